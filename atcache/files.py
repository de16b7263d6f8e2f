"""Files that can be read at any place."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Protocol


class RangeFile(Protocol):
    """A file that can be read at any place. Threads may share one; closed with its last user."""

    nbytes: int
    """Its size when it was opened."""

    def pread(self, nbytes: int, offset: int) -> bytes:
        """The bytes from `offset` on; fewer only where the file ends."""
        ...

    def expect(self, nbytes: int, offset: int) -> None:
        """Have these bytes brought near ahead of their use; returns at once, and may do nothing."""
        ...


class LocalFile:
    """A file of this machine."""

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
