"""Shows how far work is that has stages, such as fitting a codec: by a live bar on a terminal, by a line elsewhere."""

from __future__ import annotations

import sys
import time
from contextlib import suppress
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn


class StageProgress:
    """The stage that is being worked on, and its share that is done, on stderr; a context manager for one thread.

    On a terminal it shows a bar and the time that remains of the stage, and takes them away at the end. Elsewhere it
    prints a line now and then, so work that is soon done says nothing. If the terminal is closed, the work
    continues in silence.

    Args:
        title: what is being done, one word.
        seconds_between_lines: how often a line is printed if there is no terminal.
    """

    def __init__(self, title: str, *, seconds_between_lines: float = 10.0) -> None:
        self._title, self._stage, self._seconds_between_lines = title, "", seconds_between_lines
        self._share = self._first_share = 0.0
        self._start_s = self._last_line_s = time.monotonic()
        console = Console(stderr=True)
        self._rich: Progress | None = None
        if console.is_terminal:
            self._rich = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                TaskProgressColumn(),
                TimeRemainingColumn(),
                console=console,
                transient=True,
            )
            self._task = self._rich.add_task(title, total=1.0)

    def show(self, stage: str, share: float) -> None:
        """Say that `share` of `stage` is done, from 0 to 1. Another stage, or a share that falls, begins anew."""
        if stage != self._stage or share < self._share:
            self._stage, self._first_share, self._start_s = stage, share, time.monotonic()
            if self._rich is not None:
                self._rich.reset(self._task, description=f"{self._title}: {stage}")
        self._share = share
        if self._rich is not None:
            self._rich.update(self._task, completed=share)
        elif time.monotonic() - self._last_line_s > self._seconds_between_lines:
            self._print_line()

    def _print_line(self) -> None:
        now_s = time.monotonic()
        self._last_line_s = now_s
        done = self._share - self._first_share
        remaining = ""
        if done > 0 and self._share < 1:
            remaining = f", {(1 - self._share) / done * (now_s - self._start_s):.0f} s to go"
        with suppress(OSError):
            print(f"{self._title}: {self._stage}, {self._share:.0%}{remaining}", file=sys.stderr, flush=True)

    def __enter__(self) -> Self:
        if self._rich is not None:
            self._rich.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._rich is not None:
            self._rich.stop()
