"""What a training run is made of: its student, views, order, teacher and validation set, from its config."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from atcache.components import component_differences
from atcache.errors import CacheMismatchError
from atcache.loader import Views
from atcache.order import SampleOrder, choose_subset
from atcache.store.reader import CacheReader
from atcache.teachers import (
    InputConfig,
    ModelName,
    create_student,
    input_config,
    load_teacher,
    parse_model_name,
)
from atcache.weights import read_weights, tensors_sha256

from .runs import RunRecord
from .students import CacheTeacher, LiveTeacher, Student, check_views_fit, make_student, parse_layers
from .teacher_record import TeacherRecord
from .train_config import TrainConfig
from .validation import ValidationSet, open_cache_views, open_images, open_validation


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class TrainingData:
    """Everything a run reads, opened and checked."""

    student: Student
    views: Views
    label_S: np.ndarray
    """Class of every row of the source."""
    order: SampleOrder
    teacher: CacheTeacher | LiveTeacher | None
    """Gives factors for the modes that transfer attention."""
    validation: ValidationSet | None
    record: RunRecord
    identity: dict[str, Any]
    """What was read, as JSON: runs that differ in it are different runs."""
    notes: tuple[str, ...]
    """What the user should know before the run."""


def open_training_data(config: TrainConfig, device: torch.device) -> TrainingData:
    """Open and check all a run needs; the student's weights are drawn from torch's global generator.

    Raises:
        AtcacheError: one of its children for each thing that does not fit.
    """
    reader = None if config.cache is None else CacheReader(config.cache)
    cache_teacher = None if reader is None else TeacherRecord.of_cache(reader)
    transfers = config.mode in ("copy", "distill")
    layers = parse_layers(config.layers, cache_teacher.geometry) if transfers and cache_teacher else ()
    name = _student_name(config, cache_teacher)
    live_teacher = (
        cache_teacher.start(config.weights, layers, device) if cache_teacher and config.live_teacher else None
    )
    teacher: CacheTeacher | LiveTeacher | None = None
    if reader is not None and transfers:
        teacher = live_teacher or CacheTeacher(reader, layers, device)
    views, label_S, eligible_S = _open_views(config, reader, teacher, name)
    num_classes = int(label_S[eligible_S].max()) + 1
    initial_weights = _initial_weights(config, cache_teacher)
    student = make_student(
        config.mode,
        name,
        num_classes,
        geometry=cache_teacher.geometry if transfers and cache_teacher else None,
        layers=layers,
        drop_path=config.drop_path,
        weights=initial_weights,
    )
    if reader is not None:
        check_views_fit(student, reader)
    sample_S = eligible_S
    if config.subset is not None:
        sample_S = choose_subset(label_S, eligible_S, config.subset, config.seed)
    validation = _validation(config, student, layers, cache_teacher, live_teacher, device)
    return TrainingData(
        student=student,
        views=views,
        label_S=label_S,
        order=SampleOrder(sample_S=sample_S, seed=config.seed, batch_size=config.batch_size),
        teacher=teacher,
        validation=validation,
        record=RunRecord(
            mode=config.mode,
            student=str(name),
            num_classes=num_classes,
            layers=layers,
            teacher=cache_teacher if transfers else None,
        ),
        identity={
            "views": views.identity,
            "validation": None if validation is None else validation.views.identity,
            "initial_weights_sha256": None if initial_weights is None else tensors_sha256(initial_weights),
        },
        notes=_notes(config, name, cache_teacher, transfers),
    )


def _open_views(
    config: TrainConfig, reader: CacheReader | None, teacher: CacheTeacher | LiveTeacher | None, name: ModelName
) -> tuple[Views, np.ndarray, np.ndarray]:
    """The views to train on, the class of every row, and the rows that can be used."""
    keep_nbytes = config.keep_mib * 2**20 // max(1, config.workers)
    if reader is None:
        assert config.data is not None, "checked by TrainConfig"
        model_input = _input_of(name)
        views, label_S = open_images(
            config.data, model_input, config.policy or "crop-flip", config.seed, keep_nbytes=keep_nbytes
        )
        return views, label_S, np.flatnonzero(label_S >= 0)
    reads_codes = isinstance(teacher, CacheTeacher)
    views, eligible_S = open_cache_views(
        reader,
        config.data,
        with_codes=reads_codes,
        positions=teacher.positions if reads_codes else slice(None),
        keep_nbytes=keep_nbytes,
    )
    return views, reader.labels_S, eligible_S


def _student_name(config: TrainConfig, teacher: TeacherRecord | None) -> ModelName:
    if config.student is not None:
        return parse_model_name(config.student)
    assert teacher is not None, "checked by TrainConfig"
    return parse_model_name(teacher.name)


def _input_of(name: ModelName) -> InputConfig:
    with torch.device("meta"):
        return input_config(create_student(name, 1))


def _initial_weights(config: TrainConfig, teacher: TeacherRecord | None) -> dict[str, torch.Tensor] | None:
    """The teacher's weights for fine-tuning; they must be those the cache was built with, where there is one."""
    if config.mode != "finetune":
        return None
    if config.weights is not None and teacher is None:
        return read_weights(config.weights)
    name = config.student if teacher is None else teacher.name
    assert name is not None, "checked by TrainConfig"
    loaded = load_teacher(name, weights=config.weights)
    if teacher is not None and loaded.weights_sha256 != teacher.weights_sha256:
        raise CacheMismatchError(
            f"finetune would begin from {loaded.source} (sha256 {loaded.weights_sha256[:12]}...), the cache's teacher "
            f"has {teacher.weights_sha256[:12]}.... Give the --weights that the cache was built with."
        )
    return loaded.model.state_dict()


def _validation(
    config: TrainConfig,
    student: Student,
    layers: tuple[int, ...],
    cache_teacher: TeacherRecord | None,
    live_teacher: LiveTeacher | None,
    device: torch.device,
) -> ValidationSet | None:
    if config.val_cache is None and config.val_data is None:
        return None
    copies = config.mode == "copy"
    return open_validation(
        cache=config.val_cache,
        data=config.val_data,
        students=[student],
        layers=layers if copies else (),
        teacher=cache_teacher if copies else None,
        live_teacher=live_teacher if copies and config.val_cache is None else None,
        batch_size=config.batch_size,
        workers=config.workers,
        device=device,
    )


def _notes(config: TrainConfig, name: ModelName, teacher: TeacherRecord | None, transfers: bool) -> tuple[str, ...]:
    """Warn where the student lacks components of the teacher: transfer then fails (arXiv 2605.07191)."""
    if not transfers or teacher is None or config.student is None:
        return ()
    with torch.device("meta"):
        models = [create_student(parse_model_name(teacher.name), 1), create_student(name, 1)]
    differences = component_differences(*models)
    if not differences:
        return ()
    return (
        f"WARNING: the student's architecture differs from the teacher's: {' '.join(differences)} Attention transfer "
        "is known to fail between such models; leave --student out to use the teacher's own architecture.",
    )
