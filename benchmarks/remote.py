"""Training data over HTTP: requests and bytes of an epoch, and img/s compared with the same cache on the local disk.

    python benchmarks/remote.py [--samples 4096] [--delays-ms 0 50 200] [--student-rates 0 300] [--dir FOLDER]

It makes a cache with stored pixels and random codes of a ViT-B's size (`read.py`), of one view. Another process on this
machine serves it, with a delay before each answer. The loader reads two epochs with one worker process, as training
does: the first with an empty block cache, the second with what is left of the first. The block cache has room for
twice the data, or for half of it. Windows of `--shuffle block` have 4 blocks of samples instead of 128, so that there
are as many windows as in a larger dataset.

Server, fetch process, worker and this process share the machine's cores, and a local read costs almost nothing. So
there are two speeds: as fast as it goes, and beside a student that takes so many images a second.

    python benchmarks/remote.py stretches

compares sizes of requests.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from read import make_cache, transform_codes

from atcache.feed import order
from atcache.feed.loader import BatchStream
from atcache.feed.order import SampleOrder
from atcache.feed.sample_views import SampleView, Views
from atcache.files.remote import block_cache, remote_file
from atcache.store.reader import CacheReader

sys.path.append(str(Path(__file__).parent.parent / "tests"))

BATCH = 64
EPOCHS = 2
CODEC = "transpose-blosc-zstd-shuffle"


class OneView(Views):
    """View 0 of a cache with stored pixels, in every epoch."""

    def __init__(self, place: str | Path) -> None:
        self.reader = CacheReader(place)

    @property
    def identity(self) -> dict[str, Any]:
        """See `Views.identity`."""
        return {}

    @property
    def num_samples(self) -> int:
        """See `Views.num_samples`."""
        return self.reader.layout.num_samples

    @property
    def is_remote(self) -> bool:
        """See `Views.is_remote`."""
        return self.reader.is_remote

    def read(self, sample: int, epoch: int) -> SampleView:
        """See `Views.read`."""
        del epoch
        return SampleView(self.reader.read_pixels(0, sample), self.reader.read_codes(0, sample))

    def plan(self, sample_S: np.ndarray) -> None:
        """See `Views.plan`."""
        self.reader.plan(sample_S)

    def expect(self, sample_S: np.ndarray, epoch: int) -> None:
        """See `Views.expect`."""
        del epoch
        self.reader.expect(0, sample_S)


def serve(folder: Path, delay_s: float, answers: Connection) -> None:
    """Serve a folder until the parent ends. Sends the address, then, for each message, requests and bytes so far."""
    from range_server import FolderServer

    with FolderServer(folder) as server:
        server.delay_s = delay_s
        answers.send(server.url)
        try:
            while answers.recv():
                answers.send((server.num_requests, server.num_bytes))
        except EOFError:
            return


@contextmanager
def served(folder: Path, delay_ms: float) -> Generator[tuple[str, Connection]]:
    """The address of a server of this folder in a process of its own, and the connection to it."""
    processes = multiprocessing.get_context("spawn")
    answers, theirs = processes.Pipe()
    server = processes.Process(target=serve, args=(folder, delay_ms / 1e3, theirs), daemon=True)
    server.start()
    theirs.close()
    try:
        yield answers.recv(), answers
    finally:
        answers.close()
        server.join()


def use_blocks(folder: Path, max_nbytes: int) -> None:
    """Let the next reads use a new block cache."""
    block_cache._shared = remote_file._claims = None
    os.environ[block_cache.FOLDER_VARIABLE] = str(folder)
    os.environ[block_cache.GIB_VARIABLE] = str(max_nbytes / 2**30)


def read_epochs(place: str | Path, shuffle: Any, student_rate: float) -> Iterator[float]:
    """Images a second of each epoch, with a new reader and worker."""
    views = OneView(place)
    num_samples = views.num_samples
    samples = SampleOrder(sample_S=np.arange(num_samples), seed=0, batch_size=BATCH, shuffle=shuffle)
    stream = BatchStream(
        views, np.zeros(num_samples, np.int64), samples, num_steps=EPOCHS * num_samples // BATCH, workers=1
    )
    start = time.perf_counter()
    for num_steps, _ in enumerate(stream, 1):
        if student_rate:
            time.sleep(BATCH / student_rate)
        if num_steps % (num_samples // BATCH) == 0:
            yield num_samples / (time.perf_counter() - start)
            start = time.perf_counter()


def measure(url: str, answers: Connection, shuffle: str, student_rate: float) -> Iterator[tuple[float, int, int]]:
    """Images a second, requests and bytes of each epoch."""
    answers.send(True)
    before = answers.recv()
    for rate in read_epochs(url, shuffle, student_rate):
        answers.send(True)
        after = answers.recv()
        yield rate, after[0] - before[0], after[1] - before[1]
        before = after


def print_epochs(folder: Path, name: str, nbytes: int, delays_ms: Sequence[float], rates: Sequence[float]) -> None:
    """The table of delays, shuffles and sizes of the block cache."""
    print("| shuffle | block cache | away | epoch | requests | MB a request | bytes, of data | img/s | of local |")
    print("|---|---|--:|--:|--:|--:|--:|--:|--:|")
    for shuffle in ("block", "global"):
        for rate in rates:
            local = list(read_epochs(folder / name, shuffle, rate))[1]
            what = f"{shuffle}, {rate:.0f} img/s wanted" if rate else shuffle
            print(f"| {what} | none, local | | | | | | {local:.0f} | 100% |", flush=True)
            for share in (2.0, 0.5):
                for delay_ms in delays_ms:
                    with served(folder, delay_ms) as (url, answers), tempfile.TemporaryDirectory(dir=folder) as blocks:
                        use_blocks(Path(blocks), int(share * nbytes))
                        found = measure(f"{url}/{name}", answers, shuffle, rate)
                        for epoch, (speed, requests, fetched) in enumerate(found):
                            print(
                                f"| {what} | {share} x data | {delay_ms:.0f} ms | {epoch} | {requests} | "
                                f"{fetched / 1e6 / max(1, requests):.2f} | {fetched / nbytes:.2f} | {speed:.0f} | "
                                f"{speed / local:.0%} |",
                                flush=True,
                            )


def print_stretches(folder: Path, name: str, nbytes: int, delay_ms: float) -> None:
    """The table of sizes of stretches, first epoch, with room for all."""
    print("| stretches of | shuffle | requests | img/s |")
    print("|---|---|--:|--:|")
    for shuffle in ("block", "global"):
        for mib in (1, 2, 4, 8, 16):
            remote_file.STRETCH_BLOCKS = mib * 2**20 // block_cache.BLOCK_NBYTES
            with served(folder, delay_ms) as (url, answers), tempfile.TemporaryDirectory(dir=folder) as blocks:
                use_blocks(Path(blocks), 2 * nbytes)
                speed, requests, _ = next(measure(f"{url}/{name}", answers, shuffle, 0.0))
                print(f"| {mib} MiB | {shuffle} | {requests} | {speed:.0f} |", flush=True)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The parsed options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=["epochs", "stretches"], default="epochs")
    parser.add_argument("--samples", type=int, default=4096, help="samples, a multiple of 64 (default 4096)")
    parser.add_argument("--delays-ms", type=float, nargs="+", default=[0.0, 50.0, 200.0], help="before each answer")
    parser.add_argument("--student-rates", type=float, nargs="+", default=[0.0, 300.0], help="img/s; 0 for no limit")
    parser.add_argument("--dir", type=Path, help="folder for cache and blocks during the run (default: a temp folder)")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Make the cache, serve it, measure, print."""
    options = parse(arguments)
    order.WINDOW_BLOCKS = 4
    with tempfile.TemporaryDirectory(dir=options.dir) as temp:
        folder, name = Path(temp), "cache.zarr"
        make_cache(folder / name, options.samples, lambda rng: transform_codes(rng, 12, 384), CODEC, num_views=1)
        files = [file for file in (folder / name).rglob("*") if file.is_file()]
        nbytes = sum(file.stat().st_size for file in files)
        print(f"{options.samples} samples, {nbytes / 1e6:.0f} MB in {len(files)} files\n", flush=True)
        if options.what == "stretches":
            print_stretches(folder, name, nbytes, options.delays_ms[-1])
        else:
            print_epochs(folder, name, nbytes, options.delays_ms, options.student_rates)


if __name__ == "__main__":
    main()
