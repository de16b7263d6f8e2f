"""Ctrl-C and SIGTERM during training: they end it between two steps, when its state is whole and can be saved."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Generator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import NoReturn, Self

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupts:
    """Remembers that a signal came, so that a training loop can stop after its step; a context manager.

    A second signal ends the process at once, as the first does inside `at_once`. Only the main thread can receive
    signals; in another thread this does nothing. A signal that was ignored stays ignored.

    Args:
        heeded: whether this process acts on the first signal. One that does not ends only at a second signal, or
            because the process that does has ended.
    """

    def __init__(self, *, heeded: bool = True) -> None:
        self._heeded = heeded
        self._received: int | None = None
        self._ends_at_once = False
        self._handlers_before: dict[int, object] = {}

    @property
    def came(self) -> bool:
        """Whether a signal came that this process acts on."""
        return self._heeded and self._received is not None

    @contextmanager
    def at_once(self) -> Generator[None]:
        """A signal ends the process at once inside this block, where nothing would be lost."""
        self._ends_at_once = self._heeded
        try:
            if self.came:
                self.end()
            yield
        finally:
            self._ends_at_once = False

    def end(self) -> NoReturn:
        """End the process as the signal would have.

        Raises:
            KeyboardInterrupt: for Ctrl-C.
            SystemExit: for SIGTERM, with the exit status 143 that shells give it.
        """
        if self._received == signal.SIGTERM:
            raise SystemExit(128 + signal.SIGTERM)
        raise KeyboardInterrupt

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        is_second = self._received is not None
        self._received = number
        if is_second or self._ends_at_once:
            self.end()
        if self._heeded:
            # Not print: a signal can come in the middle of one. The reader of stderr may have ended, as in `| tee`.
            with suppress(OSError):
                os.write(2, b"\nStopping after this step. Ctrl-C again stops at once, without saving it.\n")

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                if (before := signal.getsignal(number)) not in (signal.SIG_IGN, None):
                    self._handlers_before[number] = before
                    signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, before in self._handlers_before.items():
            signal.signal(number, before)  # pyright: ignore[reportArgumentType] - as getsignal gave it
