"""The options of `atcache probe`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from atcache.choices import Mode, PolicyName, Precision
from atcache.errors import ConfigError
from atcache.files.location import Location, listed
from atcache.teachers.foreign.own import OwnTeacher

from ..options import config, device_option, label_key_option, option, precision_option, weights_option
from ..train.config import TrainConfig

BUILT_SAMPLES, BUILT_VAL_SAMPLES, BUILT_VIEWS = 1000, 1000, 4
_OF_BUILT_CACHES = ("teacher", "weights", "val_samples", "policy", "views", "label_key")
"""Options that are for small caches alone."""
CACHE_OPTIONS = (*_OF_BUILT_CACHES, "data", "val_data", "samples")
"""All options that decide what is in small caches."""


@config
class ProbeConfig:
    """The options of `atcache probe`. Those that build and train have too mean the same here."""

    out: Path = option(
        "Folder of the probe: small caches and runs. Finished runs are kept and not trained again.", is_written=True
    )
    mode: Literal["copy", "distill"] = option(
        "What the students do with the teacher's attention; each is compared with one from scratch.", default="copy"
    )
    cache: Location | tuple[Location, ...] | None = option(
        "The training cache, a path or URL; several are used as one.  [default: a small one is built]", default=None
    )
    val_cache: Location | tuple[Location, ...] | None = option("Cache of validation views, with --cache.", default=None)
    teacher: str | OwnTeacher | None = option(
        "Without --cache: the teacher, named as for build. Small caches of a part of --data are built.", default=None
    )
    weights: Path | None = weights_option()
    data: str | None = option(
        "The images, with labels; with --cache, where its tars are now, if they were moved.",
        default=None,
        metavar="TARS",
    )
    val_data: str | None = option(
        "Validation images; with --cache, where the validation cache's tars are now.  [default: other samples of "
        "--data]",
        default=None,
        metavar="TARS",
    )
    label_key: str | None = label_key_option()
    samples: int | None = option(
        "Training samples, drawn evenly over the classes.  [default: 1000, or all if there are fewer]",
        default=None,
        at_least=1,
    )
    val_samples: int | None = option(
        f"Validation samples of the small cache.  [default: {BUILT_VAL_SAMPLES}, or half of the samples if there are "
        "fewer]",
        default=None,
        at_least=1,
    )
    policy: PolicyName | None = option(
        "How views of the small training cache are drawn.  [default: crop-flip]", default=None
    )
    views: int | None = option(
        f"Views of each sample in the small training cache.  [default: {BUILT_VIEWS}; 1 with --policy eval]",
        default=None,
        at_least=1,
    )
    student: str | None = option(
        "The students: a timm model name, optionally with arguments.  [default: the teacher's architecture]",
        default=None,
    )
    steps: int = option("Optimiser steps of each run, if there is time.", default=400, at_least=1)
    batch_size: int = option("Samples in an optimiser step.", default=64, at_least=1)
    base_lr: float = option(
        "Learning rate for 256 samples in a step; the one used is base_lr * batch_size / 256.", default=2e-3, above=0
    )
    seeds: int = option(
        "Pairs of students, if there is time. A seed decides weights, order and, with --cache, which samples.",
        default=3,
        at_least=2,
        at_most=1000,
    )
    minutes: float = option(
        "Time for training. A few steps are timed first; then there are fewer pairs, and after that fewer steps, if "
        "not all fits.",
        default=20.0,
        above=0,
    )
    workers: int = option("Processes that read ahead; 0 reads in the training process.", default=0, at_least=0)
    device: str = device_option()
    precision: Precision = precision_option()

    def __post_init__(self) -> None:
        if self.cache is None:
            if self.val_cache is not None:
                raise ConfigError(f"val_cache={self.val_cache} without a cache to train on. Give --cache too.")
            if self.teacher is None or self.data is None:
                raise ConfigError(
                    "there is nothing to probe: give --cache and --val-cache, or --teacher and --data to build small "
                    "caches."
                )
            return
        if self.val_cache is None:
            raise ConfigError(
                "cache without val_cache: the students are compared on images that they were not trained on. Give "
                "--val-cache, made with `atcache build --policy eval`."
            )
        if given := [name for name in _OF_BUILT_CACHES if getattr(self, name) is not None]:
            raise ConfigError(
                f"{given[0]}={getattr(self, given[0])} is for building small caches, and --cache is given. Leave one "
                "of them out."
            )

    def settings(self) -> dict[str, Any]:
        """The options that all runs of one probe have in common, as JSON."""
        names = ("mode", "data", "val_data", "label_key", "samples", "val_samples", "policy", "views")
        of_runs = ("student", "steps", "batch_size", "base_lr", "precision")
        places = {name: [str(place) for place in listed(getattr(self, name))] for name in ("cache", "val_cache")}
        given = {"teacher": self.teacher, "weights": self.weights}
        texts = {name: None if value is None else str(value) for name, value in given.items()}
        return {**{name: getattr(self, name) for name in (*names, *of_runs)}, **places, **texts}

    def training(
        self, mode: Mode, seed: int, out: Path, *, steps: int, subset: int | None, caches: tuple[Any, Any]
    ) -> TrainConfig:
        """The config of one student; those of both modes differ in nothing else.

        Args:
            mode: what the student does.
            seed: of weights, order and subset.
            out: the folder of the run.
            steps: of the optimiser.
            subset: samples of the training cache to take; None takes all.
            caches: of training and validation.
        """
        is_given = self.cache is not None
        return TrainConfig(
            mode=mode,
            out=out,
            cache=caches[0],
            val_cache=caches[1],
            data=self.data if is_given else None,
            val_data=self.val_data if is_given else None,
            student=self.student,
            steps=steps,
            subset=subset,
            batch_size=self.batch_size,
            base_lr=self.base_lr,
            seed=seed,
            validate_every=0,
            compile=False,  # it takes as long as many of so few steps, and what is timed beforehand is not compiled
            workers=self.workers,
            device=self.device,
            precision=self.precision,
        )
