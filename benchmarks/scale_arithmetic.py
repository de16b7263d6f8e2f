"""What 1,000 GPUs and 10 PB of images come to: `python benchmarks/scale.py --arithmetic`."""

from __future__ import annotations

import time
from datetime import timedelta

from atcache.store.layout import MAX_FOLDER_ENTRIES, MAX_NUM_SAMPLES, MAX_NUM_TASKS, RECORDS_PER_FILE
from atcache.store.tables import MAX_ARRAY_NBYTES

GPUS, GPUS_A_NODE = 1000, 8
IMAGES_NBYTES, IMAGE_NBYTES, TAR_NBYTES = 10e15, 100e3, 1e9
# What `scale.py --arithmetic` assumes unless it is told otherwise.
VIEWS_PER_S, WORKERS = 1340, 15  # a ViT-L behind the loader on one H200, docs/benchmarks/gpu.md
VIEW_NBYTES = 135_000  # transform at its default target, ViT-S/14, docs/benchmarks/codecs.md
KEY_NBYTES = 16
ROW_NBYTES = 4 + 8 + 8 + 8 + 1 + KEY_NBYTES  # a row of the sample table
TRAINING_NBYTES = 8 + 1 + 4 + 20  # which samples, their statuses, an order, the next one while it is drawn
NODE_NBYTES = 1e12
SORTING_NBYTES = 8 + 8 + 4  # while an order is drawn: random words, their order, the same as int32
ROOT_NBYTES_A_TAR = 65  # name, folder and size of a tar in zarr.json
NODE_NBYTES_PER_S = 3e9  # what one machine reads from storage
TASK_S = 1e-3  # overhead of a task in dask.distributed, by its documentation
PUTS_PER_S, GETS_PER_S = 3500, 5500  # Amazon S3, for each prefix
PART_NBYTES, BLOCK_NBYTES, SMALL_NBYTES = 16 * 2**20, 8 * 2**20, 64 * 2**10
ARRAYS = 4  # shards of a task without pixels: codes, parameters, pixel_hash, status
STORE_REQUESTS = 6  # a second, for each process of torchrun: three of its own, three by the leader


def _time(seconds: float) -> str:
    days = seconds / 86_400
    return f"{days:.1f} days" if days >= 2 else str(timedelta(seconds=round(seconds)))


def _store_request_s() -> float:
    """Seconds of one request to torch's key-value store, from another client of the same machine."""
    import torch.distributed as dist

    leader = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    client = dist.TCPStore("127.0.0.1", leader.port, is_master=False)
    client.set("rank/1", "x" * 200)
    num, start_s = 2000, time.monotonic()
    for _ in range(num):
        client.get("rank/1")
    return (time.monotonic() - start_s) / num


