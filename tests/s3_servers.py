"""S3 servers of their own processes, for tests and benchmarks: moto, rclone, and a proxy that spoils the connection.

    with moto_server() as server, faulty_proxy(server, seed=1, faults=0.1) as proxy, reached(proxy):
        server.make_bucket("bucket")
        atcache.build(..., out="s3://bucket/cache.zarr")

Each ends with its `with` block.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import obstore
from obstore.store import S3Store

from atcache.files.remote import fetcher

_KEY, _SECRET = "atcachekey", "atcachesecret"
_SECONDS_TO_START = 30.0


@dataclass(frozen=True)
class Server:
    """An S3 server, or a proxy before one."""

    port: int
    process: subprocess.Popen[str]

    @property
    def url(self) -> str:
        """Its address, for `AWS_ENDPOINT_URL`."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def environment(self) -> dict[str, str]:
        """The variables by which atcache finds it, and everything else that obstore reads."""
        return {
            "AWS_ENDPOINT_URL": self.url,
            "AWS_ALLOW_HTTP": "true",
            "AWS_REGION": "us-east-1",
            "AWS_ACCESS_KEY_ID": _KEY,
            "AWS_SECRET_ACCESS_KEY": _SECRET,
        }

    def store(self, bucket: str) -> S3Store:
        """A bucket of it, around atcache. Only in a process that does not fork afterwards."""
        return S3Store(
            bucket,
            endpoint=self.url,
            region="us-east-1",
            access_key_id=_KEY,
            secret_access_key=_SECRET,
            client_options={"allow_http": True},
        )

    def make_bucket(self, bucket: str) -> None:
        """Make a bucket; on moto, which keeps everything in memory, it is empty."""
        import boto3

        client = boto3.client(
            "s3",
            endpoint_url=self.url,
            region_name="us-east-1",
            aws_access_key_id=_KEY,
            aws_secret_access_key=_SECRET,
        )
        client.create_bucket(Bucket=bucket)

    def objects(self, bucket: str, prefix: str) -> dict[str, bytes]:
        """All objects below a prefix, by the rest of their keys."""
        store = self.store(bucket)
        keys = [meta["path"] for page in obstore.list(store, prefix) for meta in page]
        return {key.removeprefix(f"{prefix}/"): obstore.get(store, key).bytes().to_bytes() for key in keys}

    def counts(self) -> dict[str, int]:
        """Of a proxy: requests by method, and faults by name."""
        with urlopen(f"{self.url}/proxy-counts") as answer:
            return json.load(answer)


@contextmanager
def moto_server() -> Generator[Server]:
    """moto: it keeps objects in memory, and obeys conditional puts."""
    port = _free_port()
    with _running([sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)], port) as server:
        yield server


@contextmanager
def rclone_server(folder: Path) -> Generator[Server]:
    """rclone: it keeps objects as files below `folder`, each bucket a folder, and ignores conditions of puts."""
    port = _free_port()
    command = [str(_rclone()), "serve", "s3", "--addr", f"127.0.0.1:{port}", "--auth-key", f"{_KEY},{_SECRET}"]
    with _running([*command, "--config", os.devnull, str(folder)], port) as server:
        yield server


def _rclone() -> Path:
    """The program, which the package `rclone` puts beside Python."""
    beside = Path(sys.executable).with_name("rclone")
    return beside if beside.exists() else Path(shutil.which("rclone") or beside)


@contextmanager
def faulty_proxy(
    to: Server, *, seed: int = 0, faults: float = 0.0, delay_ms: float = 0.0, deny: str = "", lacks: str = ""
) -> Generator[Server]:
    """A proxy before `to`; see `faulty_proxy.py`."""
    script = Path(__file__).with_name("faulty_proxy.py")
    options = {
        "--to": to.port,
        "--seed": seed,
        "--faults": faults,
        "--delay-ms": delay_ms,
        "--deny": deny,
        "--lacks": lacks,
    }
    command = [sys.executable, str(script), *(str(word) for pair in options.items() for word in pair)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield Server(int(process.stdout.readline()), process)
    finally:
        _end(process)


@contextmanager
def reached(server: Server) -> Generator[None]:
    """In the block, atcache in this process and in those that it starts talks to this server."""
    before = {name: os.environ.get(name) for name in server.environment}
    os.environ.update(server.environment)
    restart_fetching()
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
        restart_fetching()


def restart_fetching() -> None:
    """The process that talks to servers has read its environment when it started."""
    if fetcher._fetcher is not None:
        fetcher._fetcher.close()
        fetcher._fetcher = None


@contextmanager
def _running(command: list[str], port: int) -> Generator[Server]:
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, text=True)
    server = Server(port, process)
    try:
        deadline_s = time.monotonic() + _SECONDS_TO_START
        while not _answers(server.url):
            if process.poll() is not None or time.monotonic() > deadline_s:
                raise RuntimeError(f"{command[:3]} does not answer on port {port}")
            time.sleep(0.05)
        yield server
    finally:
        _end(process)


def _answers(url: str) -> bool:
    try:
        urlopen(url, timeout=5).close()
    except URLError as error:
        return hasattr(error, "code")  # an answer, if only to say that the caller is unknown
    except OSError:
        return False
    return True


def _end(process: subprocess.Popen[str]) -> None:
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with suppress(OSError):
                pipe.close()
    process.terminate()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]
