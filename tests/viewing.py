"""`atcache view` as a process of its own, and bare HTTP: requests that no client library would send.

with viewing(cache) as served:
    answer = served.get("caches/0/zarr.json", Range="bytes=-4")
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple
from urllib.parse import urlsplit

from atcache.errors import AtcacheError


class Answer(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes


@dataclass
class Served:
    """A running `atcache view`."""

    process: subprocess.Popen[str]
    address: str

    @property
    def port(self) -> int:
        return urlsplit(self.address).port or 0

    def get(self, path: str, *, method: str = "GET", **headers: str) -> Answer:
        """Ask for a path below the address; names of headers have _ for -."""
        return self.ask(urlsplit(self.address).path + path, method=method, **headers)

    def ask(self, target: str, *, method: str = "GET", body: bytes = b"", **headers: str) -> Answer:
        """Send exactly this target, on a connection of its own."""
        lines = {"Host": f"127.0.0.1:{self.port}", **{name.replace("_", "-"): value for name, value in headers.items()}}
        head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
        with socket.create_connection(("127.0.0.1", self.port), timeout=30) as connection:
            connection.sendall(f"{method} {target} HTTP/1.1\r\n{head}Connection: close\r\n\r\n".encode() + body)
            answer = b"".join(iter(lambda: connection.recv(2**16), b""))
        return parse_answer(answer)

    def stop(self, number: int = signal.SIGINT) -> int:
        """Its exit code after a signal."""
        self.process.send_signal(number)
        return self.process.wait(30)


def parse_answer(data: bytes) -> Answer:
    head, _, body = data.partition(b"\r\n\r\n")
    first, *lines = head.decode("latin-1").split("\r\n")
    headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
    return Answer(int(first.split()[1]) if first else 0, headers, body)


@contextmanager
def viewing(*arguments, **environment: str) -> Generator[Served]:
    """`atcache view` with these arguments, at a free port unless they name one. It ends with the block."""
    process = start_viewing(*arguments, **environment)
    try:
        line = process.stdout.readline()
        if not line:
            raise AtcacheError(process.communicate()[1])
        yield Served(process, json.loads(line)["address"])
    finally:
        process.kill()
        process.communicate()


def start_viewing(*arguments, **environment: str) -> subprocess.Popen[str]:
    port = () if "--port" in arguments else ("--port", 0)
    command = [sys.executable, "-m", "atcache.cli.main", "view", *arguments, *port]
    return subprocess.Popen(
        [str(word) for word in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )
