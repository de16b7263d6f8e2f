"""Every damaged byte is noticed, and the message names the file."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from made_store import CODES, LAYOUT, SHARDS, build, damage_and_read

from atcache.errors import CorruptCacheError
from atcache.files.durable import encode_json
from atcache.store.audit import check_metadata, find_strays
from atcache.store.growth import enlarge_arrays
from atcache.store.manifest import check_commit, commit_path, read_commits
from atcache.store.metadata import seal
from atcache.store.reader import CacheReader
from atcache.store.writer import finish_cache


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
        with pytest.raises(CorruptCacheError, match=r"v0000-b000000\.json is not a commit record .*Delete it and run"):
            read_commits(cache)
    whole["task"]["block"] = 1
    file.write_text(json.dumps(whole))
    with pytest.raises(CorruptCacheError, match=r"v0000-b000000\.json records task v0000-b000001"):
        read_commits(cache)


def test_a_commit_record_cannot_point_out_of_the_cache(cache):
    file = commit_path(cache, LAYOUT.tasks()[0])
    whole = json.loads(file.read_bytes())
    whole["files"] = {"../../etc/passwd": {"nbytes": 1, "crc32": 1}}
    file.write_bytes(encode_json(seal(whole)))
    problems = check_commit(cache, read_commits(cache)["v0000-b000000"], LAYOUT)
    assert len(problems) == 1
    assert "expected ['attention/codes/c/0/0/0/0/0'" in problems[0]


def test_shapes_of_a_growth_that_was_given_up_are_no_damage_but_a_note(cache):
    """It was killed after its arrays got their shapes, and its growth.json was deleted, as the guide says."""
    codes = CacheReader(cache).read_codes(1, 9)
    enlarge_arrays(cache, replace(LAYOUT, num_views=4))
    assert check_metadata(cache) == []
    assert CacheReader(cache).read_codes(1, 9).tobytes() == codes.tobytes()
    committed = {task.name for task in LAYOUT.tasks()}
    (note,) = find_strays(cache, LAYOUT, committed)
    assert "has the shape of a growth that was given up. That does no harm" in note
    enlarge_arrays(cache, LAYOUT)
    assert find_strays(cache, LAYOUT, committed) == []
    for layout in (replace(LAYOUT, num_views=1), replace(LAYOUT, num_tokens=6)):
        enlarge_arrays(cache, layout)
        assert len(check_metadata(cache)) >= 1
