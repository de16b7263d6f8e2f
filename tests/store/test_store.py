"""The store: what is written is read back, nothing half-written is seen, every damaged byte is noticed."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import google_crc32c
import numpy as np
import pytest
from numcodecs import blosc, zstd

from atcache.cache.stacking import Stack
from atcache.errors import CacheMismatchError, CacheMissError, ConfigError, CorruptCacheError, DiskFullError
from atcache.files.durable import only_writer, sweep_partials
from atcache.images.source import SampleIndex
from atcache.store.layout import COMPRESSORS, Status, StoreLayout
from atcache.store.manifest import check_commit, commit_path, read_commits, summarise_commits
from atcache.store.reader import CacheReader
from atcache.store.writer import TaskWriter, create_cache, encode_pixels, encode_view, finish_cache

BAD_SAMPLE = 7
LAYOUT = StoreLayout(
    num_views=2,
    num_samples=10,
    num_layers=4,
    num_tokens=5,
    num_components=24,
    codes_dtype="int8",
    samples_per_shard=4,
    layers_per_chunk=2,
    parameter_names=("top", "left"),
    pixels=(6, 7),
)
CODES = "attention/codes/c/0/0/0/0/0"
SHARDS = [CODES, "pixels/rgb/c/0/0/0/0/0", "views/parameters/c/0/0/0", "views/pixel_hash/c/0/0", "views/status/c/0/0"]


def make_index(num_samples):
    return SampleIndex(
        tars=(Path("/data/a.tar"), Path("/data/b.tar")),
        tar_nbytes=(10_240, 20_480),
        keys_S=np.array([f"dir/ключ-{sample}".encode() for sample in range(num_samples)]),
        tar_S=(np.arange(num_samples) % 2).astype(np.int32),
        offset_S=np.arange(num_samples, dtype=np.int64) * 512,
        nbytes_S=np.arange(num_samples, dtype=np.int64) + 2**40,
        label_S=np.arange(num_samples, dtype=np.int64) - 1,
        problem_S=np.where(np.arange(num_samples) == BAD_SAMPLE, 6, 0).astype(np.uint8),
    )


@lru_cache
def draw_codes(layout):
    """All codes and pixels of a cache: random integers, seeded."""
    rng = np.random.default_rng(0)
    info = np.iinfo(layout.codes_dtype)
    codes = rng.integers(info.min // 8, info.max // 8, layout.codes.shape).astype(layout.codes_dtype)
    return codes, rng.integers(0, 255, (layout.num_views, layout.num_samples, 6, 7, 3)).astype(np.uint8)


def write_task(path, layout, task, *, stop=None):
    """Write a task; with `stop`, leave off before that sample, without commit."""
    codes, pixels = draw_codes(layout)
    writer = TaskWriter(path, layout, task)
    for sample in range(task.start, task.stop):
        if sample == stop:
            writer.abort()
            return
        if sample == BAD_SAMPLE:
            writer.add(sample, status=Status.UNDECODABLE)
            continue
        writer.add(
            sample,
            status=Status.STORED,
            parameters_P=np.array([sample, -task.view], np.float32),
            pixel_hash=2**64 - 1 - sample,
            chunks=encode_view(layout, codes[task.view, sample]),
            pixels_chunk=encode_pixels(layout, pixels[task.view, sample]) if layout.pixels else None,
        )
    writer.commit({"row_kl_nats": 0.25 * (task.block + 1)})


def build(path, layout=LAYOUT, *, finish=True):
    state = {"steps": np.linspace(0, 1, 12, dtype=np.float32).reshape(4, 3), "slope": np.float32(2.5).reshape(())}
    bias_LHQK = np.arange(4 * 2 * 5 * 5, dtype=np.float32).reshape(4, 2, 5, 5)
    create_cache(path, layout, {"teacher": "tiny"}, make_index(layout.num_samples), state, bias_LHQK)
    for task in layout.tasks():
        write_task(path, layout, task)
    if finish:
        finish_cache(path)
    return path


def all_bytes(folder):
    return {file.relative_to(folder): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def run_python(code, *arguments, **options):
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        **options,
    )


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    return build(tmp_path_factory.mktemp("pristine") / "cache.zarr")


@pytest.fixture
def cache(pristine, tmp_path):
    """A copy that a test may damage."""
    return Path(shutil.copytree(pristine, tmp_path / "cache.zarr"))


# Reading back


@pytest.mark.parametrize("compressor", COMPRESSORS)
@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "int32"])
def test_codes_and_pixels_come_back_as_written(tmp_path, dtype, compressor):
    layout = replace(LAYOUT, codes_dtype=dtype, compressor=compressor)
    reader = CacheReader(build(tmp_path / "cache.zarr", layout))
    codes, pixels = draw_codes(layout)
    for view in range(2):
        for sample in set(range(10)) - {BAD_SAMPLE}:
            assert np.array_equal(reader.read_codes(view, sample), codes[view, sample])
            assert np.array_equal(reader.read_pixels(view, sample), pixels[view, sample])
    assert reader.read_codes(0, 0).dtype == dtype


def test_any_range_of_layers_comes_back(pristine):
    reader, (codes, _) = CacheReader(pristine), draw_codes(LAYOUT)
    for start in range(4):
        for stop in range(start + 1, 5):
            assert np.array_equal(reader.read_codes(1, 3, slice(start, stop)), codes[1, 3, start:stop])


def test_transposed_codes_stay_in_the_order_they_are_stored_in(tmp_path):
    """Also in a batch: a copy that only reorders integers would cost as much as reading them."""
    layout = replace(LAYOUT, codes_dtype="int16", compressor="transpose-blosc-zstd-shuffle")
    reader, (codes, _) = CacheReader(build(tmp_path / "cache.zarr", layout)), draw_codes(layout)
    stack = Stack(2)
    for sample in (0, 1):
        stack.add(reader.read_codes(0, sample, slice(1, 3)))
    batch = stack.tensor.numpy()
    assert np.array_equal(batch, codes[0, :2, 1:3])
    assert batch.swapaxes(2, 3).flags.c_contiguous


@pytest.mark.parametrize("layers", [slice(0, 4, 2), slice(3, 3)])
def test_a_range_of_layers_with_steps_or_nothing_in_it_is_refused(pristine, layers):
    with pytest.raises(ConfigError, match="expected a range without step within 4 layers"):
        CacheReader(pristine).read_codes(0, 0, layers)


def test_view_records_come_back(pristine):
    reader = CacheReader(pristine)
    assert reader.parameters(1, 9).tolist() == [9.0, -1.0]
    assert reader.pixel_hash(1, 9) == 2**64 - 10
    assert reader.status(0, 3) == Status.STORED
    assert reader.status_VS.tolist() == [[1] * 7 + [6, 1, 1]] * 2
    assert (reader.parameters(0, BAD_SAMPLE) == 0).all()
    assert reader.pixel_hash(0, BAD_SAMPLE) == 0


def test_the_sample_table_comes_back_with_the_same_fingerprint(pristine):
    index, read = make_index(10), CacheReader(pristine).samples
    assert read.fingerprint == index.fingerprint
    assert read.tars == index.tars
    assert read.tar_nbytes == index.tar_nbytes
    assert read.sample_key(3) == "b.tar/dir/ключ-3"
    for name in ("keys_S", "tar_S", "offset_S", "nbytes_S", "label_S", "problem_S"):
        assert np.array_equal(getattr(read, name), getattr(index, name)), name
        assert getattr(read, name).dtype == getattr(index, name).dtype, name


def test_a_sample_table_of_many_chunks_comes_back(tmp_path):
    layout = replace(LAYOUT, num_samples=150_000, samples_per_shard=50_000, num_views=1, pixels=None)
    create_cache(tmp_path / "cache.zarr", layout, {}, make_index(150_000), {})
    assert CacheReader(tmp_path / "cache.zarr").samples.fingerprint == make_index(150_000).fingerprint


def test_state_and_bias_come_back(pristine):
    reader = CacheReader(pristine)
    assert reader.state["steps"].tolist() == np.linspace(0, 1, 12, dtype=np.float32).reshape(4, 3).tolist()
    assert reader.state["slope"].shape == ()
    assert reader.state["slope"] == 2.5
    assert reader.bias_LHQK is not None
    assert reader.bias_LHQK[3, 1, 4, 4] == 199


def test_a_bad_sample_is_a_miss_that_says_why(pristine):
    with pytest.raises(CacheMissError, match=r"view 1 of sample 7 \('b.tar/dir/ключ-7'\) is not stored in .*: undeco"):
        CacheReader(pristine).read_codes(1, BAD_SAMPLE)
    with pytest.raises(CacheMissError, match=r"undecodable\.$"):
        CacheReader(pristine).read_pixels(0, BAD_SAMPLE)


@pytest.mark.parametrize(
    ("view", "sample", "message"),
    [
        (2, 0, "view 2 is not in .*: it has views 0 to 1"),
        (-1, 0, "view -1"),
        (0, 10, "sample 10 is not in .*: it has samples 0 to 9"),
        (0, -1, "sample -1"),
    ],
)
def test_places_outside_of_the_cache_are_misses(pristine, view, sample, message):
    reader = CacheReader(pristine)
    for read in (reader.read_codes, reader.read_pixels, reader.parameters, reader.pixel_hash, reader.status):
        with pytest.raises(CacheMissError, match=message):
            read(view, sample)


def test_a_cache_without_pixels_says_so(tmp_path):
    reader = CacheReader(build(tmp_path / "cache.zarr", replace(LAYOUT, pixels=None)))
    with pytest.raises(CacheMissError, match="stores no pixels; views are replayed from the tars"):
        reader.read_pixels(0, 0)


# Sharing a reader


def test_a_pickled_reader_reads(pristine):
    reader = CacheReader(pristine)
    reader.read_codes(0, 0)
    copy = pickle.loads(pickle.dumps(reader))
    assert np.array_equal(copy.read_codes(0, 5), reader.read_codes(0, 5))


def test_threads_share_a_reader_whose_shards_are_evicted_meanwhile(tmp_path, monkeypatch):
    monkeypatch.setattr("atcache.store.open_shards.MAX_OPEN_SHARDS", 2)
    layout = replace(LAYOUT, samples_per_shard=1, num_views=1)
    reader, (codes, _) = CacheReader(build(tmp_path / "cache.zarr", layout)), draw_codes(layout)
    samples = [sample for sample in range(10) if sample != BAD_SAMPLE]
    wrong: list[int] = []

    def read(seed):
        for sample in np.random.default_rng(seed).choice(samples, 200):
            if not np.array_equal(reader.read_codes(0, int(sample)), codes[0, sample]):
                wrong.append(int(sample))

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_open_files_are_bounded_and_closed(tmp_path, monkeypatch):
    monkeypatch.setattr("atcache.store.open_shards.MAX_OPEN_SHARDS", 5)
    layout = replace(LAYOUT, samples_per_shard=1, num_samples=20, num_views=1, pixels=None)
    reader = CacheReader(build(tmp_path / "cache.zarr", layout))
    descriptors = Path("/proc/self/fd")
    before = len(list(descriptors.iterdir()))
    for sample in range(20):
        if sample != BAD_SAMPLE:
            reader.read_codes(0, sample)
    assert len(list(descriptors.iterdir())) - before == 5
    del reader
    assert len(list(descriptors.iterdir())) == before


def test_a_view_is_one_pread_of_codes_and_one_of_pixels(tmp_path, monkeypatch):
    reader, preads = CacheReader(build(tmp_path / "cache.zarr")), []
    pread = os.pread
    for sample in (0, 9):
        reader.read_codes(1, sample)  # opens the shards, which reads their indexes
        reader.read_pixels(1, sample)
    monkeypatch.setattr(os, "pread", lambda fd, nbytes, offset: preads.append(nbytes) or pread(fd, nbytes, offset))
    for sample in (0, 9, 1):
        codes_LTC, pixels_HWC = reader.read_codes(1, sample), reader.read_pixels(1, sample)
        assert codes_LTC.shape[0] // reader.layout.layers_per_chunk > 1
        assert pixels_HWC.shape == (6, 7, 3)
    assert len(preads) == 6


def test_a_forked_process_reads_with_what_its_parent_opened(pristine):
    code = """
