"""Reading random views: atcache, zarr-python and tensorstore, compared with pread and decompression of the same bytes.

    python benchmarks/read.py [--samples 64] [--rounds 7] [--dir FOLDER]

It makes caches with stored pixels and random codes of realistic size. Then it reads codes and pixels of random views,
with one thread and with two. All bytes are in the page cache, so this measures software, not a disk. The limit is
`os.pread` at known positions plus decompression into one reused buffer, without checksums. Ways take turns in each
round. Views/s and shares of the limit are medians over the rounds. Processor time is printed too: other programs on the
machine hardly change it.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import local

import numpy as np
import torch
from PIL import Image

from atcache.codecs.transform.packing import Packing, choose_buckets
from atcache.images.source import SampleIndex
from atcache.store.chunks import blosc, use_single_threaded_blosc, zstd
from atcache.store.layout import (
    COMPRESSORS,
    GZIP,
    ArraySpec,
    Status,
    StoreLayout,
)
from atcache.store.reader import CacheReader
from atcache.store.shard_size import plan_layers_per_chunk, plan_samples_per_shard
from atcache.store.writer import TaskWriter, create_cache, encode_pixels, encode_view, finish_cache
from atcache.views.policy import PARAMETER_NAMES

Place = tuple[int, int]
"""(view, sample)."""
Read = Callable[[Place], object]

VIEWS, SIDE, TOKENS = 2, 224, 197
DISTINCT = 16  # views with different bytes; the others repeat these bytes elsewhere in the files


def transform_codes(rng: np.random.Generator, num_layers: int, num_components: int) -> np.ndarray:
    """codes_LTC like those of codec transform: two rows of bytes, of integers that are smaller in later components."""
    mean_LBJ = np.tile(8 * (1 + np.arange(num_components)) ** -0.6, (num_layers, 1, 1))
    packing = Packing(
        choose_buckets(torch.from_numpy(mean_LBJ), torch.ones(mean_LBJ.shape, dtype=torch.bool)),
        [slice(0, TOKENS)],
        torch.device("cpu"),
    )
    sizes = rng.laplace(size=(num_layers, 1, TOKENS, num_components)) * mean_LBJ[:, :, None]
    return packing.pack([torch.from_numpy(np.rint(size).astype(np.int32)) for size in sizes])[0, :, None].numpy()


def int8_codes(rng: np.random.Generator, num_layers: int, num_components: int) -> np.ndarray:
    """codes_LTC like those of codec int8: normally distributed in -127 to 127."""
    return np.clip(rng.normal(0, 45, (num_layers, TOKENS, num_components)), -127, 127).astype(np.int8)


def make_cache(
    path: Path, num_samples: int, draw: Callable[[np.random.Generator], np.ndarray], how: str, num_views: int = VIEWS
) -> None:
    """Write a finished cache of codes from `draw` and of smooth, slightly noisy images."""
    rng = np.random.default_rng(0)
    codes = [draw(rng) for _ in range(DISTINCT)]
    num_layers, num_tokens, num_components = codes[0].shape
    layout = StoreLayout(
        num_views=num_views,
        num_samples=num_samples,
        num_layers=num_layers,
        num_tokens=num_tokens,
        num_components=num_components,
        codes_dtype=str(codes[0].dtype),
        samples_per_shard=plan_samples_per_shard(codes[0].nbytes, num_samples),
        layers_per_chunk=plan_layers_per_chunk(codes[0][0].nbytes, num_layers),
        parameter_names=PARAMETER_NAMES,
        pixels=(SIDE, SIDE),
        compressor=how,
    )
    zeros = np.zeros(num_samples, np.int64)
    keys_S = np.array([b"%07d" % sample for sample in range(num_samples)])
    index = SampleIndex(
        tars=(Path("made.tar"),),
        tar_nbytes=(1024,),
        keys_S=keys_S,
        tar_S=zeros.astype(np.int32),
        offset_S=zeros,
        nbytes_S=zeros,
        label_S=zeros,
        problem_S=zeros.astype(np.uint8),
    )
    create_cache(path, layout, {}, index, {})
    made = [(encode_view(layout, codes_LTC), encode_pixels(layout, _image(rng))) for codes_LTC in codes]
    for task in layout.tasks():
        writer = TaskWriter(path, layout, task)
        for sample in range(task.start, task.stop):
            chunks, pixels = made[(sample + task.view) % DISTINCT]
            writer.add(sample, status=Status.STORED, pixel_hash=1, chunks=chunks, pixels_chunk=pixels)
        writer.commit()
    finish_cache(path)


def _image(rng: np.random.Generator) -> np.ndarray:
    coarse = Image.fromarray(rng.integers(0, 256, (14, 14, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((SIDE, SIDE), Image.Resampling.BICUBIC), np.float32)
    return np.clip(smooth + rng.normal(0, 4, smooth.shape), 0, 255).astype(np.uint8)


def read_by_atcache(path: Path, _threads: int) -> Read:
    """`CacheReader`, as the loader uses it, with new arrays for each view."""
    reader = CacheReader(path)
    return lambda place: (reader.read_codes(*place), reader.read_pixels(*place))


def read_by_zarr(path: Path, _threads: int) -> Read:
    """zarr-python with its default settings."""
    import zarr

    group = zarr.open_group(str(path), mode="r")
    codes, pixels = group["attention/codes"], group["pixels/rgb"]
    return lambda place: (codes[place], pixels[place])


def read_by_tensorstore(path: Path, threads: int) -> Read:
    """tensorstore, with as many threads as the others. It keeps the shards' indexes, but no chunks."""
    import tensorstore as ts

    limits = {"data_copy_concurrency": {"limit": threads}, "file_io_concurrency": {"limit": threads}}
    context = ts.Context({**limits, "cache_pool": {"total_bytes_limit": 0}})

    def open_array(name):
        spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{path / name}/"}}
        return ts.open(spec, context=context, read=True, recheck_cached=False).result()

    codes, pixels = open_array("attention/codes"), open_array("pixels/rgb")

    def read(place):
        both = codes[place].read(), pixels[place].read()
        return [one.result() for one in both]

    return read


