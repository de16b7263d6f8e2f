"""What `paper.py` makes: the rows of the paper's table, and for each row the commands that give its number.

A job is one command of atcache: its config. Jobs name caches, runs and evaluations by what is in them, so a job that
is finished is never done again, whichever row asks for it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from paper_study import Study

from atcache.choices import Mode, What
from atcache.errors import ConfigError
from atcache.files.durable import encode_json, make_folder, write_file
from atcache.images.source import index_source
from atcache.pipelines.build.config import BuildConfig
from atcache.pipelines.build.run import build
from atcache.pipelines.evaluate.config import EvaluateConfig
from atcache.pipelines.evaluate.run import EvaluateSummary, evaluate
from atcache.pipelines.running.run_teacher import recorded_name, run_folder_of
from atcache.pipelines.train.config import TrainConfig
from atcache.pipelines.train.run import train_sweep
from atcache.pipelines.train.scores import Score
from atcache.pipelines.train.summary import read_finished
from atcache.store.reader import CacheReader
from atcache.teachers.names import parse_model_name
from atcache.views.corrupt import parse_corruptions

STEPS = {
    "modes": "modes, cached and live",
    "ensemble": "averaged with the fine-tuned student",
    "codecs": "copy, maps stored as",
    "views": "copy, views of each image",
    "layers": "copy, layers",
    "heads": "copy, heads of each layer",
    "what": "copy, what is given",
    "finetuned": "maps of the fine-tuned teacher",
    "shift": "other test images",
}
"""The steps and their titles, the most important first."""
_CHECKPOINT_EVERY = 100
_TIMED_STEPS = 4
_SAMPLES_TO_FIT = 256  # the default of `atcache build`
_SAMPLES_TO_MEASURE = 32
"""Images on which a codec is measured that was fitted for another cache."""


class Maps(NamedTuple):
    """The maps that a student gets."""

    views: int
    codec: str
    is_finetuned: bool = False
    """Whether they are those of the fine-tuned student with seed 0, not the teacher's."""


class Student(NamedTuple):
    """One kind of student."""

    mode: Mode
    maps: Maps
    live: bool = False
    """Whether the teacher runs in every step. Then only the views of the cache are used."""
    layers: str | None = None
    heads: str | None = None
    what: What = "map"


class Row(NamedTuple):
    """One row of the table: a student, or several whose probabilities are averaged."""

    step: str
    label: str
    students: tuple[Student, ...]
    images: str | None = None
    """Other test images: a name of `shift`, or a corruption or a group of them; None for `val_data` as it is."""


class Recipe(NamedTuple):
    """What may differ between modes."""

    base_lr: float
    init_values: float | None = None

    def __str__(self) -> str:
        start = "" if self.init_values is None else f", LayerScale from {self.init_values:g}"
        return f"base-lr {self.base_lr:g}{start}"