import os, sys
from atcache.store.reader import CacheReader
reader = CacheReader(sys.argv[1])
expected = reader.read_codes(0, 5).tobytes()
child = os.fork()
if child == 0:
    os._exit(0 if reader.read_codes(0, 5).tobytes() == expected and reader.status(0, 7) == 6 else 1)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    result = run_python(code, pristine)
    assert result.returncode == 0, result.stderr


def test_reading_imports_neither_zarr_nor_torch(pristine):
    code = """
import sys
from atcache.store.reader import CacheReader
reader = CacheReader(sys.argv[1])
reader.read_codes(0, 0), reader.read_pixels(0, 0), reader.samples, reader.state, reader.status_VS
loaded = {"zarr", "torch", "dask"} & set(sys.modules)
sys.exit(f"loaded {loaded}" if loaded else 0)
"""
    result = run_python(code, pristine)
    assert result.returncode == 0, result.stderr


def test_opening_a_cache_of_imagenet_size_is_cheap(tmp_path):
    layout = StoreLayout(
        num_views=1,
        num_samples=1_300_000,
        num_layers=24,
        num_tokens=197,
        num_components=2 * 16 * 66,
        codes_dtype="int8",
        samples_per_shard=128,
        layers_per_chunk=1,
        parameter_names=tuple(f"p{number}" for number in range(18)),
    )
    create_cache(tmp_path / "cache.zarr", layout, {}, make_index(1_300_000), {})
    code = """
import resource, sys, time
from atcache.store.reader import CacheReader
start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
reader = CacheReader(sys.argv[1])
reader.is_complete
print(time.perf_counter() - start, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""
    seconds, mebibytes = map(float, run_python(code, tmp_path / "cache.zarr").stdout.split())
    assert seconds < 0.3
    assert mebibytes < 200


# Writing


def test_order_kills_and_repeats_do_not_change_a_byte(pristine, tmp_path):
    again = tmp_path / "cache.zarr"
    build_order = LAYOUT.tasks()[::-1]
    state = {"steps": np.linspace(0, 1, 12, dtype=np.float32).reshape(4, 3), "slope": np.float32(2.5).reshape(())}
    bias_LHQK = np.arange(4 * 2 * 5 * 5, dtype=np.float32).reshape(4, 2, 5, 5)
    create_cache(again, LAYOUT, {"teacher": "tiny"}, make_index(10), state, bias_LHQK)
    for task in build_order:
        write_task(again, LAYOUT, task, stop=task.start + 1)
        write_task(again, LAYOUT, task)
        write_task(again, LAYOUT, task)
    finish_cache(again)
    assert all_bytes(again) == all_bytes(pristine)


def test_finishing_twice_changes_nothing_and_gives_the_totals(cache):
    before = all_bytes(cache)
    complete = finish_cache(cache)
    assert all_bytes(cache) == before
    sizes = {
        (spec.name, task.name): (cache / spec.shard_file(task)).stat().st_size
        for spec in LAYOUT.arrays()
        for task in LAYOUT.tasks()
    }
    assert complete["nbytes"] == sum(sizes.values())
    assert complete["codes_nbytes"] == sum(size for (name, _), size in sizes.items() if name == "attention/codes")
    assert complete["num_tasks"] == 6
    assert "num_checked" not in complete, "these records do not say"
    assert (complete["num_stored"], complete["num_bad"]) == (18, 2)
    # Blocks of 4, 3 (one is bad) and 2 samples with 0.25, 0.5 and 0.75.
    assert complete["quality"] == {"row_kl_nats": {"mean": (4 * 0.25 + 3 * 0.5 + 2 * 0.75) / 9, "max": 0.75}}


def test_the_mean_is_weighted_by_the_views_that_were_looked_at(cache):
    commits = [
        replace(commit, quality={"row_kl_nats": nats}, num_checked=num_checked)
        for commit, nats, num_checked in zip(read_commits(cache).values(), (0.1, 0.2, 0.9), (4, 4, 1), strict=False)
    ]
    said = summarise_commits(commits)
    assert said["num_checked"] == 9
    assert said["quality"]["row_kl_nats"]["mean"] == pytest.approx((4 * 0.1 + 4 * 0.2 + 0.9) / 9)
    unsaid = summarise_commits([*commits[:2], replace(commits[2], num_checked=None)])
    assert unsaid["quality"]["row_kl_nats"]["mean"] == pytest.approx((4 * 0.1 + 3 * 0.2 + 2 * 0.9) / 9)


def test_an_unfinished_cache_says_what_is_missing(tmp_path):
    create_cache(tmp_path / "cache.zarr", LAYOUT, {}, make_index(10), {})
    for task in LAYOUT.tasks()[:4]:
        write_task(tmp_path / "cache.zarr", LAYOUT, task)
    reader = CacheReader(tmp_path / "cache.zarr")
    assert not reader.is_complete
    assert [task.name for task in reader.missing_tasks()] == ["v0001-b000001", "v0001-b000002"]
    assert reader.status_VS[1].tolist() == [1] * 4 + [0] * 6
    assert reader.read_codes(1, 3).shape == (4, 5, 24)
    with pytest.raises(CacheMissError, match=r"pending\. Run the same `atcache build` command again to continue"):
        reader.read_codes(1, 4)
    with pytest.raises(CacheMissError, match=r"lacks 2 of 6 tasks, the first is v0001-b000001\. Run the same"):
        finish_cache(tmp_path / "cache.zarr")


def test_a_task_shows_up_in_a_reader_that_was_open_before(tmp_path):
    create_cache(tmp_path / "cache.zarr", LAYOUT, {}, make_index(10), {})
    reader = CacheReader(tmp_path / "cache.zarr")
    assert reader.status(0, 0) == Status.PENDING
    write_task(tmp_path / "cache.zarr", LAYOUT, LAYOUT.tasks()[0])
    assert reader.status(0, 0) == Status.STORED
    assert np.array_equal(reader.read_codes(0, 0), draw_codes(LAYOUT)[0][0, 0])


def test_deleting_a_commit_record_makes_a_complete_cache_incomplete(cache):
    assert CacheReader(cache).is_complete
    commit_path(cache, LAYOUT.tasks()[1]).unlink()
    assert not CacheReader(cache).is_complete
    assert CacheReader(cache).missing_tasks() == [LAYOUT.tasks()[1]]


def test_creating_over_something_is_refused_and_leaves_it(tmp_path):
    (tmp_path / "cache.zarr").mkdir()
    (tmp_path / "cache.zarr" / "thesis.txt").write_text("important")
    with pytest.raises(CacheMismatchError, match=r"cache\.zarr exists already: give another path; or where"):
        create_cache(tmp_path / "cache.zarr", LAYOUT, {}, make_index(10), {})
    assert [file.name for file in (tmp_path / "cache.zarr").iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"index": make_index(9)}, "the layout is for 10 samples, the source has 9"),
        ({"attributes": {"layout": {}}}, "attributes layout are written by the store"),
        ({"state": {"../evil": np.zeros(1, np.float32)}}, r"codec state '\.\./evil' cannot be stored"),
        ({"state": {"steps": np.zeros(1)}}, "codec state 'steps' is float64; a cache holds float32"),
        (
            {"index": replace(make_index(10), tars=(Path("/data/a.tar"), Path("/other/a.tar")))},
            r"tar name 'a\.tar' cannot be stored; expected plain, different file names",
        ),
        ({"index": replace(make_index(10), keys_S=np.array([b"k"] * 10, "S5000"))}, "a sample key has 5000 bytes"),
    ],
)
def test_a_creation_that_fails_leaves_nothing(tmp_path, change, message):
    arguments = {"attributes": {}, "index": make_index(10), "state": {}, **change}
    with pytest.raises(ConfigError, match=message):
        create_cache(tmp_path / "cache.zarr", LAYOUT, **arguments)
    assert list(tmp_path.iterdir()) == []


def test_samples_out_of_order_or_incomplete_are_our_own_mistakes(tmp_path):
    create_cache(tmp_path / "cache.zarr", LAYOUT, {}, make_index(10), {})
    task = LAYOUT.tasks()[0]
    chunks = encode_view(LAYOUT, np.zeros((4, 5, 24), np.int8))
    writer = TaskWriter(tmp_path / "cache.zarr", LAYOUT, task)
    with pytest.raises(ValueError, match=r"sample 1 added to task v0000-b000000, expected 0"):
        writer.add(1, status=2)
    with pytest.raises(ValueError, match="status PENDING"):
        writer.add(0, status=0)
    with pytest.raises(ValueError, match="comes with none chunks of 2"):
        writer.add(0, status=1)
    with pytest.raises(ValueError, match="comes with 2 chunks"):
        writer.add(0, status=6, chunks=chunks)
    with pytest.raises(ValueError, match="pixels are given or missing"):
        writer.add(0, status=1, chunks=chunks)
    writer.add(0, status=2)
    with pytest.raises(ValueError, match="ends at sample 4, added up to 1"):
        writer.commit()
    writer.abort()
    with pytest.raises(ValueError, match=r"holds int8, got float64"):
        encode_view(LAYOUT, np.zeros((4, 5, 24)))
    with pytest.raises(ValueError, match=r"has shape \(1, 1, 2, 5, 24\), got \(2, 5, 23\)"):
        encode_view(LAYOUT, np.zeros((4, 5, 23), np.int8))
    assert not list((tmp_path / "cache.zarr").rglob("*.partial"))


def test_a_task_left_without_commit_leaves_no_files(tmp_path):
    create_cache(tmp_path / "cache.zarr", LAYOUT, {}, make_index(10), {})
    before = all_bytes(tmp_path / "cache.zarr")
    write_task(tmp_path / "cache.zarr", LAYOUT, LAYOUT.tasks()[0], stop=2)
    assert all_bytes(tmp_path / "cache.zarr") == before


def test_a_full_disk_is_a_sentence_and_leaves_no_temp_file(tmp_path):
    """The limit on file sizes stands in for a full disk: the system refuses to write in the middle of a shard."""
    create_cache(tmp_path / "cache.zarr", replace(LAYOUT, num_tokens=2000), {}, make_index(10), {})
    code = """
