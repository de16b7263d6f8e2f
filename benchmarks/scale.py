"""What 56 million views cost before any is read: time and memory to open, plan, list, begin an epoch. No codes.

    python benchmarks/scale.py [--samples 14197122] [--views 4] [--nbytes-per-view 180000] [--dir FOLDER]
    python benchmarks/scale.py --arithmetic

It makes the tables, commit records and statuses of a cache of ImageNet-21k with 4 views: a tar for each of 21,841
classes, keys and sizes like theirs, records of realistic sizes. The teacher's description is that of a small cache of
the tests. Each measure runs in a process of its own, warm (the files are in the page cache), and prints seconds,
processor seconds (other programs on the machine hardly change them) and peak memory.

With `--arithmetic` it makes nothing. It prints what 1,000 GPUs and 10 PB of images come to, with all assumptions.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from scale_arithmetic import VIEW_NBYTES, VIEWS_PER_S, WORKERS, print_arithmetic

from atcache.files.durable import encode_json
from atcache.images.source import SampleIndex
from atcache.store.layout import StoreLayout, Task
from atcache.store.manifest import (
    Commit,
    FileRecord,
    check_commit,
    commit_path,
    read_commits,
    summarise_commits,
)
from atcache.store.metadata import ATTRIBUTES, collect_metadata, load_root, seal
from atcache.store.reader import CacheReader
from atcache.store.records import join_records
from atcache.store.shard_size import plan_samples_per_shard
from atcache.store.writer import RESERVED_ATTRIBUTES, TaskWriter, create_cache, encode_view

GOLDEN = Path(__file__).parent.parent / "tests/golden/format-1/transform.zarr"
CLASSES = 21_841
RANKS, BATCH = 8, 4096
CHECKED_TASKS = 400


def make_index(num_samples: int, folder: Path) -> SampleIndex:
    """The samples of a tar for each class, with keys such as n01440764_10026."""
    rng = np.random.default_rng(0)
    sizes_C = np.diff(np.linspace(0, num_samples, min(CLASSES, num_samples) + 1).astype(np.int64))
    names = [f"n{1_440_764 + 601 * number:08d}" for number in range(len(sizes_C))]
    keys_S = np.concatenate(
        [np.array([f"{name}_{row}".encode() for row in range(size)]) for name, size in zip(names, sizes_C, strict=True)]
    )
    nbytes_S = rng.lognormal(11.3, 0.6, num_samples).astype(np.int64)  # 97 kB on average
    places_S = np.cumsum((nbytes_S + 511) // 512 * 512 + 1536)
    tar_S = np.repeat(np.arange(len(sizes_C), dtype=np.int32), sizes_C)
    ends_C = places_S[np.cumsum(sizes_C) - 1]
    starts_C = np.concatenate([[0], ends_C[:-1]])
    return SampleIndex(
        tars=tuple(folder / f"{name}.tar" for name in names),
        tar_nbytes=tuple((ends_C - starts_C + 1024).tolist()),
        keys_S=keys_S,
        tar_S=tar_S,
        offset_S=places_S - starts_C[tar_S] - (nbytes_S + 511) // 512 * 512,
        nbytes_S=nbytes_S,
        label_S=tar_S.astype(np.int64),
        problem_S=np.zeros(num_samples, np.uint8),
    )


def make_commit(layout: StoreLayout, task: Task, nbytes_per_view: int, crc: int) -> Commit:
    """A record like those of a build; its shards are not there."""
    sizes = {"attention/codes": nbytes_per_view, "views/parameters": 21, "views/pixel_hash": 8, "views/status": 0}
    files = {
        spec.shard_file(task): FileRecord(
            nbytes=sizes[spec.name] * task.num_samples + spec.index_nbytes, crc32=(crc * 2_654_435_761) % 2**32
        )
        for spec in layout.arrays()
    }
    quality = {"row_kl_nats": 0.00123 + crc * 1e-9, "injected_error": 0.0312 + crc * 1e-9}
    return Commit(task=task, files=files, num_stored=task.num_samples, num_bad=0, quality=quality, num_checked=16)


def make(folder: Path, num_samples: int, num_views: int, nbytes_per_view: int) -> None:
    """Write cache.zarr, which is finished, and unfinished.zarr, which lacks the last tenth of its tasks."""
    golden = CacheReader(GOLDEN)
    layout = replace(
        golden.layout,
        num_views=num_views,
        num_samples=num_samples,
        samples_per_shard=plan_samples_per_shard(nbytes_per_view, num_samples),
    ).with_joined_records()
    start_s = time.monotonic()
    index = make_index(num_samples, folder)
    attributes = {name: value for name, value in golden.attributes.items() if name not in RESERVED_ATTRIBUTES}
    attributes["source"] = {"fingerprint": index.fingerprint, "num_samples": num_samples}
    attributes["views"] = {**attributes["views"], "num_views": num_views}
    cache, unfinished = folder / "cache.zarr", folder / "unfinished.zarr"
    create_cache(unfinished, layout, attributes, index, golden.state, golden.bias_LHQK)
    print(f"sample table made and written: {time.monotonic() - start_s:.0f} s")
    tasks = layout.tasks()
    start_s = time.monotonic()
    commits = [make_commit(layout, task, nbytes_per_view, number) for number, task in enumerate(tasks)]
    shutil.copytree(unfinished, cache, copy_function=os.link)
    for path, stop in ((cache, len(tasks)), (unfinished, len(tasks) * 9 // 10)):
        for task, commit in zip(tasks[:stop], commits[:stop], strict=True):
            # Not `write_commit`, which waits for the disk each time.
            commit_path(path, task).write_bytes(encode_json(seal(commit.to_json())))
    print(f"{len(tasks)} records written one by one: {time.monotonic() - start_s:.0f} s")
    start_s = time.monotonic()
    for path in (cache, unfinished):
        join_records(path, layout)
    print(f"records joined, both caches: {time.monotonic() - start_s:.0f} s")
    status = _status_shard(folder, layout)
    for task in tasks:
        file = cache / layout.status.shard_file(task)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(status)
    root = load_root(cache)
    ours = root["attributes"][ATTRIBUTES]
    root["attributes"][ATTRIBUTES] = seal({**ours, "complete": summarise_commits(commits)})
    root["consolidated_metadata"] = {"kind": "inline", "must_understand": False, "metadata": collect_metadata(cache)}
    (cache / "zarr.json").unlink()  # the other cache has the same file
    (cache / "zarr.json").write_bytes(encode_json(root))


def _status_shard(folder: Path, layout: StoreLayout) -> bytes:
    """The bytes of a status shard in which all samples are stored."""
    one = replace(layout, num_views=1, num_samples=layout.samples_per_shard, records_per_file=1)
    path = folder / "one.zarr"
    write_shards(path, one)
    data = (path / one.status.shard_file(one.task(0, 0))).read_bytes()
    shutil.rmtree(path)
    return data


def write_shards(path: Path, layout: StoreLayout) -> None:
    """A cache whose shards are whole, but whose codes are all 0."""
    keys_S = np.array([b"%d" % row for row in range(layout.num_samples)])
    zeros = np.zeros(layout.num_samples, np.int64)
    index = SampleIndex(
        (path / "a.tar",), (1024,), keys_S, zeros.astype(np.int32), zeros, zeros, zeros, zeros.astype(np.uint8)
    )
    create_cache(path, layout, {}, index, {})
    chunks = encode_view(layout, np.zeros(layout.codes.shape[2:], layout.codes_dtype))
    for task in layout.tasks():
        writer = TaskWriter(path, layout, task)
        for sample in range(task.start, task.stop):
            writer.add(sample, status=1, pixel_hash=1, chunks=chunks)
        writer.commit()


# What is measured, each in its own process. `folder` is the one that `make` filled.


def measure_import(folder: Path) -> None:
    """Nothing but the imports."""


def measure_open(folder: Path) -> None:
    """`atcache.open`, and a look at its record."""
    from atcache.cache.cache import Cache

    _ = Cache(folder / "cache.zarr").record


def measure_info(folder: Path) -> None:
    """`atcache info` of the finished cache."""
    from atcache.cache.cache import Cache

    Cache(folder / "cache.zarr").describe()


def measure_info_unfinished(folder: Path) -> None:
    """`atcache info` of the unfinished cache, which adds up its records."""
    from atcache.cache.cache import Cache

    Cache(folder / "unfinished.zarr").describe()


def measure_missing(folder: Path) -> None:
    """List the tasks that are missing."""
    assert CacheReader(folder / "unfinished.zarr").missing_tasks()


def measure_records(folder: Path) -> None:
    """Read all records and add them up, as at the end of a build."""
    summarise_commits(read_commits(folder / "cache.zarr").values())


def measure_check(folder: Path) -> str:
    """Check the shards of 400 tasks, as a build does for all before it continues."""
    layout = replace(CacheReader(folder / "cache.zarr").layout, num_views=1, records_per_file=1)
    layout = replace(layout, num_samples=min(layout.num_samples, CHECKED_TASKS * layout.samples_per_shard))
    path = folder / "checked.zarr"
    if not path.exists():
        write_shards(path, layout)
    start_s = time.monotonic()
    for commit in read_commits(path).values():
        problems = check_commit(path, commit, layout)
        assert not problems, problems
    per_task_s = (time.monotonic() - start_s) / layout.num_tasks
    return f"{1e3 * per_task_s:.2f} ms a task, {per_task_s * CacheReader(folder / 'cache.zarr').layout.num_tasks:.0f} s"


def measure_samples(folder: Path) -> None:
    """Read the sample table."""
    _ = CacheReader(folder / "cache.zarr").samples


def measure_fingerprint(folder: Path) -> None:
    """Read the sample table and compute its fingerprint."""
    _ = CacheReader(folder / "cache.zarr").samples.fingerprint


def measure_arrange(folder: Path) -> None:
    """Compare the table of the cache with that of the same tars, indexed again, as a build does before it continues."""
    from atcache.pipelines.build.growth import arrange_samples

    reader, named = CacheReader(folder / "cache.zarr"), CacheReader(folder / "cache.zarr").samples
    arrange_samples(reader, named, grows=False)


def measure_find(folder: Path) -> None:
    """Find one sample by its key."""
    from atcache.cache.cache import Cache

    cache = Cache(folder / "cache.zarr")
    index = cache.reader.samples
    assert cache.find_sample(index.sample_key(len(index.keys_S) - 1)) == len(index.keys_S) - 1


def _begin(folder: Path, shuffle: str, epoch: int = 0, rank: int = 0) -> None:
    from atcache.feed.caches import usable_samples
    from atcache.feed.order import SampleOrder

    reader = CacheReader(folder / "cache.zarr")
    sample_S = usable_samples(reader)
    order = SampleOrder(
        sample_S=sample_S,
        seed=0,
        batch_size=BATCH,
        shuffle=shuffle,
        rank=rank,
        num_ranks=RANKS,  # pyright: ignore
    )
    _ = order.identity
    step = order.num_steps(epoch)
    assert len(order.batch(step)) == BATCH // RANKS
    order.windows(step)


def measure_epoch(folder: Path) -> None:
    """Begin to train: which samples can be used, and the first batch of rank 0 of 8."""
    _begin(folder, "global")


def measure_epoch_block(folder: Path) -> None:
    """The same with --shuffle block."""
    _begin(folder, "block")


def measure_epoch_later(folder: Path) -> None:
    """Continue in epoch 3, which has view 3, as the last of 8 ranks."""
    _begin(folder, "global", epoch=3, rank=RANKS - 1)


def measure_strays(folder: Path) -> None:
    """The listing of `atcache verify`: which files do not belong."""
    from atcache.store.audit import find_strays

    reader = CacheReader(folder / "cache.zarr")
    assert find_strays(reader.path, reader.layout, reader.committed_tasks()) == []


def measure_table(folder: Path) -> None:
    """`cache.samples`, an xarray table with all keys as text."""
    from atcache.cache.cache import Cache

    _ = Cache(folder / "cache.zarr").samples


MEASURES: dict[str, Callable[[Path], str | None]] = {
    name.removeprefix("measure_"): work for name, work in list(globals().items()) if name.startswith("measure_")
}


def describe_folder(folder: Path) -> None:
    """Print the entries of the folders that grow with a cache, and the bytes of its metadata and tables."""
    path = folder / "cache.zarr"
    layout = CacheReader(path).layout
    print(f"\n{layout.num_samples} samples x {layout.num_views} views, {layout.num_tasks} tasks of "
          f"{layout.samples_per_shard} samples")  # fmt: skip
    for name in ("commits", "attention/codes/c (views)", "views/status/c/0 (blocks)"):
        place = path / name.partition(" ")[0]
        if place.exists():
            print(f"{len(list(place.iterdir()))} entries in {name}")
    print(f"{layout.num_blocks} entries in attention/codes/c/0 when it is built")
    for name in ("zarr.json", "commits", layout.samples_group):
        files = (
            [path / name] if (path / name).is_file() else [file for file in (path / name).rglob("*") if file.is_file()]
        )
        print(f"{sum(file.stat().st_size for file in files) / 1e6:.1f} MB in {len(files)} files of {name}")


def run(name: str, folder: Path) -> None:
    """One measure, in this process."""
    start_s = time.monotonic()
    start_processor_s = time.process_time()
    note = MEASURES[name](folder)
    seconds, processor_s = time.monotonic() - start_s, time.process_time() - start_processor_s
    # Not `getrusage`, whose peak begins with that of the process that started this one.
    peak_kib = re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    peak_nbytes = 1024 * int(peak_kib[0])
    answer = {"seconds": seconds, "processor_s": processor_s, "peak_nbytes": peak_nbytes, "note": note or ""}
    print(json.dumps(answer))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The parsed options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=14_197_122)
    parser.add_argument("--views", type=int, default=4)
    parser.add_argument("--nbytes-per-view", type=int, default=180_000)
    parser.add_argument("--dir", type=Path, help="keep the caches here, and use those that are here")
    parser.add_argument("--only", choices=MEASURES, nargs="+", default=list(MEASURES))
    parser.add_argument("--measure", choices=MEASURES, help=argparse.SUPPRESS)
    parser.add_argument("--arithmetic", action="store_true")
    of_arithmetic = parser.add_argument_group("what --arithmetic assumes")
    of_arithmetic.add_argument(
        "--gpu-views-per-s",
        type=float,
        default=VIEWS_PER_S,
        help="of one GPU behind the loader (default %(default)s: a ViT-L on an H200, docs/benchmarks/gpu.md)",
    )
    of_arithmetic.add_argument(
        "--gpu-workers", type=int, default=WORKERS, help="cores that render these (default %(default)s: the same)"
    )
    of_arithmetic.add_argument(
        "--code-nbytes",
        type=int,
        default=VIEW_NBYTES,
        help="of a view (default %(default)s: transform at KL 0.005 of a ViT-S/14, docs/benchmarks/codecs.md)",
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Make the caches and measure, or print the arithmetic."""
    options = parse(arguments)
    if options.arithmetic:
        print_arithmetic(options.gpu_views_per_s, options.gpu_workers, options.code_nbytes)
        return
    if options.measure:
        run(options.measure, options.dir)
        return
    with tempfile.TemporaryDirectory() as temp:
        folder = options.dir or Path(temp)
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "cache.zarr/zarr.json").exists():
            make(folder, options.samples, options.views, options.nbytes_per_view)
        describe_folder(folder)
        print("\n| what | s | processor s | peak MB |\n|---|---|---|---|")
        for name in options.only:
            command = [sys.executable, __file__, "--measure", name, "--dir", str(folder)]
            answer = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            title = (MEASURES[name].__doc__ or "").split("\n")[0].rstrip(".")
            times = f"{answer['seconds']:.2f} | {answer['processor_s']:.2f}"
            note = f" ({answer['note']})" if answer["note"] else ""
            print(f"| {title}{note} | {times} | {answer['peak_nbytes'] / 1e6:.0f} |", flush=True)


if __name__ == "__main__":
    main()
