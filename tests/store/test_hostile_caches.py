"""What is not a cache, or describes an impossible one, is refused before memory is allocated."""

from __future__ import annotations

import json
import shutil
import struct

import google_crc32c
import numpy as np
import pytest
from made_store import CODES, LAYOUT, SHARDS, damage_and_read
from numcodecs import blosc, zstd

from atcache.errors import CacheMismatchError, CacheMissError, CorruptCacheError
from atcache.store.reader import CacheReader


def rewrite_root(cache, change):
    root = json.loads((cache / "zarr.json").read_bytes())
    change(root)
    (cache / "zarr.json").write_text(json.dumps(root))


def test_what_is_no_cache_is_a_miss_or_refused(tmp_path):
    with pytest.raises(CacheMissError, match=r"nothing is not a cache: .*zarr\.json does not exist\. Make one with"):
        CacheReader(tmp_path / "nothing")
    (tmp_path / "zarr.json").write_text("{")
    with pytest.raises(CorruptCacheError, match=r"zarr\.json cannot be read"):
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
