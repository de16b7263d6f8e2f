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
from atcache.files.remote.hub import served_at

_SCRIPT = Path(__file__).with_name("fetch_process.py")

MAX_WHOLE_NBYTES = 2**31
"""Limit for files that are read whole. The metadata and tables of a cache are far smaller."""


class Meta(NamedTuple):
    """What a server says about a file."""

    size: int
    version: str
    """Changes when the content does: the entity tag, or the time of the last change."""
    modified_s: float = 0.0
    """The time of the last change, in seconds since 1970; 0 if it was not asked for."""
    generation: str = ""
    """The store's own number of the version; Google's replaces an object on the condition that it has this one."""


class DeniedError(RemoteError):
    """The server refuses access, and would do so again."""


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
            where = served_at(url) if url.is_on_hub else {"root": url.root}
            line = json.dumps({**request, "id": number, **where, "key": url.key}).encode() + b"\n"
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
        "denied": f"may not be read: the server refuses access ({reason}). {_how_to_get_access(url)}",
        "ended": "cannot be read: the process that fetches it has ended. Run the same command again.",
    }
    error_type = DeniedError if kind == "denied" else RemoteError
    return error_type(f"{url} {texts.get(kind, f'cannot be read: {reason}.{_how_to_reach(url, reason)}')}")


def _how_to_reach(url: Url, reason: str) -> str:
    """What to look at if there was no answer at all from an object store."""
    if not reason.startswith("HTTP error") or not url.can_list:
        return ""
    if not url.root.startswith("s3:"):
        return " Check the network, and the environment variables of the store."
    place = os.environ.get("AWS_ENDPOINT_URL") or os.environ.get("AWS_ENDPOINT") or "Amazon's servers"
    allow = ", and set AWS_ALLOW_HTTP=true" if place.startswith("http:") else ""
    return f" {place} was asked: check the network and AWS_ENDPOINT_URL{allow}."


def _how_to_get_access(url: Url) -> str:
    if url.is_on_hub:
        return "Log in with `hf auth login`, or set HF_TOKEN, as a user who may read it."
    if not url.can_list:  # a web server
        return "Web servers are asked without credentials: use an address that anyone may read, or copy the files here."
    return "Give credentials in the environment variables of the store."


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
    return Meta(int(header["size"]), str(header["version"]), float(header["modified_s"]), str(header["generation"]))


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


def put_once(url: Url, file: Path, mode: str | dict[str, str]) -> dict[str, Any]:
    """Store a local file at `url` in one request; `putting.put_file` repeats what fails.

    Args:
        url: where.
        file: the file; the process that talks to servers reads it itself.
        mode: "create" if there must be nothing yet, "overwrite", or the "e_tag" and "version" of what is replaced.

    Returns:
        The outcome: "stored" with its version; "exists" or "changed" if a condition did not hold; or "missing" (there
        is no such bucket), "denied" or "failed" with the reason.
    """
    return _ask(url, do="put", file=str(file.absolute()), mode=mode).result()[0]


def delete_once(url: Url) -> dict[str, Any]:
    """Delete an object. Returns the outcome: "deleted", also if it was not there, or as `put_once`."""
    return _ask(url, do="delete").result()[0]


def list_below(folder: Url, *, num_pages: int | None = None) -> list[str]:
    """Paths of the files below a folder, relative to it, in no particular order.

    Args:
        folder: where to look.
        num_pages: stop after so many pages of 1,000 names.

    Raises:
        RemoteError: the server cannot list folders, or cannot be read.
    """
    if not folder.can_list:
        raise RemoteError(f"{folder} cannot be listed: web servers do not say what is in a folder. Name the files.")
    prefix = folder.key + "/" if folder.parts else ""
    names: list[str] = json.loads(_ask(folder, do="list", num_pages=num_pages).result()[1])
    return [name.removeprefix(prefix) for name in names if name.startswith(prefix)]
