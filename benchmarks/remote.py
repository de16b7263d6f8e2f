"""Reading random views of a cache over HTTP, cold and warm, compared with the same cache on the local disk.

    python benchmarks/remote.py [--samples 512] [--delay-ms 20] [--dir FOLDER]

It makes a cache with stored pixels and random codes of a ViT-B's size (`read.py`). Another process on this machine
serves it, with and without a delay before each answer. Each view is read once, in a random order, in batches, as one
training worker does. Cold means that the block cache is empty; warm means that it holds everything. Local and warm
passes take turns, and five of each give the medians.

The second table reads two epochs of one view, in small batches, with a block cache of half of the view's bytes. It
compares block sizes: small blocks need more requests, large ones more bytes.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
from read import VIEWS, make_cache, transform_codes

from atcache.files.location import parse_location
from atcache.files.remote import block_cache, remote_file
from atcache.store.reader import CacheReader

sys.path.append(str(Path(__file__).parent.parent / "tests"))

BATCH = 64
ROUNDS = 5


def serve(folder: Path, delay_s: float, answers: Connection) -> None:
    """Serve a folder until the parent ends. Sends the address, then, for each message, the bytes sent so far."""
    from range_server import FolderServer

    with FolderServer(folder) as server:
        server.delay_s = delay_s
        answers.send(server.url)
        try:
            while answers.recv():
                answers.send(server.num_bytes)
        except EOFError:
            return


def use_blocks(folder: Path, max_nbytes: int, block_nbytes: int = block_cache.BLOCK_NBYTES) -> None:
    """Let the next reads use a new block cache."""
    block_cache.BLOCK_NBYTES = remote_file.BLOCK_NBYTES = block_nbytes
    block_cache._shared = remote_file._claims = None
    os.environ[block_cache.FOLDER_VARIABLE] = str(folder)
    os.environ[block_cache.GIB_VARIABLE] = str(max_nbytes / 2**30)


def read_epoch(place: str | Path, epoch: int, *, together: bool, batch: int = BATCH) -> float:
    """Views per second of one pass with a new reader; the epoch's number decides view and order."""
    reader = CacheReader(place)
    num_samples = reader.layout.num_samples
    reader.read_codes(0, 0)  # connects and imports, which is not to be measured
    order_S = np.random.default_rng(epoch).permutation(num_samples)
    start = time.perf_counter()
    for first in range(0, num_samples, batch):
        batch_S = order_S[first : first + batch]
        if together:
            reader.expect(epoch % VIEWS, np.sort(batch_S))
        for sample in batch_S.tolist():
            reader.read_codes(epoch % VIEWS, sample)
            reader.read_pixels(epoch % VIEWS, sample)
    return num_samples / (time.perf_counter() - start)


def main(arguments: Sequence[str] | None = None) -> None:
    """Make the cache, serve it, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=512, help="samples in each of the two views (default 512)")
    parser.add_argument("--delay-ms", type=float, default=20.0, help="delay before each answer of the distant server")
    parser.add_argument("--dir", type=Path, help="folder for cache and blocks during the run (default: a temp folder)")
    options = parser.parse_args(arguments)
    processes = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(dir=options.dir) as temp:
        folder = Path(temp)
        name, codec = "cache.zarr", "transpose-blosc-zstd-shuffle"
        make_cache(folder / name, options.samples, lambda rng: transform_codes(rng, 384), codec)
        nbytes = sum(file.stat().st_size for file in (folder / name).rglob("*") if file.is_file())
        print(f"{options.samples} samples, {nbytes / 1e3 / options.samples / VIEWS:.0f} KB a view\n")
        print("| server | way | views/s | of local |")
        print("|---|---|---|---|")
        for delay_ms in (0.0, options.delay_ms):
            answers, theirs = processes.Pipe()
            server = processes.Process(target=serve, args=(folder, delay_ms / 1e3, theirs), daemon=True)
            server.start()
            url = f"{answers.recv()}/{name}"
            local = read_epoch(folder / name, 0, together=False)
            for way, together in (("cold, one by one", False), ("cold, a batch together", True)):
                use_blocks(folder / f"blocks-{delay_ms}-{together}", 4 * nbytes)
                rate = read_epoch(url, 0, together=together)
                print(f"| {delay_ms:.0f} ms away | {way} | {rate:.0f} | {rate / local:.0%} |", flush=True)
            turns = [
                (read_epoch(folder / name, 0, together=False), read_epoch(url, 0, together=True)) for _ in range(ROUNDS)
            ]
            local, warm = (statistics.median(rates) for rates in zip(*turns, strict=True))
            share = statistics.median(one / other for other, one in turns)
            print(f"| {delay_ms:.0f} ms away | warm | {warm:.0f} | {share:.0%} |", flush=True)
            print(f"| none | local | {local:.0f} | 100% |", flush=True)
            if delay_ms:
                print_block_sizes(url, nbytes, folder, answers)
            answers.close()
            server.join()


def print_block_sizes(url: str, nbytes: int, folder: Path, answers: Connection) -> None:
    """For several block sizes: bytes and speed with a block cache of half of one view's bytes."""
    print("\n| blocks of | fetched, times what was read | views/s |")
    print("|---|---|---|")
    reader = CacheReader(parse_location(url))
    wanted = nbytes / VIEWS / reader.layout.num_samples
    for kib in (16, 64, 256, 1024):
        use_blocks(folder / f"blocks-of-{kib}", nbytes // 4, kib * 2**10)
        answers.send(True)
        before = answers.recv()
        rates = [read_epoch(url, epoch, together=True, batch=8) for epoch in (0, VIEWS)]  # one view, two orders
        answers.send(True)
        fetched = (answers.recv() - before) / 2 / reader.layout.num_samples
        print(f"| {kib} KiB | {fetched / wanted:.2f} | {np.mean(rates):.0f} |", flush=True)


if __name__ == "__main__":
    main()
