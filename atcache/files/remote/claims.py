"""Claims: only one process at a time fetches a block. A killed process loses its claims."""

from __future__ import annotations

import fcntl
import os
import threading
import time

_PAUSE_S = 0.01


class Claims:
    """Claims on blocks, by key. Each is a lock on one byte of a file, and ends with its process.

    Threads may share one object. A forked copy starts without claims.
    """

    def __init__(self, lock_fd: int) -> None:
        self._fd = lock_fd
        self._reset()

    def _reset(self) -> None:
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._held: dict[bytes, threading.Event] = {}

    def take(self, key: bytes) -> bool:
        """Claim a block. Returns False if another thread or process has claimed it."""
        if self._pid != os.getpid():
            self._reset()
        with self._lock:
            if key in self._held:
                return False
            try:
                fcntl.lockf(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, _place(key))
            except OSError:
                return False
            self._held[key] = threading.Event()
            return True

    def release(self, key: bytes) -> None:
        """Give up a claim of this process."""
        with self._lock:
            fcntl.lockf(self._fd, fcntl.LOCK_UN, 1, _place(key))
            self._held.pop(key).set()

    def wait(self, key: bytes, until_s: float) -> bool:
        """Wait until nobody claims a block. The caller must hold no claim, or two callers could wait for each other.

        Args:
            key: the block.
            until_s: the time, on the monotonic clock, after which another process is not waited for: it may be stopped.

        Returns:
            Whether nobody claims it now.
        """
        while True:
            with self._lock:
                event = self._held.get(key)
                if event is None and self._is_free(key):
                    return True
            if event is not None:
                event.wait()
                return True
            if time.monotonic() >= until_s:
                return False
            time.sleep(_PAUSE_S)

    def _is_free(self, key: bytes) -> bool:
        """Whether no other process claims a block."""
        try:
            fcntl.lockf(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, _place(key))
        except OSError:
            return False
        fcntl.lockf(self._fd, fcntl.LOCK_UN, 1, _place(key))
        return True


def _place(key: bytes) -> int:
    """The byte of the lock file that is locked for a block. Byte 0 is the lock for opening the block cache."""
    return 1 + int.from_bytes(key[:7], "little")
