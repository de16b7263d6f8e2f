"""Write files that are complete or absent, even after a power cut: temp file, fsync, rename, fsync of the folder."""

from __future__ import annotations

import errno
import json
import os
import re
import secrets
import shutil
from collections.abc import Generator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from atcache.errors import AtcacheError, ConfigError, DiskFullError, NotWritableError
from atcache.files.location import Location

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NOT_WRITABLE = (errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)
_OS_ERROR = re.compile(r"\(os error (\d+)\)")  # in messages of libraries written in Rust
_NUM_THREADS = 8
_PARTIAL_NAME = re.compile(r"\.[\w.-]+\.[0-9a-f]{16}\.partial")


def partial_path(path: Path) -> Path:
    """A new temp name beside `path`, in the form that `sweep_partials` removes."""
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}.partial")


def is_partial(name: str) -> bool:
    """Whether this is the name of one of our temp files."""
    return _PARTIAL_NAME.fullmatch(name) is not None


@contextmanager
def disk_errors_explained(path: Path) -> Generator[None]:
    """Turn the errors of a disk into one sentence that names the path that is written.

    Raises:
        DiskFullError: no space is left, the quota is used up, or the file would be too large.
        NotWritableError: the file system is read-only, permission is missing, or the disk fails.
    """
    try:
        yield
    except AtcacheError:
        raise
    except Exception as error:
        number = _errno(error)
        if number in _FULL:
            raise DiskFullError(
                f"{path} cannot be written: {os.strerror(number)}. What was stored before is valid. Free some space "
                "and run the same command again to continue."
            ) from error
        if number in _NOT_WRITABLE:
            raise NotWritableError(
                f"{path} cannot be written: {os.strerror(number)}. What was stored before is valid. Check the "
                "permissions and the disk, or give another path."
            ) from error
        raise


def _errno(error: BaseException) -> int | None:
    """The operating system's number of an error, also where a library has wrapped it; None if it has none."""
    if isinstance(error, OSError):
        return error.errno
    if found := _OS_ERROR.search(str(error)):
        return int(found[1])
    # torch's writer fails while it handles our file's error, and says only that its position is unexpected.
    if isinstance(error, RuntimeError) and isinstance(error.__context__, OSError):
        return error.__context__.errno
    return None


def existing_folder(path: Path) -> Path:
    """`path` if it is a folder, or the nearest folder above it that exists."""
    return next(folder for folder in (path, *path.absolute().parents) if folder.is_dir())


def free_nbytes(place: Location) -> int | None:
    """Bytes free on the disk of a file or folder, which need not exist yet; None for one on a server."""
    return shutil.disk_usage(existing_folder(place)).free if isinstance(place, Path) else None


def check_can_write(path: Path) -> None:
    """Refuse, before long work, an output folder in which nothing could be written.

    Raises:
        NotWritableError: the folder, or the one that it would be made in, is read-only or not this user's.
    """
    folder = existing_folder(path)
    if not os.access(folder, os.W_OK | os.X_OK, effective_ids=os.access in os.supports_effective_ids):
        raise NotWritableError(
            f"{path} cannot be written: {folder} is read-only, or not yours to write to. Give another --out, or check "
            "its permissions."
        )


def check_output_file(option: str, path: Path) -> None:
    """Refuse, before long work, a file that could not be written where an option wants it.

    Raises:
        ConfigError: it is a folder, or its folder does not exist.
        NotWritableError: its folder is read-only or not this user's.
    """
    if path.is_dir():
        raise ConfigError(f"{option}={str(path)!r} is a folder: expected the name of a file.")
    if not path.absolute().parent.is_dir():
        raise ConfigError(f"{option}={str(path)!r}: there is no folder {path.absolute().parent}. Make it first.")
    check_can_write(path)


def fsync_path(path: Path) -> None:
    """Wait until the content of a file, or the list of names in a folder, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(path: Path) -> None:
    """Create a folder and its parents so that they survive a power cut. Other processes may create it meanwhile."""
    if path.is_dir():
        return
    make_folder(path.parent)
    with disk_errors_explained(path):
        path.mkdir(exist_ok=True)
        fsync_path(path.parent)


def fsync_tree(path: Path) -> None:
    """`fsync_path` for a folder and everything below it, in no particular order, but for hard links.

    A file with a second name is a shard of another cache, which made it durable; only its new name is not yet so.
    """
    paths: list[Path] = []
    for folder, _, names in os.walk(path):
        paths.append(Path(folder))
        paths += [file for name in names if (file := Path(folder) / name).stat().st_nlink <= 1]
    # At once, because file systems do many that wait together in about the time of one.
    with ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="fsync") as threads:
        list(threads.map(fsync_path, paths))


@contextmanager
def replaced_whole(path: Path) -> Generator[Path]:
    """Gives a temp path to write to, which replaces `path` durably at the end; after an error `path` is unchanged."""
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
    """Write or replace a whole file durably. After an error, what was there before is unchanged."""
    with replaced_whole(path) as partial:
        partial.write_bytes(data)


def encode_json(value: Mapping[str, Any]) -> bytes:
    """JSON text as all files of a cache have it. Its keys are sorted, so that equal content gives equal bytes.

    Raises:
        ValueError: a float is NaN or infinite, which JSON cannot express.
    """
    return (json.dumps(value, sort_keys=True, indent=1, allow_nan=False, ensure_ascii=False) + "\n").encode()
