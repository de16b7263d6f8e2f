"""What a training run needs, made from its config: student, views, order, teacher and validation set."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from atcache.cache.record import CacheRecord
from atcache.choices import Labels
from atcache.errors import AtcacheError, CacheMismatchError, ConfigError
from atcache.feed.caches import choose_cached_samples, open_caches, open_joined_views, usable_samples
from atcache.feed.classes import count_classes
from atcache.feed.order import SampleOrder, choose_subset
from atcache.feed.sample_views import FreshViews, Views
from atcache.files.location import listed
from atcache.images.class_names import ClassNames, same_classes
from atcache.images.source import SampleIndex, Source, index_source
from atcache.machine import kept_nbytes
from atcache.store.reader import CacheReader
from atcache.students.pairing import Pairing, plan_pairing
from atcache.students.student import Student, check_views_fit, new_student
from atcache.students.teacher_side import CacheTeacher, LiveTeacher, SharedTeacher, start_teacher
from atcache.teachers.foreign.names import is_foreign
from atcache.teachers.inputs import InputConfig, input_config
from atcache.teachers.load import create_student, load_teacher
from atcache.teachers.names import ModelName, parse_model_name
from atcache.teachers.record import TeacherRecord
from atcache.teachers.weight_files import read_weights
from atcache.teachers.weights import tensors_sha256, weights_of
from atcache.views.mixing import mix_policy

from ..running.run_record import RunRecord
from ..running.run_teacher import run_of_weights
from .config import TrainConfig
from .notes import start_notes, teacher_verdict, training_notes, validation_notes, view_notes
from .validation import ValidationSet, open_validation


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class TrainingData:
    """Everything a run reads, opened and checked."""

    student: Student
    views: Views
    label_S: np.ndarray
    """Class of every row of the source."""
    order: SampleOrder
    teacher: CacheTeacher | LiveTeacher | SharedTeacher | None
    """Gives the teacher's factors; None for modes that transfer no attention."""
    validation: ValidationSet | None
    record: RunRecord
    identity: dict[str, Any]
    """What the run reads, as JSON: runs that differ in it are different runs."""
    about_teacher: str | None
    """A line on what is known of the teacher; None for modes that transfer no attention."""
    notes: tuple[str, ...]
    """What the user should know before the run."""


def open_training_data(configs: Sequence[TrainConfig], device: torch.device) -> list[TrainingData]:
    """Open and check everything that runs need; what they share is opened once.

    Each run's weights are drawn from torch's global generator, seeded with the run's seed.

    Args:
        configs: one per run, all with the same `stream()`.
        device: where the students run.

    Raises:
        AtcacheError: something does not fit; always one of its children.
    """
    first = configs[0]
    val_readers, readers = open_caches(listed(first.val_cache)), open_caches(first.caches)
    cache_teacher = CacheRecord.of(readers[0]).teacher_record if readers else None
    plans: list[_Plan] = []
    for config in configs:
        with _named(config, len(configs)):
            plans.append(_plan(config, cache_teacher))
    if not readers:
        _check_one_size([plan.student for plan in plans])
    pairings = [plan.pairing for plan in plans if plan.pairing is not None]
    live_teacher: LiveTeacher | None = None
    if cache_teacher is not None and first.live_teacher:
        live_teacher = start_teacher(cache_teacher, first.weights, pairings, device)
    teacher: CacheTeacher | LiveTeacher | None = None
    if readers and pairings:
        teacher = live_teacher or CacheTeacher(readers, pairings, device)
    opened_views = _open_views(configs, readers, teacher, plans[0].student)
    views, label_S, sample_S = opened_views.views, opened_views.label_S, opened_views.sample_S
    learns_labels = any(not config.attention_only for config in configs)
    stream = _Stream(
        readers=readers,
        val_readers=val_readers,
        views=views,
        label_S=label_S,
        order=SampleOrder(
            sample_S=sample_S, seed=first.stream_seed, batch_size=first.batch_size, shuffle=first.shuffle
        ),
        # Classes are counted over all usable labels, so that a subset does not change the student.
        num_classes=(
            count_classes(opened_views.indexes, opened_views.eligible_S, first.num_classes) if learns_labels else 0
        ),
        classes=same_classes([index.classes for index in opened_views.indexes]),
        cache_teacher=cache_teacher,
        teacher=teacher,
        shared_teacher=SharedTeacher(teacher) if teacher is not None and len(configs) > 1 else None,
        live_teacher=live_teacher,
        device=device,
    )
    opened: list[TrainingData] = []
    for config, plan in zip(configs, plans, strict=True):
        with _named(config, len(configs)):
            opened.append(_open_student(config, plan, stream))
    return opened


