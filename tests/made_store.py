"""A small cache for tests of the store: random codes and pixels, written task by task."""

from __future__ import annotations

import subprocess
import sys
from functools import lru_cache
from pathlib import Path

import numpy as np

from atcache.images.source import SampleIndex
from atcache.store.layout import Status, StoreLayout
from atcache.store.reader import CacheReader
from atcache.store.writer import TaskWriter, create_cache, encode_pixels, encode_view, finish_cache

BAD_SAMPLE = 7
LAYOUT = StoreLayout(
    num_views=2,
    num_samples=10,
    num_layers=4,
    num_tokens=5,
    num_components=24,
    codes_dtype="int8",
    samples_per_shard=4,
    layers_per_chunk=2,
    parameter_names=("top", "left"),
    pixels=(6, 7),
)
CODES = "attention/codes/c/0/0/0/0/0"
SHARDS = [CODES, "pixels/rgb/c/0/0/0/0/0", "views/parameters/c/0/0/0", "views/pixel_hash/c/0/0", "views/status/c/0/0"]


def make_index(num_samples):
    return SampleIndex(
        tars=(Path("/data/a.tar"), Path("/data/b.tar")),
        tar_nbytes=(10_240, 20_480),
        keys_S=np.array([f"dir/ключ-{sample}".encode() for sample in range(num_samples)]),
        tar_S=(np.arange(num_samples) % 2).astype(np.int32),
        offset_S=np.arange(num_samples, dtype=np.int64) * 512,
        nbytes_S=np.arange(num_samples, dtype=np.int64) + 2**40,
        label_S=np.arange(num_samples, dtype=np.int64) - 1,
        problem_S=np.where(np.arange(num_samples) == BAD_SAMPLE, 6, 0).astype(np.uint8),
    )


def plain_index(num_samples):
    """Good samples of one made-up tar, without a difference but their keys."""
    zeros = np.zeros(num_samples, np.int64)
    return SampleIndex(
        tars=(Path("made.tar"),),
        tar_nbytes=(1024,),
        keys_S=np.array([b"%07d" % sample for sample in range(num_samples)]),
        tar_S=zeros.astype(np.int32),
        offset_S=zeros,
        nbytes_S=zeros,
        label_S=zeros,
        problem_S=zeros.astype(np.uint8),
    )


@lru_cache
def draw_codes(layout):
    """All codes and pixels of a cache: random integers, seeded."""
    rng = np.random.default_rng(0)
    info = np.iinfo(layout.codes_dtype)
    codes = rng.integers(info.min // 8, info.max // 8, layout.codes.shape).astype(layout.codes_dtype)
    return codes, rng.integers(0, 255, (layout.num_views, layout.num_samples, 6, 7, 3)).astype(np.uint8)


def write_task(path, layout, task, *, stop=None):
    """Write a task; with `stop`, leave off before that sample, without commit."""
    codes, pixels = draw_codes(layout)
    writer = TaskWriter(path, layout, task)
    for sample in range(task.start, task.stop):
        if sample == stop:
            writer.abort()
            return
        if sample == BAD_SAMPLE:
            writer.add(sample, status=Status.UNDECODABLE)
            continue
        writer.add(
            sample,
            status=Status.STORED,
            parameters_P=np.array([sample, -task.view], np.float32),
            pixel_hash=2**64 - 1 - sample,
            chunks=encode_view(layout, codes[task.view, sample]),
            pixels_chunk=encode_pixels(layout, pixels[task.view, sample]) if layout.pixels else None,
        )
    writer.commit({"row_kl_nats": 0.25 * (task.block + 1)})


def build(path, layout=LAYOUT, *, finish=True):
    state = {"steps": np.linspace(0, 1, 12, dtype=np.float32).reshape(4, 3), "slope": np.float32(2.5).reshape(())}
    bias_LHQK = np.arange(4 * 2 * 5 * 5, dtype=np.float32).reshape(4, 2, 5, 5)
    create_cache(path, layout, {"teacher": "tiny"}, make_index(layout.num_samples), state, bias_LHQK)
    for task in layout.tasks():
        write_task(path, layout, task)
    if finish:
        finish_cache(path)
    return path


def all_bytes(folder):
    return {file.relative_to(folder): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def run_python(code, *arguments, **options):
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        **options,
    )


def damage_and_read(cache):
    """Read all that shard 0 of view 0 holds."""
    reader = CacheReader(cache)
    for sample in range(4):
        reader.read_codes(0, sample)
        reader.read_pixels(0, sample)
        reader.parameters(0, sample)
        reader.pixel_hash(0, sample)
        reader.status(0, sample)