import resource, sys
import numpy as np
from atcache.errors import DiskFullError
from atcache.store.reader import CacheReader
from atcache.store.writer import TaskWriter, encode_view, encode_pixels
layout = CacheReader(sys.argv[1]).layout
task = layout.tasks()[0]
rng = np.random.default_rng(0)
chunks = encode_view(layout, rng.integers(-128, 127, (4, 2000, 24)).astype(np.int8))
pixels = encode_pixels(layout, np.zeros((6, 7, 3), np.uint8))
resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))
writer = TaskWriter(sys.argv[1], layout, task)
try:
    for sample in range(task.start, task.stop):
        writer.add(sample, status=1, chunks=chunks, pixels_chunk=pixels)
    writer.commit()
except DiskFullError as error:
    writer.abort()
    print(error)
"""
    result = run_python(code, tmp_path / "cache.zarr")
    assert "What was stored before is valid; make room and run the same command again" in result.stdout
    assert not list(tmp_path.rglob("*.partial"))
    assert issubclass(DiskFullError, OSError)


def test_a_writer_killed_in_mid_write_leaves_a_readable_cache(tmp_path):
    cache = tmp_path / "cache.zarr"
    create_cache(cache, LAYOUT, {}, make_index(10), {})
    write_task(cache, LAYOUT, LAYOUT.tasks()[0])
    code = """
