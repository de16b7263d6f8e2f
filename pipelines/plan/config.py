"""The options of `atcache plan`, and the numbers that it takes as given instead of measuring them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from atcache.choices import Decoding, Labels, Pixels, PolicyName, Precision, Queries
from atcache.errors import ConfigError
from atcache.files.location import Location, Url
from atcache.machine import num_processors
from atcache.teachers.foreign.own import OwnTeacher

from ..build.config import check_out, check_queries, check_views
from ..options import (
    calibration_samples_option,
    config,
    cutmix_option,
    decoding_option,
    decoding_workers_option,
    device_option,
    kept_heads_option,
    kept_layers_option,
    keys_option,
    label_key_option,
    labels_option,
    max_samples_option,
    mix_prob_option,
    mixup_option,
    option,
    pixels_option,
    policy_option,
    precision_option,
    queries_option,
    store_option,
    weights_option,
)

ASSUMABLE: dict[str, tuple[str, float]] = {
    "samples": ("num_samples", 1),  # images in the dataset
    "nbytes-per-view": ("nbytes_per_view", 1),  # bytes a view takes in the cache
    "teacher-img-per-s": ("teacher_img_per_s", 1),  # speed of the teacher's forward
    "student-img-per-s": ("student_img_per_s", 1),  # of steps, without the time that the teacher's attention takes
    "encode-img-per-s": ("encode_img_per_s", 1),  # speed of the codec on the teacher's device
    "load-img-per-s": ("load_img_per_s", 1),  # images read and augmented by all worker processes
    "disk-read-gb-per-s": ("read_nbytes_per_s", 1e9),  # speed of the target disk at reading views
    "disk-write-gb-per-s": ("write_nbytes_per_s", 1e9),  # speed of the target disk at writing
    "disk-free-tb": ("free_nbytes", 1e12),  # space on the target disk
}
"""Names for `--assume`: each one's field of `Assumptions`, and its unit. GB and TB are decimal, as disks are sold."""
_OF_TEACHER = ("nbytes-per-view", "teacher-img-per-s", "student-img-per-s")
_WHOLE = ("num_samples", "nbytes_per_view", "free_nbytes")


@dataclass(frozen=True, kw_only=True, slots=True)
class Assumptions:
    """Numbers that are taken as given; None is measured. One field for each name of `ASSUMABLE`; sizes are in bytes."""

    num_samples: int | None = None
    nbytes_per_view: int | None = None
    teacher_img_per_s: float | None = None
    student_img_per_s: float | None = None
    encode_img_per_s: float | None = None
    load_img_per_s: float | None = None
    read_nbytes_per_s: float | None = None
    write_nbytes_per_s: float | None = None
    free_nbytes: int | None = None

    @property
    def missing_of_teacher(self) -> list[str]:
        """The names whose values are still to be measured with the teacher; if empty, it need not be loaded."""
        return [name for name in _OF_TEACHER if getattr(self, ASSUMABLE[name][0]) is None]


def parse_assumptions(texts: Sequence[str]) -> Assumptions:
    """The assumptions a user typed.

    >>> parse_assumptions(["samples=1281167", "disk-free-tb=8"]).free_nbytes
    8000000000000

    Raises:
        ConfigError: a name is unknown or given twice, or a value is not a number above 0.
    """
    values: dict[str, Any] = {}
    for text in texts:
        name, equals, value = (part.strip() for part in text.partition("="))
        if name not in ASSUMABLE:
            raise ConfigError(f"assume {text!r}: {name!r} is unknown; expected one of {', '.join(ASSUMABLE)}.")
        field_name, unit = ASSUMABLE[name]
        if field_name in values:
            raise ConfigError(f"assume {text!r}: {name} is given twice.")
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        if not equals or not 0 < number < math.inf:
            raise ConfigError(f"assume {text!r}: expected {name}=NUMBER, with a number above 0.")
        values[field_name] = max(1, round(number * unit)) if field_name in _WHOLE else number * unit
    return Assumptions(**values)