@contextmanager
def _named(config: TrainConfig, num_students: int) -> Generator[None]:
    """Put the student's name before the message of an error, if there are several students."""
    try:
        yield
    except AtcacheError as error:
        if num_students == 1:
            raise
        raise type(error)(f"{config.out.name}: {error}") from error


class _Plan(NamedTuple):
    """What is known of a run's student before it is made."""

    student: ModelName
    pairing: Pairing | None
    """Which of the teacher's layers and heads it is given, and where; None for scratch and finetune."""


class _Stream(NamedTuple):
    """What runs that are trained together share."""

    readers: Sequence[CacheReader]
    val_readers: Sequence[CacheReader]
    views: Views
    label_S: np.ndarray
    order: SampleOrder
    num_classes: int
    classes: ClassNames
    cache_teacher: TeacherRecord | None
    """The teacher of the caches."""
    teacher: CacheTeacher | LiveTeacher | None
    shared_teacher: SharedTeacher | None
    """Gives several students the same factors of a batch; None for a student alone."""
    live_teacher: LiveTeacher | None
    device: torch.device

    def teacher_of(self, config: TrainConfig) -> CacheTeacher | LiveTeacher | SharedTeacher | None:
        """The teacher that gives a run its factors."""
        # Parts of a batch cannot be shared. `SharedTeacher` says why only copying students share a cache's factors.
        shares = config.accumulate == 1 and (config.mode == "copy" or self.live_teacher is not None)
        return self.shared_teacher if self.shared_teacher is not None and shares else self.teacher


def _plan(config: TrainConfig, cache_teacher: TeacherRecord | None) -> _Plan:
    name = config.student or (cache_teacher and cache_teacher.name)
    assert name is not None, "checked by TrainConfig"
    if config.mode not in ("copy", "distill") or cache_teacher is None:
        return _Plan(parse_model_name(name), None)
    pairing = plan_pairing(
        cache_teacher.geometry,
        layers=config.layers,
        heads=config.heads,
        layer_map=config.layer_map,
        head_map=config.head_map,
        what=config.what,
        copies=config.mode == "copy",
    )
    return _Plan(parse_model_name(name), pairing)


def _open_student(config: TrainConfig, plan: _Plan, stream: _Stream) -> TrainingData:
    """The data of one run: its own part, and what it shares with the others."""
    teacher = stream.cache_teacher if plan.pairing else None
    initial_weights = _initial_weights(config, stream.cache_teacher)
    num_classes = 0 if config.attention_only else stream.num_classes
    torch.manual_seed(config.seed)  # the student's weights are the first thing drawn
    student = new_student(
        config.mode,
        plan.student,
        num_classes,
        geometry=teacher and teacher.geometry,
        pairing=plan.pairing,
        drop_path=config.drop_path,
        weights=initial_weights,
    )
    if stream.readers:
        check_views_fit(student, stream.readers[0])
    validation = _validation(config, student, stream)
    verdict = teacher_verdict(config, plan.student, stream.readers)
    views_identity, seen_label_S = stream.views.identity, stream.label_S[stream.order.sample_S]
    if plan.pairing is None:  # the sweep may read codes for others; trained alone, this run would read none
        views_identity = _without_codecs(views_identity)
    return TrainingData(
        student=student,
        views=stream.views,
        label_S=stream.label_S,
        order=stream.order,
        teacher=stream.teacher_of(config) if plan.pairing else None,
        validation=validation,
        record=RunRecord(
            mode=config.mode,
            student=str(plan.student),
            num_classes=num_classes,
            classes=(stream.classes.names or None) if num_classes else None,
            pairing=plan.pairing,
            teacher=teacher,
        ),
        identity={
            "views": views_identity,
            "validation": None if validation is None else validation.views.identity,
            "initial_weights_sha256": None if initial_weights is None else tensors_sha256(initial_weights),
        },
        about_teacher=None if verdict is None else verdict.line,
        notes=(
            *training_notes(config, plan.student, num_classes, stream.readers, verdict),
            *start_notes(config, plan.student, student.model),
            *view_notes(config, len(seen_label_S), stream.readers),
            *(() if validation is None else validation_notes(stream.views, seen_label_S, validation)),
        ),
    )


def _without_codecs(identity: dict[str, Any]) -> dict[str, Any]:
    """The identity of the same views, read without codes."""
    if "joined" in identity:
        return {"joined": {number: _without_codecs(part) for number, part in identity["joined"].items()}}
    return {**identity, "codec": None} if "codec" in identity else identity


class _OpenedViews(NamedTuple):
    """The views to train on."""

    views: Views
    label_S: np.ndarray
    """Class of every row; -1 for none."""
    eligible_S: np.ndarray
    """The rows that can be used."""
    sample_S: np.ndarray
    """The rows that are used."""
    indexes: tuple[SampleIndex, ...]
    """The sample tables, whose rows follow one another."""


