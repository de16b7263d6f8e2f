"""Disks that refuse to be written, as the operating system makes them: full, read-only, or another user's."""

from __future__ import annotations

import os
import resource
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def largest_file(*, nbytes: int) -> Iterator[None]:
    """The operating system refuses longer files: what a full disk does, without privileges."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextmanager
def mounted(folder: Path, options: str) -> Iterator[None]:
    """A file system in memory, such as one of "size=2m"."""
    folder.mkdir(exist_ok=True)
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True)
    if done.returncode:
        pytest.skip(f"a file system cannot be mounted here: {done.stderr.decode().strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@contextmanager
def without_permission(folder: Path) -> Iterator[None]:
    """Nobody may write into the folder; root, whom no permission binds, becomes another user for the while."""
    is_root = os.geteuid() == 0
    for parent in folder.parents if is_root else ():  # pytest's folders are for their owner only
        if parent.is_relative_to("/tmp/") and parent.stat().st_uid == 0 and len(parent.parts) > 2:
            parent.chmod(0o755)
    mode = folder.stat().st_mode
    folder.chmod(0o555)
    try:
        if is_root:
            os.seteuid(65534)
        yield
    finally:
        if is_root:
            os.seteuid(0)
        folder.chmod(mode)