class Job(NamedTuple):
    """One command, and how much it has to do."""

    path: Path
    """The cache, the run or the file of the evaluation that it makes."""
    config: BuildConfig | TrainConfig | EvaluateConfig
    num_images: float
    after: tuple[Path, ...] = ()
    """Runs that must be finished first."""

    @property
    def kind(self) -> str:
        """Jobs of one kind take about equally long for each image."""
        if isinstance(self.config, BuildConfig):
            # Some codecs are fitted first, which takes longer than a small cache.
            return f"build {(self.config.codec or 'given codec').partition(':')[0]}"
        live = " live" if self.config.live_teacher else ""
        return f"train {self.config.mode}{live}" if isinstance(self.config, TrainConfig) else f"eval{live}"

    @property
    def is_done(self) -> bool:
        """Whether its result is there."""
        if isinstance(self.config, BuildConfig):
            return _is_complete(self.path)
        return self.path.exists() if isinstance(self.config, EvaluateConfig) else read_finished(self.path) is not None

    @property
    def missing(self) -> list[Path]:
        """What it needs and is not there."""
        caches: list[object] = []
        if isinstance(self.config, BuildConfig):
            caches = [self.config.codec_from]
        elif isinstance(self.config, TrainConfig):
            caches = [self.config.cache, self.config.val_cache]
        else:
            caches = [self.config.cache]
        needed = [cache for cache in caches if isinstance(cache, Path)]
        return [
            *(path for path in needed if not _is_complete(path)),
            *(run for run in self.after if read_finished(run) is None),
        ]

    def run(self) -> tuple[float, float] | None:
        """Do it, or what is left of it; returns the images and the seconds it took, None if it took only a part.

        Raises:
            AtcacheError: what the command raises, or its loss became NaN or infinite.
        """
        if isinstance(self.config, BuildConfig):
            built = build(self.config)
            return (self.num_images, built.seconds) if built.num_built_views >= self.num_images else None
        if isinstance(self.config, TrainConfig):
            # A sweep of one, because a sweep records what it gave up: it is not trained in vain by every call.
            (result,) = train_sweep([self.config])
            if (trained := result.summary) is None:
                raise ConfigError(f"given up, {result.problem} Delete {self.path} to train it again.")
            return self.num_images, self.num_images / trained.img_per_s if self.config.steps else trained.seconds
        evaluated = evaluate(self.config)
        make_folder(self.path.parent)
        write_file(self.path, encode_json(evaluated.to_json()))
        return self.num_images, evaluated.seconds


def rows_of(study: Study, num_layers: int, num_heads: int) -> list[Row]:
    """All rows of the table, the most important first."""
    maps = Maps(study.views, study.codec)
    scratch, copy, distill, finetune = (Student(mode, maps) for mode in ("scratch", "copy", "distill", "finetune"))
    rows = [
        Row("modes", "scratch", (scratch,)),
        Row("modes", "copy", (copy,)),
        Row("modes", "finetune", (finetune,)),  # here, because it is the other end of the gap
        Row("modes", "distill", (distill,)),
        Row("modes", "copy, live teacher", (copy._replace(live=True),)),
        Row("modes", "distill, live teacher", (distill._replace(live=True),)),
        Row("ensemble", "finetune + distill", (finetune, distill)),
        Row("ensemble", "finetune + copy", (finetune, copy)),
    ]
    for codec in study.codecs:
        rows.append(Row("codecs", codec, (copy._replace(maps=maps._replace(codec=codec)),)))
    for views in study.view_counts:
        rows.append(Row("views", str(views), (copy._replace(maps=maps._replace(views=views)),)))
    for count in _parts(num_layers, (1, 2, 3)):
        rows.append(Row("layers", f"first {count}", (copy._replace(layers=_span(0, count)),)))
        rows.append(Row("layers", f"last {count}", (copy._replace(layers=_span(num_layers - count, num_layers)),)))
    for count in _parts(num_heads, (1, 2)):
        rows.append(Row("heads", f"first {count}", (copy._replace(heads=_span(0, count)),)))
    # Codec transform keeps maps only.
    exact = copy._replace(maps=maps._replace(codec=study.codecs[0]))
    rows += [Row("what", what, (exact._replace(what=what),)) for what in ("q", "k", "map")]
    own = maps._replace(is_finetuned=True)
    rows += [Row("finetuned", one.mode, (one._replace(maps=own),)) for one in (copy, distill)]
    for name in (*study.shift, *study.corrupt):
        for student in (scratch, copy, distill, finetune):
            rows.append(Row("shift", f"{name}: {student.mode}", (student,), name))
    return rows


