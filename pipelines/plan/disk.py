"""Measures how fast a disk writes, and reads views in random order, by means of a temp file without a name."""

from __future__ import annotations

import os
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal, Self

import numpy as np

from atcache.errors import DiskFullError

_PROBE_NBYTES = 256 * 2**20
_BLOCK_NBYTES = 4 * 2**20
_BLOCKS_A_FSYNC = 8  # few, so that a slow disk is noticed before everything is written
_SECONDS_A_PROBE = 2.0


class DiskProbe:
    """A temp file that measures its disk. It has no name, so it is gone when the `with` block ends, even by a kill.

    Entering the block writes the file. Only one thread at a time may use it.
    """

    def __init__(self, folder: Path, *, max_nbytes: int = _PROBE_NBYTES) -> None:
        """Prepare a probe; nothing is written yet.

        Args:
            folder: a folder on the disk to measure.
            max_nbytes: size of the file; less is written where the disk is slow or nearly full.
        """
        self._folder = folder
        self._max_nbytes = max_nbytes
        self._nbytes = 0
        self.write_nbytes_per_s = 0.0
        """Write speed, including all fsyncs."""
        self.page_cache: Literal["dropped", "kept", "unknown"] = "unknown"
        """Whether the file was dropped from memory before the last reads. If "kept", they did not measure the disk."""

    def __enter__(self) -> Self:
        self._file = tempfile.TemporaryFile(dir=self._folder, prefix=".atcache-plan-", buffering=0)
        try:
            self._write()
        except BaseException:
            self._file.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def _write(self) -> None:
        stat = os.statvfs(self._file.fileno())
        limit = min(self._max_nbytes, stat.f_bavail * stat.f_frsize // 4)
        # Random bytes, because a disk that compresses would be too fast at zeros.
        block = np.random.default_rng(0).bytes(max(1, min(_BLOCK_NBYTES, limit)))
        start_s = time.monotonic()
        while self._nbytes + len(block) <= limit and time.monotonic() - start_s < _SECONDS_A_PROBE:
            for _ in range(min(_BLOCKS_A_FSYNC, (limit - self._nbytes) // len(block))):
                self._nbytes += self._file.write(block)
            os.fsync(self._file.fileno())
        if not self._nbytes:
            raise DiskFullError(
                f"{self._folder}: no space is free, so its disk cannot be measured. Give another --out."
            )
        self.write_nbytes_per_s = self._nbytes / (time.monotonic() - start_s)

    def read_nbytes_per_s(self, view_nbytes: int, num_threads: int) -> float:
        """Speed of reading views from random places by several threads, as training does.

        Args:
            view_nbytes: bytes of a view, which is one read.
            num_threads: how many reads run at the same time.
        """
        fd = self._file.fileno()
        self._forget_pages(fd)
        view_nbytes = min(view_nbytes, self._nbytes)
        places = np.random.default_rng(1).permutation(self._nbytes // view_nbytes) * view_nbytes
        stop_s = (start_s := time.monotonic()) + _SECONDS_A_PROBE

        def read_some(thread: int) -> int:
            nbytes = 0
            for place in places[thread::num_threads].tolist():
                if time.monotonic() > stop_s:
                    break
                nbytes += len(os.pread(fd, view_nbytes, place))
            return nbytes

        with ThreadPoolExecutor(num_threads, thread_name_prefix="probe") as threads:
            nbytes = sum(threads.map(read_some, range(num_threads)))
        return nbytes / max(1e-9, time.monotonic() - start_s)

    def _forget_pages(self, fd: int) -> None:
        """Make the kernel drop the file from memory, and check whether it did."""
        if not hasattr(os, "posix_fadvise"):
            self.page_cache = "kept"
            return
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        if not hasattr(os, "RWF_NOWAIT"):
            self.page_cache = "unknown"
            return
        places = range(0, self._nbytes, max(1, self._nbytes // 8))
        try:
            self.page_cache = "kept" if all(_is_in_memory(fd, place) for place in places) else "dropped"
        except OSError:  # this file system cannot say
            self.page_cache = "unknown"


def _is_in_memory(fd: int, place: int) -> bool:
    try:
        os.preadv(fd, [bytearray(1)], place, os.RWF_NOWAIT)
    except BlockingIOError:
        return False
    return True
