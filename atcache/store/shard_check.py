"""Checks one shard: its size, its index, the checksum of the whole file, and that each chunk can be decompressed.

Memory: one chunk."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

from atcache.files.location import Location
from atcache.files.ranges import RangeFile, is_damage, open_file, unreadable
from atcache.store.chunks import EMPTY, DamagedChunkError, decode_index, decompress_into
from atcache.store.layout import ArraySpec

_GAP_BLOCK_NBYTES = 2**22  # bytes between chunks are read in blocks, however many they are


@dataclass(kw_only=True, slots=True)
class ShardCheck:
    """What checking one shard found."""

    problem: str | None = None
    """One sentence that names the file; None if nothing is wrong."""
    is_there_N: np.ndarray | None = None
    """Which chunks the index lists, bool; None if the index cannot be used."""
    content: np.ndarray = field(default_factory=lambda: np.empty(0, np.uint8))
    """The bytes of the last chunk that was decompressed; if the shard has only one chunk, its whole content."""


def check_shard(
    file: Location, spec: ArraySpec, nbytes: int, crc32: int, *, first_sample: int = 0, deep: bool = False
) -> ShardCheck:
    """Check one shard.

    Args:
        file: the shard.
        spec: its array.
        nbytes: the size that was committed.
        crc32: the committed checksum of the whole file.
        first_sample: the sample of its first chunks, for messages.
        deep: read every byte; if False, check only the size and the index.

    Raises:
        AtcacheError: it cannot be read now, which says nothing about it.
    """
    check = ShardCheck()
    try:
        shard = open_file(file)
        if shard.nbytes != nbytes:
            check.problem = f"{file} has {shard.nbytes} bytes, {nbytes} were committed."
            return check
        reason = _look(shard, spec, crc32 if deep else None, first_sample, check)
        if reason is not None and shard.forget(nbytes, 0):  # perhaps only a copy of a remote file is damaged
            reason = _look(shard, spec, crc32 if deep else None, first_sample, check)
        if reason is not None:
            check.problem = f"{file} is damaged: {reason}."
    except OSError as error:
        if not is_damage(error):
            raise unreadable(file, error) from error
        check.problem = f"{file} cannot be read: {error.strerror}."
    return check


def _look(shard: RangeFile, spec: ArraySpec, crc32: int | None, first_sample: int, check: ShardCheck) -> str | None:
    """How a shard of the right size is damaged; None if it is not. If `crc32` is given, every byte is checked."""
    try:
        start = max(0, shard.nbytes - spec.index_nbytes)
        index_N2 = decode_index(shard.pread(shard.nbytes - start, start), spec, shard.nbytes)
    except DamagedChunkError as error:
        return str(error)
    check.is_there_N = index_N2[:, 0] != EMPTY
    if crc32 is None:
        return None
    damaged, found_crc32 = _read_all(shard, index_N2, spec, check)
    if damaged:
        return _describe(damaged, spec, first_sample)
    return None if found_crc32 == crc32 else "its checksum is not the committed one"


def _read_all(shard: RangeFile, index_N2: np.ndarray, spec: ArraySpec, check: ShardCheck) -> tuple[dict[int, str], int]:
    """The damaged chunks by number, each with what is wrong, and the crc32 of the file. Reads each byte once."""
    damaged: dict[int, str] = {}
    check.content = np.empty(spec.chunk_nbytes, np.uint8)
    position = crc32 = 0
    # In the order of the file, which another writer may have chosen freely: chunks may even overlap.
    for number in np.argsort(index_N2[:, 0], kind="stable").tolist():
        offset, length = index_N2[number].tolist()
        if offset == EMPTY:
            break  # chunks that are not there sort last
        crc32 = _skip(shard, position, offset, crc32)
        data = shard.pread(length, offset)
        crc32 = zlib.crc32(memoryview(data)[max(0, position - offset) :], crc32)
        position = max(position, offset + length)
        try:
            decompress_into(data, spec.compressor, check.content)
        except DamagedChunkError as error:
            damaged[number] = str(error)
    return damaged, _skip(shard, position, shard.nbytes, crc32)


def _skip(shard: RangeFile, position: int, stop: int, crc32: int) -> int:
    """The crc32 continued over the bytes from `position` to `stop`, if there are any."""
    while position < stop and (block := shard.pread(min(_GAP_BLOCK_NBYTES, stop - position), position)):
        crc32 = zlib.crc32(block, crc32)
        position += len(block)
    return crc32


def _describe(damaged: dict[int, str], spec: ArraySpec, first_sample: int) -> str:
    """Which samples have damaged chunks, and how the first of these is damaged.

    One line per shard, because a lost disk sector can damage thousands of chunks.
    """
    reason = next(iter(damaged.values()))
    if not spec.num_chunks_per_sample:
        return reason
    samples = sorted({first_sample + number // spec.num_chunks_per_sample for number in damaged})
    chunks = "1 chunk" if len(damaged) == 1 else f"{len(damaged)} chunks"
    return f"{chunks} of {name_samples(samples)}: {reason}"


def name_samples(samples: list[int]) -> str:
    """Ascending samples in words, runs shortened.

    >>> name_samples([3, 5, 6, 7])
    'samples 3, 5-7'
    """
    breaks = [0, *(place for place, (one, next_) in enumerate(pairwise(samples), 1) if next_ != one + 1), len(samples)]
    runs = [samples[start:stop] for start, stop in pairwise(breaks)]
    text = ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
    return f"{'sample' if len(samples) == 1 else 'samples'} {text}"
