"""One small interface to files on this machine and on servers: read any part, read all, check existence, list."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from atcache.errors import AtcacheError
from atcache.files.location import Location

MAX_WHOLE_NBYTES = 2**31
"""The largest file that is read as a whole: what claims to be larger is no part of a cache."""


class NotAFileError(OSError):
    """There is something else at a path, whose bytes may never come or never end."""


_DAMAGE = frozenset((errno.ELOOP, errno.EIO, errno.ENXIO, errno.EFBIG))
"""Of the errors that have no class of their own, those that tell of the file: a loop of links, a bad disk, a socket,
more bytes than any file of a cache has."""


def is_damage(error: OSError) -> bool:
    """Whether an error of reading a file says that the file is gone, damaged or something else.

    Others say only that it cannot be read now: too many open files, no memory, no permission, a server that lost its
    place. Whoever takes these for damage deletes what is whole.
    """
    gone = (FileNotFoundError, NotADirectoryError, IsADirectoryError, NotAFileError)
    return isinstance(error, gone) or error.errno in _DAMAGE


def unreadable(place: Location, error: OSError) -> AtcacheError:
    """The error for what cannot be read now, see `is_damage`. It is no OSError, as `RemoteError` is none."""
    return AtcacheError(
        f"{place} cannot be read: {error.strerror or error}. It may be whole, so nothing was decided about it. Check "
        "its permissions and the disk, or the limit of open files, and type the same command again."
    )


class RangeFile(Protocol):
    """A file of which any part can be read. Threads may share one. It closes when nothing refers to it."""

    @property
    def nbytes(self) -> int:
        """The file's size when it was opened."""
        ...

    @property
    def version(self) -> str:
        """A text that changes when the file's content changes; empty if the file has none."""
        ...

    def pread(self, nbytes: int, offset: int) -> bytes:
        """`nbytes` bytes from `offset` on; fewer only if the file ends before."""
        ...

    def expect(self, nbytes: int, offset: int) -> None:
        """Start to fetch these bytes before they are read. Returns at once, and may do nothing."""
        ...

    def will_read(self, nbytes: int) -> None:
        """Say how many of its bytes will be read within an epoch: it may be worth fetching it whole."""
        ...

    def forget(self, nbytes: int, offset: int) -> bool:
        """Drop cached copies of these bytes. Returns whether this kind of file has such copies."""
        ...


class LocalFile:
    """A file on this machine; see `RangeFile`."""

    version = ""

    def __init__(self, path: Path) -> None:
        """Open the file; raises an OSError if that fails, or if it is a folder, a pipe or a device."""
        self._fd = -1  # for `__del__`, if opening fails
        # Without waiting for the other end, should it be a pipe.
        flags = os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NONBLOCK", 0)
        self._fd = os.open(path, flags)
        about = os.fstat(self._fd)
        if stat.S_ISDIR(about.st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        if not stat.S_ISREG(about.st_mode):
            raise NotAFileError(errno.EINVAL, "not a plain file, but a pipe or a device", str(path))
        self.nbytes = about.st_size

    def __del__(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)

    def pread(self, nbytes: int, offset: int) -> bytes:
        """See `RangeFile.pread`."""
        data = os.pread(self._fd, nbytes, offset)
        while len(data) < nbytes:  # one call may return less: it stops at 2 GiB, or at a signal
            more = os.pread(self._fd, nbytes - len(data), offset + len(data))
            if not more:
                break
            data += more
        return data

    def expect(self, nbytes: int, offset: int) -> None:
        """See `RangeFile.expect`. Asks the operating system to read ahead."""
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._fd, offset, nbytes, os.POSIX_FADV_WILLNEED)

    def will_read(self, nbytes: int) -> None:
        """See `RangeFile.will_read`. The operating system decides."""
        del nbytes

    def forget(self, nbytes: int, offset: int) -> bool:
        """See `RangeFile.forget`. There is nothing to drop: the operating system keeps its copies up to date."""
        del nbytes, offset
        return False


def expect_together(wanted: Sequence[tuple[RangeFile, int, int]]) -> None:
    """`expect` ranges of several files, each as (file, bytes, offset), of which the first is needed first."""
    remote: list[Any] = []
    for file, nbytes, offset in wanted:
        if isinstance(file, LocalFile):
            file.expect(nbytes, offset)
        else:
            remote.append((file, nbytes, offset))
    if remote:
        from atcache.files.remote import remote_file

        remote_file.expect_together(remote)


def promise(reader: object, name: str, nbytes: int) -> None:
    """Say how many bytes of servers' files a reader will read within an epoch, under a name for these files.

    It holds until the reader says something else under this name, or is gone.

    Files are fetched whole, see `RangeFile.will_read`, only if all that was promised fits into the local block cache.
    """
    from atcache.files.remote.block_cache import shared_blocks

    shared_blocks().promise(reader, name, nbytes)


def open_file(location: Location) -> RangeFile:
    """Open a file for reading.

    Raises:
        FileNotFoundError: there is no such file.
        OSError: a local file cannot be opened.
        RemoteError: the server does not answer, or refuses access.
    """
    if isinstance(location, Path):
        return LocalFile(location)
    from atcache.files.remote.remote_file import RemoteFile

    return RemoteFile(location)


def read_file(location: Location, most_nbytes: int = MAX_WHOLE_NBYTES) -> bytes:
    """All bytes of a small file; see `open_file` for the errors.

    Args:
        location: the file.
        most_nbytes: a larger local file is an OSError. Servers' files have a limit of their own.
    """
    if isinstance(location, Path):
        file = LocalFile(location)
        if file.nbytes > most_nbytes:
            raise OSError(errno.EFBIG, f"it has {file.nbytes} bytes, expected at most {most_nbytes}", str(location))
        return file.pread(file.nbytes, 0)
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
    """Sorted paths of all files in a folder and below it, relative to the folder; empty if there is no such folder.

    Raises:
        AtcacheError: a folder cannot be read: what it holds would seem to be missing.
        RemoteError: the server cannot be read, or it is a web server, which cannot list a folder.
    """
    if isinstance(folder, Path):

        def refuse(error: OSError) -> None:
            is_gone = isinstance(error, FileNotFoundError)  # others may remove a folder while this one is listed
            if not is_gone and not (isinstance(error, NotADirectoryError) and error.filename == str(folder)):
                raise unreadable(Path(error.filename or folder), error) from error

        return sorted(
            (Path(parent) / name).relative_to(folder).as_posix()
            for parent, _, names in os.walk(folder, onerror=refuse)
            for name in names
        )
    from atcache.files.remote.fetcher import list_below

    return sorted(list_below(folder))
