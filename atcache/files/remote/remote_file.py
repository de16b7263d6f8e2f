"""A file on a server. Any part of it can be read, through the block cache."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any

from atcache.errors import RemoteError
from atcache.files.location import Url
from atcache.files.remote import ahead
from atcache.files.remote.block_cache import BLOCK_NBYTES, BlockCache, BlockKeys, shared_blocks
from atcache.files.remote.claims import Claims
from atcache.files.remote.fetcher import get_range, head

STRETCH_BLOCKS = 128
"""8 MiB, the most that one request asks for. At 50 ms and 100 MB/s, a request costs as much as 5 MB; several are under
way at a time. Smaller stretches mean more requests, larger ones more memory and a later first batch."""
# Of a file of which at least this share will be read, all is worth fetching.
_WHOLE_SHARE = 0.75
# Of the block cache, for one list of what is expected: two windows of codes and images may be expected at a time.
_MAX_EXPECTED_SHARE = 1 / 8
# Blocks that are here already, but lie between missing ones, come again rather than cost another request: 128 KiB take
# 1 ms at 100 MB/s. A whole view that a batch has fetched before its window is not worth it.
_MAX_HOLE_BLOCKS = 2
# Reads this close together count as one pass over the file. The blocks that follow are then fetched ahead.
_NEAR_BLOCKS = 8
# How long a read waits for blocks that another process fetches. That process may be stopped, as by a debugger.
_PATIENCE_S = 120.0
_MAX_AHEAD_BLOCKS = 4 * STRETCH_BLOCKS

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

    Only one process at a time fetches a block, and all processes can then read it. How much a request asks for:

    - Where an epoch will read the file (nearly) whole, and the block cache has room for all that it will read, a
      missing block brings its whole stretch of `STRETCH_BLOCKS`: each byte comes once, in as few requests as possible.
    - Else only the blocks that are wanted: what came with them would be replaced before it is read. Neighbours share a
      request. So under `--shuffle block` a request brings the 32 neighbouring samples of a block.
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
        self._is_read_whole = False

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
        first, stop = (numbers := self.blocks_of(nbytes, offset)).start, numbers.stop
        self._look_ahead(first, stop)
        parts = self._read_blocks(numbers)
        data = parts[0] if len(parts) == 1 else b"".join(parts)
        return data[offset - first * BLOCK_NBYTES : end - first * BLOCK_NBYTES]

    def expect(self, nbytes: int, offset: int) -> None:
        """See `RangeFile.expect`. Starts to fetch the blocks that are not in the cache. A later read reports errors."""
        expect_together([(self, nbytes, offset)])

    def will_read(self, nbytes: int) -> None:
        """See `RangeFile.will_read`."""
        self._is_read_whole = nbytes >= _WHOLE_SHARE * self.nbytes

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

    @property
    def comes_in_stretches(self) -> bool:
        """Whether a missing block brings its whole stretch."""
        return self._is_read_whole and self._blocks.has_room

    def _read_blocks(self, numbers: range) -> list[bytes]:
        until_s = time.monotonic() + _PATIENCE_S
        found = {number: self._blocks.get(self._keys[number]) for number in numbers}
        while missing := [number for number, data in found.items() if data is None]:
            for run, future in self._fetch_for(missing):
                fetched = self._cut(run, future.result()[1])
                found.update({number: data for number, data in fetched.items() if number in numbers})
            # Others fetch the rest, or have just done so. Here we hold no claim, as `Claims.wait` demands.
            abandoned: list[int] = []
            for number in missing:
                if found[number] is None:
                    is_free = self._claims.wait(self._keys[number], until_s)
                    found[number] = self._blocks.get(self._keys[number])
                    if found[number] is None and not is_free:
                        abandoned.append(number)
            found.update(self._fetch_unclaimed(abandoned))
        return [data for data in found.values() if data is not None]

    def _fetch_unclaimed(self, numbers: list[int]) -> dict[int, bytes]:
        """Blocks that another process claims and does not bring. A block that comes twice does no harm."""
        fetched: dict[int, bytes] = {}
        for run in _runs(numbers):
            stop = min(run.stop * BLOCK_NBYTES, self.nbytes)
            fetched |= self._cut(run, get_range(self._url, self._meta, run.start * BLOCK_NBYTES, stop).result()[1])
        for number, data in fetched.items():
            self._blocks.put(self._keys[number], data, was_read=True)
        return fetched

    def _fetch_for(self, wanted: list[int]) -> list[tuple[range, _Fetched]]:
        """Start to fetch blocks that a reader waits for; the requests for those that nobody else fetches."""
        fetched: list[tuple[range, _Fetched]] = []
        if self.comes_in_stretches:
            for stretch in self.stretches_of(wanted):
                fetched += self._fetch(self.missing(stretch), wanted, gives_up=True)
        fetched += self._fetch(wanted, wanted)
        return [(run, future) for run, future in fetched if any(number in run for number in wanted)]

    def fetch_ahead(self, numbers: range) -> list[tuple[int, _Fetched]]:
        """See `Fetchable.fetch_ahead`."""
        fetched = self._fetch(self.missing(numbers), gives_up=True)
        return [(len(run) * BLOCK_NBYTES, future) for run, future in fetched]

    def blocks_of(self, nbytes: int, offset: int) -> range:
        """The numbers of the blocks that hold these bytes."""
        return range(offset // BLOCK_NBYTES, -(-min(offset + nbytes, self.nbytes) // BLOCK_NBYTES))

    def missing(self, numbers: Iterable[int]) -> list[int]:
        """Those of these blocks that are not in the block cache."""
        return [number for number in numbers if not self._blocks.has(self._keys[number])]

    def stretches_of(self, numbers: Iterable[int]) -> list[range]:
        """The stretches that these blocks are in."""
        starts = dict.fromkeys(number // STRETCH_BLOCKS * STRETCH_BLOCKS for number in numbers)
        stop = -(-self.nbytes // BLOCK_NBYTES)
        return [range(start, min(start + STRETCH_BLOCKS, stop)) for start in starts]

    def _fetch(
        self, numbers: Iterable[int], wanted: Sequence[int] = (), *, gives_up: bool = False
    ) -> list[tuple[range, _Fetched]]:
        """Start to fetch these blocks, given in ascending order, except those that others are fetching already.

        Each is stored in the block cache when it arrives.

        Args:
            numbers: the blocks.
            wanted: those that a reader waits for, so that they count as read.
            gives_up: fetch nothing if others have the first two: they have begun with the same run. (The first alone
                may be the last of another run.)
        """
        # Cut where others fetch a block already, so that it does not come a second time.
        pieces: list[list[int]] = [[]]
        for place, number in enumerate(numbers):
            if self._claims.take(self._keys[number]):
                pieces[-1].append(number)
            elif gives_up and place == 1 and not pieces[0]:
                return []
            else:
                pieces.append([])
        fetched: list[tuple[range, _Fetched]] = []
        for piece in pieces:
            # Others may have stored a block after the caller looked and before we claimed it.
            late = {number for number in piece if self._is_here(number, number in wanted)}
            for number in late:
                self._claims.release(self._keys[number])
            mine = [number for number in piece if number not in late]
            for run in _runs(mine, _MAX_HOLE_BLOCKS):
                stop = min(run.stop * BLOCK_NBYTES, self.nbytes)
                future = get_range(self._url, self._meta, run.start * BLOCK_NBYTES, stop)
                claimed = {number: number in wanted for number in mine if number in run}
                future.add_done_callback(partial(self._keep, run, claimed))
                fetched.append((run, future))
        return fetched

    def _is_here(self, number: int, is_wanted: bool) -> bool:
        """Whether a block is in the block cache. One that a reader waits for must be readable, or it waits for ever."""
        key = self._keys[number]
        return self._blocks.get(key) is not None if is_wanted else self._blocks.has(key)

    def _keep(self, run: range, claimed: dict[int, bool], future: _Fetched) -> None:
        """Store those blocks of a run that we claimed, each with whether it counts as read, and give up the claims."""
        try:
            if future.exception() is None:
                data = self._cut(run, future.result()[1])
                for number, was_read in claimed.items():
                    self._blocks.put(self._keys[number], data[number], was_read=was_read)
        except RemoteError:
            return  # the reader gets this error from the future
        finally:
            for number in claimed:
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


def expect_together(wanted: Sequence[tuple[RemoteFile, int, int]]) -> None:
    """Start to fetch these ranges of files, each as (file, bytes, offset), in this order. Returns at once.

    Nothing is fetched if it might be replaced by the rest before it is read. The reader then fetches what it needs.
    """
    numbers_of: dict[RemoteFile, set[int]] = {}
    for file, nbytes, offset in wanted:
        numbers_of.setdefault(file, set()).update(file.blocks_of(nbytes, offset))
    runs: list[tuple[RemoteFile, range]] = []
    num_missing = num_narrow = 0
    for file, numbers in numbers_of.items():
        missing = set(file.missing(sorted(numbers)))
        num_missing += len(missing)
        if file.comes_in_stretches:
            runs += [(file, stretch) for stretch in file.stretches_of(sorted(missing))]
        else:
            num_narrow += len(missing)
            runs += [(file, run) for run in _runs(sorted(numbers)) if not missing.isdisjoint(run)]
    if num_narrow <= shared_blocks().num_slots * _MAX_EXPECTED_SHARE:
        ahead.shared.add(num_missing, runs)


def _runs(numbers: list[int], max_hole: int = 0) -> list[range]:
    """Ascending numbers as ranges of neighbours, each of at most `STRETCH_BLOCKS`.

    Args:
        numbers: the numbers.
        max_hole: numbers count as neighbours if at most this many are missing between them.

    >>> _runs([1, 2, 3, 7])
    [range(1, 4), range(7, 8)]
    >>> _runs([1, 2, 3, 7], max_hole=3)
    [range(1, 8)]
    """
    runs: list[range] = []
    for number in numbers:
        last = runs[-1] if runs else None
        if last and number - last.stop <= max_hole and number - last.start < STRETCH_BLOCKS:
            runs[-1] = range(last.start, number + 1)
        else:
            runs.append(range(number, number + 1))
    return runs