@config
class PlanConfig:
    """The options of `atcache plan`. Those that build and train have too mean the same here."""

    teacher: str | OwnTeacher | None = option(
        "The teacher, named as for build. Not needed if all that is measured with it is assumed.",
        default=None,
    )
    data: str | None = option(
        "The images, as for build. A part of them is enough if their number is assumed.", default=None, metavar="TARS"
    )
    labels: Labels = labels_option()
    label_key: str | None = label_key_option()
    max_samples: int | None = max_samples_option()
    keys: Path | None = keys_option()
    out: Location = option(
        "Where the cache would be: a folder, whose disk is measured, and nothing is left there; or a URL on an object "
        "store (s3, gs, az), whose speeds are to be assumed.",
        default=Path(),
        is_written=True,
    )
    weights: Path | None = weights_option()
    codec: tuple[str, ...] = option(
        "A codec to compare, as for build; repeat for several.  [default: all that suit the teacher]", default=()
    )
    policy: PolicyName = policy_option("How views are drawn.")
    decoding: Decoding = decoding_option()
    mixup: float = mixup_option()
    cutmix: float = cutmix_option()
    mix_prob: float = mix_prob_option()
    views: int = option("Views (fixed augmentations) of each sample.", default=1, at_least=1)
    layers: str | None = kept_layers_option()
    heads: str | None = kept_heads_option()
    store: Literal["v", "x"] | None = store_option()
    queries: Queries = queries_option()
    pixels: Pixels = pixels_option()
    mode: Literal["copy", "distill"] = option("What the student would do with the teacher's attention.", default="copy")
    student: str | None = option(
        "The student: a timm model name, optionally with arguments.  [default: the teacher's architecture]",
        default=None,
    )
    epochs: float = option("Epochs of one training run.", default=100.0, above=0)
    runs: int = option("Training runs that would use the cache.", default=1, at_least=1)
    batch_size: int = option(
        "Samples in a training step, and views in a forward of the teacher.", default=32, at_least=1
    )
    workers: int | None = decoding_workers_option()
    calibration_samples: int = calibration_samples_option("sizes and fidelity are measured on")
    device: str = device_option()
    precision: Precision = precision_option()
    assume: tuple[str, ...] = option(
        "Take a number as given instead of measuring it, for example one of another machine; repeat for several. "
        f"Names: {', '.join(ASSUMABLE)}.",
        default=(),
        metavar="NAME=VALUE",
    )
    assumed: Assumptions = field(init=False)
    """The numbers that `assume` gives."""

    def __post_init__(self) -> None:
        from atcache.codecs.registry import parse_codec
        from atcache.images.labels import LabelRule

        LabelRule(mode=self.labels, key=self.label_key)  # raises if they do not go together
        check_views(self.policy, self.views, self.mixup, self.cutmix, self.mix_prob)
        for codec in map(parse_codec, self.codec):  # raises here, before anything takes long
            if self.store is not None:
                codec.refuse_values(self.store)
        check_queries(self.queries, self.store, self.codec)
        if self.queries != "all" and self.mode == "copy":
            raise ConfigError(
                f"queries={self.queries} and mode=copy: a student that copies needs the rows of all tokens. Give "
                "--mode distill, or leave --queries out."
            )
        assumed = parse_assumptions(self.assume)
        object.__setattr__(self, "assumed", assumed)
        check_out(self.out)
        if isinstance(self.out, Url) and None in (assumed.read_nbytes_per_s, assumed.write_nbytes_per_s):
            raise ConfigError(
                f"out={self.out}: the speeds of an object store are not measured. Give them, for example --assume "
                "disk-read-gb-per-s=1 --assume disk-write-gb-per-s=0.5."
            )
        if assumed.nbytes_per_view is not None and len(self.codec) > 1:
            raise ConfigError(
                f"nbytes-per-view is assumed, and {len(self.codec)} codecs are named: {', '.join(self.codec)}. "
                "Give one --codec."
            )
        if assumed.missing_of_teacher and (self.teacher is None or self.data is None):
            option = "--teacher" if self.teacher is None else "--data"
            raise ConfigError(
                f"{option} is missing: {', '.join(assumed.missing_of_teacher)} can only be measured with a teacher and "
                "images. Give it, or --assume these."
            )
        if assumed.num_samples is None and self.data is None:
            raise ConfigError("the number of images is not known: give --data, or --assume samples=NUMBER.")

    @property
    def num_workers(self) -> int:
        """Processes that load images, at least one: if `workers` is 0, the main process loads them."""
        return max(1, num_processors() - 1 if self.workers is None else self.workers)
