"""Joined commit records: what a kill may leave, one record out of many, damage to one line, names that lie."""

from __future__ import annotations

import itertools
import os
import random
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings, strategies as st
from made_store import LAYOUT, all_bytes, build, write_task

from atcache.errors import CacheMissError, CorruptCacheError
from atcache.files.durable import is_partial
from atcache.store import records
from atcache.store.audit import find_strays
from atcache.store.layout import MAX_SINGLE_RECORDS, Status, StoreLayout
from atcache.store.manifest import check_commit, delete_commits, list_commits, read_commit, read_commits
from atcache.store.reader import CacheReader
from atcache.store.records import RecordFile, files_of, join_records, list_record_files
from atcache.store.writer import TaskWriter, finish_cache

# 2 views of 10 blocks of one sample, whose records are joined by four: blocks 0-3, 4-7, 8-9.
JOINED = replace(LAYOUT, samples_per_shard=1, records_per_file=4)
NAMES = [
    f"v000{view}-b00000{span}.jsonl" for view in (0, 1) for span in ("0-b000003", "4-b000007", "8-b000009")
]  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return build(tmp_path_factory.mktemp("joined") / "cache.zarr", JOINED)


@pytest.fixture
def joined(whole, tmp_path):
    return Path(shutil.copytree(whole, tmp_path / "cache.zarr"))


def record_files(path):
    return sorted(file.name for file in (path / "commits").iterdir() if file.name != "zarr.json")


def test_a_finished_cache_has_one_file_for_each_stretch(whole):
    assert record_files(whole) == NAMES == [file.name for file in files_of(JOINED)]
    reader = CacheReader(whole)
    assert reader.is_complete
    assert list(read_commits(whole)) == [task.name for task in JOINED.tasks()]
    assert read_commits(whole) == read_commits(whole, JOINED), "with and without listing the folder"
    assert read_commit(whole, "v0001-b000006") == read_commit(whole, "v0001-b000006", JOINED)
    assert all(check_commit(whole, commit, JOINED, deep=True) == [] for commit in read_commits(whole).values())
    assert find_strays(whole, JOINED, list_commits(whole)) == []


def test_records_say_the_same_joined_or_not(whole, tmp_path):
    single = build(tmp_path / "single.zarr", replace(JOINED, records_per_file=1))
    assert len(record_files(single)) == 20
    assert read_commits(single) == read_commits(whole)
    assert CacheReader(single).attributes["complete"] == CacheReader(whole).attributes["complete"]


def test_only_large_caches_have_their_records_joined():
    small = replace(LAYOUT, num_views=1, samples_per_shard=1, num_samples=MAX_SINGLE_RECORDS)
    assert small.with_joined_records() is small
    assert "records_per_file" not in small.to_json()
    large = replace(small, num_samples=MAX_SINGLE_RECORDS + 1).with_joined_records()
    assert large.to_json()["records_per_file"] == 1000
    assert StoreLayout.from_json(large.to_json()) == large
    assert len(files_of(large)) == 10


@pytest.mark.parametrize("seed", range(4))
def test_however_a_build_goes_the_bytes_are_the_same(whole, tmp_path, seed):
    """Tasks in any order, joined at any time, some done again."""
    rng, path = random.Random(seed), build(tmp_path / "cache.zarr", JOINED, finish=False)
    delete_commits(path, list_commits(path))
    assert record_files(path) == []
    tasks = JOINED.tasks() + rng.sample(JOINED.tasks(), 7)
    rng.shuffle(tasks)
    seen = set()
    for task in tasks:
        write_task(path, JOINED, task)
        seen.add(task.name)
        if rng.random() < 0.3:
            join_records(path, JOINED)
        assert list_commits(path) == seen
    finish_cache(path)
    assert all_bytes(path) == all_bytes(whole)


