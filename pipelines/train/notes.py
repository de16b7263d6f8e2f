"""Notes: what a user should know before a run, but no reason to refuse it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from torch import nn

from atcache.cache.record import CacheRecord
from atcache.feed.caches import usable_samples
from atcache.feed.sample_views import Views
from atcache.store.reader import CacheReader
from atcache.teachers.names import ModelName
from atcache.teachers.verdict import TeacherVerdict, judge

from .config import TrainConfig
from .recipes import read_recipe, view_differences
from .validation import ValidationSet

_LAYER_SCALES = ("gamma", "gamma_1", "gamma_2")
"""What timm calls the parameters of LayerScale."""
_LOW_SCALE = 1e-2
_MANY_TIMES = 30
"""How often a run may show a view before a note warns: docs/benchmarks/does-it-work.md has 12, 25 and 100."""


def teacher_verdict(config: TrainConfig, student: ModelName, readers: Sequence[CacheReader]) -> TeacherVerdict | None:
    """What is known of the teacher whose attention the student is given; None if it is given none."""
    if not readers or config.mode not in ("copy", "distill"):
        return None
    record = CacheRecord.of(readers[0])
    return judge(record.teacher_record.name, None if config.student is None else student, record.trained)


def training_notes(
    config: TrainConfig,
    student: ModelName,
    num_classes: int,
    readers: Sequence[CacheReader],
    verdict: TeacherVerdict | None,
) -> Iterator[str]:
    """Notes on a run of this student from these caches, the most important first.

    Args:
        config: the run.
        student: its architecture.
        num_classes: the number of classes of the labels.
        readers: the caches, all of one teacher; empty for a run without a cache.
        verdict: what is known of the teacher; None if the student is not given its attention.
    """
    if config.student is not None and verdict is not None and verdict.warning is not None:
        yield verdict.warning
    asked: int = 0 if config.student is None else student.arguments.get("num_classes", 0)
    if asked not in (0, num_classes) and not config.attention_only:
        yield f"NOTE: the student's num_classes={asked} is not used: the labels have {num_classes} classes, from 0."
    if not config.attention_only:
        yield from _notes_on_labels(readers)
    if config.recipe is not None:
        wanted = read_recipe(config.recipe)["build"]
        for reader in readers:
            if differences := view_differences(wanted, CacheRecord.of(reader).policy.to_json()):
                yield (
                    f"NOTE: the views of {reader.path} are not those of recipe {config.recipe}: "
                    f"{'; '.join(differences)}. A cache's views are fixed; `atcache build --recipe {config.recipe}` "
                    "builds one with the recipe's."
                )


def _notes_on_labels(readers: Sequence[CacheReader]) -> Iterator[str]:
    """A note on samples that are left out because they have no label."""
    num_stored, num_labelled = (
        sum(len(usable_samples(reader, labels)) for reader in readers) for labels in ("none", "required")
    )
    if num_stored > num_labelled:
        yield (
            f"NOTE: {num_stored - num_labelled:,} of {num_stored:,} samples have no label and are left out. To learn "
            "from the teacher's maps of all: --mode distill --attention-only."
        )


def start_notes(config: TrainConfig, name: ModelName, student: nn.Module) -> Iterator[str]:
    """A note if a student begins so near to doing nothing that distillation is slow.

    Args:
        config: the run.
        name: the student's architecture.
        student: the student as it begins.
    """
    if config.mode != "distill":
        return  # a student that copies loses nothing: docs/benchmarks/papers-table.md
    scales = [scale for path, scale in student.named_parameters() if path.rpartition(".")[2] in _LAYER_SCALES]
    start = max((float(scale.detach().abs().max()) for scale in scales), default=1.0)
    if start < _LOW_SCALE:
        better = replace(name, arguments={**name.arguments, "init_values": 1.0})
        yield (
            f"NOTE: the student's LayerScale begins at {start:.0e}, timm's value. Where it was measured, distilled "
            f"students learned more from 1 (docs/benchmarks/papers-table.md): --student '{better}'."
        )


def view_notes(config: TrainConfig, num_samples: int, readers: Sequence[CacheReader]) -> Iterator[str]:
    """A note if a run shows the same few views so often that its student may learn them by heart.

    Args:
        config: the run.
        num_samples: how many samples it is trained on.
        readers: the caches; empty for a run without a cache, which draws new views. Caches of policy eval do not count:
            they cannot have more than one view.
    """
    drawn = [identity for reader in readers if (identity := CacheRecord.of(reader).identity).policy.name != "eval"]
    num_epochs = config.epochs if config.steps is None else config.steps * config.batch_size / num_samples
    num_views = max((identity.num_views for identity in drawn), default=0)
    if num_views and num_epochs / num_views > _MANY_TIMES:
        yield (
            f"NOTE: the cache has {num_views} view{'s' * (num_views > 1)} of an image, which the run shows "
            f"{num_epochs / num_views:.0f} times each: students may learn them by heart. Build a cache with more "
            "--views, or vary the student's images with --student-jitter."
        )


def validation_notes(views: Views, seen_label_S: np.ndarray, validation: ValidationSet) -> Iterator[str]:
    """Notes on what a run is validated on.

    Args:
        views: the views it is trained on.
        seen_label_S: the classes of their labels.
        validation: what it is validated on.
    """
    if _sources(views.identity) & _sources(validation.views.identity):
        yield "NOTE: the run is validated on images that it is trained on: scores say nothing about other images."
    label_S = validation.label_S[validation.sample_S]
    if num_unseen := int((~np.isin(label_S, seen_label_S)).sum()):
        yield (
            f"NOTE: {num_unseen:,} of {len(label_S):,} validation images are of classes without a training image; they "
            "count as wrong."
        )


def _sources(identity: dict[str, Any]) -> set[str]:
    """Fingerprints of the tars that views come from."""
    parts = identity.get("joined", {"only": identity}).values()
    return {part["source"] for part in parts}
