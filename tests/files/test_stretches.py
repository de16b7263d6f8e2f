"""How much is asked of a server: whole stretches where an epoch reads all and the block cache holds it, else no more
than is wanted. Counted at a real server, with forked workers.
"""

from __future__ import annotations

import gc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from made_store import plain_index
from range_server import FolderServer

from atcache.feed import order
from atcache.feed.loader import BatchStream
from atcache.feed.order import SampleOrder
from atcache.feed.sample_views import SampleView, Views
from atcache.files.location import parse_location
from atcache.files.ranges import open_file
from atcache.files.remote.block_cache import BLOCK_NBYTES, BlockCache, BlockKeys, shared_blocks
from atcache.files.remote.remote_file import STRETCH_BLOCKS
from atcache.images.source import SampleIndex, Source
from atcache.store.layout import Status, StoreLayout
from atcache.store.reader import CacheReader
from atcache.store.writer import TaskWriter, create_cache, encode_view, finish_cache
from atcache.views.policy import PARAMETER_NAMES

NUM_SAMPLES = 640
STRETCH_NBYTES = STRETCH_BLOCKS * BLOCK_NBYTES
BATCH = 32


class CodesOnly(Views):
    """View 0 of a cache's codes, with pixels that only say which sample it is."""

    def __init__(self, place: str | Path) -> None:
        self.reader = CacheReader(place)

    @property
    def num_samples(self) -> int:
        return self.reader.layout.num_samples

    @property
    def is_remote(self) -> bool:
        return self.reader.is_remote

    def read(self, sample: int, epoch: int) -> SampleView:
        del epoch
        return SampleView(np.full((1, 1, 3), sample % 256, np.uint8), self.reader.read_codes(0, sample))

    def plan(self, sample_S: np.ndarray) -> None:
        self.reader.plan(sample_S)

    def expect(self, sample_S: np.ndarray, epoch: int) -> None:
        del epoch
        self.reader.expect(0, sample_S)


@pytest.fixture(scope="session")
def large_cache(tmp_path_factory):
    """A cache of one view of 640 samples, whose codes take 42 MB in two shards and cannot be compressed."""
    path = tmp_path_factory.mktemp("large") / "large.zarr"
    layout = StoreLayout(
        num_views=1,
        num_samples=NUM_SAMPLES,
        num_layers=4,
        num_tokens=64,
        num_components=256,
        codes_dtype="int8",
        samples_per_shard=NUM_SAMPLES // 2,
        layers_per_chunk=2,
        parameter_names=PARAMETER_NAMES,
        pixels=None,
        compressor="zstd",
    )
    index = plain_index(NUM_SAMPLES)
    create_cache(path, layout, {}, index, {})
    for task in layout.tasks():
        writer = TaskWriter(path, layout, task)
        for sample in range(task.start, task.stop):
            codes_LTC = np.random.default_rng(sample).integers(-128, 128, (4, 64, 256)).astype(np.int8)
            writer.add(sample, status=Status.STORED, pixel_hash=1, chunks=encode_view(layout, codes_LTC))
        writer.commit()
    finish_cache(path)
    return path


@pytest.fixture
def codes_server(large_cache, blocks_dir):
    with FolderServer(large_cache.parent) as server:
        yield server


def shards_nbytes(path: Path) -> int:
    return sum(file.stat().st_size for file in (path / "attention/codes/c").rglob("*") if file.is_file())


def give_blocks(monkeypatch, nbytes: float) -> None:
    monkeypatch.setenv("ATCACHE_BLOCKS_GIB", str(nbytes / 2**30))


def read_epoch(server, cache: Path, sample_S: np.ndarray, shuffle, *, epochs: int = 1, workers: int = 2):
    """Requests for ranges that hold data, and bytes, of an epoch of every sample, checked against the local cache."""
    local = CacheReader(cache)
    views = CodesOnly(f"{server.url}/{cache.name}")
    samples = SampleOrder(sample_S=sample_S, seed=3, batch_size=BATCH, shuffle=shuffle)
    stream = BatchStream(
        views, np.zeros(NUM_SAMPLES, np.int64), samples, num_steps=epochs * len(sample_S) // BATCH, workers=workers
    )
    before, nbytes, seen = len(server.log), server.num_bytes, []
    for batch in stream:
        seen += batch.sample_B.tolist()
        assert batch.codes[0].codes_BLTC[0].numpy().tobytes() == local.read_codes(0, seen[-BATCH]).tobytes()
    assert sorted(seen) == sorted(sample_S.tolist() * epochs)
    return [one for one in server.log[before:] if one.range], server.num_bytes - nbytes


