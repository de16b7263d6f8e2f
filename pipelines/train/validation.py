"""Validation: the views and labels that students are scored on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from atcache.cache.record import CacheRecord
from atcache.errors import CacheMismatchError, ConfigError
from atcache.feed.batch import Batch
from atcache.feed.caches import open_joined_views
from atcache.feed.classes import refuse_beyond
from atcache.feed.loader import validation_batches
from atcache.feed.sample_views import FreshViews, Views
from atcache.images.class_names import ClassNames, same_classes
from atcache.images.source import SampleIndex, Source, index_source
from atcache.store.reader import CacheReader
from atcache.students.pairing import Pairing
from atcache.students.student import Student, check_views_fit
from atcache.students.teacher_side import CacheTeacher, LiveTeacher
from atcache.teachers.record import TeacherRecord

from ..running.ranks import Ranks
from .kept_classes import read_kept_classes


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ValidationSet:
    """Views and labels to score students on, and the teacher for students that need one."""

    views: Views
    label_S: np.ndarray
    """Class of every row of the source."""
    sample_S: np.ndarray
    """Rows that can be used."""
    classes: ClassNames
    """Names of the classes, as far as they are known."""
    indexes: tuple[SampleIndex, ...]
    """The sample tables, whose rows follow one another."""
    teacher: CacheTeacher | LiveTeacher | None
    batch_size: int
    workers: int
    kept_K: np.ndarray | None = None
    """The classes that predictions are restricted to, rising; None for all. Samples of others are not usable."""
    num_left_out: int = 0
    """Samples that could be used but for their class."""

    def batches(self, ranks: Ranks = Ranks()) -> Iterator[Batch]:  # noqa: B008 - frozen
        """Batches of this rank's share of the usable samples; together the ranks see each sample once."""
        return validation_batches(
            self.views,
            self.label_S,
            self.sample_S[ranks.rank :: ranks.world_size],
            batch_size=max(1, self.batch_size // ranks.world_size),
            workers=self.workers,
        )


def open_validation(
    *,
    readers: Sequence[CacheReader],
    data: str | tuple[str, ...] | None,
    students: Sequence[Student],
    teacher: TeacherRecord | None,
    live_teacher: LiveTeacher | None,
    batch_size: int,
    workers: int,
    device: torch.device,
    label_key: str | None = None,
    known: Sequence[ClassNames] = (),
    kept: Path | None = None,
) -> ValidationSet:
    """Views to score students on.

    Args:
        readers: a validation cache, or several as one; none draws `eval` views from `data`.
        data: the images, or where the caches' tars now are.
        students: their inputs and classes must fit the views and labels.
        teacher: the teacher that copying students were trained with; None if none of them copies.
        live_teacher: the same teacher, loaded, to be used instead of the cache's maps.
        batch_size: samples per batch.
        workers: processes that read ahead.
        device: where students run.
        label_key: where labels are in the `.json` files of `data`; None for `.cls` files.
        known: names of the classes that the students were trained on.
        kept: a file of the classes to keep to, as `read_kept_classes` reads it; None for all.

    Raises:
        ConfigError: copying students have nothing to take maps from, or sizes or classes do not fit.
        CacheMismatchError: a cache does not hold the maps that copying students were trained with, the caches cannot
            be used together, or a class has another name than in training.
    """
    pairings = [student.pairing for student in students if student.mode == "copy" and student.pairing is not None]
    given: CacheTeacher | LiveTeacher | None = live_teacher
    if readers:
        for reader in readers:
            _check_unmixed(reader)
        code_layers = None
        if teacher is not None and live_teacher is None:
            for reader in readers:
                _check_maps_fit(reader, teacher, pairings)
            given = CacheTeacher(readers, pairings, device)
            code_layers = given.code_layers
        views, label_S, usable_S = open_joined_views(readers, data, code_layers=code_layers, keep_nbytes=0)
        indexes = [reader.samples for reader in readers]
        for student in students:
            check_views_fit(student, readers[0])
    else:
        if teacher is not None and live_teacher is None:
            raise ConfigError(
                "a copying student needs the teacher's maps to predict, and no cache of these images is given. Build "
                "one with `atcache build --policy eval` and the same teacher, or give --live-teacher."
            )
        assert data is not None, "checked by the callers' configs"
        index = index_source(data, label_key=label_key)
        indexes = [index]
        views, label_S = FreshViews(Source(index), students[0].input.view_policy("eval", seed=0)), index.label_S
        usable_S = np.flatnonzero(label_S >= 0)
    classes = same_classes([*known, *(index.classes for index in indexes)])
    _check_students_fit(students)
    num_classes = students[0].num_classes
    expected = f"the student has {num_classes} classes, from 0. Validate on the classes it was trained on."
    refuse_beyond(indexes, usable_S, num_classes, expected)
    if not readers:
        _check_one_view(students)
    kept_K = None if kept is None else read_kept_classes(kept, classes, num_classes)
    num_usable = len(usable_S)
    if kept_K is not None:
        usable_S = usable_S[np.isin(label_S[usable_S], kept_K)]
        if not len(usable_S):
            raise ConfigError(f"no sample is of one of the classes in {kept}. Give the list of this set's classes.")
    return ValidationSet(
        views=views,
        label_S=label_S,
        sample_S=usable_S,
        classes=classes,
        indexes=tuple(indexes),
        teacher=given,
        batch_size=batch_size,
        workers=workers,
        kept_K=kept_K,
        num_left_out=num_usable - len(usable_S),
    )


def _check_unmixed(reader: CacheReader) -> None:
    """Refuse a cache of mixed views: each of them has several labels."""
    if CacheRecord.of(reader).policy.mixing is not None:
        raise ConfigError(
            f"the views of {reader.path} are mixed with each other, so they have no single label to predict. Build a "
            "validation cache with --policy eval."
        )


def _check_maps_fit(reader: CacheReader, teacher: TeacherRecord, pairings: Sequence[Pairing]) -> None:
    """Refuse a cache without the same maps that copying students were trained with."""
    theirs = CacheRecord.of(reader).teacher_record
    if theirs.weights_sha256 != teacher.weights_sha256:
        raise CacheMismatchError(
            f"{reader.path} holds maps of {theirs.name} (sha256 {theirs.weights_sha256[:12]}...), but the student "
            f"copies {teacher.name} ({teacher.weights_sha256[:12]}...). Build a validation cache with that teacher."
        )
    if not theirs.geometry.keeps_all_queries:
        raise CacheMismatchError(
            f"{reader.path} keeps only some rows of the maps (it was built with --queries {theirs.geometry.queries}), "
            "and a student that copies needs the rows of all tokens. Build a validation cache without --queries."
        )
    layers = {layer for pairing in pairings for layer in pairing.teacher_layers}
    if missing := sorted(layers - set(theirs.geometry.layers)):
        raise CacheMismatchError(
            f"{reader.path} has no maps of layer {missing[0]}, which the student copies. Build it with the --layers of "
            "the training cache."
        )
    heads = {head for pairing in pairings for head in pairing.teacher_heads}
    if missing := sorted(heads - set(theirs.geometry.heads)):
        raise CacheMismatchError(
            f"{reader.path} has no maps of head {missing[0]}, which the student copies. Build it with the --heads of "
            "the training cache."
        )


def _check_one_view(students: Sequence[Student]) -> None:
    """Refuse students that need different views of an image. Their normalisation may differ: each does its own."""
    first = students[0].input
    for other in (student.input for student in students):
        if other.view_policy("eval", seed=0) != first.view_policy("eval", seed=0):
            raise ConfigError(
                f"the runs cannot be scored together on tars: one resizes with {first.interpolation} and shows "
                f"{first.crop_pct:g} of an image, another with {other.interpolation} and {other.crop_pct:g}. Give a "
                "validation cache, whose views are the same for all, or evaluate them one by one."
            )


def _check_students_fit(students: Sequence[Student]) -> None:
    """Refuse students of different sizes."""
    first = students[0]
    for student in students:
        sizes = [(other.input.height, other.input.width, other.num_classes) for other in (first, student)]
        if sizes[0] != sizes[1]:
            raise ConfigError(
                "the runs cannot be scored together: their (height, width, classes) are "
                f"{sizes[0]} and {sizes[1]}. Evaluate them one by one."
            )
