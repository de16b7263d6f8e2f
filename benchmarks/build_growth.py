"""Measures the store's part of a build as a dataset grows, and opening a large cache, each in a new process."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

NUM_TOKENS, NUM_COMPONENTS, SAMPLES_PER_SHARD = 65, 32, 500


def measure_growth(sizes: list[int]) -> list[dict[str, Any]]:
    """For each number of samples: microseconds per view of a build without its teacher, and peak memory."""
    return [_in_a_process("grow", str(num_samples)) for num_samples in sizes]


def measure_opening(num_samples: int) -> dict[str, Any]:
    """Seconds and MB to open a cache of this many samples and 24 layers, and to read its first views."""
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/large.zarr"
        created = _in_a_process("create", path, str(num_samples))
        return {**created, **_in_a_process("open", path)}


def _in_a_process(*arguments: str) -> dict[str, Any]:
    command = [sys.executable, __file__, *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


def _index(num_samples: int, folder: str) -> Any:
    from atcache.images.source import SampleIndex

    return SampleIndex(
        tars=(Path(folder) / "train.tar",),
        tar_nbytes=(2**40,),
        keys_S=np.char.mod(b"n%08d", np.arange(num_samples)),
        tar_S=np.zeros(num_samples, np.int32),
        offset_S=np.arange(num_samples, dtype=np.int64) * 110_000,
        nbytes_S=np.full(num_samples, 100_000, np.int64),
        label_S=np.arange(num_samples, dtype=np.int64) % 1000,
        problem_S=np.zeros(num_samples, np.uint8),
    )


def _layout(num_samples: int, **changes: Any) -> Any:
    from atcache.store.layout import StoreLayout
    from atcache.views.policy import PARAMETER_NAMES

    fields = {
        "num_views": 1,
        "num_samples": num_samples,
        "num_layers": 1,
        "num_tokens": NUM_TOKENS,
        "num_components": NUM_COMPONENTS,
        "codes_dtype": "int32",
        "samples_per_shard": SAMPLES_PER_SHARD,
        "layers_per_chunk": 1,
        "parameter_names": PARAMETER_NAMES,
        "compressor": "transpose-blosc-zstd-shuffle",
    }
    return StoreLayout(**{**fields, **changes})


def _attributes(layout: Any, index: Any) -> dict[str, Any]:
    """The metadata of a cache of ViT-L's attention."""
    from atcache.attention.geometry import FactorGeometry
    from atcache.attention.tokens import TokenLayout
    from atcache.cache.identity import CacheIdentity, Selection
    from atcache.cache.record import CacheRecord, CalibrationRecord, CreatedBy
    from atcache.teachers.inputs import InputConfig
    from atcache.views.policy import ViewPolicy

    size, half = {"height": 224, "width": 224}, (0.5, 0.5, 0.5)
    geometry = FactorGeometry(
        layers=tuple(range(24)),
        heads=tuple(range(16)),
        num_model_heads=16,
        num_kv_heads=16,
        head_dim=64,
        tokens=TokenLayout(num_prefix_tokens=1, grid_height=14, grid_width=14),
        scale=0.125,
    )
    identity = CacheIdentity(
        teacher="made",
        weights_sha256="0" * 64,
        input=InputConfig(**size, mean=half, std=half, interpolation="bicubic", crop_pct=0.875),
        precision="float32",
        fingerprint=index.fingerprint,
        num_samples=layout.num_samples,
        policy=ViewPolicy(name="crop-flip", image_height=224, image_width=224),
        num_views=layout.num_views,
        pixels="replay",
        selection=Selection(layers=geometry.layers, heads=None),
        codec={"name": "int8"},
    )
    return CacheRecord(
        identity=identity,
        weights_from="made",
        licence=None,
        depth=24,
        geometry=geometry,
        calibration=CalibrationRecord(row_kl_nats=0.0, injected_error=0.0),
        created_by=CreatedBy(atcache="0", python="3", torch="2", timm="1", device="cpu", views={}),
    ).to_json()