def print_arithmetic(
    gpu_views_per_s: float = VIEWS_PER_S, workers: int = WORKERS, view_nbytes: int = VIEW_NBYTES
) -> None:
    """Print the assumptions, then one line for each quantity.

    Args:
        gpu_views_per_s: views that one GPU makes maps of in a second.
        workers: processor cores that render these views.
        view_nbytes: bytes of a view's codes.
    """
    core_views_per_s = gpu_views_per_s / workers
    print(
        f"assumed: {GPUS} GPUs in nodes of {GPUS_A_NODE} with {NODE_NBYTES / 1e12:g} TB of memory; "
        f"{IMAGES_NBYTES / 1e15:g} PB of images of {IMAGE_NBYTES / 1e3:g} kB in tars of {TAR_NBYTES / 1e9:g} GB; "
        f"{gpu_views_per_s:g} views/s a GPU and {core_views_per_s:.0f} a core that renders; {view_nbytes / 1e3:g} kB "
        f"of codes a view; one view of each image; {NODE_NBYTES_PER_S / 1e9:g} GB/s from storage to a node; keys of "
        f"{KEY_NBYTES} bytes"
    )
    images = IMAGES_NBYTES / IMAGE_NBYTES
    views_per_s = GPUS * gpu_views_per_s
    seconds = images / views_per_s
    line = "{:<44} {}".format

    print("\n# the build")
    print(line("images", f"{images:.3g}"))
    print(line("views/s, all GPUs", f"{views_per_s:.3g}"))
    print(line("time", _time(seconds)))
    print(line("cores that render", f"{views_per_s / core_views_per_s:.0f}, {workers} a GPU"))
    read = views_per_s * IMAGE_NBYTES
    print(line("images read", f"{read / 1e9:.0f} GB/s, {read / GPUS * GPUS_A_NODE / 1e9:.2f} GB/s a node"))
    written = views_per_s * view_nbytes
    print(line("codes written", f"{written / 1e9:.0f} GB/s, {images * view_nbytes / 1e15:.1f} PB in all"))

    print("\n# as one cache: refused")
    print(
        line("rows of a sample table, the most", f"{MAX_NUM_SAMPLES:.3g}, {images / MAX_NUM_SAMPLES:.0f} times too few")
    )
    print(line("sample table", f"{images * ROW_NBYTES / 1e12:.1f} TB of memory in each process"))
    per_shard = int(256 * 2**20 / view_nbytes)
    tasks = images / per_shard
    print(line("tasks, in shards of 256 MiB", f"{tasks:.3g}, the most is {MAX_NUM_TASKS:.0e}"))
    print(line("samples a shard, for 10,000 in a folder", f"{images / MAX_FOLDER_ENTRIES:.3g}, or "
               f"{images / MAX_FOLDER_ENTRIES * view_nbytes / 1e12:.2f} TB"))  # fmt: skip
    tars = IMAGES_NBYTES / TAR_NBYTES
    print(line("zarr.json", f"{tars * ROOT_NBYTES_A_TAR * 2 / 1e9:.1f} GB for {tars:.0e} tars, read to open it"))
    print(line("index of the tars, by one process", _time(IMAGES_NBYTES / NODE_NBYTES_PER_S)))

    print("\n# as parts, each of 10,000 shards of 256 MiB a view")
    samples = per_shard * MAX_FOLDER_ENTRIES
    parts = -(-images // samples)
    print(line("samples a part", f"{samples:.3g}, {samples * IMAGE_NBYTES / 1e12:.1f} TB of images"))
    print(line("parts", f"{parts:.0f}"))
    print(line("sample table", f"{samples * ROW_NBYTES / 1e9:.2f} GB a process"))
    print(
        line(
            "an epoch's order",
            f"{samples * 4 / 1e9:.2f} GB a process, {samples * SORTING_NBYTES / 1e9:.2f} while drawn",
        )
    )
    print(line("index of its tars, on its node", _time(samples * IMAGE_NBYTES / NODE_NBYTES_PER_S)))
    node_s = samples / (gpu_views_per_s * GPUS_A_NODE)
    print(line("its build, on one node", f"{_time(node_s)}; {parts * GPUS_A_NODE / GPUS:.1f} parts a node"))
    print(line("records", f"{MAX_FOLDER_ENTRIES} tasks in {MAX_FOLDER_ENTRIES // RECORDS_PER_FILE} files"))
    print(line("zarr.json", f"{samples * IMAGE_NBYTES / TAR_NBYTES * ROOT_NBYTES_A_TAR * 2 / 1e6:.2f} MB"))
    rows = min(MAX_NUM_SAMPLES, MAX_ARRAY_NBYTES // KEY_NBYTES)
    print(line("samples of one cache, by merging", f"{rows:.3g}, {images / rows:.0f} caches; a table of "
               f"{rows * ROW_NBYTES / 1e9:.0f} GB"))  # fmt: skip
    trained = NODE_NBYTES / 2 / GPUS_A_NODE / (ROW_NBYTES + TRAINING_NBYTES)
    print(line("samples of one training", f"{trained:.3g} in half of a node's memory, {GPUS_A_NODE} processes"))

    print("\n# requests, all GPUs together")
    per_s = views_per_s / per_shard
    print(line("tasks", f"{tasks:.3g}, {per_s:.0f}/s; one GPU ends one in {GPUS / per_s:.1f} s"))
    print(line("dask's scheduler", f"busy {100 * per_s * TASK_S:.1f}% of the time"))
    puts = per_s * (ARRAYS + 1)
    multipart = per_s * (ARRAYS + 1 + 256 * 2**20 / PART_NBYTES + 1)
    print(line("PUT, shards whole", f"{puts:.0f}/s, {puts / PUTS_PER_S:.2f} prefixes"))
    print(line("PUT, codes in pieces of 16 MiB", f"{multipart:.0f}/s, {multipart / PUTS_PER_S:.1f} prefixes"))
    for name, nbytes in (("GET, blocks of 8 MiB", BLOCK_NBYTES), ("GET, blocks of 64 KiB", SMALL_NBYTES)):
        print(line(name, f"{read / nbytes:.3g}/s, {read / nbytes / GETS_PER_S:.1f} prefixes"))
    print(line("LIST, records, 1,000 an answer", f"{tasks / 1000:.0f} one by one, {parts:.0f} joined"))
    print(line("GET, records", f"{tasks:.3g} one by one, {tasks / RECORDS_PER_FILE:.0f} joined"))
    request_s = _store_request_s()
    print(line("a request to torch's key-value store", f"{1e6 * request_s:.0f} us, measured here"))
    for processes in (GPUS_A_NODE, GPUS, 10 * GPUS):
        leader_s = 2 * processes * request_s
        print(line(f"torchrun, {processes} processes", f"{STORE_REQUESTS * processes} requests/s; the leader asks for "
                   f"{100 * leader_s:.1f}% of each second"))  # fmt: skip