@settings(max_examples=12)
@given(st.sets(st.sampled_from([task.name for task in JOINED.tasks()]), min_size=1))
def test_deleted_records_are_gone_and_no_others(whole, tmp_path_factory, names):
    path = Path(shutil.copytree(whole, tmp_path_factory.mktemp("deleted") / "cache.zarr"))
    before = read_commits(path)
    assert delete_commits(path, [*names, "v0007-b000000", "../zarr"]) == sorted(names)
    assert read_commits(path) == {name: commit for name, commit in before.items() if name not in names}
    with pytest.raises(CacheMissError, match=rf"lacks {len(names)} of 20 tasks, the first is {min(names)}"):
        finish_cache(path)
    for task in JOINED.tasks():
        if task.name in names:
            write_task(path, JOINED, task)
    finish_cache(path)
    assert all_bytes(path) == all_bytes(whole)
    shutil.rmtree(path)


def states_while(path, monkeypatch, work):
    """The folder of records as it is before each change that `work` makes, as a kill there would leave it."""
    states = []

    def note(patch, name):
        real = getattr(Path, name)

        def noting(self, *arguments, **options):
            states.append({file: (path / "commits" / file).read_bytes() for file in record_files(path)})
            return real(self, *arguments, **options)

        patch.setattr(Path, name, noting)

    with monkeypatch.context() as patch:
        note(patch, "replace")
        note(patch, "unlink")
        work()
    return states


@pytest.mark.parametrize("work", ["join", "delete"])
def test_a_kill_at_any_moment_leaves_records_that_can_be_read_and_deleted(whole, joined, monkeypatch, work):
    """Files are written and removed one after the other. The folder is looked at as a kill would leave it."""
    name, others = "v0000-b000001", {task.name for task in JOINED.tasks()} - {"v0000-b000001"}
    if work == "join":
        shutil.rmtree(joined)
        build(joined, JOINED, finish=False)
        states = states_while(joined, monkeypatch, lambda: join_records(joined, JOINED))
    else:
        states = states_while(joined, monkeypatch, lambda: delete_commits(joined, [name]))
    assert len(states) >= 3
    expected = read_commits(whole)
    for state in states:  # temp files are swept before anything else is written
        for file in record_files(joined):
            (joined / "commits" / file).unlink()
        for file, data in state.items():
            if not is_partial(file):
                (joined / "commits" / file).write_bytes(data)
        commits = read_commits(joined)
        assert commits.items() <= expected.items()
        assert commits.keys() >= others, "only the record that was to go may be gone"
        delete_commits(joined, [name])
        assert list_commits(joined) == others
        write_task(joined, JOINED, JOINED.task(0, 1))
        join_records(joined, JOINED)
        assert {file: (joined / "commits" / file).read_bytes() for file in record_files(joined)} == {
            file: (whole / "commits" / file).read_bytes() for file in NAMES
        }


def test_a_damaged_line_is_the_loss_of_one_record(joined):
    file = joined / "commits" / NAMES[1]
    lines = file.read_bytes().split(b"\n")
    for damaged in (
        b"{",
        b"[]",
        lines[2].replace(b'"files"', b'"tiles"'),
        lines[2].replace(b'"block":6', b'"block":9'),
    ):
        file.write_bytes(b"\n".join([*lines[:2], damaged, *lines[3:]]))
        message = rf"{NAMES[1]}, task v0000-b000006 is not a commit record .*atcache verify .*cache\.zarr --repair"
        with pytest.raises(CorruptCacheError, match=message):
            read_commits(joined)
        assert read_commit(joined, "v0000-b000005").num_stored == 1
    assert delete_commits(joined, ["v0000-b000006"]) == ["v0000-b000006"]
    assert len(read_commits(joined)) == 19
    # Records that cannot be read are not joined: the file that holds them is to be named.
    (joined / "commits" / NAMES[0]).write_bytes(b"")
    assert delete_commits(joined, ["v0000-b000000"]) == [f"v0000-b00000{block}" for block in range(4)]


def test_damage_to_single_records_is_not_hidden_by_joining(tmp_path):
    path = build(tmp_path / "cache.zarr", JOINED, finish=False)
    (path / "commits/v0000-b000001.json").write_text("{}")
    (path / "commits/v0001-b000001.json").write_bytes((path / "commits/v0001-b000002.json").read_bytes())
    join_records(path, JOINED)
    assert set(NAMES) - set(record_files(path)) == {NAMES[0], NAMES[3]}