def read_plainly(path: Path, _threads: int) -> Read:
    """The limit: positions known beforehand, one pread for each array of a view, a reused buffer, no checks."""
    return _read_plainly(path, decompresses=True)


def read_bytes_alone(path: Path, _threads: int) -> Read:
    """Only the preads of the limit."""
    return _read_plainly(path, decompresses=False)


def _decompressor(name: str) -> Callable[[bytes, np.ndarray], object]:
    how = COMPRESSORS[name]
    if how.is_deflated:
        return lambda data, out: zlib.decompress(data, 31, len(out))
    return (blosc if how.shuffle else zstd).decompress


def _read_plainly(path: Path, *, decompresses: bool) -> Read:
    layout = CacheReader(path).layout
    places = {spec.name: _places(path, layout, spec) for spec in (layout.codes, layout.rgb) if spec}
    unpackers = {spec.name: _decompressor(spec.compressor) for spec in (layout.codes, layout.rgb) if spec}
    buffers = local()

    def read(place):
        if not hasattr(buffers, "by_name"):
            buffers.by_name = {
                spec.name: np.empty((spec.num_chunks_per_sample, spec.chunk_nbytes), np.uint8)
                for spec in (layout.codes, layout.rgb)
                if spec
            }
        for name, unpack in unpackers.items():
            fd, start, nbytes, ranges = places[name][place]
            data = os.pread(fd, nbytes, start)
            if not decompresses:
                continue
            view = memoryview(data)
            for (first, stop), out in zip(ranges, buffers.by_name[name], strict=True):
                unpack(view[first:stop], out)

    return read


def _places(path: Path, layout: StoreLayout, spec: ArraySpec) -> dict[Place, tuple[int, int, int, list[Place]]]:
    """For each (view, sample): file descriptor, start, size, and the ranges of its chunks without their checksums."""
    found: dict[Place, tuple[int, int, int, list[Place]]] = {}
    per_sample = spec.num_chunks_per_sample
    for task in layout.tasks():
        file = path / spec.shard_file(task)
        data = file.read_bytes()
        index_N2 = np.frombuffer(data[-spec.index_nbytes : -4], "<u8").reshape(-1, 2).astype(np.int64)
        fd = os.open(file, os.O_RDONLY)
        for row in range(task.num_samples):
            chunks = index_N2[row * per_sample : (row + 1) * per_sample].tolist()
            start, stop = chunks[0][0], sum(chunks[-1])
            ranges = [(offset - start, offset - start + nbytes - 4) for offset, nbytes in chunks]
            found[task.view, task.start + row] = (fd, start, stop - start, ranges)
    return found


