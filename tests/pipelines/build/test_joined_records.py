"""Builds whose commit records are joined: small ones here, as if a few tasks were many."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from builds import differences, files
from range_server import FolderServer

import atcache
from atcache.pipelines.build.config import BuildConfig
from atcache.pipelines.build.prepare import Prepared, prepare
from atcache.pipelines.build.run import build
from atcache.pipelines.build.shared_folder import RecordJoiner
from atcache.pipelines.merge.config import MergeConfig
from atcache.pipelines.merge.run import merge
from atcache.store import layout as layouts
from atcache.store.growth import read_growth
from atcache.store.manifest import delete_commits, list_commits
from atcache.store.reader import CacheReader


@pytest.fixture
def config(digits_build, digits_tars, monkeypatch) -> BuildConfig:
    """32 samples of two of the three tars, in 11 shards; records are joined by four from the 9th task on."""
    monkeypatch.setattr(layouts, "MAX_SINGLE_RECORDS", 8)
    monkeypatch.setattr(layouts, "RECORDS_PER_FILE", 4)
    return replace(digits_build, data=pattern(digits_tars[:2]), samples_per_shard=3, batch_size=4, codec="int8")


def pattern(tars):
    return f"{tars[0].parent}/{{{','.join(tar.name for tar in tars)}}}"


def record_files(path):
    return sorted(file.name for file in (path / "commits").iterdir() if file.name != "zarr.json")


@pytest.fixture
def built(config):
    build(config)
    assert record_files(config.out) == [
        "v0000-b000000-b000003.jsonl", "v0000-b000004-b000007.jsonl", "v0000-b000008-b000010.jsonl"
    ]  # fmt: skip
    return config.out


def test_a_build_continues_to_the_same_bytes(config, built, tmp_path):
    other = replace(config, out=tmp_path / "again.zarr")
    build(other)
    rng = random.Random(0)
    for _ in range(3):
        delete_commits(other.out, rng.sample(sorted(list_commits(other.out)), 4))
        assert not CacheReader(other.out).is_complete
        assert atcache.open(other.out).describe()["num_tasks_done"] == 7
        assert build(other).num_built_views > 0
        assert differences(other.out, built) == []
    assert atcache.open(other.out).describe() == {**atcache.open(built).describe(), "path": str(other.out)}


def test_a_damaged_task_is_repaired(config, built, tmp_path):
    build(replace(config, out=tmp_path / "whole.zarr"))
    shard = built / CacheReader(built).layout.codes.shard_file(CacheReader(built).layout.task(0, 5))
    data = bytearray(shard.read_bytes())
    data[len(data) // 3] ^= 1
    shard.write_bytes(data)
    report = atcache.verify(cache=built, repair=True)
    assert report.repaired_tasks == ("v0000-b000005",)
    assert record_files(built)[1:3] == ["v0000-b000004.json", "v0000-b000006-b000007.jsonl"]
    build(config)
    assert differences(built, tmp_path / "whole.zarr") == []
    assert not atcache.verify(cache=built, all=True).problems


def test_a_cache_that_grows_beyond_the_limit_has_its_records_joined(config, tmp_path):
    small = replace(config, samples_per_shard=4)
    build(small)
    assert len(record_files(small.out)) == 8
    assert "records_per_file" not in CacheReader(small.out).attributes["layout"]
    reader = CacheReader(small.out)
    build(replace(small, views=2, grow=True))
    assert reader.is_complete, "who has it open sees what it was"
    assert len(record_files(small.out)) == 4
    build(replace(small, views=2, out=tmp_path / "at-once.zarr"))
    assert differences(small.out, tmp_path / "at-once.zarr") == []


def test_the_old_command_is_content_while_a_growth_beyond_the_limit_is_begun(config, tmp_path):
    small, grown = replace(config, samples_per_shard=4), replace(config, samples_per_shard=4, views=2, grow=True)
    build(small)
    _, prepared = prepare(grown)
    assert isinstance(prepared, Prepared)
    prepared.begin()  # and then it was killed
    growth = read_growth(small.out)
    assert growth is not None
    assert growth[1].records_per_file == 4
    before = files(small.out)
    again = build(small)
    assert (again.plan, again.num_built_views) == (None, 0)
    assert files(small.out) == before
    build(grown)
    build(replace(small, views=2, out=tmp_path / "at-once.zarr"))
    assert differences(small.out, tmp_path / "at-once.zarr") == []


def test_merged_caches_have_their_records_joined(config, digits_tars, tmp_path):
    parts = [tmp_path / f"part-{number}.zarr" for number in (0, 1)]
    build(replace(config, data=str(digits_tars[0]), out=parts[0]))
    build(replace(config, data=pattern(digits_tars[1:]), out=parts[1], codec=None, codec_from=parts[0]))
    assert [len(record_files(part)) for part in parts] == [6, 3]
    merge(MergeConfig(caches=tuple(parts), out=tmp_path / "merged.zarr"))
    assert len(record_files(tmp_path / "merged.zarr")) == 5
    report = atcache.verify(cache=tmp_path / "merged.zarr", all=True)
    assert report.is_complete
    assert not report.problems


def test_the_leader_joins_now_and_then(built, tmp_path):
    layout = CacheReader(built).layout
    delete_commits(built, ["v0000-b000001", "v0000-b000008"])
    joiner = RecordJoiner(built, layout, every_s=3600)
    for name in ("v0000-b000004-b000007.jsonl", "v0000-b000000.json"):
        assert name in record_files(built)
    joiner.look()
    assert len(record_files(built)) == 4
    delete_commits(built, ["v0000-b000005"])
    joiner.look()
    assert len(record_files(built)) == 5, "it is not yet time"


def test_a_copy_from_a_web_server_is_the_same_and_a_part_has_the_records_of_a_build_of_its_size(
    config, built, tmp_path
):
    """A web server lists nothing, so the files of records must be known from the layout."""
    with FolderServer(built.parent) as server:
        atcache.pull(cache=f"{server.url}/{built.name}", out=tmp_path / "copy.zarr")
        assert differences(tmp_path / "copy.zarr", built) == []
        two_views = replace(config, out=tmp_path / "two.zarr", views=2)
        build(two_views)
        atcache.pull(cache=two_views.out, out=tmp_path / "part.zarr", views=1)
    assert len(record_files(two_views.out)) == 6
    assert differences(tmp_path / "part.zarr", built) == []
