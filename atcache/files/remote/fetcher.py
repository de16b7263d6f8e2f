"""Asks servers for bytes, through a separate process; see `fetch_process`."""

from __future__ import annotations

import atexit
import errno
import json
import os
import socket
import subprocess
import sys
import threading
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from atcache.errors import RemoteError
from atcache.files.location import Url

_SCRIPT = Path(__file__).with_name("fetch_process.py")

MAX_WHOLE_NBYTES = 2**31
"""Limit for files that are read whole. The metadata and tables of a cache are far smaller."""


class Meta(NamedTuple):
    """What a server says about a file."""

    size: int
    version: str
    """Changes when the content does: the entity tag, or the time of the last change."""


class _Fetcher:
    """A fetch process and the requests it has not answered yet. Threads may share it; forked copies may not."""

    def __init__(self) -> None:
        self._socket, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", str(_SCRIPT), str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env={"TOKIO_WORKER_THREADS": "2", **os.environ},
                process_group=0,  # Ctrl-C and a scheduler's SIGTERM must not end it while we still need its answers
            )
        self._lock = threading.Lock()
        self._waiting: dict[int, tuple[Url, Future[tuple[dict[str, Any], bytes]]]] = {}
        self._num_asked = 0
        self.is_running = True
        threading.Thread(target=self._receive, name="atcache-fetch", daemon=True).start()

    def ask(self, url: Url, request: dict[str, Any]) -> Future[tuple[dict[str, Any], bytes]]:
        """A future of the answer: its header and bytes, or an exception if the server or the process fails."""
        future: Future[tuple[dict[str, Any], bytes]] = Future()
        with self._lock:
            self._num_asked += 1
            number = self._num_asked
            self._waiting[number] = url, future
            line = json.dumps({**request, "id": number, "root": url.root, "key": url.key}).encode() + b"\n"
            try:
                self._socket.sendall(line)
            except OSError:
                self.is_running = False
                del self._waiting[number]
                future.set_exception(_describe(url, "ended", ""))
        return future

    def _receive(self) -> None:
        try:
            with self._socket.makefile("rb") as answers:
                for line in answers:
                    header: dict[str, Any] = json.loads(line)
                    payload = answers.read(header["nbytes"])
                    if len(payload) < header["nbytes"]:
                        break
                    with self._lock:
                        url, future = self._waiting.pop(header["id"])
                    if "error" in header:
                        future.set_exception(_describe(url, header["error"], header["reason"]))
                    else:
                        future.set_result((header, payload))
        except (OSError, ValueError):
            pass  # the socket was closed while this thread waited
        with self._lock:
            self.is_running = False
            left = list(self._waiting.values())
            self._waiting.clear()
        for url, future in left:
            future.set_exception(_describe(url, "ended", ""))

    def close(self) -> None:
        """End the process."""
        self.is_running = False
        with suppress(OSError):  # the process may have ended already
            self._socket.shutdown(socket.SHUT_RDWR)
        self._process.wait()
        self._socket.close()

    def abandon(self) -> None:
        """In a forked copy: let go of the process, which belongs to the parent."""
        self._socket.close()
        self._process.returncode = 0  # or Popen would warn that the process still runs


def _describe(url: Url, kind: str, reason: str) -> Exception:
    if kind == "missing":
        return FileNotFoundError(errno.ENOENT, "no such file on the server", str(url))
    texts = {
        "changed": "has changed since it was opened. Start again, so that all its bytes come from one version.",
        "no ranges": "cannot be read in parts: its server does not answer range requests. Use another server.",
        "denied": f"may not be read: the server refuses access ({reason}). Give credentials in the environment "
        "variables of the store.",
        "ended": "cannot be read: the process that fetches it has ended. Run the same command again.",
    }
    return RemoteError(f"{url} {texts.get(kind, f'cannot be read: {reason}.')}")


_fetcher: _Fetcher | None = None
_starting = threading.Lock()


def _forget_parents() -> None:
    global _fetcher, _starting
    if _fetcher is not None:
        _fetcher.abandon()
    _fetcher, _starting = None, threading.Lock()


def _close() -> None:
    if _fetcher is not None:
        _fetcher.close()


os.register_at_fork(after_in_child=_forget_parents)
atexit.register(_close)


def _ask(url: Url, **request: Any) -> Future[tuple[dict[str, Any], bytes]]:  # noqa: ANN401 - JSON
    global _fetcher
    with _starting:
        if _fetcher is None or not _fetcher.is_running:
            if _fetcher is not None:
                _fetcher.close()
            _fetcher = _Fetcher()
        fetcher = _fetcher
    return fetcher.ask(url, request)


def head(url: Url) -> Meta:
    """Size and version of a file on a server.

    Raises:
        FileNotFoundError: the server has no such file.
        RemoteError: the server does not answer, or refuses access.
    """
    header, _ = _ask(url, do="head").result()
    return Meta(int(header["size"]), str(header["version"]))


def get_range(url: Url, meta: Meta, start: int, stop: int) -> Future[tuple[dict[str, Any], bytes]]:
    """A future of the bytes [start, stop), as (header, bytes). It fails if the file's version is not that of `meta`."""
    return _ask(url, do="get", start=start, stop=stop, size=meta.size, version=meta.version)


def read_whole(url: Url) -> bytes:
    """All bytes of a small file.

    Raises:
        FileNotFoundError: the server has no such file.
        RemoteError: the file cannot be read, or is larger than `MAX_WHOLE_NBYTES`.
    """
    return _ask(url, do="read", limit=MAX_WHOLE_NBYTES).result()[1]


def list_below(folder: Url) -> list[str]:
    """Paths of the files below a folder, relative to it, in no particular order.

    Raises:
        RemoteError: the server cannot list folders, or cannot be read.
    """
    if not folder.can_list:
        raise RemoteError(f"{folder} cannot be listed: web servers do not say what is in a folder. Name the files.")
    prefix = folder.key + "/" if folder.parts else ""
    names: list[str] = json.loads(_ask(folder, do="list").result()[1])
    return [name.removeprefix(prefix) for name in names if name.startswith(prefix)]