@pytest.mark.parametrize("shuffle", ["block", "global"])
def test_an_epoch_that_fits_comes_in_whole_stretches(shuffle, codes_server, large_cache, monkeypatch):
    nbytes = shards_nbytes(large_cache)
    give_blocks(monkeypatch, 4 * nbytes)
    codes_server.delay_s = 0.02
    requests, fetched = read_epoch(codes_server, large_cache, np.arange(NUM_SAMPLES), shuffle, epochs=3)
    assert nbytes <= fetched <= 1.1 * nbytes
    # For each shard its stretches and its index. Where two workers start with one stretch at once, it comes in parts.
    num_stretches = -(-nbytes // STRETCH_NBYTES)
    assert num_stretches <= len(requests) <= 2 * num_stretches + 10


def test_a_block_cache_of_half_the_data_brings_runs_of_neighbours(codes_server, large_cache, monkeypatch):
    monkeypatch.setattr(order, "WINDOW_BLOCKS", 1)
    nbytes = shards_nbytes(large_cache)
    give_blocks(monkeypatch, nbytes / 2)
    requests, fetched = read_epoch(codes_server, large_cache, np.arange(NUM_SAMPLES), "block")
    # 20 windows, of which the first is read before it is fetched. Blocks at the ends of windows come twice: 1 of 32.
    assert fetched <= 1.15 * nbytes
    assert len(requests) < 120


def test_random_reads_with_a_small_block_cache_bring_no_more_than_is_wanted(codes_server, large_cache, monkeypatch):
    nbytes = shards_nbytes(large_cache)
    give_blocks(monkeypatch, nbytes / 2)
    # Each sample has 64 KiB and a bit, so it lies in two blocks. Whole stretches would be 128 times what is read.
    _, fetched = read_epoch(codes_server, large_cache, np.arange(NUM_SAMPLES), "global")
    assert fetched <= 2.1 * nbytes


def test_a_few_samples_of_a_shard_bring_no_whole_stretches(codes_server, large_cache, monkeypatch):
    give_blocks(monkeypatch, 4 * shards_nbytes(large_cache))
    sample_S = np.arange(0, NUM_SAMPLES, 10)
    _, fetched = read_epoch(codes_server, large_cache, sample_S, "global")
    assert fetched <= 2 * len(sample_S) * BLOCK_NBYTES + 10 * BLOCK_NBYTES


def test_tars_of_which_all_is_read_come_in_whole_stretches(server, monkeypatch):
    give_blocks(monkeypatch, 2**26)
    data = np.random.default_rng(0).bytes(2 * STRETCH_NBYTES + 1000)
    (server.folder / "a.tar").write_bytes(data)
    url = parse_location(f"{server.url}/a.tar")
    offset_S = np.arange(0, len(data) - 40_000, 40_000)
    index = SampleIndex(
        tars=(url,),
        tar_nbytes=(len(data),),
        keys_S=np.array([b"%05d" % sample for sample in range(len(offset_S))]),
        tar_S=np.zeros(len(offset_S), np.int32),
        offset_S=offset_S,
        nbytes_S=np.full(len(offset_S), 39_000),
        label_S=np.zeros(len(offset_S), np.int64),
        problem_S=np.zeros(len(offset_S), np.uint8),
    )
    source = Source(index)
    source.plan(np.arange(len(offset_S)))
    for sample in np.random.default_rng(1).permutation(len(offset_S)).tolist():
        source.expect(np.array([sample]))
        assert source.read_bytes(sample) == data[sample * 40_000 :][:39_000]
    assert [one.method for one in server.log] == ["HEAD"] + ["GET"] * 3
    assert server.num_bytes == len(data)


def test_what_is_fetched_ahead_stays_until_it_is_read(tmp_path):
    blocks = BlockCache(tmp_path, 20 * 2**20)
    numbered = BlockKeys("http://host/file", "version", 2**30)
    keys = [numbered[number] for number in range(4000)]
    for key in keys[:2000]:
        blocks.put(key, key, was_read=True)
    ahead = keys[2000 : 2000 + blocks.num_slots // 2]
    for key in ahead:
        blocks.put(key, key)
    for key in keys[3000:]:  # others that are read at once
        blocks.put(key, key, was_read=True)
    assert sum(blocks.get(key) is not None for key in ahead) > 0.97 * len(ahead)
    for key in keys[:2000]:  # now they were read, and may go
        blocks.put(key, key, was_read=True)
    assert sum(blocks.get(key) is not None for key in ahead) < 0.3 * len(ahead)


def test_what_nobody_read_within_a_day_may_go(tmp_path, monkeypatch):
    blocks = BlockCache(tmp_path, 2**21)
    assert blocks.num_sets == 1
    old, *new = (bytes([number]) * 16 for number in range(1, 18))
    monkeypatch.setattr("atcache.files.remote.block_cache.time.time", lambda: 0.0)
    blocks.put(old, old)
    monkeypatch.undo()
    for key in new:
        blocks.put(key, key)
    assert not blocks.has(old)
    assert all(blocks.has(key) for key in new)


class _Reader:
    """Whoever promises."""


def test_room_is_for_all_that_was_promised_together(server, monkeypatch):
    give_blocks(monkeypatch, 2**26)
    (server.folder / "file").write_bytes(bytes(2**20))
    file = open_file(parse_location(f"{server.url}/file"))
    blocks = shared_blocks()
    one, other = _Reader(), _Reader()
    blocks.promise(one, "a", 2**25)
    file.will_read(2**20)
    assert file.comes_in_stretches
    blocks.promise(other, "a", 2**25)
    assert not file.comes_in_stretches
    blocks.promise(other, "a", 2**20)
    assert file.comes_in_stretches
    blocks.promise(other, "b", 2**25)
    assert not file.comes_in_stretches
    del other
    assert file.comes_in_stretches
    file.will_read(2**19)
    assert not file.comes_in_stretches


def test_readers_that_are_gone_take_no_room(codes_server, large_cache, monkeypatch):
    nbytes = shards_nbytes(large_cache)
    give_blocks(monkeypatch, 2 * nbytes)
    index = replace(
        CacheReader(large_cache).samples,
        tars=(parse_location(f"{codes_server.url}/a.tar"),),
        tar_nbytes=(nbytes,),
        nbytes_S=np.full(NUM_SAMPLES, nbytes // NUM_SAMPLES),
    )
    for _ in range(3):
        source, reader = Source(index), CacheReader(f"{codes_server.url}/{large_cache.name}")
        source.plan(np.arange(NUM_SAMPLES))
        assert shared_blocks().has_room
        reader.plan(np.arange(NUM_SAMPLES))
        reader.expect(0, np.arange(BATCH))
        assert not shared_blocks().has_room
        del source, reader
        gc.collect()
        assert shared_blocks().has_room
