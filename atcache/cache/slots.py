"""Memory that a worker process shares with the process that started it: slots, which are filled again and again.

A slot is a file without a name in memory, not one in /dev/shm: containers often give that folder 64 MB in all. Making
shared memory anew for each batch costs more than filling it, since the system has to clear it and map it page by page.
"""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from typing import Self

import numpy as np

from atcache.errors import ConfigError
from atcache.files.sizes import size_text

_ALIGNMENT = 64
_current: list[Slot] = []


class Slot:
    """Shared memory of fixed size, given out in order until it is emptied. For one thread of each process.

    Args:
        file: descriptor of the memory; the slot keeps it, and closes it with `close`.
        nbytes: its size.
    """

    def __init__(self, file: int, nbytes: int) -> None:
        self.file, self.nbytes = file, nbytes
        self._bytes = np.frombuffer(mmap.mmap(file, nbytes), np.uint8)
        self._first = int(self._bytes.ctypes.data)
        self._num_taken = 0

    @classmethod
    def create(cls, nbytes: int) -> Self:
        """A new slot of at least this size.

        Raises:
            ConfigError: there is not so much memory.
        """
        nbytes = -(-max(1, nbytes) // mmap.PAGESIZE) * mmap.PAGESIZE
        file = _nameless_file()
        try:
            # Now, since memory that turns out to be missing when it is written to ends the process.
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file, 0, nbytes)
            else:
                os.truncate(file, nbytes)
            return cls(file, nbytes)
        except OSError as error:
            os.close(file)
            raise ConfigError(
                f"{size_text(nbytes)} of memory for a batch cannot be shared between processes: {error.strerror}. "
                "Use fewer --workers, or a smaller --batch-size."
            ) from error

    def close(self) -> None:
        """Close the descriptor. The memory stays as long as an array of it lives."""
        os.close(self.file)

    def empty(self) -> None:
        """Give all of it out again."""
        self._num_taken = 0

    def take(self, nbytes: int) -> np.ndarray | None:
        """The next bytes, uint8, with whatever they hold; None if there are not so many left."""
        start = -(-self._num_taken // _ALIGNMENT) * _ALIGNMENT
        if start + nbytes > self.nbytes:
            return None
        self._num_taken = start + nbytes
        return self._bytes[start : start + nbytes]

    def at(self, start: int, nbytes: int) -> np.ndarray:
        """Some of its bytes."""
        return self._bytes[start : start + nbytes]

    def find(self, array: np.ndarray) -> int | None:
        """Where these bytes begin in the slot; None if they are not in it."""
        start = int(array.ctypes.data) - self._first
        return start if start >= 0 and start + array.nbytes <= self.nbytes else None


def slot_nbytes(sizes: list[int]) -> int:
    """The size of a slot that has room for arrays of these sizes."""
    return sum(-(-size // _ALIGNMENT) * _ALIGNMENT for size in sizes)


@contextmanager
def filling(slot: Slot | None) -> Generator[None]:
    """A context in which `take_memory` takes from a slot, emptied before; from none if it is None."""
    if slot is None:
        yield
        return
    slot.empty()
    _current.append(slot)
    try:
        yield
    finally:
        _current.pop()


def take_memory(nbytes: int) -> np.ndarray | None:
    """Bytes of the slot that is being filled; None if there is none, or no room in it."""
    return _current[-1].take(nbytes) if _current else None


def _nameless_file() -> int:
    if hasattr(os, "memfd_create"):
        return os.memfd_create("atcache", os.MFD_CLOEXEC)
    with tempfile.TemporaryFile() as file:  # macOS
        return os.dup(file.fileno())
