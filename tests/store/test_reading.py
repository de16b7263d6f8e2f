"""What is written is read back, by threads, forked processes and readers opened before."""

from __future__ import annotations

import os
import pickle
import shutil
import struct
import sys
import threading
from dataclasses import replace
from pathlib import Path

import google_crc32c
import numpy as np
import pytest
from counting import bytes_read, opened_below
from made_store import BAD_SAMPLE, CODES, LAYOUT, build, draw_codes, make_index, run_python

from atcache.cache.stacking import Stack
from atcache.errors import CacheMissError, ConfigError
from atcache.store.layout import COMPRESSORS, Status, StoreLayout
from atcache.store.manifest import delete_commits
from atcache.store.reader import CacheReader
from atcache.store.tables import find_bad_tar_name
from atcache.store.writer import create_cache

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
import resource, sys
from atcache.store.reader import CacheReader
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
reader = CacheReader(sys.argv[1])
reader.is_complete
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""
    assert float(run_python(code, tmp_path / "cache.zarr").stdout) < 200, "MiB"
    before = bytes_read()
    with opened_below(tmp_path) as opened:
        assert not CacheReader(tmp_path / "cache.zarr").is_complete
    assert len(opened) < 10, "it does not grow with the tasks"
    assert bytes_read() - before < 100_000


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


def test_reading_a_sample_again_opens_nothing_and_reads_its_chunks_alone(pristine):
    reader = CacheReader(pristine)
    reader.read_codes(0, 0)
    before = bytes_read()
    with opened_below(pristine) as opened:
        for _ in range(200):
            reader.read_codes(0, 0)
    assert opened == []
    chunks_nbytes = (pristine / CODES).stat().st_size - LAYOUT.codes.index_nbytes
    assert 0 < (bytes_read() - before) / 200 < 1.2 * chunks_nbytes / LAYOUT.samples_per_shard


def test_a_complete_cache_with_all_codes_needs_no_status_files(cache, tmp_path):
    whole = build(tmp_path / "whole.zarr", replace(LAYOUT, num_samples=BAD_SAMPLE))
    for path in (whole, cache):
        expected = CacheReader(path).status_VS
        shutil.rmtree(path / "views/status/c")
        found = CacheReader(path).status_VS
        assert np.array_equal(found, expected) == (path == whole), "a cache that lacks codes must look which"
    assert (expected[:, BAD_SAMPLE] == Status.UNDECODABLE).all()
    delete_commits(whole, ["v0000-b000000"])
    assert not CacheReader(whole).status_VS.any(), "it is no longer complete, so its totals say nothing"


def test_names_of_many_tars_are_checked_in_no_time():
    class Name(str):
        """Counts how often it is compared or looked for."""

        __slots__ = ()
        num_looks = 0

        def __eq__(self, other):
            Name.num_looks += 1
            return str.__eq__(self, other)

        def __hash__(self):
            Name.num_looks += 1
            return str.__hash__(self)

    names = [Name(f"n{number:08d}.tar") for number in range(2000)]
    assert find_bad_tar_name(names) is None
    assert find_bad_tar_name([*names, names[7]]) == names[7]
    assert 0 < Name.num_looks < 40 * len(names), "once each name was compared with all before it"


def test_a_big_endian_machine_is_refused_in_one_sentence(cache, tmp_path, monkeypatch):
    reader = CacheReader(cache)
    monkeypatch.setattr(sys, "byteorder", "big")
    with pytest.raises(ConfigError, match="this machine is big-endian"):
        CacheReader(cache)
    with pytest.raises(ConfigError, match="this machine is big-endian"):
        create_cache(tmp_path / "new.zarr", reader.layout, {}, reader.samples, {})
    assert not (tmp_path / "new.zarr").exists()