def _parts(count: int, quarters: Sequence[int]) -> list[int]:
    """Some quarters of a count, without none and all."""
    return sorted({max(1, count * number // 4) for number in quarters} - {count})


def _span(start: int, stop: int) -> str:
    return str(start) if stop == start + 1 else f"{start}-{stop - 1}"


def seeds_of(study: Study, row: Row) -> range:
    """The seeds that a row has students of: as many as other rows of its step, so that they can be compared."""
    return range(study.seeds if row.step in ("modes", "ensemble", "shift") else study.side_seeds)


def jobs_of(study: Study, row: Row, seed: int, recipes: Mapping[Mode, Recipe]) -> Iterator[Job]:
    """All that one row needs for one seed, in this order."""
    for student in row.students:
        training = train_job(study, student, seed, recipes[student.mode])
        if not training.is_done:  # else its caches may have been deleted
            yield from cache_jobs(study, student.maps)
        yield training
    live = any(student.live for student in row.students)
    for images, path in evaluation_files(study, row, seed).items():
        job = cache_job(study, row.students[0].maps, images)
        yield job
        config = EvaluateConfig(
            runs=tuple(run_folder(study, student, seed) for student in row.students),
            cache=job.path,
            live_teacher=live,
            weights=_weights_of(study) if live else None,
            workers=study.workers,
            device=study.device,
            precision=study.precision,
        )
        yield Job(path, config, len(row.students) * job.num_images, after=config.runs)


def cache_jobs(study: Study, maps: Maps) -> list[Job]:
    """The training cache of some maps, and the validation cache with the same codec."""
    return [cache_job(study, maps, "train"), cache_job(study, maps, "test")]


def cache_job(study: Study, maps: Maps, images: str) -> Job:
    """The job of a cache: of "train" several views of each image, of "test", "held-out" or other test images one."""
    path = cache_path(study, maps, images)
    fitted = cache_path(study, maps._replace(views=study.views), "train")
    trains = images == "train"
    keys = {"train": study.out / "labels.txt", "held-out": study.out / "held-out.txt"}.get(images)
    data = study.data if keys else study.shift.get(images, study.val_data)
    known = {"train": study.labels, "held-out": study.held_out}
    num_samples = known[images] if keys else min(study.val_samples, num_labelled(data))
    finetuned = run_folder(study, Student("finetune", Maps(study.views, study.codec)), 0) if maps.is_finetuned else None
    config = BuildConfig(
        teacher=study.teacher if finetuned is None else str(finetuned),
        weights=study.weights if finetuned is None else None,
        data=data,
        keys=keys,
        max_samples=None if keys else num_samples,
        out=path,
        policy=study.policy if trains else "eval",
        mixup=study.mixup if trains else 0.0,
        cutmix=study.cutmix if trains else 0.0,
        corrupt=None if keys or images == "test" or images in study.shift else images,
        views=maps.views if trains else 1,
        # One codec for all images and numbers of views, so that only what is compared differs.
        codec=maps.codec if path == fitted else None,
        codec_from=None if path == fitted else fitted,
        calibration_samples=_SAMPLES_TO_FIT if path == fitted else _SAMPLES_TO_MEASURE,
        workers=study.workers,
        device=study.device,
        precision=study.precision,
    )
    return Job(path, config, num_samples * config.views, after=() if finetuned is None else (finetuned,))


@lru_cache
def num_labelled(data: str) -> int:
    """The images of some tars that have labels."""
    return int((index_source(data).label_S >= 0).sum())


def cache_path(study: Study, maps: Maps, images: str) -> Path:
    """The place of a cache. Only training images have several views."""
    number = f"-{maps.views}" if images == "train" else ""
    name = f"{_plain(maps.codec)}{'-finetuned' * maps.is_finetuned}-{_plain(images)}{number}.zarr"
    return study.out / "caches" / name


def train_job(study: Study, student: Student, seed: int, recipe: Recipe, *, held_out: bool = False) -> Job:
    """The training of one student. All modes share a recipe, except that fine-tuning changes low layers less."""
    finetunes = student.mode == "finetune"
    path = tuning_folder(study, student.mode, recipe) if held_out else run_folder(study, student, seed)
    config = TrainConfig(
        mode=student.mode,
        cache=cache_path(study, student.maps, "train"),
        # A live copying student would be given the maps of this cache: it is evaluated with its teacher afterwards.
        val_cache=None
        if student.live and student.mode == "copy"
        else cache_path(study, student.maps, "held-out" if held_out else "test"),
        student=_student_name(study, recipe),
        weights=_weights_of(study) if student.live or finetunes else None,
        live_teacher=student.live,
        layers=student.layers,
        heads=student.heads,
        what=student.what,
        out=path,
        epochs=study.epochs,
        batch_size=study.batch_size,
        base_lr=recipe.base_lr,
        layer_decay=study.layer_decay if finetunes else None,
        drop_path=study.drop_path,
        label_smoothing=study.label_smoothing,
        seed=seed,
        workers=study.workers,
        keep_mib=study.keep_mib,
        device=study.device,
        precision=study.precision,
        compile=False,  # each of so many runs would wait for it
        validate_every=0,
        checkpoint_every=_CHECKPOINT_EVERY,
    )
    return Job(path, config, study.epochs * study.labels)


def _weights_of(study: Study) -> Path | None:
    """The weights that students are given: a run that is the teacher has its own."""
    return study.weights or run_folder_of(study.teacher)


def timing_job(study: Study, job: Job) -> Job | None:
    """A few steps of a training, which say how long it takes; None for other jobs."""
    if not isinstance(job.config, TrainConfig):
        return None
    path = study.out / "timing" / job.kind.replace(" ", "-")
    config = replace(job.config, out=path, steps=_TIMED_STEPS, val_cache=None)
    return Job(path, config, _TIMED_STEPS * study.batch_size)


def _student_name(study: Study, recipe: Recipe) -> str | None:
    """The teacher's architecture, with another start of LayerScale; None for the teacher's as it is."""
    if recipe.init_values is None:
        return None
    name = parse_model_name(recorded_name(study.teacher))
    return str(replace(name, arguments={**name.arguments, "init_values": recipe.init_values}))


def run_folder(study: Study, student: Student, seed: int) -> Path:
    """The folder of a student's run."""
    parts = [student.mode, "live" if student.live else "", student.what if student.what != "map" else ""]
    parts += [f"layers-{student.layers}" if student.layers else "", f"heads-{student.heads}" if student.heads else ""]
    return study.out / "runs" / _maps_name(student.maps) / f"{'-'.join(filter(None, parts))}-{seed}"


def tuning_folder(study: Study, mode: Mode, recipe: Recipe) -> Path:
    """The folder of a run that tries a recipe."""
    start = "" if recipe.init_values is None else f"-init-{recipe.init_values:g}"
    return study.out / "tuning" / f"{mode}-lr-{recipe.base_lr:g}{start}"


def evaluation_files(study: Study, row: Row, seed: int) -> dict[str, Path]:
    """The files of a row's evaluations by their images; none if its run was validated when it ended."""
    (student, *others) = row.students
    if not others and row.images is None and not (student.live and student.mode == "copy"):
        return {}
    images = [row.images or "test"]
    if row.images in study.corrupt:
        images = [str(corruption) for corruption in parse_corruptions(row.images)]
    name = "+".join(f"{one.mode}{'-live' * one.live}" for one in row.students)
    return {one: study.out / "evaluations" / f"{_plain(one)}-{name}-{seed}.json" for one in images}


def scores_of(study: Study, row: Row, seed: int) -> list[Score]:
    """What commands found for a row: a score for each of its sets of test images; none if they are not finished."""
    files = evaluation_files(study, row, seed).values()
    if not files:
        summary = read_finished(run_folder(study, row.students[0], seed))
        return [] if summary is None or summary.validation is None else [summary.validation]
    if not all(file.exists() for file in files):
        return []
    return [EvaluateSummary.from_json(json.loads(file.read_text())).score for file in files]


def _is_complete(cache: Path) -> bool:
    return cache.exists() and CacheReader(cache).is_complete


def _maps_name(maps: Maps) -> str:
    return f"{_plain(maps.codec)}{'-finetuned' * maps.is_finetuned}-{maps.views}"


def _plain(text: str) -> str:
    return re.sub(r"[^\w.]+", "-", text)
