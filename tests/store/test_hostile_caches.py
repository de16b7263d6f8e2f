"""What is not a cache, or describes an impossible one, is refused before memory is allocated."""

from __future__ import annotations

import json
import math
import os
import shutil
import struct

import google_crc32c
import numpy as np
import pytest
from made_store import CODES, LAYOUT, SHARDS, damage_and_read
from numcodecs import blosc, zstd

from atcache.errors import CacheMismatchError, CacheMissError, CorruptCacheError
from atcache.store.audit import check_metadata, check_tables
from atcache.store.manifest import read_commits
from atcache.store.reader import CacheReader
from atcache.store.tables import check_array, read_array, write_array


def rewrite_root(cache, change):
    root = json.loads((cache / "zarr.json").read_bytes())
    change(root)
    (cache / "zarr.json").write_text(json.dumps(root))


def rewrite(file, change):
    file.write_text(json.dumps({**json.loads(file.read_bytes()), **change}))


def chunks(*shape):
    return {"name": "regular", "configuration": {"chunk_shape": list(shape)}}


def test_what_is_no_cache_is_a_miss_or_refused(tmp_path):
    with pytest.raises(CacheMissError, match=r"nothing is not a cache: .*zarr\.json does not exist\. Make one with"):
        CacheReader(tmp_path / "nothing")
    (tmp_path / "zarr.json").write_text("{")
    with pytest.raises(CorruptCacheError, match=r"zarr\.json cannot be read"):
        CacheReader(tmp_path)
    (tmp_path / "zarr.json").write_text("[" * 100_000)
    with pytest.raises(CorruptCacheError, match=r"zarr\.json cannot be read \(.* nested too deeply\)"):
        CacheReader(tmp_path)
    for text in ("[]", "3", "{}", '{"attributes": 5}', '{"attributes": {"atcache": []}}'):
        (tmp_path / "zarr.json").write_text(text)
        with pytest.raises(CorruptCacheError, match=r"is not (a Zarr group|an atcache cache)"):
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


def test_a_table_of_another_shape_than_the_layout_says_is_refused_before_it_is_read(cache):
    rewrite(cache / "samples/label/zarr.json", {"shape": [2**30], "chunk_grid": chunks(2**16)})
    message = r"samples/label has shape \(1073741824,\) and type int64, expected \(10\) and int64, as the"
    with pytest.raises(CorruptCacheError, match=message):
        _ = CacheReader(cache).samples
    rewrite(cache / "samples/key/zarr.json", {"shape": [10, 5000], "chunk_grid": chunks(10, 5000)})
    with pytest.raises(CorruptCacheError, match=r"samples/key has shape .* expected \(10, 1 to 4096\) and uint8"):
        _ = CacheReader(cache).samples


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("problem", 9, r"problem holds 9 for sample 3, expected one of 0, 2, 3, 4, 5, 6, 255"),
        ("label", -2, r"label holds -2 for sample 3, expected a class, or -1 for none"),
        ("tar", -1, r"tar holds -1 for sample 3, expected 0 to 1: the cache lists 2 tars"),
        ("key", 0xFF, r"key holds b'.* for sample 3, expected text in UTF-8"),
    ],
)
def test_values_that_no_sample_table_has_are_refused_with_their_sample(cache, column, value, message):
    values = read_array(cache, f"samples/{column}")
    values[3] = value
    shutil.rmtree(cache / "samples" / column)
    write_array(cache, f"samples/{column}", values, None)
    with pytest.raises(CorruptCacheError, match=message):
        _ = CacheReader(cache).samples


def test_a_key_that_goes_on_in_the_next_row_is_not_utf_8(cache):
    keys_SN = np.full((10, 3), ord("x"), np.uint8)
    keys_SN[4, 2], keys_SN[5, 0] = "é".encode()
    shutil.rmtree(cache / "samples/key")
    write_array(cache, "samples/key", keys_SN, None)
    with pytest.raises(CorruptCacheError, match=r"samples/key holds b'xx\\xc3' for sample 4, expected text in UTF-8"):
        _ = CacheReader(cache).samples


@pytest.mark.parametrize("sizes", [[10_240, -1], [10_240, 1e999], [10_240, "5"], 7])
def test_sizes_of_tars_that_are_none_are_refused(cache, sizes):
    file = cache / "samples" / "zarr.json"
    group = json.loads(file.read_bytes())
    group["attributes"]["tar_nbytes"] = sizes
    file.write_text(json.dumps(group))
    with pytest.raises(CorruptCacheError, match=r"samples/zarr\.json does not list the tars .*tar_nbytes is not a"):
        _ = CacheReader(cache).samples


def test_of_an_array_that_lost_all_its_chunks_only_the_first_are_told(cache):
    rewrite(cache / "samples/label/zarr.json", {"shape": [2**20], "chunk_grid": chunks(1)})
    shutil.rmtree(cache / "samples/label/c")
    *problems, last = check_array(cache, "samples/label")
    assert [problem.startswith(f"{cache}/samples/label/c/{number} is") for number, problem in enumerate(problems)] == (
        [True] * 3
    )
    assert last == f"{cache}/samples/label: 1048573 more of its chunks were not looked at."


