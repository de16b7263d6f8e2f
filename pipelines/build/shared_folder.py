"""Check that the processes of all nodes see the same folder, wait for what the others have written, and join records.

Network file systems show a new file to other nodes after some seconds, or up to a minute if the folder was just listed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path

from atcache.errors import ConfigError
from atcache.files.durable import disk_errors_explained, partial_path
from atcache.files.location import Location
from atcache.files.remote.putting import patiently
from atcache.store.layout import StoreLayout
from atcache.store.manifest import list_commits
from atcache.store.records import join_records

_SECONDS_TO_APPEAR = 60.0
_SECONDS_BETWEEN_LOOKS = 0.5
_SECONDS_BETWEEN_JOINS = 300.0


@contextmanager
def marked(folder: Location) -> Generator[str]:
    """The name of an empty file that is in `folder` during the block, for `check_mark` in other processes.

    It is named like a temp file, so that the next build removes it if this one is killed. On an object store, which all
    processes see alike, there is none.
    """
    if not isinstance(folder, Path):
        yield ""
        return
    mark = partial_path(folder / "mark")
    with disk_errors_explained(mark):
        mark.touch()
    try:
        yield mark.name
    finally:
        mark.unlink(missing_ok=True)


def check_mark(
    folder: Location, name: str, each_look: Callable[[], None] = lambda: None, patience_s: float = _SECONDS_TO_APPEAR
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
    if not isinstance(folder, Path):
        return
    stop_s = time.monotonic() + patience_s
    while not (folder / name).exists():
        each_look()
        if time.monotonic() > stop_s:
            raise ConfigError(
                f"{folder} is not the folder that the leading process writes to. Give an --out on storage that all "
                "nodes share."
            )
        time.sleep(_SECONDS_BETWEEN_LOOKS)


def wait_for_commits(path: Location, layout: StoreLayout, patience_s: float = _SECONDS_TO_APPEAR) -> None:
    """Wait, at most `patience_s`, until all commit records are visible; `finish_cache` names those that are missing."""
    names, stop_s = {task.name for task in layout.tasks()}, time.monotonic() + patience_s
    while not names <= _committed(path) and time.monotonic() < stop_s:
        time.sleep(_SECONDS_BETWEEN_LOOKS)


def _committed(path: Location) -> set[str]:
    return list_commits(path) if isinstance(path, Path) else patiently(lambda: list_commits(path))


class RecordJoiner:
    """Joins the commit records of a large cache now and then while it is built, so that their folder stays small.

    For the process that leads. On an object store it does nothing: there folders may be of any size, and each record
    must have its object until all are done, see `atcache.store.bucket`.
    """

    def __init__(self, path: Location, layout: StoreLayout, every_s: float = _SECONDS_BETWEEN_JOINS) -> None:
        self._path, self._layout, self._every_s = path, layout, every_s
        self._next_s = 0.0

    def look(self) -> None:
        """Join what is complete, if it is time."""
        if isinstance(self._path, Path) and time.monotonic() >= self._next_s:
            join_records(self._path, self._layout)
            self._next_s = time.monotonic() + self._every_s
