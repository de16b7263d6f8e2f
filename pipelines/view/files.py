"""The files that the viewer serves: parts of local and remote files, and which files of a cache may be read."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import stat
import time
from pathlib import Path
from typing import Protocol

from atcache.files.location import Location, Url
from atcache.files.ranges import open_file

# What a remote file was is believed for so long: the page asks for many parts of the same shard.
_BELIEVED_S = 5.0

_NO_SUCH_FILE = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.ENXIO)

_NODES = (
    r"attention(?:/(?:codes|bias|state(?:/[A-Za-z0-9_][A-Za-z0-9_.-]*)?))?|views(?:/(?:parameters|pixel_hash|status))?"
    r"|pixels(?:/rgb)?|samples(?:-[0-9]+)?(?:/(?:key|tar|offset|nbytes|label|problem))?|commits"
)
_CACHE_FILE = re.compile(rf"zarr\.json|(?:{_NODES})/(?:zarr\.json|c(?:/[0-9]{{1,10}})*)")


class NotThereError(Exception):
    """There is nothing at an address; the message is a sentence for the user."""


class Bytes(Protocol):
    """A file whose parts can be read, with what identifies its content; see `RangeFile`."""

    @property
    def nbytes(self) -> int: ...

    @property
    def version(self) -> str: ...

    def pread(self, nbytes: int, offset: int) -> bytes: ...


class Memory:
    """A small file in memory."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self.nbytes = len(data)
        self.version = hashlib.blake2b(data, digest_size=12).hexdigest()

    def pread(self, nbytes: int, offset: int) -> bytes:
        """See `RangeFile.pread`."""
        return self._data[offset : offset + nbytes]


class _LocalFile:
    """A file of this machine. It is one version: a file that is replaced meanwhile is read as it was."""

    def __init__(self, path: Path) -> None:
        self._fd = -1  # for `__del__`, if opening fails
        # Without waiting for the other end, should it be a pipe.
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW)
        about = os.fstat(self._fd)
        if not stat.S_ISREG(about.st_mode):
            raise FileNotFoundError(errno.ENOENT, "not a file", str(path))
        self.nbytes = about.st_size
        self.version = f"{about.st_mtime_ns:x}-{about.st_ino:x}-{about.st_size:x}"

    def __del__(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)

    def pread(self, nbytes: int, offset: int) -> bytes:
        """See `RangeFile.pread`."""
        return os.pread(self._fd, nbytes, offset)


class CacheFiles:
    """The files of a cache that a page may read: metadata and chunks. Threads may share it."""

    def __init__(self, location: Location) -> None:
        self._root = location.resolve() if isinstance(location, Path) else location
        self._opened: dict[str, tuple[float, Bytes]] = {}

    def open(self, name: str) -> Bytes:
        """Open a file by its path in the cache.

        Raises:
            NotThereError: there is no such file, it is none that a page needs, or it is a link that leads out of the
                cache.
            RemoteError: the server that has it cannot be read.
            OSError: it is there, and cannot be read.
        """
        if not _CACHE_FILE.fullmatch(name):
            raise NotThereError(f"{name} is not a file of a cache.")
        try:
            return self._open_remote(self._root, name) if isinstance(self._root, Url) else self._open_local(name)
        except (OSError, RuntimeError) as error:
            # RuntimeError: links that lead to one another. What is there but cannot be read must not look like a gap.
            if isinstance(error, OSError) and error.errno not in _NO_SUCH_FILE:
                raise
            raise NotThereError(f"{name} is not in the cache.") from error

    def _open_local(self, name: str) -> Bytes:
        assert isinstance(self._root, Path)
        file = (self._root / name).resolve(strict=True)
        if not file.is_relative_to(self._root):
            raise NotThereError(f"{name} leads out of the cache.")
        return _LocalFile(file)

    def _open_remote(self, root: Url, name: str) -> Bytes:
        now_s = time.monotonic()
        opened_s, file = self._opened.get(name, (0.0, None))
        # The root says whether a cache is complete and how large it is: it is always asked for.
        if file is not None and now_s - opened_s < _BELIEVED_S and name != "zarr.json":
            return file
        file = open_file(root / name)
        if len(self._opened) > 1000:
            self._opened.clear()
        self._opened[name] = now_s, file
        return file

    def forget(self) -> None:
        """Ask anew for every file of a server."""
        self._opened.clear()
