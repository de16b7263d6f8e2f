"""Folders for files on their way to an object store. What a killed process leaves there, the next one removes."""

from __future__ import annotations

import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

from atcache.files.writers import opened_folder, try_lock

_PREFIX = "atcache-spool-"


class Spool:
    """A new folder in the place for temp files (`TMPDIR`), until it is closed or its process ends.

    Its process holds a lock, by which `sweep_spools` knows that it is still used. The locked file lies beside the
    folder, so that it is not stored with the others. Threads may share a spool.
    """

    def __init__(self) -> None:
        self._lock: int | None = None
        while self._lock is None:
            self._made = Path(tempfile.mkdtemp(prefix=_PREFIX))
            with suppress(FileNotFoundError), opened_folder(self._made) as made:  # it may be swept before its lock
                # Without locks, a killed process's folder stays until somebody removes it.
                self._lock = try_lock(made, where_possible=True)
        self.path = self._made / "files"
        self.path.mkdir()

    def write(self, name: str, data: bytes) -> Path:
        """A new file in the folder; its name may have folders before it."""
        file = self.path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
        return file

    def close(self) -> None:
        """Remove the folder with all that is in it. More calls do nothing."""
        if self._lock is not None:
            shutil.rmtree(self._made, ignore_errors=True)
            os.close(self._lock)
            self._lock = None

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
        with suppress(OSError), opened_folder(folder, follow_links=False) as made:  # without locks, or gone by now
            if os.fstat(made).st_uid == os.geteuid() and (lock := try_lock(made)) is not None:
                shutil.rmtree(folder, ignore_errors=True)
                os.close(lock)
                num_removed += 1
    return num_removed
