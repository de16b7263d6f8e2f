"""A web server of a folder that answers range requests, and S3's listing; it misbehaves when it is told to."""

from __future__ import annotations

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from time import sleep
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape


class FolderServer(ThreadingHTTPServer):
    """Serves a folder on a free port of this machine, from a thread, until it is closed."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder = folder
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.num_requests = 0
        self.num_bytes = 0
        self.delay_s = 0.0
        self.fault = ""
        """ignore-ranges, truncate, garbage or fail."""
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

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
        server.num_requests += 1
        sleep(server.delay_s)
        path, query = unquote(urlsplit(self.path).path).strip("/"), parse_qs(urlsplit(self.path).query)
        if "list-type" in query:
            self._list(path, query["prefix"][0])
            return
        file = server.folder / path
        if fault == "fail" or not file.is_file():
            self.send_error(500 if fault == "fail" else 404)
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
        self.send_header("ETag", f'"{file.stat().st_mtime_ns:x}-{size:x}"')
        self.send_header("Content-Length", str(stop - start))
        self.end_headers()
        server.num_bytes += len(data)
        if fault == "garbage":
            data = bytes(len(data))
        if fault == "truncate":
            data, self.close_connection = data[: len(data) // 2], True
        self.wfile.write(data)

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
