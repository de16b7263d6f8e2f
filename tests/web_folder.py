"""A web server of two folders, as a bucket or another server would be: it answers ranges and CORS, or fails to."""

from __future__ import annotations

import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit


class WebFolder(ThreadingHTTPServer):
    """Serves folders on a free port of this machine, from a thread, until it is closed."""

    daemon_threads = True

    def __init__(self, **folders: Path) -> None:
        """Each folder is at the address of its name."""
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folders = folders
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.has_cors = True
        self.has_ranges = True
        self.has_suffixes = True
        """Whether it answers `bytes=-4`; Azure does not."""
        self.status = 0
        """What all requests are answered with, if not 0."""
        self.log: list[tuple[str, str, str]] = []
        """Method, path and range of each request."""
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    def __exit__(self, *error: object) -> None:
        self.shutdown()
        super().__exit__(*error)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: WebFolder

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_OPTIONS(self) -> None:
        self.send_response(204 if self.server.has_cors else 403)
        self.send_header("Access-Control-Allow-Headers", "Range")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def do_GET(self) -> None:
        server, asked = self.server, self.headers.get("Range", "")
        path = unquote(urlsplit(self.path).path).lstrip("/")
        server.log.append((self.command, path, asked))
        name, _, rest = path.partition("/")
        file = server.folders.get(name, Path("/nowhere")) / (rest or "index.html")
        if server.status or not file.is_file():
            self.send_response(server.status or 404)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        data = file.read_bytes()
        part = self._range(asked, len(data))
        start, stop = part or (0, len(data))
        self.send_response(206 if part else 200)
        if part:
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(data)}")
        kinds = {".html": "text/html", ".js": "text/javascript", ".css": "text/css"}
        self.send_header("Content-Type", kinds.get(file.suffix, "application/octet-stream"))
        self.send_header("Content-Length", str(stop - start))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data[start:stop])

    def _range(self, asked: str, size: int) -> tuple[int, int] | None:
        """The bytes of a part; None to answer with all."""
        found = re.fullmatch(r"bytes=(\d*)-(\d*)", asked)
        if found is None or not self.server.has_ranges or not size:
            return None
        first, last = found.groups()
        if first:
            return int(first), min(int(last) + 1, size)
        return (max(0, size - int(last)), size) if self.server.has_suffixes else None

    def end_headers(self) -> None:
        if self.server.has_cors:
            self.send_header("Access-Control-Allow-Origin", "*")
            self.send_header("Access-Control-Expose-Headers", "Content-Range, Content-Length")
        super().end_headers()

    def log_message(self, *_: object) -> None:
        """Keep quiet."""
