"""What is wrong with the files of a cache is found and named, and only that."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from verifying import BLOCK_SIZE, CODES, RECORD, TASK, flip, look, messages

from atcache.errors import AtcacheError
from atcache.files.durable import encode_json
from atcache.store.audit import check_metadata
from atcache.store.chunks import compress, decode_index
from atcache.store.layout import ZSTD
from atcache.store.manifest import check_commit, check_seal, list_commits, parse_commit, read_commit, write_commit
from atcache.store.metadata import seal
from atcache.store.reader import CacheReader
from atcache.store.records import read_record
from atcache.store.shard_file import ShardFile
from atcache.store.tables import write_state
from atcache.store.writer import finish_cache


@pytest.mark.parametrize("place", [0, 0.3, -30, -9, -1])
@pytest.mark.parametrize(
    "array", ["attention/codes", "views/parameters", "views/pixel_hash", "views/status", "pixels/rgb"]
)
def test_a_flipped_byte_of_a_shard_is_named_with_its_task(stored, array, place):
    spec = next(spec for spec in CacheReader(stored).layout.arrays() if spec.name == array)
    file = stored / spec.shard_file(CacheReader(stored).layout.task(1, 1))
    flip(file, place)
    summary = look(stored, sample=0)
    (finding,) = summary.problems
    assert finding.message.startswith(f"{file} is damaged: ")
    assert finding.task == TASK


def test_damaged_chunks_are_told_by_their_samples(stored):
    spec, file = CacheReader(stored).layout.codes, stored / CODES
    data = file.read_bytes()
    offset_N = decode_index(data[-spec.index_nbytes :], spec, len(data))[:, 0].reshape(BLOCK_SIZE, -1)[:, 0]
    for row in (0, 9, 10, 19):
        flip(file, int(offset_N[row]) + 3)
    (message,) = messages(look(stored, sample=0))
    assert message == f"{file} is damaged: 4 chunks of samples 20, 29-30, 39: its checksum does not match."


def test_a_chunk_of_the_wrong_size_is_found_though_all_checksums_hold(cache):
    """What a wrong writer would leave: a chunk that is whole, decompresses, and is too short."""
    layout = CacheReader(cache).layout
    task, spec = layout.task(1, 1), layout.parameters
    shard = ShardFile(cache / spec.shard_file(task), spec)
    shard.append(0, compress(np.zeros(3, np.float32), ZSTD))
    record = shard.seal()
    shard.place()
    commit = read_commit(cache, TASK)
    write_commit(cache, replace(commit, files={**commit.files, spec.shard_file(task): record}))
    assert any(
        f"{spec.shard_file(task)} is damaged: it claims 12 bytes of content, expected" in message
        for message in messages(look(cache, sample=0))
    )


@pytest.mark.parametrize("keep", [0, 3, 0.5, -1])
def test_a_truncated_shard_is_named(cache, keep):
    data = (cache / CODES).read_bytes()
    (cache / CODES).write_bytes(data[: int(len(data) * keep) if isinstance(keep, float) else keep])
    (message,) = messages(look(cache))
    assert message.startswith(f"{cache / CODES} has ")
    assert message.endswith(f" bytes, {len(data)} were committed.")


def test_missing_shards_and_records_are_named(cache):
    (cache / CODES).unlink()
    (cache / "views/status/c/0/2").unlink()
    (cache / "commits/v0000-b000000.json").unlink()
    summary = look(cache)
    assert {finding.task: finding.message for finding in summary.problems} == {
        "v0000-b000000": f"{cache}/commits/v0000-b000000.json is missing, though the cache was finished.",
        "v0000-b000002": f"{cache}/views/status/c/0/2 cannot be read: No such file or directory.",
        TASK: f"{cache / CODES} cannot be read: No such file or directory.",
    }


def test_every_bit_of_a_commit_record_counts(cache):
    layout, file = CacheReader(cache).layout, cache / RECORD
    whole = file.read_bytes()
    for place in range(0, len(whole), 5):
        flip(file, place, bit=1 << (place % 8))
        try:
            record = read_record(cache, TASK)
            problems = check_seal(record) + check_commit(cache, parse_commit(record), layout, deep=True)
        except AtcacheError as error:
            problems = [str(error)]
        assert any(str(file) in problem for problem in problems), whole[max(0, place - 20) : place + 20]
        file.write_bytes(whole)


@pytest.mark.parametrize("name", ["zarr.json", "views/status/zarr.json", "samples/zarr.json", "samples/key/zarr.json"])
def test_every_bit_of_a_zarr_json_counts(cache, name):
    file = cache / name
    whole = file.read_bytes()
    for place in range(0, len(whole), max(1, len(whole) // 60)):
        flip(file, place, bit=1 << (place % 8))
        try:
            problems = check_metadata(cache)
        except AtcacheError as error:
            problems = [str(error)]
        assert any(str(file) in problem for problem in problems), whole[max(0, place - 20) : place + 20]
        file.write_bytes(whole)


@pytest.mark.parametrize("name", ["key", "label", "tar"])
def test_damage_in_the_sample_table_is_named_and_is_nothing_a_build_redoes(cache, name):
    (file,) = [file for file in (cache / "samples" / name / "c").rglob("*") if file.is_file()]
    flip(file, 0.5)
    summary = look(cache, repair=True)
    (finding,) = [finding for finding in summary.problems if str(file) in finding.message]
    assert finding.task is None
    assert "restore it from a copy" in finding.message
    assert len(list_commits(cache)) == 6


def test_another_sample_table_is_found_by_its_fingerprint(cache):
    shutil.rmtree(cache / "samples/label/c")
    shutil.copytree(cache / "samples/offset/c", cache / "samples/label/c")
    found = messages(look(cache, sample=0))
    assert len(found) == 2
    assert all(message.startswith(f"the sample table in {cache}/samples has the fingerprint") for message in found)


@pytest.mark.parametrize("name", ["attention/state/steps", "attention/bias"])
def test_damaged_codec_state_is_named(cache, name, tiny_vit, tiny_weights):
    write_state(cache, {"steps": np.ones((2, 32), np.float32)}, np.zeros((2, 2, 17, 17), np.float32))
    finish_cache(cache)  # which lists them
    (file,) = [file for file in (cache / name / "c").rglob("*") if file.is_file()]
    assert messages(look(cache, sample=0)) == []
    flip(file, 0.5)
    summary = look(cache, sample=0, teacher=tiny_vit, weights=tiny_weights)
    assert [message.startswith(f"{file} is damaged: ") for message in messages(summary)] == [True]
    assert summary.fidelity is None


def test_a_codec_that_does_not_fit_the_layout_is_found(cache):
    root = json.loads((cache / "zarr.json").read_bytes())
    ours = root["attributes"]["atcache"]
    root["attributes"]["atcache"] = seal({**ours, "codec": {"name": "exact", "dtype": "float16"}})
    (cache / "zarr.json").write_bytes(encode_json(root))
    found = messages(look(cache, sample=0))
    assert any("type of codes: 'int16', but its layout says 'int8'" in message for message in found), found


def test_a_record_that_is_another_tasks_or_no_tasks_is_found(cache):
    shutil.copy(cache / "commits/v0000-b000001.json", cache / RECORD)
    shutil.copy(cache / "commits/v0000-b000001.json", cache / "commits/v0007-b000001.json")
    summary = look(cache)
    assert [finding.task for finding in summary.problems] == ["v0007-b000001", TASK]
    assert "is for a task that this cache does not have" in summary.problems[0].message
    assert f"{cache / RECORD} records task v0000-b000001" in summary.problems[1].message


def test_counts_are_compared_with_statuses_and_totals_with_records(cache):
    commit = read_commit(cache, TASK)
    write_commit(cache, replace(commit, num_stored=19, num_bad=1))
    summary = look(cache, sample=0)
    status = cache / "views/status/c/1/1"
    assert messages(summary) == [f"{cache / RECORD} counts 19 views with codes and 1 without, {status} has 20 and 0."]
    write_commit(cache, replace(commit, quality={"row_kl_nats": 3.0}))
    (message,) = messages(look(cache, sample=0))
    assert message.startswith(f"{cache}/zarr.json: \"complete\" says {{'row_kl_nats': ")
    assert message.endswith("'max': 3.0}}.")


def test_views_that_are_stored_against_their_status_are_found(cache):
    """A task written again by a wrong writer: its statuses call two stored views bad."""
    layout = CacheReader(cache).layout
    spec, task = layout.status, layout.task(1, 1)
    status_S = np.ones(BLOCK_SIZE, np.uint8)
    status_S[[3, 4]] = 6
    shard = ShardFile(cache / spec.shard_file(task), spec)
    shard.append(0, compress(status_S, ZSTD))
    record = shard.seal()
    shard.place()
    commit = read_commit(cache, TASK)
    files = {**commit.files, spec.shard_file(task): record}
    write_commit(cache, replace(commit, files=files, num_stored=18, num_bad=2))
    assert f"{cache / CODES} does not hold exactly the views whose status is STORED: see samples 23-24." in messages(
        look(cache, sample=0)
    )
