"""What `atcache plan` was asked for, and what it was told instead of having to measure it."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from atcache.attention.geometry import AttentionKind
from atcache.codecs.registry import CODECS, parse_codec
from atcache.errors import ConfigError
from atcache.views.mixing import mix_policy
from atcache.views.policy import PolicyName

_OF_MAPS = ("logmap",)
DEFAULT_CODECS: dict[AttentionKind, tuple[str, ...]] = {
    "factors": tuple(name for name in CODECS if name not in _OF_MAPS),
    "maps": _OF_MAPS,
}
"""What is compared when no codec is named, by what the teacher hands over: codecs at their own defaults."""

ASSUMABLE: dict[str, str] = {
    "samples": "images in the dataset",
    "nbytes-per-view": "bytes a view takes in the cache",
    "teacher-img-per-s": "speed of the teacher's forward",
    "student-img-per-s": "speed of a training step with the teacher's attention at hand",
    "encode-img-per-s": "speed of the codec on the teacher's device",
    "load-img-per-s": "images read and augmented by all worker processes",
    "disk-read-gb-per-s": "speed of the target disk at reading views",
    "disk-write-gb-per-s": "speed of the target disk at writing",
    "disk-free-tb": "space on the target disk",
}
"""Names for `--assume`, with what each means. GB and TB are decimal, as disks are sold."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Assumptions:
    """Numbers that are taken as given; None is measured. Fields are those of `ASSUMABLE`, in plain units."""

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
        """The names that only a run of the teacher can tell; empty where none has to be loaded."""
        values = {
            "nbytes-per-view": self.nbytes_per_view,
            "teacher-img-per-s": self.teacher_img_per_s,
            "student-img-per-s": self.student_img_per_s,
        }
        return [name for name, value in values.items() if value is None]


def parse_assumptions(texts: Sequence[str]) -> Assumptions:
    """The assumptions a user typed.

    >>> parse_assumptions(["samples=1281167", "disk-free-tb=8"]).free_nbytes
    8000000000000

    Raises:
        ConfigError: a name is unknown or given twice, or a value is no number above 0.
    """
    values: dict[str, float] = {}
    for text in texts:
        name, equals, value = (part.strip() for part in text.partition("="))
        if name not in ASSUMABLE:
            raise ConfigError(f"assume {text!r}: {name!r} is not known; known are {', '.join(ASSUMABLE)}.")
        if name in values:
            raise ConfigError(f"assume {text!r}: {name} is given twice.")
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        if not equals or not 0 < number < math.inf:
            raise ConfigError(f"assume {text!r}: expected {name}=NUMBER, with a number above 0.")
        values[name] = number

    def scaled(name: str, unit: float = 1) -> float | None:
        return None if name not in values else values[name] * unit

    def whole(name: str, unit: float = 1) -> int | None:
        return None if name not in values else max(1, round(values[name] * unit))

    return Assumptions(
        num_samples=whole("samples"),
        nbytes_per_view=whole("nbytes-per-view"),
        teacher_img_per_s=scaled("teacher-img-per-s"),
        student_img_per_s=scaled("student-img-per-s"),
        encode_img_per_s=scaled("encode-img-per-s"),
        load_img_per_s=scaled("load-img-per-s"),
        read_nbytes_per_s=scaled("disk-read-gb-per-s", 1e9),
        write_nbytes_per_s=scaled("disk-write-gb-per-s", 1e9),
        free_nbytes=whole("disk-free-tb", 1e12),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanConfig:
    """What `atcache plan` was asked for. What build and train also have means the same here."""

    teacher: str | None = None
    """As for build; needed unless all that it could tell is assumed."""
    data: str | None = None
    """The images; a sample of them will do where their number is assumed."""
    out: Path = Path()
    """Where the cache would be. Its disk is measured; nothing is left there."""
    weights: Path | None = None
    """The teacher's weights; None takes timm's."""
    codecs: tuple[str, ...] = ()
    """The codec settings to compare; empty for `DEFAULT_CODECS`."""
    policy: PolicyName = "crop-flip"
    """How views are drawn."""
    mixup: float = 0.0
    """As for build."""
    cutmix: float = 0.0
    """As for build."""
    mix_prob: float = 1.0
    """As for build."""
    views: int = 1
    """Views of each sample."""
    layers: str | None = None
    """Block indices to keep; None for all."""
    heads: str | None = None
    """Head indices to keep; None for all."""
    store: Literal["v"] | None = None
    """`v` keeps the teacher's values too; codecs that cannot are not compared."""
    pixels: Literal["replay", "store"] = "replay"
    """`store` keeps the augmented images too."""
    mode: Literal["copy", "distill"] = "copy"
    """What the student is to do with the teacher's attention."""
    student: str | None = None
    """A timm name; None takes the teacher's architecture."""
    epochs: float = 100.0
    """Passes over the samples in one training run; the default is train's."""
    runs: int = 1
    """Training runs that would use the cache."""
    batch_size: int = 32
    """Samples a step, and views a forward."""
    workers: int | None = None
    """Processes that decode and augment; None takes one less than there are processors."""
    calibration_samples: int = 256
    """Samples that sizes and fidelity are measured on, spread over the dataset."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    precision: str = "auto"
    """auto, fp32 or bf16."""
    assume: tuple[str, ...] = ()
    """What is not to be measured, as name=value; see `ASSUMABLE`."""
    assumed: Assumptions = field(init=False)
    """`assume`, read."""

    def __post_init__(self) -> None:
        for name in ("views", "epochs", "runs", "batch_size", "calibration_samples"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name}={getattr(self, name)}: expected more than 0.")
        if self.workers is not None and self.workers < 0:
            raise ConfigError(f"workers={self.workers}: expected 0 or more.")
        mix_policy(self.mixup, self.cutmix, self.mix_prob)  # refuses what cannot be
        for codec in map(parse_codec, self.codecs):  # before anything takes long
            if self.store == "v":
                codec.refuse_values()
        assumed = parse_assumptions(self.assume)
        object.__setattr__(self, "assumed", assumed)
        if assumed.nbytes_per_view is not None and len(self.codecs) > 1:
            raise ConfigError(
                f"nbytes-per-view is assumed, and {len(self.codecs)} codecs are named: {', '.join(self.codecs)}. "
                "Give one --codec."
            )
        if assumed.missing_of_teacher and (self.teacher is None or self.data is None):
            option = "--teacher" if self.teacher is None else "--data"
            raise ConfigError(
                f"{option} is missing: {', '.join(assumed.missing_of_teacher)} can only be measured with a teacher and "
                "images. Give it, or --assume these."
            )
        if assumed.num_samples is None and self.data is None:
            raise ConfigError("nothing tells how many images there are: give --data, or --assume samples=NUMBER.")

    @property
    def num_workers(self) -> int:
        """Processes that load images, at least one: with `workers` 0 it is the caller's own."""
        return max(1, (os.cpu_count() or 1) - 1 if self.workers is None else self.workers)
