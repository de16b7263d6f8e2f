"""A proxy before an S3 server that misbehaves at random, with a seed: run as a script, it prints its port.

    python faulty_proxy.py --to PORT [--seed 0] [--faults 0.1] [--delay-ms 0] [--deny HEAD] [--lacks If-Match]

A share `faults` of the requests meets one of the faults below. `GET /proxy-counts` answers how many requests came, by
method, and how many met which fault. `--deny` answers a method with 403, and `--lacks` a PUT with a header with 501. It
ends when its stdin does, so that it cannot outlive the test.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import socket
import sys
import threading
import time
from collections import Counter
from http.client import HTTPConnection, HTTPException
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

FAULTS = ("500", "503", "429", "drop-before", "drop-within", "drop-after", "truncate", "late")
"""An error instead of an answer; the connection dropped before the request is forwarded, in the middle of its body,
or after it was obeyed; half an answer; an answer that takes a while."""
_HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding"}


class Proxy(ThreadingHTTPServer):
    """The proxy: it listens on a free port."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, options: argparse.Namespace) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.to: int = options.to
        self.share: float = options.faults
        self.delay_s: float = options.delay_ms / 1000
        self.denied: str = options.deny
        self.lacks: str = options.lacks
        self.counts: Counter[str] = Counter()
        self._random = random.Random(options.seed)
        self._lock = threading.Lock()

    def draw(self, method: str) -> tuple[str, float]:
        """The fault of the next request, or "", and a number from 0 to 1 that says how bad it is."""
        with self._lock:
            self.counts[method] += 1
            fault = self._random.choice(FAULTS) if self._random.random() < self.share else ""
            self.counts[fault] += bool(fault)
            return fault, self._random.random()

    def handle_error(self, *_: Any) -> None:
        """Keep quiet: clients that are killed drop their connections."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1
    server: Proxy

    def _serve(self) -> None:
        if self.path == "/proxy-counts":
            self._answer(200, {}, json.dumps(self.server.counts).encode())
            return None
        fault, amount = self.server.draw(self.command)
        time.sleep(self.server.delay_s + (amount * 0.3 if fault == "late" else 0))
        length = int(self.headers.get("Content-Length", 0))
        if fault == "drop-before":
            return self._drop()
        body = self.rfile.read(length // 2 if fault == "drop-within" else length)
        if fault == "drop-within":
            return self._drop()
        if self.command == self.server.denied:
            fault = "403"
        if self.command == "PUT" and self.server.lacks in self.headers:
            fault = "501"
        if fault.isdigit():
            headers = {"Retry-After": "0"} if fault in ("503", "429") else {}
            self._answer(int(fault), headers, b"<Error><Code>SlowDown</Code></Error>")
            return None
        upstream = HTTPConnection("127.0.0.1", self.server.to, timeout=60)
        try:
            upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                if name.lower() not in _HOP_BY_HOP:
                    upstream.putheader(name, value)
            upstream.endheaders(body or None)
            answer = upstream.getresponse()
            data = answer.read()
        except (OSError, HTTPException):  # the server is gone: so is the connection
            return self._drop()
        finally:
            upstream.close()
        if fault == "drop-after":
            return self._drop()
        headers = {name: value for name, value in answer.getheaders() if name.lower() not in _HOP_BY_HOP}
        self._answer(answer.status, headers, data, cut=fault == "truncate")
        return None

    do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = _serve

    def _answer(self, status: int, headers: dict[str, str], data: bytes, *, cut: bool = False) -> None:
        self.send_response_only(status)
        for name, value in headers.items():
            if name.lower() != "content-length" or self.command == "HEAD":
                self.send_header(name, value)
        if self.command != "HEAD":
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data[: len(data) // 2] if cut else data)
        self.wfile.flush()
        if cut:
            self._drop()

    def _drop(self) -> None:
        """End the connection at once, as a cut cable or a killed server does."""
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        self.connection.close()

    def log_message(self, *_: Any) -> None:
        """Keep quiet."""


def main() -> None:
    """Serve until stdin ends."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--to", type=int, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--faults", type=float, default=0.0)
    parser.add_argument("--delay-ms", type=float, default=0.0)
    parser.add_argument("--deny", default="", help="method whose requests are answered with 403")
    parser.add_argument("--lacks", default="", help="header with which a PUT is answered with 501")
    proxy = Proxy(parser.parse_args())
    print(proxy.server_port, flush=True)
    threading.Thread(target=proxy.serve_forever, args=(0.05,), daemon=True).start()
    sys.stdin.read()
    os._exit(0)


if __name__ == "__main__":
    main()
