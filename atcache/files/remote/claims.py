"""Who is fetching which block: one at a time, over all processes, and a killed one no longer."""

from __future__ import annotations

import fcntl
import os
import threading


class Claims:
    """Claims on blocks by their keys: locks on single bytes of a file, which end with their process.

    Threads may share it; a forked copy begins without any.
    """

    def __init__(self, lock_fd: int) -> None:
        self._fd = lock_fd
        self._reset()

    def _reset(self) -> None:
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._held: dict[bytes, threading.Event] = {}

    def take(self, key: bytes) -> bool:
        """Claim a block, unless somebody has."""
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
        """Give a claim of this process back."""
        with self._lock:
            fcntl.lockf(self._fd, fcntl.LOCK_UN, 1, _place(key))
            self._held.pop(key).set()

    def wait(self, key: bytes) -> None:
        """Wait until nobody has claimed a block. Whoever waits must hold no claim."""
        with self._lock:
            event = self._held.get(key)
        if event is not None:
            event.wait()
            return
        try:
            fcntl.lockf(self._fd, fcntl.LOCK_EX, 1, _place(key))
            fcntl.lockf(self._fd, fcntl.LOCK_UN, 1, _place(key))
        except OSError:
            return  # the system sees a deadlock where two threads of a process wait for one another's processes


def _place(key: bytes) -> int:
    """The byte of the lock file that stands for a block. Byte 0 is for opening the block cache."""
    return 1 + int.from_bytes(key[:7], "little")
