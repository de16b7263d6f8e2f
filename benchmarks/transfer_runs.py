"""Makes what `transfer.py` compares: tars of few images, a teacher, caches of its attention, and students.

Finished parts are kept as they are; unfinished ones are continued.
"""

from __future__ import annotations

import multiprocessing
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import torch

from atcache.choices import Mode
from atcache.feed.order import choose_subset
from atcache.files.durable import replaced_whole
from atcache.images.source import Source, index_source
from atcache.pipelines.build.config import BuildConfig
from atcache.pipelines.build.run import build
from atcache.pipelines.pretrain.config import PretrainConfig
from atcache.pipelines.pretrain.run import pretrain
from atcache.pipelines.train.config import TrainConfig
from atcache.pipelines.train.run import train_sweep

MODEL = "vit_tiny_patch16_224:img_size=32,patch_size=4,embed_dim=64,num_heads=2,num_classes=10"
"""12 layers of 2 heads, 65 tokens."""
MAIN_CODEC = "transform:target_kl=0.005"
"""The default of `atcache build`."""

FINETUNE_LAYER_DECAY = 0.75
"""Learning rate of a block, relative to the block above it; from MAE (arXiv 2111.06377, table 9)."""
_BATCH_SIZE = 32

_Given = TypeVar("_Given")
_Made = TypeVar("_Made")


@dataclass(frozen=True, kw_only=True, slots=True)
class Grid:
    """What to make, and how much of it."""

    out: Path
    data: str
    """Tars of images for the teacher. Students get some of these images, with labels."""
    val_data: str
    model: str
    """The teacher's and the students' architecture."""
    pretrain_steps: int
    """Steps of pre-training, of 64 images each."""
    train_samples: int
    """The number of labelled images that students get."""
    val_samples: int
    epochs: float
    """A student's passes over its samples."""
    lr: float
    """Highest learning rate of students that start with random weights. Scratch learns more at 1e-3 than at 5e-4, and
    copy about the same at both, on 2,000 training images that neither had seen (5,000 labels, 8 epochs)."""
    finetune_lr: float
    """Highest learning rate of fine-tuning, used in the last layer only. It learns more at 2e-3 than at 1e-3."""
    seeds: int
    """Students of each of the ways in `main_jobs`: scratch, finetune and copy."""
    side_seeds: int
    """Students of each other way: distill, and copy with other numbers of views and other codecs."""
    main_views: int
    """Views in the cache on which modes and codecs are compared."""
    views: tuple[int, ...]
    """Numbers of views to try with copy."""
    codecs: tuple[str, ...]
    """Codecs to try with copy."""


class Way(NamedTuple):
    """One kind of student: its mode, and the cache it is trained from."""

    mode: Mode
    views: int
    codec: str = MAIN_CODEC
    live: bool = False
    """Whether the teacher runs in every step. Then only the views of the cache are used."""


class Job(NamedTuple):
    """Students that share a stream of batches."""

    ways: tuple[Way, ...]
    seed: int


def mode_ways(grid: Grid) -> tuple[Way, ...]:
    """The ways that compare modes."""
    cached = [Way(mode, grid.main_views) for mode in ("scratch", "finetune", "copy", "distill")]
    return (*cached, *(way._replace(live=True) for way in cached[2:]))


def view_ways(grid: Grid) -> tuple[Way, ...]:
    """The ways that compare numbers of views."""
    return tuple(Way("copy", views) for views in grid.views)


def codec_ways(grid: Grid) -> tuple[Way, ...]:
    """The ways that compare codecs."""
    return tuple(Way("copy", grid.main_views, codec) for codec in grid.codecs)


def all_ways(grid: Grid) -> list[Way]:
    """Every way, once."""
    return list(dict.fromkeys(mode_ways(grid) + view_ways(grid) + codec_ways(grid)))


def main_jobs(grid: Grid) -> list[Job]:
    """The students that others are compared with, seed by seed: if the run is stopped, all have as many seeds."""
    cached = tuple(Way(mode, grid.main_views) for mode in ("scratch", "finetune", "copy"))
    live = cached[-1]._replace(live=True)
    return [Job(ways, seed) for seed in range(grid.seeds) for ways in (cached, (live,))]


def side_jobs(grid: Grid) -> list[Job]:
    """All other students."""
    main = {way for job in main_jobs(grid) for way in job.ways}
    return [Job((way,), seed) for seed in range(grid.side_seeds) for way in all_ways(grid) if way not in main]


