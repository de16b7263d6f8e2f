"""A web server of a folder that answers range requests, and S3's listing; it misbehaves when it is told to."""

from __future__ import annotations

import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qs, quote, unquote, urlsplit
from xml.sax.saxutils import escape


class Asked(NamedTuple):
    """One request."""

    method: str
    path: str
    range: str
    authorization: str | None
    when_s: float


class FolderServer(ThreadingHTTPServer):
    """Serves a folder on a free port of this machine, from a thread, until it is closed."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder = folder
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.log: list[Asked] = []
        self.num_bytes = 0
        self.delay_s = 0.0
        self.fault = ""
        """ignore-ranges, truncate, garbage or fail."""
        self.refusals: list[tuple[int, str]] = []
        """Status and Retry-After of the next answers; the last comes first."""
        self.redirects_to: FolderServer | None = None
        """Where the bytes of the files are, at addresses that are signed for `link_life_s`."""
        self.link_life_s = 600.0
        self.says_linked = True
        """Whether a redirect says what the file is, as Hugging Face's hub does."""
        self.signed_only = False
        """Whether only signed addresses are answered, and only GET, as an object store does."""
        self.answers_together = 0
        """No request is answered before so many were under way at once; some are answered after 20 s all the same."""
        self.most_at_once = 0
        """The most requests that were under way at once while `answers_together` was set."""
        self.under_way = 0
        self.changed = threading.Condition()
        self.tag = ""
        """Makes its entity tags different from those of other servers."""
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def num_requests(self) -> int:
        """How many requests came."""
        return len(self.log)

    def entity_tag(self, file: Path) -> str:
        """Changes when the file does."""
        return f'"{self.tag}{file.stat().st_mtime_ns:x}-{file.stat().st_size:x}"'

    def __exit__(self, *error: Any) -> None:
        self.shutdown()
        super().__exit__(*error)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1
    server: FolderServer

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        server, fault = self.server, self.server.fault
        found = urlsplit(self.path)
        path, query = unquote(found.path).strip("/"), parse_qs(found.query)
        authorization, range_ = self.headers.get("Authorization"), self.headers.get("Range", "")
        server.log.append(Asked(self.command, path, range_, authorization, time.monotonic()))
        time.sleep(server.delay_s)
        if server.answers_together:
            self._wait_for_others()
        if server.refusals:
            self._answer_shortly(*server.refusals.pop())
            return
        if "list-type" in query:
            self._list(path, query["prefix"][0])
            return
        file = server.folder / path
        if fault == "fail" or not file.is_file():
            self.send_error(500 if fault == "fail" else 404)
            return
        if server.redirects_to is not None:
            self._redirect(file, path, server.redirects_to)
            return
        if server.signed_only and (self.command == "HEAD" or float(query.get("Expires", ["0"])[0]) < time.time()):
            self._answer_shortly(403, "")
            return
        with file.open("rb") as opened:
            size, start = file.stat().st_size, 0
            stop = size
            if "Range" in self.headers and fault != "ignore-ranges":
                first, last = self.headers["Range"].removeprefix("bytes=").split("-")
                start, stop = int(first), min(int(last) + 1, size)
                self.send_response(206)
                self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{size}")
            else:
                self.send_response(200)
            opened.seek(start)
            data = opened.read(stop - start) if self.command == "GET" else b""
        self.send_header("ETag", server.entity_tag(file))
        self.send_header("Content-Length", str(stop - start))
        self.end_headers()
        server.num_bytes += len(data)
        if fault == "garbage":
            data = bytes(len(data))
        if fault == "truncate":
            data, self.close_connection = data[: len(data) // 2], True
        self.wfile.write(data)

    def _wait_for_others(self) -> None:
        server = self.server
        with server.changed:
            server.under_way += 1
            server.most_at_once = max(server.most_at_once, server.under_way)
            server.changed.notify_all()
            server.changed.wait_for(lambda: server.most_at_once >= server.answers_together, timeout=20)
            server.under_way -= 1

    def _answer_shortly(self, status: int, retry_after: str) -> None:
        self.send_response(status)
        if retry_after:
            self.send_header("Retry-After", retry_after)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _redirect(self, file: Path, path: str, other: FolderServer) -> None:
        self.send_response(302)
        expires = time.time() + self.server.link_life_s
        self.send_header("Location", f"{other.url}/{quote(path)}?Expires={expires:.0f}&Signature=s%2Fg")
        if self.server.says_linked:
            self.send_header("X-Linked-Size", str(file.stat().st_size))
            self.send_header("X-Linked-ETag", self.server.entity_tag(file))
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _list(self, bucket: str, prefix: str) -> None:
        """S3's ListObjectsV2, in one page."""
        root = self.server.folder / bucket
        names = sorted(file.relative_to(root).as_posix() for file in root.rglob("*") if file.is_file())
        keys = "".join(
            f"<Contents><Key>{escape(name)}</Key><LastModified>2026-01-01T00:00:00.000Z</LastModified><ETag>x</ETag>"
            f"<Size>{(root / name).stat().st_size}</Size></Contents>"
            for name in names
            if name.startswith(prefix)
        )
        body = f"<ListBucketResult><IsTruncated>false</IsTruncated>{keys}</ListBucketResult>".encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Keep quiet."""
