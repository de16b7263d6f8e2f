"""A folder has one writer at a time. What a killed writer left in it, the next one removes."""

from __future__ import annotations

import errno
import fcntl
import glob
import os
import shutil
import time
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path

from atcache.errors import ConfigError
from atcache.files.durable import disk_errors_explained, is_partial

LOCK = ".writer.lock"
"""The file in a folder that its only writer locks. It is there while something is written."""
_SECONDS_TO_WAIT = 10.0
_WITHOUT_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)


def sweep_partials(path: Path | str) -> int:
    """Remove what killed writers of this cache left behind, and return how many. The caller is its only writer.

    These are temp files inside the cache, and temp folders beside it from caches whose creation did not finish. A temp
    folder that another process is filling stays.
    """
    path = Path(path)
    num_removed = 0
    for sibling in path.parent.glob(f".{glob.escape(path.name)}.*.partial"):
        if is_partial(sibling.name) and sibling.is_dir() and not sibling.is_symlink():
            with suppress(FileNotFoundError), opened_folder(sibling) as folder:  # it may become a cache meanwhile
                lock = try_lock(folder, where_possible=True)
                if lock is not None:
                    shutil.rmtree(sibling)
                    os.close(lock)
                    num_removed += 1
    for folder, _, names in os.walk(path):
        for name in names:
            if is_partial(name):
                (Path(folder) / name).unlink(missing_ok=True)
                num_removed += 1
    return num_removed


@contextmanager
def only_writer(folder: Path | str, *, where_possible: bool = False, name: str = LOCK) -> Generator[None]:
    """Keep other processes from writing into a folder: a lock that ends with the process that holds it.

    It locks a file in the folder, which is removed at the end. The folder itself could not be locked for other
    machines: NFS and Lustre keep locks of folders to themselves, and answer that all is well. The folder may be renamed
    meanwhile.

    Waits up to 10 s, because the workers of a killed writer hold the lock until they notice that it is gone.

    Args:
        folder: a cache, or the folder of a run.
        where_possible: continue without a lock if the file system has no locks.
        name: of the file.

    Raises:
        ConfigError: another process writes to the folder, or its file system has no locks.
        NotWritableError: no file can be made in the folder.
    """
    with opened_folder(folder) as descriptor:
        lock = _wait_for_lock(Path(folder), descriptor, where_possible, name)
        try:
            yield
        finally:
            with suppress(OSError):  # the folder may be gone
                os.unlink(name, dir_fd=descriptor)
            # Forked workers share the lock. If they still run, closing our descriptor does not end it.
            with suppress(OSError):  # the file system may have no locks
                fcntl.flock(lock, fcntl.LOCK_UN)
            os.close(lock)


def _wait_for_lock(folder: Path, descriptor: int, where_possible: bool, name: str) -> int:
    deadline_s = time.monotonic() + _SECONDS_TO_WAIT
    while True:
        try:
            with disk_errors_explained(folder):
                lock = try_lock(descriptor, where_possible=where_possible, name=name)
        except OSError as error:
            if error.errno not in _WITHOUT_LOCKS:
                raise
            raise ConfigError(
                f"{folder} is on a file system without locks, which are needed to keep a second build out. Build on "
                "another disk, and copy the cache."
            ) from error
        if lock is not None:
            return lock
        if time.monotonic() > deadline_s:
            raise ConfigError(f"another process is writing to {folder}. Wait until it ends, or give another --out.")
        time.sleep(0.1)


def try_lock(folder: int, *, where_possible: bool = False, name: str = LOCK) -> int | None:
    """The descriptor of a file that holds the lock of a folder; None if another process holds it.

    Args:
        folder: its descriptor.
        where_possible: without the lock if the file system has no locks.
        name: of the file in the folder. It is made if need be.

    Raises:
        OSError: the file cannot be made, or its file system has no locks.
    """
    while True:
        lock = os.open(name, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666, dir_fd=folder)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            return None
        except OSError as error:
            if where_possible and error.errno in _WITHOUT_LOCKS:
                return lock
            os.close(lock)
            raise
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(lock), os.stat(name, dir_fd=folder)):
                return lock
        os.close(lock)  # whoever held it has removed it meanwhile


@contextmanager
def opened_folder(folder: Path | str, *, follow_links: bool = True) -> Generator[int]:
    """The descriptor of a folder. Raises `OSError`."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | (0 if follow_links else os.O_NOFOLLOW))
    try:
        yield descriptor
    finally:
        os.close(descriptor)
