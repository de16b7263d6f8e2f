"""What it costs to build into a bucket instead of a folder: time, and requests a task.

    python benchmarks/bucket_build.py --data /data/photos --weights dinov2-vit-s.safetensors

Builds the same cache into a folder, and into buckets of S3 servers on this machine (moto keeps objects in memory,
rclone in files), directly and behind a proxy that delays each request. Servers and build share the processors. The
last row builds into a folder by a dask cluster of this machine (`--scheduler local`), which starts within that time.

The second table puts one task of random bytes, 64 MiB of codes and 4 MiB of pixels, twice, and gives the mean.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from s3_servers import Server, faulty_proxy, moto_server, rclone_server, reached

from atcache.files.location import parse_location
from atcache.files.spool import Spool
from atcache.pipelines.build.config import BuildConfig
from atcache.pipelines.build.run import build
from atcache.store.bucket import Piece, obeyed_conditions, put_together


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The parsed options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="tars of images")
    parser.add_argument("--teacher", default="vit_small_patch14_dinov2:img_size=224")
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--max-samples", type=int)
    parser.add_argument("--views", type=int, default=4)
    parser.add_argument("--samples-per-shard", type=int, default=32)
    parser.add_argument("--codec", default="int8", help="[default: %(default)s, which is not fitted for long]")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Build everywhere, and print a table."""
    options = parse(arguments)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        (folder / "bucket").mkdir()
        moto, rclone = stack.enter_context(moto_server()), stack.enter_context(rclone_server(folder))
        moto.make_bucket("bucket")
        _time_build(options, str(folder / "warm-up.zarr"))
        local_s, num_tasks, nbytes = _time_build(options, str(folder / "local.zarr"))
        print(f"{num_tasks} tasks of {nbytes / num_tasks / 2**20:.1f} MiB\n")
        print("| to | build | of local | requests a task | bytes a request |\n|---|---|---|---|---|", flush=True)
        print(f"| folder | {local_s:.1f} s | 1.00 | | |", flush=True)
        places = [("moto", moto, 0), ("moto, 50 ms", moto, 50), ("rclone", rclone, 0), ("rclone, 50 ms", rclone, 50)]
        for name, server, delay_ms in places:
            with faulty_proxy(server, delay_ms=delay_ms) as proxy, reached(proxy):
                seconds, _, _ = _time_build(options, f"s3://bucket/{_folder(name)}.zarr")
                counts = {method: count for method, count in proxy.counts().items() if method.isupper()}
            num_requests = sum(counts.values())
            methods = ", ".join(f"{count / num_tasks:.1f} {method}" for method, count in sorted(counts.items()))
            print(
                f"| {name} | {seconds:.1f} s | {seconds / local_s:.2f} | {methods} | {nbytes // num_requests} |",
                flush=True,
            )
        cluster_s, _, _ = _time_build(options, str(folder / "cluster.zarr"), scheduler="local")
        print(f"| folder, by a cluster | {cluster_s:.1f} s | {cluster_s / local_s:.2f} | | |")
        again_s, _, _ = _time_build(options, str(folder / "again.zarr"))
        print(f"| folder, again | {again_s:.1f} s | {again_s / local_s:.2f} | | |\n")
        print("| one task of 68 MiB to | time | requests |\n|---|---|---|", flush=True)
        for name, server, delay_ms in places:
            _time_task(name, server, delay_ms)


def _folder(name: str) -> str:
    return name.replace(", ", "-").replace(" ", "")


def _time_task(name: str, server: Server, delay_ms: int) -> None:
    sizes = {"codes": 64 * 2**20, "rgb": 4 * 2**20, "parameters": 9000, "pixel_hash": 800, "status": 100}
    root = parse_location(f"s3://bucket/task-{_folder(name)}.zarr")
    with Spool() as spool, faulty_proxy(server, delay_ms=delay_ms) as proxy, reached(proxy):
        pieces = [Piece.of(piece, spool.write(piece, os.urandom(nbytes))) for piece, nbytes in sizes.items()]
        record = Piece.of("record", spool.write("record", bytes(1000)))
        obeyed_conditions(root)  # asked once by each process
        before, start_s = proxy.counts(), time.perf_counter()
        for task in range(2):
            put_together(
                root,
                [piece._replace(name=f"{piece.name}-{task}") for piece in pieces],
                record._replace(name=f"record-{task}"),
            )
        seconds = (time.perf_counter() - start_s) / 2
        counts = {method: (count - before.get(method, 0)) / 2 for method, count in proxy.counts().items()}
    methods = ", ".join(
        f"{count:.0f} {method}" for method, count in sorted(counts.items()) if method.isupper() and count
    )
    print(f"| {name} | {seconds:.1f} s | {methods} |", flush=True)


def _time_build(options: argparse.Namespace, out: str, scheduler: str | None = None) -> tuple[float, int, int]:
    start_s = time.monotonic()
    summary = build(
        BuildConfig(
            teacher=options.teacher,
            weights=options.weights,
            data=options.data,
            out=parse_location(out),
            max_samples=options.max_samples,
            views=options.views,
            samples_per_shard=options.samples_per_shard,
            codec=options.codec,
            calibration_samples=16,
            workers=0,
            scheduler=scheduler,
        )
    )
    assert summary.complete is not None
    return time.monotonic() - start_s, summary.complete["num_tasks"], summary.complete["nbytes"]


if __name__ == "__main__":
    main()