def _grow(num_samples: int) -> dict[str, Any]:
    """Create a cache, write and commit all its tasks with random codes, and finish it."""
    from atcache.store.layout import Status
    from atcache.store.writer import TaskWriter, create_cache, encode_view, finish_cache

    rng = np.random.default_rng(0)
    size = (16, 1, NUM_TOKENS, NUM_COMPONENTS)
    codes = (rng.laplace(size=size) * np.linspace(4, 0.1, NUM_COMPONENTS)).astype(np.int32)
    codes_BLTC = np.where(codes < 0, -2 * codes - 1, 2 * codes).astype(np.int32)
    with tempfile.TemporaryDirectory() as folder:
        index, layout, path = _index(num_samples, folder), _layout(num_samples), Path(folder) / "cache.zarr"
        before_nbytes = _peak_nbytes()
        marks = [time.perf_counter()]
        create_cache(path, layout, {}, index, {})
        marks.append(time.perf_counter())
        parameters_P = np.ones(len(layout.parameter_names), np.float32)
        for task in layout.tasks():
            writer = TaskWriter(path, layout, task)
            for sample in range(task.start, task.stop):
                chunks = encode_view(layout, codes_BLTC[sample % len(codes_BLTC)])
                writer.add(sample, status=Status.STORED, parameters_P=parameters_P, pixel_hash=1, chunks=chunks)
            writer.commit({"row_kl_nats": 0.005})
        marks.append(time.perf_counter())
        finish_cache(path)
        marks.append(time.perf_counter())
    stages = dict(zip(("create", "compress, write, commit", "finish"), np.diff(marks).tolist(), strict=True))
    return {
        "num_samples": num_samples,
        "us_a_view": {name: round(1e6 * seconds / num_samples, 2) for name, seconds in stages.items()},
        "peak_mb_above_index": round((_peak_nbytes() - before_nbytes) / 1e6, 1),
    }


def _create(path: str, num_samples: int) -> dict[str, Any]:
    """Create a cache of ViT-L's 24 layers, and write only its first and last task."""
    from atcache.store.layout import Status
    from atcache.store.writer import TaskWriter, create_cache, encode_view

    index = _index(num_samples, str(Path(path).parent))
    layout = _layout(num_samples, num_layers=24, num_tokens=197, num_components=64, samples_per_shard=2048)
    before_nbytes, start_s = _peak_nbytes(), time.perf_counter()
    create_cache(path, layout, _attributes(layout, index), index, {})
    create_s, create_nbytes = time.perf_counter() - start_s, _peak_nbytes() - before_nbytes
    tasks = list(layout.tasks())
    chunks = encode_view(layout, np.arange(24 * 197 * 64, dtype=np.int32).reshape(24, 197, 64) % 7)
    for task in (tasks[0], tasks[-1]):
        writer = TaskWriter(path, layout, task)
        for sample in range(task.start, task.stop):
            is_stored = sample < task.start + 8
            writer.add(
                sample,
                status=Status.STORED if is_stored else Status.UNDECODABLE,
                chunks=chunks if is_stored else None,
            )
        writer.commit()
    return {
        "num_samples": num_samples,
        "create_s": round(create_s, 3),
        "create_peak_mb": round(create_nbytes / 1e6, 1),
        "num_tasks": len(tasks),
    }


def _open(path: str) -> dict[str, Any]:
    """Open the cache and read some of it. Memory counts from after `import atcache`."""
    import atcache

    before_nbytes = _peak_nbytes()
    marks = [time.perf_counter()]
    import atcache.cache

    marks.append(time.perf_counter())
    cache = atcache.open(path)
    marks.append(time.perf_counter())
    opened_nbytes = _peak_nbytes() - before_nbytes
    cache.reader.read_codes(0, 3)
    marks.append(time.perf_counter())
    read_nbytes = _peak_nbytes() - before_nbytes
    cache.reader.read_codes(0, 5)
    marks.append(time.perf_counter())
    assert cache.reader.labels_S[-1] >= 0
    marks.append(time.perf_counter())
    names = ("first_import_s", "open_s", "first_read_s", "second_read_s", "labels_s")
    seconds = dict(zip(names, (round(value, 4) for value in np.diff(marks).tolist()), strict=True))
    return {
        **seconds,
        "open_peak_mb": round(opened_nbytes / 1e6, 1),
        "first_read_peak_mb": round(read_nbytes / 1e6, 1),
        "labels_peak_mb": round((_peak_nbytes() - before_nbytes) / 1e6, 1),
    }


def _peak_nbytes() -> int:
    # getrusage is not suitable: its maximum starts with that of the parent process.
    status = Path("/proc/self/status").read_text(encoding="ascii")
    (line,) = [line for line in status.splitlines() if line.startswith("VmHWM:")]
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    what, *given = sys.argv[1:]
    if what == "grow":
        print(json.dumps(_grow(int(given[0]))))
    elif what == "create":
        print(json.dumps(_create(given[0], int(given[1]))))
    else:
        print(json.dumps(_open(given[0])))