def make_all(grid: Grid, processes: int) -> None:
    """Make whatever is not finished."""
    write_tar(grid.data, grid.out / "images" / "train-000000.tar", grid.train_samples)
    write_tar(grid.val_data, grid.out / "images" / "test-000000.tar", grid.val_samples)
    make_teacher(grid)
    for jobs in (main_jobs(grid), side_jobs(grid)):
        ways = [way for job in jobs for way in job.ways]
        caches = dict.fromkeys((views, way.codec) for way in ways for views in (way.views, None))
        in_processes(processes, build, [build_config(grid, *cache) for cache in caches])
        in_processes(processes, partial(train_job, grid), jobs)


def write_tar(data: str, path: Path, num_samples: int) -> None:
    """Write some samples of `data` as one tar, as evenly over the classes as possible."""
    from webdataset.writer import TarWriter

    if path.exists():
        return
    index = index_source(data)
    source = Source(index)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replaced_whole(path) as partial_path, TarWriter(str(partial_path), mtime=0) as writer:
        for sample in choose_subset(index.label_S, np.arange(index.num_samples), num_samples, seed=0):
            image, label = source.read_bytes(int(sample)), str(index.label_S[sample])
            writer.write({"__key__": f"{sample:06d}", "jpg": image, "cls": label})


def make_teacher(grid: Grid) -> None:
    """Pre-train a masked autoencoder on all images, in fp32: bf16's backward pass is slower in such narrow models."""
    pretrain(
        PretrainConfig(
            model=grid.model,
            data=grid.data,
            out=_teacher_folder(grid),
            steps=grid.pretrain_steps,
            batch_size=64,
            base_lr=5e-3,
            decoder_dim=64,
            decoder_depth=1,
            precision="fp32",
        )
    )


def build_config(grid: Grid, views: int | None, codec: str) -> BuildConfig:
    """The config of a training cache, or of the validation cache if `views` is None."""
    return BuildConfig(
        teacher=grid.model,
        weights=_teacher_folder(grid) / "model.safetensors",
        data=str(grid.out / "images" / f"{'test' if views is None else 'train'}-000000.tar"),
        out=grid.out / "caches" / f"{_folder_name(codec)}-{views or 'test'}.zarr",
        policy="eval" if views is None else "crop-flip",
        views=views or 1,
        codec=codec,
        workers=0,
        precision="fp32",
    )


def train_config(grid: Grid, way: Way, seed: int) -> TrainConfig:
    """The config of one student. All modes share a recipe, except that fine-tuning changes low layers less."""
    finetunes = way.mode == "finetune"
    validation = build_config(grid, None, way.codec)
    return TrainConfig(
        mode=way.mode,
        cache=build_config(grid, way.views, way.codec).out,
        # With a cache, a copying student of a live teacher would be validated on cached maps. So it gets images.
        val_cache=None if way.live else validation.out,
        val_data=validation.data if way.live else None,
        weights=validation.weights if way.live or finetunes else None,
        live_teacher=way.live,
        out=run_folder(grid, way, seed),
        epochs=grid.epochs,
        batch_size=_BATCH_SIZE,
        base_lr=(grid.finetune_lr if finetunes else grid.lr) * 256 / _BATCH_SIZE,
        layer_decay=FINETUNE_LAYER_DECAY if finetunes else None,
        label_smoothing=0.1,
        seed=seed,
        precision="fp32",
        validate_every=0,
        checkpoint_every=50,
    )


def train_job(grid: Grid, job: Job) -> None:
    """Train the students of a job."""
    for result in train_sweep([train_config(grid, way, job.seed) for way in job.ways]):
        if result.summary is None:
            raise RuntimeError(f"{result.name}: {result.problem}")


def run_folder(grid: Grid, way: Way, seed: int) -> Path:
    """The folder of a student."""
    return grid.out / "runs" / f"{_folder_name(way.codec)}-{way.views}" / f"{way.mode}{'-live' * way.live}-{seed}"


def in_processes(processes: int, function: Callable[[_Given], _Made], given: Sequence[_Given]) -> list[_Made]:
    """What `function` returns for each, in processes of one thread; in this process if `processes` is 1."""
    if processes == 1:
        return [function(one) for one in given]
    context = multiprocessing.get_context("spawn")  # a fork may inherit a lock of torch's threads, and hang
    with ProcessPoolExecutor(processes, context, torch.set_num_threads, (1,)) as pool:
        return list(pool.map(function, given))


def _teacher_folder(grid: Grid) -> Path:
    return grid.out / "teacher"


def _folder_name(codec: str) -> str:
    return re.sub(r"[^\w.]+", "-", codec)
