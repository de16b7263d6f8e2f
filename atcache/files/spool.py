"""Folders for files on their way to an object store. What a killed process leaves there, the next one removes."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

_PREFIX = "atcache-spool-"


class Spool:
    """A new folder in the place for temp files (`TMPDIR`), until it is closed or its process ends.

    Its process holds a lock on it, by which `sweep_spools` knows that it is still used. Threads may share it.
    """

    def __init__(self) -> None:
        self._fd = -1
        while self._fd < 0:
            self.path = Path(tempfile.mkdtemp(prefix=_PREFIX))
            fd = os.open(self.path, os.O_RDONLY)
            with suppress(OSError):  # without locks, a killed process's folder stays until somebody removes it
                fcntl.flock(fd, fcntl.LOCK_EX)
            if self.path.exists():
                self._fd = fd
            else:  # swept between its making and its lock
                os.close(fd)

    def write(self, name: str, data: bytes) -> Path:
        """A new file in the folder; its name may have folders before it."""
        file = self.path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
        return file

    def close(self) -> None:
        """Remove the folder with all that is in it. More calls do nothing."""
        if self._fd >= 0:
            shutil.rmtree(self.path, ignore_errors=True)
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> Spool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def spool_free_nbytes() -> tuple[Path, int]:
    """The place for temp files, and the bytes that are free there."""
    place = Path(tempfile.gettempdir())
    return place, shutil.disk_usage(place).free


def sweep_spools() -> int:
    """Remove the folders of this user's processes that were killed, and return how many there were."""
    num_removed = 0
    for folder in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        with suppress(OSError):  # another user's, or no longer there
            fd = os.open(folder, os.O_RDONLY | os.O_NOFOLLOW | os.O_DIRECTORY)
            try:
                if os.fstat(fd).st_uid == os.geteuid():
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(folder, ignore_errors=True)
                    num_removed += 1
            finally:
                os.close(fd)
    return num_removed