import sys, time
import numpy as np
from atcache.store.reader import CacheReader
from atcache.store.writer import TaskWriter, encode_view, encode_pixels
layout = CacheReader(sys.argv[1]).layout
writer = TaskWriter(sys.argv[1], layout, layout.tasks()[1])
chunks = encode_view(layout, np.zeros((4, 5, 24), np.int8))
pixels = encode_pixels(layout, np.zeros((6, 7, 3), np.uint8))
writer.add(4, status=1, chunks=chunks, pixels_chunk=pixels)
print("writing", flush=True)
time.sleep(60)
"""
    process = subprocess.Popen([sys.executable, "-c", code, str(cache)], stdout=subprocess.PIPE, text=True)
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == "writing\n"
        process.send_signal(signal.SIGKILL)
    partials = list(cache.rglob("*.partial"))
    assert len(partials) == len(LAYOUT.arrays())
    assert not (cache / "attention/codes/c/0/1/0/0/0").exists()
    assert CacheReader(cache).read_codes(0, 3).shape == (4, 5, 24)
    (cache / "somebody-elses.partial").write_text("not ours")
    (tmp_path / ".cache.zarr.0123456789abcdef.partial").mkdir()
    assert sweep_partials(cache) == len(partials) + 1
    assert [file.name for file in tmp_path.rglob("*.partial")] == ["somebody-elses.partial"]
    write_task(cache, LAYOUT, LAYOUT.tasks()[1])
    assert np.array_equal(CacheReader(cache).read_codes(0, 4), draw_codes(LAYOUT)[0][0, 4])


def test_a_task_written_again_is_not_vouched_for_by_its_old_record(cache):
    """Killed between the new shards and the new record: the task must count as not done."""
    task = LAYOUT.tasks()[0]
    script = """
