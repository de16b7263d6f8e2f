"""Files, here or on a server, behind one small interface: read at any place, read whole, look for, list."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Protocol

from atcache.files.location import Location


class RangeFile(Protocol):
    """A file that can be read at any place. Threads may share one; closed with its last user."""

    @property
    def nbytes(self) -> int:
        """Its size when it was opened."""
        ...

    @property
    def version(self) -> str:
        """What changes when its content does; empty where that is not known."""
        ...

    def pread(self, nbytes: int, offset: int) -> bytes:
        """The bytes from `offset` on; fewer only where the file ends."""
        ...

    def expect(self, nbytes: int, offset: int) -> None:
        """Have these bytes brought near ahead of their use; returns at once, and may do nothing."""
        ...

    def forget(self, nbytes: int, offset: int) -> bool:
        """Drop copies of these bytes that are kept nearer than the file; whether there can be any."""
        ...


class LocalFile:
    """A file of this machine; see `RangeFile`."""

    version = ""

    def __init__(self, path: Path) -> None:
        """Open it; an OSError when that cannot be done."""
        self._fd = -1
        self._fd = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        self.nbytes = os.fstat(self._fd).st_size

    def __del__(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)

    def pread(self, nbytes: int, offset: int) -> bytes:
        """See `RangeFile.pread`."""
        data = os.pread(self._fd, nbytes, offset)
        while len(data) < nbytes:  # it may stop early at 2 GiB, or at a signal
            more = os.pread(self._fd, nbytes - len(data), offset + len(data))
            if not more:
                break
            data += more
        return data

    def expect(self, nbytes: int, offset: int) -> None:
        """See `RangeFile.expect`: asks the system to read ahead."""
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._fd, offset, nbytes, os.POSIX_FADV_WILLNEED)

    def forget(self, nbytes: int, offset: int) -> bool:
        """See `RangeFile.forget`: the system's own copies are as good as the file."""
        del nbytes, offset
        return False


def open_file(location: Location) -> RangeFile:
    """A file, open for reading.

    Raises:
        FileNotFoundError: there is none.
        OSError: a local one cannot be opened.
        RemoteError: a server cannot be asked.
    """
    if isinstance(location, Path):
        return LocalFile(location)
    from atcache.files.remote.remote_file import RemoteFile

    return RemoteFile(location)


def read_file(location: Location) -> bytes:
    """A small file, whole; see `open_file` for the errors."""
    if isinstance(location, Path):
        return location.read_bytes()
    from atcache.files.remote.fetcher import read_whole

    return read_whole(location)


def file_exists(location: Location) -> bool:
    """Whether there is such a file."""
    if isinstance(location, Path):
        return location.exists()
    from atcache.files.remote.fetcher import head

    try:
        head(location)
    except FileNotFoundError:
        return False
    return True


def list_files(folder: Location) -> list[str]:
    """The files in a folder and all below it, by their paths in it, in order; none where there is no such folder.

    Raises:
        RemoteError: a web server, which cannot list.
    """
    if isinstance(folder, Path):
        return sorted(
            (Path(parent) / name).relative_to(folder).as_posix()
            for parent, _, names in os.walk(folder)
            for name in names
        )
    from atcache.files.remote.fetcher import list_below

    return sorted(list_below(folder))