@pytest.mark.parametrize("name", ["attention/bias", "attention/state/steps"])
def test_an_array_that_a_copy_of_a_finished_cache_has_lost_is_missed(cache, name):
    """Maps that are made without it would be wrong."""
    shutil.rmtree(cache / name)
    reader = CacheReader(cache)
    with pytest.raises(CorruptCacheError, match=rf"{name}/zarr\.json is missing, without which the cache cannot"):
        _ = reader.bias_LHQK, reader.state
    assert check_tables(cache, reader.attributes, reader.layout)[0].startswith(f"{cache / name}/zarr.json is missing")


def test_state_of_a_type_that_no_codec_has_is_refused(cache):
    rewrite(cache / "attention/state/steps/zarr.json", {"data_type": "int64"})
    with pytest.raises(CorruptCacheError, match=r"state/steps is int64; a cache holds float32, float16, int32, int8"):
        _ = CacheReader(cache).state


@pytest.mark.parametrize("name", ["zarr.json", "samples/zarr.json", "samples/key/zarr.json", SHARDS[0], SHARDS[2]])
def test_a_pipe_in_place_of_a_file_is_refused_and_not_waited_for(cache, name):
    (cache / name).unlink()
    os.mkfifo(cache / name)
    with pytest.raises(CorruptCacheError, match=r"not a plain file, but a pipe or a device"):
        _ = damage_and_read(cache), CacheReader(cache).samples


def test_a_link_to_a_device_that_never_ends_is_refused(cache):
    file = cache / "samples/label/c/0"
    file.unlink()
    file.symlink_to("/dev/zero")
    with pytest.raises(CorruptCacheError, match=r"samples/label/c/0 is damaged: .*not a plain file"):
        _ = CacheReader(cache).samples


def test_a_chunk_file_that_is_larger_than_any_chunk_is_not_read(cache):
    with (cache / "samples/label/c/0").open("r+b") as file:
        file.truncate(2**40)  # takes no space
    with pytest.raises(CorruptCacheError, match=r"it has 1099511627776 bytes, expected at most 1105"):
        _ = CacheReader(cache).samples


@pytest.mark.parametrize("name", ["samples/zarr.json", "samples/key/zarr.json", "attention/state/steps/zarr.json"])
def test_lists_within_lists_without_end_are_damage(cache, name):
    (cache / name).write_text("[" * 100_000)
    with pytest.raises(CorruptCacheError, match=rf"{name} .*nested too deeply"):
        _ = CacheReader(cache).samples, CacheReader(cache).state
    assert any("nested too deeply" in problem for problem in check_metadata(cache))


def test_a_commit_record_of_lists_within_lists_is_damage(cache):
    (cache / "commits/v0000-b000001.json").write_text("[" * 100_000)
    with pytest.raises(CorruptCacheError, match=r"v0000-b000001\.json is not a commit record \(.*nested too deeply\)"):
        read_commits(cache)


@pytest.mark.parametrize("classes", ["cat", 5, {"0": "cat"}, ["cat", 5]])
def test_names_of_classes_that_are_no_list_of_texts_are_refused(cache, classes):
    file = cache / "samples" / "zarr.json"
    group = json.loads(file.read_bytes())
    assert "classes" not in group["attributes"]  # old caches have none
    group["attributes"]["classes"] = classes
    file.write_text(json.dumps(group))
    with pytest.raises(CorruptCacheError, match=r"samples/zarr\.json does not list the tars .*classes is not a list"):
        _ = CacheReader(cache).samples


def test_a_sample_table_that_names_no_tar_is_refused(cache):
    group = json.loads((cache / "samples" / "zarr.json").read_bytes())
    for name in ("tars", "folders", "tar_nbytes"):
        group["attributes"][name].pop()
    (cache / "samples" / "zarr.json").write_text(json.dumps(group))
    message = r"samples/tar holds 1 for sample 1, expected 0 to 0: the cache lists 1 tars\. Restore it from a copy"
    with pytest.raises(CorruptCacheError, match=message):
        _ = CacheReader(cache).samples


@pytest.mark.parametrize(
    "change",
    [
        {"shape": [2**40, 8]},
        {"shape": [-1]},
        {"shape": 3},
        {"shape": [math.inf]},
        {"shape": [10, True]},
        {"shape": [0, 2**60], "chunk_grid": chunks(1, 1)},
        {"shape": [2**32, 1], "chunk_grid": chunks(1, 1)},
        {"shape": [10, 15], "chunk_grid": chunks(10, 1)},
        {"shape": [1] * 100, "chunk_grid": chunks(*[1] * 100)},
        {"data_type": "object"},
        {"data_type": "f4,("},
        {"data_type": ["uint8"]},
        {"codecs": [{"name": "bytes"}]},
    ],
    ids=repr,
)
def test_a_sample_table_of_absurd_shape_is_refused_before_memory_is_asked_for(cache, change):
    rewrite(cache / "samples/key/zarr.json", change)
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
    huge = {f"attention/state/huge{number}": {} for number in range(3)}
    for number in range(3):
        shutil.copytree(folder / "steps", folder / f"huge{number}")
        rewrite(folder / f"huge{number}/zarr.json", {"shape": [2**26, 3], "chunk_grid": chunks(2**22, 3)})
        shutil.rmtree(folder / f"huge{number}/c")
    rewrite_root(cache, lambda root: root["consolidated_metadata"]["metadata"].update(huge))
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
        (SHARDS[1], b"\x28\xb5\x2f\xfd\x00\x58\x01\x00\x00", "does not state its size"),
        (SHARDS[1], b"plain text", "is not a zstd frame"),
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
