"""What cannot be read now is not taken for damage or for missing, and a damaged record enters no total."""

from __future__ import annotations

import errno
import json
import os
import resource
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import replace

import pytest
from made_store import CODES, LAYOUT, build, write_task

from atcache.errors import AtcacheError, CorruptCacheError
from atcache.files.durable import encode_json
from atcache.files.ranges import list_files
from atcache.store.committed import check_commits
from atcache.store.growth import GROWTH, read_growth
from atcache.store.manifest import (
    check_commit,
    commit_path,
    delete_commits,
    list_commits,
    read_commit,
    read_commits,
    summarise_commits,
)
from atcache.store.metadata import seal
from atcache.store.records import RecordFile, read_record
from atcache.store.writer import TaskWriter, finish_cache

JOINED = replace(LAYOUT, samples_per_shard=1, records_per_file=4)
TASK = LAYOUT.tasks()[0]


@contextmanager
def no_more_files():
    """This process may open no more files meanwhile."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    spare = os.open("/", os.O_RDONLY)
    os.close(spare)  # the number that the next file would get
    resource.setrlimit(resource.RLIMIT_NOFILE, (spare, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def failing(monkeypatch, function, number, name):
    """Let a function of the operating system fail where a path ends in `name`."""
    real = getattr(os, function)

    def fail(path, *arguments, **options):
        if str(path).endswith(name):
            raise OSError(number, os.strerror(number), str(path))
        return real(path, *arguments, **options)

    monkeypatch.setattr(os, function, fail)


def change_record(cache, *, is_sealed=True, **members):
    file = commit_path(cache, TASK)
    changed = {**json.loads(file.read_bytes()), **members}
    # `allow_nan`, which `encode_json` does not, is what a hostile writer has.
    file.write_text(json.dumps(seal(changed) if is_sealed else changed))


# What cannot be read now


def test_too_many_open_files_are_no_damage(cache):
    commit = read_commit(cache, TASK.name)
    for read in (
        lambda: check_commit(cache, commit, LAYOUT, deep=True),
        lambda: read_record(cache, TASK.name, LAYOUT),
        lambda: list_files(cache),
        lambda: read_growth(cache),
        lambda: delete_commits(cache, [TASK.name]),
    ):
        message = r"cannot be read: Too many open files\. It may be whole"
        with pytest.raises(AtcacheError, match=message) as caught, no_more_files():
            read()
        assert not isinstance(caught.value, CorruptCacheError)
    assert len(list_commits(cache)) == LAYOUT.num_tasks


@pytest.mark.parametrize("number", [errno.EACCES, errno.ENOMEM, errno.ESTALE, errno.ETIMEDOUT])
def test_other_errors_that_pass_are_no_damage(cache, monkeypatch, number):
    commit = read_commit(cache, TASK.name)
    failing(monkeypatch, "open", number, CODES)
    with pytest.raises(AtcacheError, match=rf"{CODES} cannot be read: {os.strerror(number)}"):
        check_commit(cache, commit, LAYOUT)
    failing(monkeypatch, "open", number, f"{TASK.name}.json")
    with pytest.raises(AtcacheError, match=rf"{TASK.name}\.json cannot be read: {os.strerror(number)}"):
        read_commits(cache)


def test_a_bad_disk_a_folder_and_a_loop_of_links_are_damage(cache, monkeypatch):
    commit = read_commit(cache, TASK.name)
    file = cache / CODES
    file.unlink()
    for make, reason in (
        (lambda: file.mkdir(), "Is a directory"),
        (lambda: (file.rmdir(), file.symlink_to(file)), "Too many levels of symbolic links"),
    ):
        make()
        assert check_commit(cache, commit, LAYOUT) == [f"{file} cannot be read: {reason}."]
    failing(monkeypatch, "open", errno.EIO, CODES)
    assert check_commit(cache, commit, LAYOUT) == [f"{file} cannot be read: Input/output error."]


def test_a_folder_that_cannot_be_listed_is_not_empty(cache, monkeypatch):
    failing(monkeypatch, "scandir", errno.ESTALE, "commits")
    for ask in (lambda: list_files(cache), lambda: list_commits(cache)):
        with pytest.raises(AtcacheError, match=rf"commits cannot be read: {os.strerror(errno.ESTALE)}"):
            ask()


def test_what_is_no_folder_has_no_files(cache):
    assert list_files(cache / "zarr.json") == list_files(cache / "nothing") == []


def test_records_that_may_not_be_read_are_no_damaged_growth(cache):
    """Root may read all: so another user looks."""
    script = "import os, sys\nfrom atcache.store.growth import read_growth\nfrom pathlib import Path\n"
    script += "os.chdir(sys.argv[1])\nif os.geteuid() == 0: os.setuid(65534)\nread_growth(Path())"
    (cache / "commits").chmod(0)
    done = subprocess.run([sys.executable, "-c", script, cache], capture_output=True, text=True)
    (cache / "commits").chmod(0o755)
    (last,) = done.stderr.splitlines()[-1:]
    assert last.startswith(f"atcache.errors.AtcacheError: {GROWTH} cannot be read: Permission denied.")
    assert "Delete" not in last


# Records that say what no build writes


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"num_stored": -7}, r'"num_stored" is -7, expected at least 0'),
        ({"num_bad": 2**60}, r'"num_bad" is 1152921504606846976, expected'),
        ({"num_checked": -1}, r'"num_checked" is -1, expected at least 0'),
        ({"quality": {"row_kl_nats": 10**400}}, r'"quality\.row_kl_nats" is 1000.*, expected -1000000'),
        ({"quality": {"row_kl_nats": "1"}}, r'"quality\.row_kl_nats" is .1., expected a number'),
        ({"files": {CODES: {"nbytes": -1, "crc32": 0}}}, r'nbytes" is -1, expected at least 0'),
    ],
)
def test_numbers_that_no_build_writes_are_damage(cache, members, message):
    change_record(cache, **members)
    with pytest.raises(CorruptCacheError, match=rf"{TASK.name}\.json is not a commit record .*{message}"):
        summarise_commits(read_commits(cache).values())


@pytest.mark.parametrize("text", ["NaN", "Infinity", "1e999"])
def test_numbers_that_json_has_not_are_damage(cache, text):
    file = commit_path(cache, TASK)
    record = json.loads(file.read_bytes())
    file.write_text(json.dumps(record).replace(json.dumps(record["quality"]["row_kl_nats"]), text))
    with pytest.raises(CorruptCacheError, match=r'"quality\.row_kl_nats" is (nan|inf), expected a finite number'):
        read_commits(cache)


def test_a_record_that_does_not_match_its_checksum_enters_no_total(cache):
    change_record(cache, is_sealed=False, quality={"row_kl_nats": 0.5})
    problem = f"{commit_path(cache, TASK)}: the record of task {TASK.name} is damaged: its checksum does not match."
    assert check_commits(cache, LAYOUT)[TASK.name].problems == [problem]
    for read in (lambda: finish_cache(cache), lambda: read_commits(cache), lambda: read_commit(cache, TASK.name)):
        with pytest.raises(CorruptCacheError) as caught:
            read()
        again = "and run the same `atcache build` or `atcache pull` command again: only this task is redone."
        assert str(caught.value) == f"{problem} Delete {commit_path(cache, TASK)} {again}"


# Deleting records out of joined files


def test_the_record_of_a_task_that_was_done_again_outlives_its_neighbours(tmp_path):
    path, task = build(tmp_path / "cache.zarr", JOINED), JOINED.task(0, 1)
    (path / JOINED.codes.shard_file(task)).write_bytes(b"")
    writer = TaskWriter(path, JOINED, task)
    writer.add(1, status=6)
    again = writer.commit()
    assert read_commit(path, task.name) == again
    neighbours = ["v0000-b000000", "v0000-b000002"]
    assert delete_commits(path, neighbours) == neighbours
    assert read_commit(path, task.name) == again
    assert check_commit(path, again, JOINED, deep=True) == []
    for block in (0, 2):
        write_task(path, JOINED, JOINED.task(0, block))
    assert finish_cache(path)["num_bad"] == 3


def test_a_damaged_record_that_is_not_to_go_stays_as_it_is(tmp_path):
    path, task = build(tmp_path / "cache.zarr", JOINED), JOINED.task(0, 1)
    own = commit_path(path, task)
    own.write_text("{")
    assert delete_commits(path, ["v0000-b000000"]) == ["v0000-b000000"]
    assert own.read_text() == "{"
    with pytest.raises(CorruptCacheError, match="not a commit record"):
        read_commit(path, task.name)


def test_a_line_that_cannot_be_written_again_is_lost_with_its_file(tmp_path):
    path, first = build(tmp_path / "cache.zarr", JOINED), RecordFile(0, 0, 3)
    file = path / "commits" / first.name
    lines = file.read_text().splitlines()
    lines[2] = lines[2].replace('"quality":{', '"quality":{"x":NaN,')
    file.write_text("\n".join(lines) + "\n")
    assert delete_commits(path, ["v0000-b000000"]) == ["v0000-b000000", "v0000-b000002"]
    assert len(read_commits(path)) == JOINED.num_tasks - 2


def test_old_records_have_no_checksum_and_are_read(cache):
    file = commit_path(cache, TASK)
    record = json.loads(file.read_bytes())
    before = read_commits(cache)
    del record["crc32"]
    file.write_bytes(encode_json(record))
    assert read_commits(cache) == before
