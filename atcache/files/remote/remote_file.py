"""A file on a server. Any part of it can be read, through the block cache."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable
from concurrent.futures import Future
from functools import partial
from itertools import pairwise
from typing import Any

from atcache.errors import RemoteError
from atcache.files.location import Url
from atcache.files.remote.block_cache import BLOCK_NBYTES, BlockCache, BlockKeys, shared_blocks
from atcache.files.remote.claims import Claims
from atcache.files.remote.fetcher import get_range, head

_MAX_BLOCKS_A_REQUEST = 32
# Reads this close together count as one pass over the file. The blocks that follow are then fetched ahead.
_NEAR_BLOCKS = 8
_MAX_AHEAD_BLOCKS = 128

_Fetched = Future[tuple[dict[str, Any], bytes]]

_claims: Claims | None = None
_making = threading.Lock()


def _shared_claims(blocks: BlockCache) -> Claims:
    global _claims
    with _making:
        if _claims is None:
            _claims = Claims(blocks.lock_fd)
        return _claims


def _renew_lock() -> None:
    global _making
    _making = threading.Lock()


os.register_at_fork(after_in_child=_renew_lock)


class RemoteFile:
    """One version of a file on a server; see `RangeFile`. Threads and forked processes may share it.

    Only one process at a time fetches a block, and all processes can then read it. Adjacent blocks share a request.
    """

    def __init__(self, url: Url) -> None:
        """Ask the server for the file's size and version.

        Raises:
            FileNotFoundError: the server has no such file.
            RemoteError: the server does not answer, or refuses access.
        """
        self._url = url
        self._meta = head(url)
        self._keys = BlockKeys(str(url), self._meta.version, self._meta.size)
        self._blocks = shared_blocks()
        self._claims = _shared_claims(self._blocks)
        # A small share of the cache, so that blocks fetched ahead are not replaced before they are read.
        self._num_ahead = min(_MAX_AHEAD_BLOCKS, self._blocks.num_slots // 32)
        self._last_stop = self._ahead_stop = self._num_near = 0

    @property
    def nbytes(self) -> int:
        """The file's size."""
        return self._meta.size

    @property
    def version(self) -> str:
        """The entity tag, or the time of the last change."""
        return self._meta.version

    def pread(self, nbytes: int, offset: int) -> bytes:
        """See `RangeFile.pread`.

        Raises:
            RemoteError: the file has changed, or cannot be read.
        """
        end = min(offset + nbytes, self.nbytes)
        if offset >= end:
            return b""
        first, stop = offset // BLOCK_NBYTES, -(-end // BLOCK_NBYTES)
        self._look_ahead(first, stop)
        parts = self._read_blocks(range(first, stop))
        data = parts[0] if len(parts) == 1 else b"".join(parts)
        return data[offset - first * BLOCK_NBYTES : end - first * BLOCK_NBYTES]

    def expect(self, nbytes: int, offset: int) -> None:
        """See `RangeFile.expect`. Starts to fetch the blocks that are not in the cache. A later read reports errors."""
        end = min(offset + nbytes, self.nbytes)
        wanted = range(offset // BLOCK_NBYTES, -(-end // BLOCK_NBYTES))
        self._fetch([number for number in wanted if not self._blocks.has(self._keys[number])])

    def forget(self, nbytes: int, offset: int) -> bool:
        """See `RangeFile.forget`."""
        for number in range(offset // BLOCK_NBYTES, -(-(offset + nbytes) // BLOCK_NBYTES)):
            self._blocks.drop(self._keys[number])
        return True

    def _look_ahead(self, first: int, stop: int) -> None:
        """Fetch ahead if reads follow one another closely, as the reads of tar headers do."""
        is_near = -1 <= first - self._last_stop <= _NEAR_BLOCKS
        self._num_near = self._num_near + 1 if is_near else 0
        self._last_stop = stop
        if self._num_near < 2:
            self._ahead_stop = stop
        elif stop + self._num_ahead // 2 > self._ahead_stop:
            begin = max(stop, self._ahead_stop)
            self._ahead_stop = begin + self._num_ahead
            self.expect(self._num_ahead * BLOCK_NBYTES, begin * BLOCK_NBYTES)

    def _read_blocks(self, numbers: range) -> list[bytes]:
        found = {number: self._blocks.get(self._keys[number]) for number in numbers}
        while missing := [number for number, data in found.items() if data is None]:
            fetched = self._fetch(missing)
            for run, future in fetched:
                found.update(self._cut(run, future.result()[1]))
            # Others fetch the rest, or have just done so. Here we hold no claim, as `Claims.wait` demands.
            for number in missing:
                if found[number] is None:
                    self._claims.wait(self._keys[number])
                    found[number] = self._blocks.get(self._keys[number])
        return [data for data in found.values() if data is not None]

    def _fetch(self, numbers: Iterable[int]) -> list[tuple[range, _Fetched]]:
        """Start to fetch these blocks, given in ascending order, except those that others are fetching already.

        Each is stored in the block cache when it arrives.
        """
        mine = [number for number in numbers if self._claims.take(self._keys[number])]
        # Others may have stored a block after the caller looked and before we claimed it.
        late = {number for number in mine if self._blocks.has(self._keys[number])}
        for number in late:
            self._claims.release(self._keys[number])
        fetched: list[tuple[range, _Fetched]] = []
        for run in _runs([number for number in mine if number not in late]):
            stop = min(run.stop * BLOCK_NBYTES, self.nbytes)
            future = get_range(self._url, self._meta, run.start * BLOCK_NBYTES, stop)
            future.add_done_callback(partial(self._keep, run))
            fetched.append((run, future))
        return fetched

    def _keep(self, run: range, future: _Fetched) -> None:
        """Store the blocks that arrived, and give up the claims on them."""
        try:
            if future.exception() is None:
                for number, data in self._cut(run, future.result()[1]).items():
                    self._blocks.put(self._keys[number], data)
        except RemoteError:
            return  # the reader gets this error from the future
        finally:
            for number in run:
                self._claims.release(self._keys[number])

    def _cut(self, run: range, data: bytes) -> dict[int, bytes]:
        """The fetched bytes, cut into blocks."""
        expected = min(run.stop * BLOCK_NBYTES, self.nbytes) - run.start * BLOCK_NBYTES
        if len(data) != expected:
            raise RemoteError(
                f"{self._url} cannot be read: its server sent {len(data)} bytes, expected {expected}. Try again, or "
                "use another server."
            )
        starts = range(0, len(data), BLOCK_NBYTES)
        return {number: data[start : start + BLOCK_NBYTES] for number, start in zip(run, starts, strict=True)}


def _runs(numbers: list[int]) -> list[range]:
    """Ascending numbers as ranges of neighbours, each of at most `_MAX_BLOCKS_A_REQUEST`.

    >>> _runs([1, 2, 3, 7])
    [range(1, 4), range(7, 8)]
    """
    cuts = [0, *(at for at, (one, next_) in enumerate(pairwise(numbers), 1) if next_ != one + 1), len(numbers)]
    runs = [range(numbers[start], numbers[stop - 1] + 1) for start, stop in pairwise(cuts) if stop > start]
    return [
        range(start, min(start + _MAX_BLOCKS_A_REQUEST, run.stop))
        for run in runs
        for start in range(run.start, run.stop, _MAX_BLOCKS_A_REQUEST)
    ]
