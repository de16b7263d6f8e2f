"""The viewer's server: files by HTTP, in parts, for those who may see them.

It gives only what the site has, so no path can lead out of it. A web page of another origin can make a browser ask a
server of this machine. It must not read the answers: so a name in the header Host that is not ours is refused (an
attacker may let a name of his point here), and CORS allows pages of this machine, or of the origin that was named.
"""

from __future__ import annotations

import hmac
import ipaddress
import json
import re
import socket
import socketserver
import sys
import threading
import traceback
from collections.abc import Callable
from contextlib import suppress
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote_to_bytes

from atcache.errors import (
    AtcacheError,
    CacheMismatchError,
    CacheMissError,
    RemoteError,
    SourceError,
)

from .files import NotThereError
from .site import Found, Site

_LOOPBACK = frozenset(("localhost", "127.0.0.1", "::1"))
_MAX_CONNECTIONS = 200
_MAX_TARGET = 4096
_TIMEOUT_S = 60.0  # without a byte from or to a client
_PIECE_NBYTES = 2**22  # read at once: a server is then asked in few requests
_SEND_NBYTES = 2**18  # sent within the timeout
_RANGE = re.compile(r"bytes=([0-9]{0,19})-([0-9]{0,19})")
_EXPOSED = "Content-Range, Content-Length, Accept-Ranges, ETag"
# The page is its own scripts and styles, and workers and images that it makes itself. numcodecs, which decompresses,
# makes functions of WebAssembly from texts, and so needs unsafe-eval. No other server is ever asked.
_PAGE_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-eval' blob:; worker-src 'self' blob:; "
    "img-src 'self' blob: data:; style-src 'self' 'unsafe-inline'; connect-src 'self' blob: data:; "
    "object-src 'none'; base-uri 'none'; form-action 'none'"
)


class ViewServer(ThreadingHTTPServer):
    """Serves a site. Each connection has a thread, so that slow clients do not hold up others."""

    daemon_threads = True
    block_on_close = False  # open connections end with the process
    request_queue_size = 128

    def __init__(
        self,
        host: str,
        port: int,
        site: Site,
        *,
        token: str = "",
        names: frozenset[str] = frozenset(),
        origin: str = "",
    ) -> None:
        """Listen, but do not answer yet.

        Args:
            host: the address to listen at.
            port: 0 for any that is free.
            site: what is served.
            token: the first part of every path; empty for none.
            names: hosts that requests may name, beside those of loopback and, with a token, addresses in numbers:
                nobody can let these point elsewhere.
            origin: the origin of pages elsewhere that may read what is served, or "*".

        Raises:
            OSError: the address cannot be listened at.
        """
        self.site, self.token = site, token
        self._names, self._origin = names, origin
        self._room = threading.BoundedSemaphore(_MAX_CONNECTIONS)
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        self.address_family = family
        super().__init__(address[:2], _Handler)  # pyright: ignore[reportArgumentType]

    def server_bind(self) -> None:
        """Bind without asking a name server for this machine's name, as `HTTPServer` does, which can take seconds."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])

    def is_ours(self, host: str) -> bool:
        """Whether a header Host names this server."""
        name = _host_name(host)
        if name in _LOOPBACK or name in self._names:
            return True
        return bool(self.token) and _is_address(name)

    def may_read(self, origin: str) -> bool:
        """Whether a page of another origin may read the answers. Who knows the token was given it."""
        if self.token or self._origin == "*":
            return True
        return origin == self._origin or _host_name(origin.partition("://")[2]) in _LOOPBACK

    def process_request(self, request: Any, client_address: Any) -> None:  # noqa: ANN401 - socketserver's
        """Start a thread for a connection, unless there are very many."""
        if self._room.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:  # noqa: ANN401 - socketserver's
        """Answer one connection, in a thread of its own."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._room.release()

    def handle_error(self, request: Any, client_address: Any) -> None:  # noqa: ANN401 - socketserver's
        """Say nothing of clients that have gone; show a bug of ours."""
        if not isinstance(sys.exception(), OSError):
            traceback.print_exc()