LIMIT = "pread + decompress"
WAYS: dict[str, Callable[[Path, int], Read]] = {
    "pread": read_bytes_alone,
    LIMIT: read_plainly,
    "atcache": read_by_atcache,
    "tensorstore": read_by_tensorstore,
    "zarr-python": read_by_zarr,
}


def time_way(read: Read, places: Sequence[Place], threads: int) -> tuple[float, float]:
    """Seconds, and seconds of processor time, to read all places."""
    start, start_cpu = time.perf_counter(), time.process_time()
    if threads == 1:
        for place in places:
            read(place)
    else:
        parts = [places[number::threads] for number in range(threads)]
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(lambda part: [read(place) for place in part] and None, parts))
    return time.perf_counter() - start, time.process_time() - start_cpu


def measure(path: Path, threads: int, rounds: int) -> list[list[str]]:
    """Rows of the table: way, threads, views/s, MB/s, share of the limit, processor milliseconds a view."""
    layout = CacheReader(path).layout
    rng = np.random.default_rng(1)
    ways = {name: make(path, threads) for name, make in WAYS.items()}
    everything = [(view, sample) for view in range(VIEWS) for sample in range(layout.num_samples)]
    counts: dict[str, int] = {}
    for name, read in ways.items():
        for place in everything[:4]:
            read(place)
        some = everything[: max(8, len(everything) // 8)]
        counts[name] = max(16, min(2000, int(0.4 / (time_way(read, some, 1)[0] / len(some)))))  # 0.4 s a turn
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    cpu_seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, read in ways.items():
            count = counts[name]
            places = [everything[number] for number in rng.integers(len(everything), size=count)]
            wall_s, cpu_s = time_way(read, places, threads)
            seconds[name].append(wall_s / count)
            cpu_seconds[name].append(cpu_s / count)
    assert layout.rgb is not None, "these caches store pixels"
    nbytes = layout.codes.chunk_nbytes * layout.codes.num_chunks_per_sample + layout.rgb.chunk_nbytes
    rows: list[list[str]] = []
    for name in ways:
        rate = 1 / statistics.median(seconds[name])
        shares = [limit / own for limit, own in zip(seconds[LIMIT], seconds[name], strict=True)]
        cpu_shares = [limit / own for limit, own in zip(cpu_seconds[LIMIT], cpu_seconds[name], strict=True)]
        rows.append(
            [
                f"{threads}",
                name,
                f"{rate:.0f}",
                f"{rate * nbytes / 1e6:.0f}",
                f"{statistics.median(shares):.0%}",
                f"{statistics.median(cpu_seconds[name]) * 1e3:.2f}",
                f"{statistics.median(cpu_shares):.0%}",
            ]
        )
    return rows


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The parsed options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=64, help="samples in each of the two views (default 64)")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--dir", type=Path, help="folder for the caches during the run (default: a temp folder)")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Make the caches, measure, and print the table."""
    options = parse(arguments)
    use_single_threaded_blosc()
    caches: dict[str, tuple[Callable[[np.random.Generator], np.ndarray], str]] = {
        "transform, ViT-B": (lambda rng: transform_codes(rng, 12, 400), GZIP),
        "transform, ViT-L": (lambda rng: transform_codes(rng, 24, 500), GZIP),
        "int8, ViT-B": (lambda rng: int8_codes(rng, 12, 1584), "zstd"),
        "int8, ViT-L": (lambda rng: int8_codes(rng, 24, 2112), "zstd"),
    }
    print(
        "| cache | KB a view | of them pixels | threads | way | views/s | MB/s | of limit | CPU ms a view | of limit |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    for name, (draw, how) in caches.items():
        with tempfile.TemporaryDirectory(dir=options.dir) as folder:
            path = Path(folder) / "cache.zarr"
            make_cache(path, options.samples, draw, how)
            sizes = [_folder_nbytes(path / part) / VIEWS / options.samples / 1e3 for part in ("attention", "pixels")]
            for threads in (1, 2):
                for row in measure(path, threads, options.rounds):
                    print("| " + " | ".join([name, f"{sum(sizes):.0f}", f"{sizes[1]:.0f}", *row]) + " |", flush=True)


def _folder_nbytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


if __name__ == "__main__":
    main()