def _open_views(
    configs: Sequence[TrainConfig],
    readers: Sequence[CacheReader],
    teacher: CacheTeacher | LiveTeacher | None,
    name: ModelName,
) -> _OpenedViews:
    config = configs[0]
    keep_nbytes = kept_nbytes(config.keep_mib, config.workers)
    if not readers:
        assert config.data, "checked by TrainConfig"
        index = index_source(config.data, label_key=config.label_key)
        eligible_S = np.flatnonzero(index.label_S >= 0)
        sample_S = eligible_S
        if config.subset is not None:
            sample_S = choose_subset(index.label_S, eligible_S, config.subset, config.stream_seed)
        mixing = mix_policy(config.mixup, config.cutmix, config.mix_prob)
        policy = _input_of(name).view_policy(config.policy or "crop-flip", config.stream_seed, mixing)
        fresh = FreshViews(Source(index), policy, partner_S=sample_S, keep_nbytes=keep_nbytes)
        return _OpenedViews(fresh, index.label_S, eligible_S, sample_S, (index,))
    views, label_S, eligible_S = open_joined_views(
        readers,
        config.data or None,
        code_layers=teacher.code_layers if isinstance(teacher, CacheTeacher) else None,
        keep_nbytes=keep_nbytes,
        labels=_labels_for(configs, readers),
    )
    sample_S = choose_cached_samples(readers, label_S, eligible_S, subset=config.subset, seed=config.stream_seed)
    return _OpenedViews(views, label_S, eligible_S, sample_S, tuple(reader.samples for reader in readers))


def _labels_for(configs: Sequence[TrainConfig], readers: Sequence[CacheReader]) -> Labels:
    """Whether the samples of runs need labels. All students of a sweep see the same samples."""
    modes: set[Labels] = {"none" if config.attention_only else "required" for config in configs}
    if len(modes) == 1:
        return modes.pop()
    num_stored, num_labelled = (
        sum(len(usable_samples(reader, labels)) for reader in readers) for labels in ("none", "required")
    )
    if num_stored != num_labelled:
        raise ConfigError(
            f"{num_stored - num_labelled} of {num_stored} samples have no label: alone, a student of attention_only "
            "would train on all, and the others on those with a label. Train them in two sweeps."
        )
    return "required"


def _input_of(name: ModelName) -> InputConfig:
    with torch.device("meta"):
        return input_config(create_student(name, 1))


def _check_one_size(names: Sequence[ModelName]) -> None:
    """Refuse students of one sweep that need different views, which they would have to share."""
    policies = [_input_of(name).view_policy("crop-flip", 0) for name in names]
    for name, policy in zip(names, policies, strict=True):
        if policy != policies[0]:
            sizes = [f"{p.image_height} x {p.image_width}, {p.interpolation}" for p in (policies[0], policy)]
            raise ConfigError(
                f"students {names[0]} and {name} take different views ({sizes[0]}; {sizes[1]}). Without a cache the "
                "students of a sweep share the views that are drawn: give all one img_size, or train them one by one."
            )


def _initial_weights(config: TrainConfig, teacher: TeacherRecord | None) -> dict[str, torch.Tensor] | None:
    """The teacher's weights for fine-tuning; if there is a cache, they must be those it was built with."""
    if config.mode != "finetune":
        return None
    run_of_weights(config.weights)  # refuses a student that copies
    if config.weights is not None and teacher is None:
        return read_weights(config.weights)
    name = config.student if teacher is None else teacher.name
    assert name is not None, "checked by TrainConfig"
    if is_foreign(name):
        raise ConfigError(
            f"mode finetune begins with the weights of the teacher, {name}, which do not fit a model of timm. Choose "
            "another mode, or finetune from a file: --student with --weights, without --cache."
        )
    loaded = load_teacher(name, weights=config.weights)
    if teacher is not None and loaded.weights_sha256 != teacher.weights_sha256:
        raise CacheMismatchError(
            f"finetune would start from {loaded.source} (sha256 {loaded.weights_sha256[:12]}...), but the cache's "
            f"teacher has {teacher.weights_sha256[:12]}.... Give the --weights that the cache was built with."
        )
    return weights_of(loaded.model)


def _validation(config: TrainConfig, student: Student, stream: _Stream) -> ValidationSet | None:
    if config.val_cache is None and config.val_data is None:
        return None
    copies = config.mode == "copy"
    return open_validation(
        readers=stream.val_readers,
        data=config.val_data,
        students=[student],
        teacher=stream.cache_teacher if copies else None,
        live_teacher=stream.live_teacher if copies and not stream.val_readers else None,
        batch_size=config.batch_size // config.accumulate,  # what fits in memory in training fits here
        workers=config.workers,
        device=stream.device,
        label_key=config.label_key,
        known=(stream.classes,),
    )
