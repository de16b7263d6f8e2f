"""Nothing half-written is seen, and order, kills and repeats do not change a byte."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from made_store import LAYOUT, all_bytes, draw_codes, make_index, run_python, write_task

from atcache.errors import CacheMismatchError, CacheMissError, ConfigError, DiskFullError
from atcache.files.writers import LOCK, only_writer, sweep_partials
from atcache.store.layout import Status
from atcache.store.manifest import commit_path, read_commits, summarise_commits
from atcache.store.reader import CacheReader
from atcache.store.writer import TaskWriter, create_cache, encode_view, finish_cache, new_cache_folder

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
    with pytest.raises(
        CacheMissError, match=r"pending\. Run the same `atcache build` or `atcache pull` command again to continue"
    ):
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
    with pytest.raises(CacheMismatchError, match=r"cache\.zarr exists already: give another path, or run"):
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
    with pytest.raises(ValueError, match="expected pixels if it is STORED and"):
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
    assert "What was stored before is valid. Free some space and run the same command again" in result.stdout
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


# One writer at a time


def test_a_cache_has_one_writer_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr("atcache.files.writers._SECONDS_TO_WAIT", 0.3)
    program = (
        "import sys, time\nfrom atcache.files.writers import only_writer\n"
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


def test_a_file_is_locked_because_network_disks_lock_no_folders_and_it_is_removed(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    for end in ("usual", "killed before"):
        if end == "killed before":
            (folder / LOCK).touch()
        with only_writer(folder), (folder / LOCK).open("r+") as file:
            with pytest.raises(BlockingIOError):
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            folder = folder.rename(folder.with_name(f"renamed after {end}"))
        assert list(folder.iterdir()) == []


def test_a_lock_file_that_leads_elsewhere_is_not_followed(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / LOCK).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="symbolic links"), only_writer(tmp_path / "folder"):
        pass
    assert not (tmp_path / "elsewhere").exists()


def test_a_new_folder_is_durable_and_shards_of_other_caches_are_not_synced_again(tmp_path, monkeypatch):
    synced, real = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda descriptor: (synced.append(os.fstat(descriptor).st_ino), real(descriptor)))
    (tmp_path / "shard").touch()
    with new_cache_folder(tmp_path / "out.zarr") as temp:
        (temp / "c/0").mkdir(parents=True)
        (temp / "c/0/linked").hardlink_to(tmp_path / "shard")
        (temp / "c/0/own").touch()
    out = tmp_path / "out.zarr"
    assert {path.stat().st_ino for path in (tmp_path, out, out / "c", out / "c/0", out / "c/0/own")} <= set(synced)
    assert (tmp_path / "shard").stat().st_ino not in synced


def test_a_cache_that_another_process_is_making_is_not_swept(tmp_path):
    program = (
        "import sys, time\nfrom pathlib import Path\nfrom atcache.store.writer import new_cache_folder\n"
        "with new_cache_folder(Path(sys.argv[1])) as temp:\n"
        "    (temp / 'file').touch()\n    print('filling', flush=True)\n    sys.stdin.readline()\n"
    )
    out = tmp_path / "out.zarr"
    command = [sys.executable, "-c", program, str(out)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "filling\n"
        assert sweep_partials(out) == 0
        other.communicate("go on\n")
    assert [path.name for path in tmp_path.iterdir()] == ["out.zarr"]
    assert [path.name for path in out.iterdir()] == ["file"]
    with subprocess.Popen([*command[:-1], str(tmp_path / "b")], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"filling\n"
        other.kill()
    assert sweep_partials(tmp_path / "b") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["out.zarr"]


def test_a_writer_that_has_ended_leaves_no_lock_with_the_workers_it_forked(tmp_path, monkeypatch):
    monkeypatch.setattr("atcache.files.writers._SECONDS_TO_WAIT", 0.3)
    program = (
        "import os, sys, time\nfrom atcache.files.writers import only_writer\n"
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