import os, sys
import numpy as np
from atcache.store import shard_file
from atcache.store.reader import CacheReader
from atcache.store.writer import TaskWriter
layout = CacheReader(sys.argv[1]).layout
place, num_placed = shard_file.ShardFile.place, 0
def place_and_die(self):
    place(self)
    os.kill(os.getpid(), 9)
shard_file.ShardFile.place = place_and_die
writer = TaskWriter(sys.argv[1], layout, layout.tasks()[0])
for sample in range(4):
    writer.add(sample, status=2)
writer.commit()
"""
    assert run_python(script, cache).returncode == -signal.SIGKILL
    assert task.name not in read_commits(cache)
    assert CacheReader(cache).missing_tasks() == [task]


# Damage


def damage_and_read(cache):
    """Read all that shard 0 of view 0 holds."""
    reader = CacheReader(cache)
    for sample in range(4):
        reader.read_codes(0, sample)
        reader.read_pixels(0, sample)
        reader.parameters(0, sample)
        reader.pixel_hash(0, sample)
        reader.status(0, sample)


@pytest.mark.parametrize("shard", SHARDS)
@pytest.mark.parametrize("place", [0, 20, -1, -5, -17])
def test_every_flipped_byte_of_chunks_and_index_is_noticed(cache, shard, place):
    data = bytearray((cache / shard).read_bytes())
    data[place] ^= 0x10
    (cache / shard).write_bytes(data)
    with pytest.raises(
        CorruptCacheError, match=rf"{shard}.* is damaged: .*Delete .*commits/v0000-b000000\.json and run"
    ):
        damage_and_read(cache)
    commit = read_commits(cache)["v0000-b000000"]
    assert len(check_commit(cache, commit, LAYOUT, deep=True)) == 1


@pytest.mark.parametrize("shard", SHARDS)
@pytest.mark.parametrize("keep", [0, 3, 0.5, -1])
def test_every_truncation_is_noticed(cache, shard, keep):
    data = (cache / shard).read_bytes()
    (cache / shard).write_bytes(data[: int(len(data) * keep) if isinstance(keep, float) else keep])
    with pytest.raises(CorruptCacheError, match=rf"{shard}.* is damaged"):
        damage_and_read(cache)
    problems = check_commit(cache, read_commits(cache)["v0000-b000000"], LAYOUT)
    assert len(problems) == 1
    assert "bytes" in problems[0]
    with pytest.raises(CorruptCacheError, match="only this task is redone"):
        finish_cache(cache)


@pytest.mark.parametrize("shard", SHARDS)
def test_a_lost_shard_is_damage_not_a_miss(cache, shard):
    (cache / shard).unlink()
    if shard.startswith("views/status"):
        assert CacheReader(cache).read_codes(0, 0).shape == (4, 5, 24)
    else:
        with pytest.raises(CorruptCacheError, match=r"damaged: it lacks sample 0, which was committed"):
            damage_and_read(cache)
    assert check_commit(cache, read_commits(cache)["v0000-b000000"], LAYOUT) == [
        f"{cache / shard} cannot be read: No such file or directory."
    ]


def test_a_shard_swapped_for_another_of_equal_size_is_noticed_by_a_deep_check(tmp_path):
    """Each is valid in itself: only the committed checksum of the whole file can tell."""
    layout = replace(LAYOUT, num_views=1, num_samples=8, pixels=None)
    cache = build(tmp_path / "cache.zarr", layout)
    one, other = (cache / layout.pixel_hash.shard_file(task) for task in layout.tasks())
    assert one.stat().st_size == other.stat().st_size
    one.write_bytes(other.read_bytes())
    commit = read_commits(cache)["v0000-b000000"]
    assert check_commit(cache, commit, layout) == []
    assert check_commit(cache, commit, layout, deep=True) == [
        f"{one} is damaged: its checksum is not the committed one."
    ]


def test_every_bit_of_a_shard_counts(tmp_path):
    """Exhaustive on one small shard of codes."""
    layout = replace(LAYOUT, num_views=1, num_samples=2, samples_per_shard=2, num_components=3, pixels=None)
    cache = build(tmp_path / "cache.zarr", layout)
    whole = (cache / CODES).read_bytes()
    for place in range(len(whole)):
        data = bytearray(whole)
        data[place] ^= 1 << (place % 8)
        (cache / CODES).write_bytes(data)
        with pytest.raises(CorruptCacheError, match="is damaged"):
            [CacheReader(cache).read_codes(0, sample) for sample in range(2)]


@pytest.mark.parametrize("name", ["key", "label", "offset"])
def test_damage_in_the_sample_table_is_noticed(cache, name):
    (file,) = [file for file in (cache / "samples" / name / "c").rglob("*") if file.is_file()]
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with pytest.raises(CorruptCacheError, match=rf"samples/{name}/c/.* is damaged: its checksum does not match"):
        _ = CacheReader(cache).samples


def test_a_damaged_commit_record_names_its_file(cache):
    file = commit_path(cache, LAYOUT.tasks()[0])
    whole = json.loads(file.read_bytes())
    for text in ("", "[]", "{}", file.read_text()[:-20], json.dumps({**whole, "files": 3})):
        file.write_text(text)
        with pytest.raises(CorruptCacheError, match=r"v0000-b000000\.json is no commit record .*Delete it and run"):
            read_commits(cache)
    whole["task"]["block"] = 1
    file.write_text(json.dumps(whole))
    with pytest.raises(CorruptCacheError, match=r"v0000-b000000\.json records task v0000-b000001"):
        read_commits(cache)


def test_a_commit_record_cannot_point_out_of_the_cache(cache):
    file = commit_path(cache, LAYOUT.tasks()[0])
    whole = json.loads(file.read_bytes())
    whole["files"] = {"../../etc/passwd": {"nbytes": 1, "crc32": 1}}
    file.write_text(json.dumps(whole))
    problems = check_commit(cache, read_commits(cache)["v0000-b000000"], LAYOUT)
    assert len(problems) == 1
    assert "expected ['attention/codes/c/0/0/0/0/0'" in problems[0]


# Opening what is no cache, or a hostile one


def rewrite_root(cache, change):
    root = json.loads((cache / "zarr.json").read_bytes())
    change(root)
    (cache / "zarr.json").write_text(json.dumps(root))


def test_what_is_no_cache_is_a_miss_or_refused(tmp_path):
    with pytest.raises(CacheMissError, match=r"nothing is no cache: .*zarr\.json does not exist\. Make one with"):
        CacheReader(tmp_path / "nothing")
    (tmp_path / "zarr.json").write_text("{")
    with pytest.raises(CorruptCacheError, match=r"zarr\.json cannot be read"):
        CacheReader(tmp_path)
    for text in ("[]", "3", "{}", '{"attributes": 5}', '{"attributes": {"atcache": []}}'):
        (tmp_path / "zarr.json").write_text(text)
        with pytest.raises(CorruptCacheError, match=r"is no (Zarr group|atcache cache)"):
            CacheReader(tmp_path)


def test_another_format_number_is_refused_in_one_sentence(cache):
    rewrite_root(cache, lambda root: root["attributes"]["atcache"].update(format=2))
    with pytest.raises(CacheMismatchError, match=r"has format 2, this version of atcache reads format 1; use the"):
        CacheReader(cache)


@pytest.mark.parametrize(
    "change",
    [
        {"num_samples": -4},
        {"num_samples": 10**30},
        {"num_tokens": 10**9},
        {"layers_per_chunk": 0},
        {"samples_per_shard": "4"},
        {"codes_dtype": "float64"},
        {"pixels": [1, 2, 3]},
        {"parameter_names": 7},
    ],
)
def test_a_hostile_layout_is_refused_at_opening(cache, change):
    rewrite_root(cache, lambda root: root["attributes"]["atcache"]["layout"].update(change))
    with pytest.raises(CorruptCacheError, match=rf"the layout in .*zarr\.json cannot be used: .*{next(iter(change))}"):
        CacheReader(cache)


@pytest.mark.parametrize("name", ["../a.tar", "/etc/passwd", "..", "", "x\\y.tar", "b.tar"])
def test_tar_names_that_lead_elsewhere_are_refused(cache, name):
    file = cache / "samples" / "zarr.json"
    group = json.loads(file.read_bytes())
    group["attributes"]["tars"][0] = name
    file.write_text(json.dumps(group))
    with pytest.raises(CorruptCacheError, match=r"samples/zarr\.json lists the tar .*; expected plain, different"):
        _ = CacheReader(cache).samples


def test_a_sample_table_that_names_no_tar_is_refused(cache):
    group = json.loads((cache / "samples" / "zarr.json").read_bytes())
    for name in ("tars", "folders", "tar_nbytes"):
        group["attributes"][name].pop()
    (cache / "samples" / "zarr.json").write_text(json.dumps(group))
    with pytest.raises(CorruptCacheError, match=r"samples/tar names tar 1, the cache lists 1"):
        _ = CacheReader(cache).samples


@pytest.mark.parametrize(
    "change",
    [{"shape": [2**40, 8]}, {"shape": [-1]}, {"data_type": "object"}, {"codecs": [{"name": "bytes"}]}, {"shape": 3}],
)
def test_a_sample_table_of_absurd_shape_is_refused_before_memory_is_asked_for(cache, change):
    file = cache / "samples" / "key" / "zarr.json"
    file.write_text(json.dumps({**json.loads(file.read_bytes()), **change}))
    with pytest.raises(CorruptCacheError, match=r"samples/key/zarr\.json (describes|does not describe) an array"):
        _ = CacheReader(cache).samples


def replace_first_chunk(cache, shard, packed):
    """Put a chunk with a right checksum in front of a shard, and an index with a right checksum behind."""
    spec = {spec.name: spec for spec in LAYOUT.arrays()}[shard.partition("/c/")[0]]
    chunk = packed + struct.pack("<I", google_crc32c.value(packed))
    index = np.full((spec.num_chunks_per_shard, 2), 2**64 - 1, "<u8")
    index[:] = 0, len(chunk)
    tail = index.tobytes()
    (cache / shard).write_bytes(chunk + tail + struct.pack("<I", google_crc32c.value(tail)))


def zstd_frame_claiming(nbytes):
    return b"\x28\xb5\x2f\xfd" + bytes([0xE0]) + struct.pack("<Q", nbytes) + b"\x01\x00\x00"


def test_state_that_no_codec_has_is_refused_before_any_of_it_is_read(cache):
    folder = cache / "attention/state"
    for number in range(3):
        shutil.copytree(folder / "steps", folder / f"huge{number}")
        file = folder / f"huge{number}/zarr.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "shape": [2**26, 3]}))
        shutil.rmtree(folder / f"huge{number}/c")
    message = r"attention/state describes 5 arrays of 2\.42 GB in all; expected at most 2\.15 GB\. Restore it"
    with pytest.raises(CorruptCacheError, match=message):
        CacheReader(cache).state  # noqa: B018 - read when it is asked for


@pytest.mark.parametrize(
    ("shard", "packed", "message"),
    [
        (CODES, struct.pack("<BBBBIII", 2, 1, 0x94, 1, 2**32 - 1, 2**20, 20) + b"abcd", r"claims 4294967295 bytes of"),
        (CODES, struct.pack("<BBBBIII", 2, 1, 0x94, 1, 240, 240, 999) + b"abcd", "blosc header says 999 bytes"),
        (CODES, struct.pack("<BBBBIII", 2, 1, 0x96, 1, 240, 240, 20) + b"abcd", "contradicts itself"),
        (CODES, bytes(blosc.compress(bytes(240), b"zstd", 5, 2)) + b"x", "blosc header says"),
        (CODES, bytes(blosc.compress(bytes(239), b"zstd", 5, 2)), "claims 239 bytes of content, expected 240"),
        (CODES, struct.pack("<BBBBIII", 2, 1, 0x94, 1, 240, 240, 56) + b"\xff" * 40, "cannot be decompressed"),
        (CODES, b"abc", "too few for a blosc chunk"),
        (SHARDS[1], zstd_frame_claiming(2**60), r"claims 1152921504606846976 bytes of content, expected 126"),
        (SHARDS[1], bytes(zstd.compress(bytes(10**6), 1)), r"claims 1000000 bytes of content, expected 126"),
        (SHARDS[1], zstd_frame_claiming(126), "cannot be decompressed"),
        (SHARDS[1], b"\x28\xb5\x2f\xfd\x00\x58\x01\x00\x00", "does not tell its size"),
        (SHARDS[1], b"plain text", "is no zstd frame"),
    ],
)
def test_a_hostile_chunk_is_refused_before_it_is_decompressed(cache, shard, packed, message):
    replace_first_chunk(cache, shard, packed)
    with pytest.raises(CorruptCacheError, match=message):
        damage_and_read(cache)


@pytest.mark.parametrize(
    ("offset", "nbytes"), [(0, 2**63), (2**63, 2**63), (2**64 - 2, 10), (10**6, 10), (0, 0), (0, 2**64 - 1), (0, 4)]
)
def test_an_index_that_points_elsewhere_is_refused(cache, offset, nbytes):
    data = (cache / CODES).read_bytes()
    index = np.frombuffer(data[-LAYOUT.codes.index_nbytes : -4], "<u8").reshape(-1, 2).copy()
    index[3] = offset, nbytes
    tail = index.tobytes()
    (cache / CODES).write_bytes(
        data[: -LAYOUT.codes.index_nbytes] + tail + struct.pack("<I", google_crc32c.value(tail))
    )
    with pytest.raises(CorruptCacheError, match="its index points outside of the shard"):
        CacheReader(cache).read_codes(0, 0)


def test_chunks_in_any_order_are_read(cache):
    """The specification leaves the order of chunks open; another writer may choose another."""
    data, spec = (cache / CODES).read_bytes(), LAYOUT.codes
    index = np.frombuffer(data[-spec.index_nbytes : -4], "<u8").reshape(-1, 2).copy()
    content, gap = b"", bytes(70_000)
    for number in np.random.default_rng(1).permutation(len(index)):
        offset, nbytes = map(int, index[number])
        index[number] = len(content), nbytes
        content += data[offset : offset + nbytes] + gap
    tail = index.tobytes()
    (cache / CODES).write_bytes(content + tail + struct.pack("<I", google_crc32c.value(tail)))
    for sample in range(4):
        assert np.array_equal(CacheReader(cache).read_codes(0, sample), draw_codes(LAYOUT)[0][0, sample])


def test_reading_a_sample_takes_less_than_a_millisecond(pristine):
    reader = CacheReader(pristine)
    reader.read_codes(0, 0)
    start = time.perf_counter()
    for _ in range(200):
        reader.read_codes(0, 0)
    assert (time.perf_counter() - start) / 200 < 1e-3


def test_a_cache_has_one_writer_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr("atcache.files.durable._SECONDS_TO_WAIT", 0.3)
    program = (
        "import sys, time\nfrom atcache.files.durable import only_writer\n"
        "with only_writer(sys.argv[1]):\n    print('locked', flush=True)\n    time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "locked\n"
        with (
            pytest.raises(ConfigError, match=r"another process is writing .*give another --out"),
            only_writer(tmp_path),
        ):
            pass
        other.kill()
    with only_writer(tmp_path):  # a killed writer leaves nothing locked
        pass


def test_a_writer_that_has_ended_leaves_no_lock_with_the_workers_it_forked(tmp_path, monkeypatch):
    monkeypatch.setattr("atcache.files.durable._SECONDS_TO_WAIT", 0.3)
    program = (
        "import os, sys, time\nfrom atcache.files.durable import only_writer\n"
        "with only_writer(sys.argv[1]):\n    child = os.fork()\n    if child == 0:\n        time.sleep(60)\n"
        "print(child, flush=True)\ntime.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        worker = int(other.stdout.readline())
        try:
            os.kill(worker, 0)  # the worker is there, with the descriptor it inherited
            with only_writer(tmp_path):
                pass
        finally:
            os.kill(worker, signal.SIGKILL)
            other.kill()
