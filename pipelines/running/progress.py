"""Shows how far a running pipeline is: by a live bar on a terminal, by a plain line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from contextlib import suppress
from typing import Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress as RichProgress,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

_SECONDS_BETWEEN_LINES = 10.0


class Progress:
    """Progress of `total` units on stderr; a context manager for one thread.

    On a terminal it shows a bar and the time that remains. Elsewhere (a log file, CI) it prints one line every ten
    seconds and one at the end, so that logs stay readable. If the terminal is closed, the work continues in silence.

    Args:
        title: what is being done, one word.
        total: units in all.
        unit: plural name of a unit, such as "views".
        done: units that were done before this run; they count in the bar but not in the speed.
    """

    def __init__(self, title: str, *, total: int, unit: str, done: int = 0) -> None:
        self._title, self._total, self._unit = title, total, unit
        self._done = self._done_before = done
        self._start_s = self._last_line_s = time.monotonic()
        self._note = ""
        console = Console(stderr=True)
        self._rich: RichProgress | None = None
        if console.is_terminal:
            self._rich = RichProgress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TaskProgressColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}", markup=False),
                console=console,
            )
            self._task = self._rich.add_task(title, total=total, completed=done, note="")

    def advance(self, num_units: int, note: str = "") -> None:
        """Count `num_units` as done; `note` is shown beside, such as bytes so far or the loss."""
        self._done += num_units
        self._note = note
        if self._rich is not None:
            self._rich.update(self._task, advance=num_units, note=f"{self._speed():.4g} {self._unit}/s  {note}")
        elif time.monotonic() - self._last_line_s >= _SECONDS_BETWEEN_LINES:
            self._print_line()

    @property
    def done(self) -> int:
        """Units done so far."""
        return self._done

    def say(self, line: str) -> None:
        """Print a line; on a terminal, above the bar."""
        with suppress(OSError):
            if self._rich is not None:
                self._rich.console.print(Text(line))
            else:
                print(line, file=sys.stderr, flush=True)

    def _speed(self) -> float:
        return (self._done - self._done_before) / max(1e-9, time.monotonic() - self._start_s)

    def _print_line(self) -> None:
        self._last_line_s = time.monotonic()
        speed = self._speed()
        remaining = (
            f", {(self._total - self._done) / speed:.0f} s to go" if speed > 0 and self._done < self._total else ""
        )
        note = f", {self._note}" if self._note else ""
        done = f"{self._done}/{self._total} {self._unit}"
        self.say(f"{self._title}: {done}, {speed:.4g}/s{note}{remaining}")

    def __enter__(self) -> Self:
        if self._rich is not None:
            self._rich.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._rich is not None:
            self._rich.stop()
        elif self._done > self._done_before:
            self._print_line()
