"""Fetches in the background what will be read soon: a bounded amount at a time, and what is needed first at first."""

from __future__ import annotations

import os
from collections.abc import Iterable
from concurrent.futures import Future
from functools import partial
from heapq import heappop, heappush
from threading import Lock
from typing import Any, Protocol

# What is under way, of one process. Enough for 300 MB/s over 200 ms, and it is memory of two processes.
_MAX_NBYTES = 2**26
_MAX_REQUESTS = 32


class Fetchable(Protocol):
    """A file whose blocks can be fetched."""

    def fetch_ahead(self, numbers: range) -> list[tuple[int, Future[Any]]]:
        """Ask for those of these blocks that are missing: the bytes and the future of each request."""
        ...


class Ahead:
    """What waits to be fetched. Threads may share it; a forked copy begins with nothing."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._waiting: list[tuple[int, int, Fetchable, range]] = []
        self._num_added = self._nbytes = self._num_requests = 0

    def add(self, nbytes: int, runs: Iterable[tuple[Fetchable, range]]) -> None:
        """Fetch these runs of blocks, in this order, before all that was added with more bytes.

        The samples of a batch are few and needed at once, those of a window of batches are many and needed later.
        """
        with self._lock:
            for file, run in runs:
                heappush(self._waiting, (nbytes, self._num_added, file, run))
                self._num_added += 1
        self._ask()

    def _ask(self) -> None:
        while True:
            with self._lock:
                if not self._waiting or self._nbytes >= _MAX_NBYTES or self._num_requests >= _MAX_REQUESTS:
                    return
                *_, file, run = heappop(self._waiting)
            for nbytes, future in file.fetch_ahead(run):
                with self._lock:
                    self._nbytes += nbytes
                    self._num_requests += 1
                future.add_done_callback(partial(self._ended, nbytes))

    def _ended(self, nbytes: int, future: Future[Any]) -> None:
        with self._lock:
            self._nbytes -= nbytes
            self._num_requests -= 1
            if future.exception() is not None:
                self._waiting.clear()  # the rest would fail, too, or is no longer wanted; reading it says why
        self._ask()


shared = Ahead()


def _begin_anew() -> None:
    global shared
    shared = Ahead()


os.register_at_fork(after_in_child=_begin_anew)
