"""A folder that processes of several nodes must all see: is it one, and is what the others wrote there yet?

Network file systems show a new file to other nodes after some seconds, up to a minute where a folder was just listed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path

from atcache.errors import ConfigError
from atcache.files.durable import partial_path
from atcache.store.layout import StoreLayout
from atcache.store.manifest import list_commits

_SECONDS_TO_APPEAR = 60.0
_SECONDS_BETWEEN_LOOKS = 0.5


@contextmanager
def marked(folder: Path) -> Generator[str]:
    """The name of an empty file that is in `folder` meanwhile, for `check_mark` of other processes.

    It is named as temp files are: what a kill leaves is swept.
    """
    mark = partial_path(folder / "mark")
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
        folder: to look in.
        name: of the mark.
        each_look: called while it is not there; raises where the other process has ended, and taken its mark along.
        patience_s: how long it may take to appear.

    Raises:
        ConfigError: the mark is not there, and does not appear.
    """
    stop_s = time.monotonic() + patience_s
    while not (folder / name).exists():
        each_look()
        if time.monotonic() > stop_s:
            raise ConfigError(
                f"{folder} is not the folder that the leading process writes to: several nodes need an --out on "
                "storage that they share. Give one."
            )
        time.sleep(_SECONDS_BETWEEN_LOOKS)


def wait_for_commits(path: Path, layout: StoreLayout, patience_s: float = _SECONDS_TO_APPEAR) -> None:
    """Wait until the commit records of all tasks can be seen; not for ever: who looks next says what is missing."""
    names, stop_s = {task.name for task in layout.tasks()}, time.monotonic() + patience_s
    while not names <= list_commits(path) and time.monotonic() < stop_s:
        time.sleep(_SECONDS_BETWEEN_LOOKS)
