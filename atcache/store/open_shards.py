"""Shards that are open for reading: their files and checked indexes, a limited number of them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache, lru_cache, partial
from pathlib import Path
from typing import TypeVar

import numpy as np

from atcache.files.location import Location
from atcache.files.ranges import NotAFileError, RangeFile, open_file
from atcache.store.chunks import EMPTY, DamagedChunkError, decode_index, decompress_into
from atcache.store.layout import ArraySpec, Task

# Bounds what is kept: file descriptors, and indexes of some 100 KB each for a large teacher.
MAX_OPEN_SHARDS = 384
MAX_VIEW_BLOCKS = 128

_NUM_REQUESTS = 16  # requests to a server at the same time

# Chunks further apart than this are read one by one: another writer may have laid them out in another order.
_MAX_GAP_NBYTES = 2**16


Item = TypeVar("Item")
Result = TypeVar("Result")


class OpenShard:
    """A shard's file and checked index. Closed with its last user, so that eviction cannot hurt a reading thread."""

    def __init__(self, file: RangeFile, spec: ArraySpec) -> None:
        """Read its index.

        Raises:
            DamagedChunkError: the index cannot be used.
        """
        self.file = file
        nbytes = self.file.nbytes
        if nbytes < spec.index_nbytes:
            raise DamagedChunkError(f"it has {nbytes} bytes, fewer than its index")
        self.index_N2 = self._read_index(spec)

    def _read_index(self, spec: ArraySpec) -> np.ndarray:
        offset = self.file.nbytes - spec.index_nbytes
        try:
            return decode_index(self._read(spec.index_nbytes, offset), spec, self.file.nbytes)
        except DamagedChunkError:
            if not self.file.forget(spec.index_nbytes, offset):
                raise
        return decode_index(self._read(spec.index_nbytes, offset), spec, self.file.nbytes)

    def read_into(self, ranges: list[list[int]], spec: ArraySpec, out_bytes: np.ndarray) -> None:
        """Decompress the chunks at these (offset, nbytes) one after another; see `decompress_into`.

        If a chunk is damaged in the local copy of a remote shard, it is fetched again, once.

        Raises:
            DamagedChunkError: the file ends early, or a chunk is damaged.
        """
        try:
            self._read_into(ranges, spec, out_bytes)
        except DamagedChunkError:
            # A list, not a generator: every range must be forgotten, not only the first.
            if not any([self.file.forget(nbytes, offset) for offset, nbytes in ranges]):
                raise
            self._read_into(ranges, spec, out_bytes)

    def _read_into(self, ranges: list[list[int]], spec: ArraySpec, out_bytes: np.ndarray) -> None:
        nbytes = out_bytes.nbytes // len(ranges)
        for number, encoded in enumerate(self._read_chunks(ranges)):
            decompress_into(encoded, spec.compressor, out_bytes[number * nbytes : (number + 1) * nbytes])

    def _read_chunks(self, ranges: list[list[int]]) -> list[bytes]:
        """The chunks at these (offset, nbytes), in one `pread` unless they lie far apart."""
        if len(ranges) == 1:
            ((offset, nbytes),) = ranges
            return [self._read(nbytes, offset)]
        start = min(offset for offset, _ in ranges)
        nbytes = max(offset + nbytes for offset, nbytes in ranges) - start
        if nbytes > sum(nbytes for _, nbytes in ranges) + _MAX_GAP_NBYTES:
            return [self._read(nbytes, offset) for offset, nbytes in ranges]
        data = self._read(nbytes, start)
        return [data[offset - start : offset - start + nbytes] for offset, nbytes in ranges]

    def place_of(self, first: int, stop: int) -> tuple[RangeFile, int, int] | None:
        """Where the chunks numbered `first` up to `stop` are, as (file, bytes, offset); None if none is stored."""
        index_N2 = self.index_N2[first:stop]
        index_N2 = index_N2[index_N2[:, 0] != EMPTY]
        if not len(index_N2):
            return None
        start, end = int(index_N2[:, 0].min()), int(index_N2.sum(axis=1).max())
        return self.file, end - start, start

    def _read(self, nbytes: int, offset: int) -> bytes:
        data = self.file.pread(nbytes, offset)
        if len(data) < nbytes:
            raise DamagedChunkError("it ends early")
        return data


class OpenShards:
    """The shards of one cache. Threads may share it; a forked copy opens its own files."""

    def __init__(self, path: Location) -> None:
        self._path = path
        self._reset()

    def _reset(self) -> None:
        self._pid = os.getpid()
        # Remote files hold no descriptor, so all of them are kept: opening one again would ask the server.
        find = open_file if isinstance(self._path, Path) else cache(open_file)
        self._read_block = partial(_read_block, self._path, find)
        self._kept_shard = lru_cache(MAX_OPEN_SHARDS)(partial(_open_shard, self._path, find))
        self._kept_block = lru_cache(MAX_VIEW_BLOCKS)(self._read_block)

    def map(self, work: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
        """The results of `work` in order. A remote cache runs several at once, since each waits for a server."""
        if isinstance(self._path, Path) or len(items) < 2:
            return [work(item) for item in items]
        with ThreadPoolExecutor(_NUM_REQUESTS) as pool:
            return list(pool.map(work, items))

    def open_together(
        self, specs: Iterable[ArraySpec], block_specs: Sequence[ArraySpec], tasks: Iterable[Task]
    ) -> None:
        """`get` the shards of `specs`, `view_block` those of `block_specs`. Damage is left for reading to report."""

        def open_quietly(place: tuple[ArraySpec, Task]) -> None:
            with suppress(DamagedChunkError):
                if place[0] in block_specs:
                    self.view_block(*place)
                else:
                    self.get(*place)

        self.map(open_quietly, [(spec, task) for task in tasks for spec in (*specs, *block_specs)])

    def get(self, spec: ArraySpec, task: Task) -> OpenShard | None:
        """The open shard, or None if there is no such file: its task is not done.

        Raises:
            DamagedChunkError: its index cannot be used.
        """
        if self._pid != os.getpid():
            self._reset()
        try:
            return self._kept_shard(spec, task)
        except FileNotFoundError:
            return None

    def view_block(self, spec: ArraySpec, task: Task, *, keep: bool = True) -> np.ndarray | None:
        """One shard of a views array, which is one chunk; None if its task is not done.

        Raises:
            DamagedChunkError: it cannot be used.
        """
        if self._pid != os.getpid():
            self._reset()
        try:
            return self._kept_block(spec, task) if keep else self._read_block(spec, task)
        except FileNotFoundError:
            return None


def _open_shard(path: Location, find: Callable[[Location], RangeFile], spec: ArraySpec, task: Task) -> OpenShard:
    try:
        file = find(path / spec.shard_file(task))
    except (IsADirectoryError, NotAFileError) as error:
        raise DamagedChunkError(f"it is {error.strerror}") from error
    return OpenShard(file, spec)


def _read_block(path: Location, find: Callable[[Location], RangeFile], spec: ArraySpec, task: Task) -> np.ndarray:
    shard = _open_shard(path, find, spec, task)
    block = np.empty(spec.chunk_shape[1:], spec.dtype)
    ranges: list[list[int]] = shard.index_N2[:1].tolist()
    if ranges[0][0] == EMPTY:
        raise DamagedChunkError("its only chunk is missing")
    shard.read_into(ranges, spec, block.reshape(-1).view(np.uint8))
    return block