class _Refusal(Exception):
    """An answer that is an error; the message is one sentence."""

    def __init__(self, status: HTTPStatus, sentence: str, **headers: str) -> None:
        super().__init__(sentence)
        self.status, self.headers = status, headers


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1
    timeout = _TIMEOUT_S
    server: ViewServer  # pyright: ignore[reportIncompatibleVariableOverride]

    def do_GET(self) -> None:
        self._answer(self._get)

    def do_HEAD(self) -> None:
        self._answer(self._get)

    def do_OPTIONS(self) -> None:
        self._answer(self._preflight)

    def _answer(self, how: Callable[[str], None]) -> None:
        """Check a request, answer it, and turn errors into answers."""
        self._has_begun = False
        try:
            how(self._checked_path())
        except _Refusal as refusal:
            self._refuse(refusal.status, str(refusal), **refusal.headers)
        except NotThereError as error:
            self._refuse(HTTPStatus.NOT_FOUND, str(error))
        except AtcacheError as error:
            self._refuse(_status_of(error), str(error))
        except OSError as error:
            if self._has_begun:
                raise  # the client has gone
            what = f"a file of the cache or of its data cannot be read ({error.strerror})."
            self._refuse(HTTPStatus.INTERNAL_SERVER_ERROR, what)
        except Exception:
            traceback.print_exc()
            self._refuse(HTTPStatus.INTERNAL_SERVER_ERROR, "a bug of atcache; its terminal shows more.")

    def _checked_path(self) -> str:
        """The path below the token, decoded."""
        if self.headers.get("Transfer-Encoding") or self.headers.get("Content-Length", "0") != "0":
            self.close_connection = True
            raise _Refusal(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "requests must have no body.")
        if not self.server.is_ours(self.headers.get("Host", "")):
            raise _Refusal(
                HTTPStatus.FORBIDDEN,
                "this server is not known by the name in the address. Use the address that `atcache view` printed, or "
                "name the host with --host.",
            )
        target = self.path.partition("?")[0]
        if len(self.path) > _MAX_TARGET or not target.startswith("/"):
            raise _Refusal(HTTPStatus.BAD_REQUEST, f"the address must be a path of at most {_MAX_TARGET} characters.")
        path = _decode_path(target[1:])
        if not self.server.token:
            return path
        token, slash, path = path.partition("/")
        if not hmac.compare_digest(token.encode(), self.server.token.encode()):
            raise NotThereError("there is nothing without the token, which is in the address that was printed.")
        if not slash:  # so that relative addresses of the page work
            raise _Refusal(HTTPStatus.MOVED_PERMANENTLY, "the address ends in /.", Location=f"/{token}/")
        return path

    def _preflight(self, path: str) -> None:
        del path
        self._begin(HTTPStatus.NO_CONTENT)
        self.send_header("Access-Control-Allow-Methods", "GET, HEAD, OPTIONS")
        self.send_header("Access-Control-Allow-Headers", "Range, If-Match, If-None-Match, If-Range")
        self.send_header("Access-Control-Max-Age", "600")
        self.send_header("Allow", "GET, HEAD, OPTIONS")
        self.end_headers()

    def _get(self, path: str) -> None:
        try:
            query = parse_qs(self.path.partition("?")[2], max_num_fields=10)
        except ValueError:
            raise _Refusal(HTTPStatus.BAD_REQUEST, "the address asks for too many things.") from None
        found = self.server.site.find(path, query)
        tag = f'"{found.file.version}"'
        if (wanted := self.headers.get("If-Match")) and wanted != "*" and tag not in _tags(wanted):
            raise _Refusal(HTTPStatus.PRECONDITION_FAILED, "the file has changed.")
        if (known := self.headers.get("If-None-Match")) and (known == "*" or tag in _tags(known)):
            self._begin(HTTPStatus.NOT_MODIFIED, found, tag)
            self.end_headers()
            return
        size = found.file.nbytes
        is_part, start, stop = False, 0, size
        # RFC 9110, section 14.2: only GET has ranges.
        range_ = self.headers.get("Range") if self.command == "GET" else None
        if range_ and self.headers.get("If-Range", tag) == tag:
            is_part, start, stop = _parse_range(range_, size)
        # The first piece comes before the answer begins, so that an error can still be one.
        first = found.file.pread(min(_PIECE_NBYTES, stop - start), start) if self.command == "GET" else b""
        self._begin(HTTPStatus.PARTIAL_CONTENT if is_part else HTTPStatus.OK, found, tag)
        self.send_header("Content-Type", found.mime)
        self.send_header("Content-Length", str(stop - start))
        if is_part:
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{size}")
        if found.mime.startswith("text/html"):
            self.send_header("Content-Security-Policy", _PAGE_POLICY)
        self.end_headers()
        if self.command == "GET":
            self._send(found, first, start, stop)

    def _send(self, found: Found, piece: bytes, start: int, stop: int) -> None:
        while start < stop:
            if not piece:  # the file became shorter: what was promised cannot be sent
                self.close_connection = True
                return
            for at in range(0, len(piece), _SEND_NBYTES):
                self.wfile.write(memoryview(piece)[at : at + _SEND_NBYTES])
            start += len(piece)
            try:
                piece = found.file.pread(min(_PIECE_NBYTES, stop - start), start) if start < stop else b""
            except AtcacheError as error:
                self.log_error("%s", error)
                piece = b""

    def _refuse(self, status: HTTPStatus, sentence: str, **headers: str) -> None:
        if self._has_begun:
            self.close_connection = True
            return
        body = json.dumps({"error": sentence}).encode()
        self._begin(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _begin(self, status: HTTPStatus, found: Found | None = None, tag: str = "") -> None:
        """The status and the headers that all answers have."""
        self._has_begun = True
        self.send_response(status)
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Referrer-Policy", "no-referrer")  # the address may have a token in it
        self.send_header("Cross-Origin-Resource-Policy", "same-origin")
        self.send_header("Vary", "Origin")
        origin = self.headers.get("Origin")
        if origin and self.server.may_read(origin):
            self.send_header("Access-Control-Allow-Origin", origin)
            self.send_header("Access-Control-Expose-Headers", _EXPOSED)
        if found is None:
            self.send_header("Cache-Control", "no-store")
        else:
            self.send_header("Accept-Ranges", "bytes")
            self.send_header("ETag", tag)
            self.send_header("Cache-Control", "no-cache" if found.is_kept else "no-store")

    def version_string(self) -> str:
        """The header Server."""
        return "atcache"

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Answer a request that the library refuses as we do: malformed, too long, or with another method."""
        del explain
        self.close_connection, self._has_begun = True, False
        self.request_version = self.protocol_version  # what came may be none
        self.command = getattr(self, "command", None) or "GET"
        if not hasattr(self, "headers"):
            from http.client import HTTPMessage

            self.headers = HTTPMessage()
        status = HTTPStatus(code)
        headers = {"Allow": "GET, HEAD, OPTIONS"} if status == HTTPStatus.NOT_IMPLEMENTED else {}
        status = HTTPStatus.METHOD_NOT_ALLOWED if headers else status
        self._refuse(status, message or status.phrase, **headers)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: ANN401 - the library's
        """Do not print every request."""

    def log_error(self, format: str, *args: Any) -> None:  # noqa: ANN401 - the library's
        """Print what went wrong while a file was sent; timeouts of idle clients did not."""
        if "timed out" not in format:
            sys.stderr.write(f"{format % args}\n")


def _status_of(error: AtcacheError) -> HTTPStatus:
    """The status of an answer that an error has become."""
    if isinstance(error, CacheMissError | SourceError):
        return HTTPStatus.NOT_FOUND
    if isinstance(error, CacheMismatchError):
        return HTTPStatus.CONFLICT
    return HTTPStatus.BAD_GATEWAY if isinstance(error, RemoteError) else HTTPStatus.INTERNAL_SERVER_ERROR


def _decode_path(path: str) -> str:
    """A path with its percent encoding undone. Parts that could lead elsewhere are refused."""
    try:
        text = unquote_to_bytes(path).decode()
    except UnicodeDecodeError:
        text = "\0"
    parts = text.split("/")
    if any(part in {".", ".."} for part in parts) or "" in parts[:-1] or "\\" in text or not text.isprintable():
        raise _Refusal(HTTPStatus.BAD_REQUEST, "the address is not a path of names between single slashes.")
    return text


def _parse_range(text: str, size: int) -> tuple[bool, int, int]:
    """Whether a part is asked for, its first byte and the byte behind its last.

    What is not one range of bytes is ignored, as HTTP says: then all is sent.
    """
    match = _RANGE.fullmatch(text.replace(" ", ""))
    if match is None or match[1] == match[2] == "" or (match[1] and match[2] and int(match[1]) > int(match[2])):
        return False, 0, size
    if match[1]:
        start, stop = int(match[1]), min(size, int(match[2]) + 1) if match[2] else size
    else:  # the last so many
        start, stop = max(0, size - int(match[2])), size
    if start >= stop:
        raise _Refusal(
            HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE,
            f"bytes {text.removeprefix('bytes=')} are not in the file, which has {size}.",
            Content_Range=f"bytes */{size}",
        )
    return True, start, stop


def _tags(header: str) -> set[str]:
    """The entity tags in a header; a proxy may have made them weak."""
    return {tag.strip().removeprefix("W/") for tag in header.split(",")}


def _host_name(host: str) -> str:
    """The name in a header Host, without its port.

    >>> _host_name("LOCALHOST:80"), _host_name("[::1]:80"), _host_name("a b")
    ('localhost', '::1', '')
    """
    match = re.fullmatch(r"(?:\[([0-9a-f:]+)\]|([a-z0-9._-]+))(?::[0-9]{1,5})?", host.lower())
    return "" if match is None else match[1] or match[2]


def _is_address(name: str) -> bool:
    with suppress(ValueError):
        return bool(ipaddress.ip_address(name))
    return False
