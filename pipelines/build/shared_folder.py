"""Check that the processes of all nodes see the same folder, and wait for what the others have written to it.

Network file systems show a new file to other nodes after some seconds, or up to a minute if the folder was just listed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path

from atcache.errors import ConfigError
from atcache.files.durable import disk_errors_explained, partial_path
from atcache.store.layout import StoreLayout
from atcache.store.manifest import list_commits

_SECONDS_TO_APPEAR = 60.0
_SECONDS_BETWEEN_LOOKS = 0.5


@contextmanager
def marked(folder: Path) -> Generator[str]:
    """The name of an empty file that is in `folder` during the block, for `check_mark` in other processes.

    It is named like a temp file, so that the next build removes it if this one is killed.
    """
    mark = partial_path(folder / "mark")
    with disk_errors_explained(mark):
        mark.touch()
    try:
        yield mark.name
    finally:
        mark.unlink(missing_ok=True)


def check_mark(
    folder: Path, name: str, each_look: Callable[[], None] = lambda: None, patience_s: float = _SECONDS_TO_APPEAR
) -> None:
    """Refuse a folder that is not the one that another process has marked.

    Args:
        folder: where to look.
        name: the name of the mark.
        each_look: called while the mark is not there; raises if the other process has ended and removed its mark.
        patience_s: how long the mark may take to appear.

    Raises:
        ConfigError: the mark does not appear in that time.
    """
    stop_s = time.monotonic() + patience_s
    while not (folder / name).exists():
        each_look()
        if time.monotonic() > stop_s:
            raise ConfigError(
                f"{folder} is not the folder that the leading process writes to. Give an --out on storage that all "
                "nodes share."
            )
        time.sleep(_SECONDS_BETWEEN_LOOKS)


def wait_for_commits(path: Path, layout: StoreLayout, patience_s: float = _SECONDS_TO_APPEAR) -> None:
    """Wait, at most `patience_s`, until all commit records are visible; `finish_cache` names those that are missing."""
    names, stop_s = {task.name for task in layout.tasks()}, time.monotonic() + patience_s
    while not names <= list_commits(path) and time.monotonic() < stop_s:
        time.sleep(_SECONDS_BETWEEN_LOOKS)
