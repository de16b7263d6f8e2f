"""Files that are whole or absent, also after a power cut: temp file, fsync, rename, fsync of the folder."""

from __future__ import annotations

import errno
import fcntl
import glob
import json
import os
import re
import secrets
import shutil
import time
from collections.abc import Generator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from atcache.errors import ConfigError, DiskFullError

_SECONDS_TO_WAIT = 10.0
_PARTIAL_NAME = re.compile(r"\.[\w.-]+\.[0-9a-f]{16}\.partial")


def partial_path(path: Path) -> Path:
    """A fresh temp name beside `path`, which `sweep_partials` knows as ours."""
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}.partial")


def is_partial(name: str) -> bool:
    """Whether a file's name is that of a temp file of ours."""
    return _PARTIAL_NAME.fullmatch(name) is not None


def sweep_partials(path: Path | str) -> int:
    """Remove what killed writers of this cache left behind; returns how many. No other writer may be at work.

    These are temp files inside of the cache, and beside it the temp folders of caches that were never created.
    """
    path = Path(path)
    num_removed = 0
    for sibling in path.parent.glob(f".{glob.escape(path.name)}.*.partial"):
        if is_partial(sibling.name) and sibling.is_dir() and not sibling.is_symlink():
            shutil.rmtree(sibling)
            num_removed += 1
    for folder, _, names in os.walk(path):
        for name in names:
            if is_partial(name):
                (Path(folder) / name).unlink(missing_ok=True)
                num_removed += 1
    return num_removed


@contextmanager
def only_writer(folder: Path | str, *, where_possible: bool = False) -> Generator[None]:
    """Keep other processes from writing into a folder: a lock on it, gone with the process that holds it.

    Waits some seconds, because the workers of a writer that was killed hold the lock until they notice.

    Args:
        folder: a cache, or the folder of a run.
        where_possible: go on without where the file system has no locks.

    Raises:
        ConfigError: another process is writing it, or the file system has no locks.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        deadline_s = time.monotonic() + _SECONDS_TO_WAIT
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if time.monotonic() > deadline_s:
                    raise ConfigError(
                        f"another process is writing {folder}. Wait until it is done, or give another --out."
                    ) from error
                time.sleep(0.1)
            except OSError as error:
                if error.errno not in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK):
                    raise
                if where_possible:
                    break
                raise ConfigError(
                    f"{folder}: its file system has no locks, which keep a second build away. Build on another disk, "
                    "and copy the cache."
                ) from error
        try:
            yield
        finally:
            # Closing alone would leave the lock with forked workers that are still there.
            with suppress(OSError):  # there may be none
                fcntl.flock(descriptor, fcntl.LOCK_UN)
    finally:
        os.close(descriptor)


@contextmanager
def disk_errors_explained(path: Path) -> Generator[None]:
    """Turn "no space left" and "quota exceeded" into a `DiskFullError` that names the path."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise DiskFullError(
            f"{path} cannot be written: {os.strerror(error.errno)}. What was stored before is valid; make room and "
            "run the same command again to continue."
        ) from error


def fsync_path(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(path: Path) -> None:
    """Create a folder and its parents so that they survive a power cut. Other processes may do the same."""
    if path.is_dir():
        return
    make_folder(path.parent)
    path.mkdir(exist_ok=True)
    fsync_path(path.parent)


def fsync_tree(path: Path) -> None:
    """`fsync_path` for a folder and everything below it."""
    for folder, _, names in os.walk(path, topdown=False):
        for name in names:
            fsync_path(Path(folder) / name)
        fsync_path(Path(folder))


@contextmanager
def replaced_whole(path: Path) -> Generator[Path]:
    """A temp path to write to; without an error it takes the place of `path`, durably, at the end."""
    partial = partial_path(path)
    with disk_errors_explained(path):
        try:
            yield partial
            fsync_path(partial)
            partial.replace(path)
            fsync_path(path.parent)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise


def write_file(path: Path, data: bytes) -> None:
    """Write or replace a whole file, durably: afterwards it is there, or after an error what was there before."""
    with replaced_whole(path) as partial:
        partial.write_bytes(data)


def encode_json(value: Mapping[str, Any]) -> bytes:
    """JSON as every file of a cache has it: sorted keys, so that equal content means equal bytes.

    Raises:
        ValueError: a float is not finite, which JSON cannot say.
    """
    return (json.dumps(value, sort_keys=True, indent=1, allow_nan=False, ensure_ascii=False) + "\n").encode()
