"""Copies a file from a server or another disk, whole, to the local disk."""

from __future__ import annotations

import threading
import zlib
from collections.abc import Iterator
from pathlib import Path

from atcache.errors import CorruptCacheError
from atcache.files.durable import replaced_whole
from atcache.files.location import Location, Url
from atcache.files.ranges import LocalFile
from atcache.files.remote.fetcher import get_range, head

_PIECE_NBYTES = 8 * 2**20


def download(source: Location, target: Path, nbytes: int, crc32: int, stop: threading.Event) -> None:
    """Copy a file that must have this size and checksum; `target` is durable and whole, or is not there.

    Another thread may set `stop`, which ends this with an InterruptedError.

    The blocks that training keeps of remote files are left alone: what is read here is read once.

    Raises:
        FileNotFoundError: there is no such file.
        CorruptCacheError: it has other bytes.
        RemoteError: the server cannot be read.
        DiskFullError: no space is left.
    """
    with replaced_whole(target) as partial:
        found_nbytes, found_crc32 = 0, 0
        with partial.open("wb") as file:
            for piece in _pieces(source, nbytes):
                if stop.is_set():
                    raise InterruptedError
                file.write(piece)
                found_nbytes, found_crc32 = found_nbytes + len(piece), zlib.crc32(piece, found_crc32)
        if (found_nbytes, found_crc32) != (nbytes, crc32):
            raise CorruptCacheError(
                f"{source} has {found_nbytes} bytes with the checksum {found_crc32:08x}, but its commit record says "
                f"{nbytes} bytes with {crc32:08x}: it is damaged where it is. Ask who published it."
            )


def _pieces(source: Location, nbytes: int) -> Iterator[bytes]:
    """The file in order, at most `nbytes` bytes of it if it has the right size, else none."""
    starts = range(0, nbytes, _PIECE_NBYTES)
    if not isinstance(source, Url):
        local = LocalFile(source)
        if local.nbytes == nbytes:
            yield from (local.pread(_PIECE_NBYTES, start) for start in starts)
        return
    meta = head(source)
    if meta.size != nbytes:
        return
    # One piece is on its way while the one before is written.
    ahead = get_range(source, meta, 0, min(_PIECE_NBYTES, nbytes)) if nbytes else None
    for start in starts:
        assert ahead is not None, "there is a piece for each start"
        piece = ahead.result()[1]
        following = start + _PIECE_NBYTES
        ahead = (
            get_range(source, meta, following, min(following + _PIECE_NBYTES, nbytes)) if following < nbytes else None
        )
        yield piece