@pytest.mark.parametrize(
    "name",
    ["v0000-b000000-b999999.jsonl", "v0000-b000003-b000000.jsonl", "v0000-b000001-b000001.jsonl", "v0-b0.json",
     "v0000-b0000001.json", "v0000-b000000.jsonl", "v0000-b000000-b000003.json"],
)  # fmt: skip
def test_names_that_are_not_those_of_records_are_not_taken_for_them(joined, name):
    assert RecordFile.parse(name) is None
    (joined / "commits" / name).write_text("{}")
    assert list_commits(joined) == {task.name for task in JOINED.tasks()}
    assert any(name in stray for stray in find_strays(joined, JOINED, set()))


@given(st.integers(0, 10**5), st.integers(0, 10**7), st.integers(0, 9999))
def test_a_name_says_which_tasks_a_file_is_of(view, first, more):
    file = RecordFile(view, first, first + more)
    assert RecordFile.parse(file.name) == file
    assert len(file.tasks()) == file.num_tasks == more + 1


def test_records_that_are_joined_while_they_are_read_are_found_again(tmp_path, monkeypatch):
    path = build(tmp_path / "cache.zarr", JOINED, finish=False)
    calls = itertools.count()
    real = os.pread

    def pread(*arguments):
        if next(calls) == 2:
            join_records(path, JOINED)
        return real(*arguments)

    monkeypatch.setattr(os, "pread", pread)
    assert list(read_commits(path)) == [task.name for task in JOINED.tasks()]
    assert len(list_record_files(path)) == 6


def test_a_missing_record_is_looked_for_once(joined, monkeypatch):
    delete_commits(joined, ["v0000-b000001"])
    listings = []
    listed = records.list_files
    monkeypatch.setattr(records, "list_files", lambda path: listings.append(path) or listed(path))
    assert "there is no such record" in records.read_record(joined, "v0000-b000001").problem
    assert len(listings) == 1


# Tasks that two workers of a cluster do, while the client joins records


def write_otherwise(path, task):
    """Write a task as another device may: the same samples with other bytes."""
    writer = TaskWriter(path, JOINED, task)
    for sample in range(task.start, task.stop):
        writer.add(sample, status=Status.UNDECODABLE)
    return writer.commit()


def test_a_task_whose_record_is_joined_is_not_put_in_place_again(joined, whole):
    """To write its record would split the joined file, as the client may do at the same moment."""
    task = JOINED.task(0, 5)
    assert write_otherwise(joined, task) == read_commits(whole)[task.name]
    assert all_bytes(joined) == all_bytes(whole)


def test_a_joined_record_that_does_not_hold_keeps_no_task_from_being_done(joined, whole):
    task, file = JOINED.task(0, 5), joined / "commits" / NAMES[1]
    shard, lines = joined / JOINED.codes.shard_file(task), file.read_bytes().splitlines(keepends=True)
    unsealed = lines[1].replace(b'"num_bad":0', b'"num_bad":1')
    for path, damaged in ((shard, b""), (file, b"".join([lines[0], unsealed, *lines[2:]]))):
        path.write_bytes(damaged)
        write_task(joined, JOINED, task)
        assert record_files(joined) == sorted([*NAMES, f"{task.name}.json"]), "the joined file is the client's"
        finish_cache(joined)
        assert all_bytes(joined) == all_bytes(whole)


def test_a_record_that_is_replaced_while_it_is_joined_is_the_one_that_stays(tmp_path, monkeypatch):
    path, task = build(tmp_path / "cache.zarr", JOINED, finish=False), JOINED.task(0, 0)
    calls, real = itertools.count(), os.pread

    def pread(*arguments):
        data = real(*arguments)
        if next(calls) == 2:
            write_otherwise(path, task)
        return data

    monkeypatch.setattr(os, "pread", pread)
    join_records(path, JOINED)
    assert record_files(path) == NAMES
    assert read_commit(path, task.name).num_bad == 1
    assert check_commit(path, read_commit(path, task.name), JOINED, deep=True) == []


def test_to_commit_a_task_lists_no_records(tmp_path, monkeypatch):
    """There may be millions, on a slow disk."""
    listings, listed = [], records.list_files
    monkeypatch.setattr(records, "list_files", lambda path: listings.append(path) or listed(path))
    path = build(tmp_path / "cache.zarr", JOINED, finish=False)
    write_task(path, JOINED, JOINED.task(1, 9))
    assert listings == []
