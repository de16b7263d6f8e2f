"""Evaluate: accuracy and loss of one finished run, or of several together."""

from __future__ import annotations

import time
from dataclasses import dataclass

from atcache.errors import ConfigError
from atcache.feed.caches import open_caches
from atcache.fields import JsonFields
from atcache.files.location import listed
from atcache.images.class_names import ClassNames
from atcache.students.teacher_side import start_teacher
from atcache.teachers.devices import resolve_device, resolve_precision

from ..running.run_files import WEIGHTS_FILE
from ..running.run_record import load_run
from ..train.validation import Score, open_validation, score_students
from .config import EvaluateConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluateSummary(JsonFields):
    """The result of an evaluation."""

    runs: tuple[str, ...]
    modes: tuple[str, ...]
    score: Score
    seconds: float


def evaluate(config: EvaluateConfig) -> EvaluateSummary:
    """Score a finished run, or several as an ensemble.

    Raises:
        AtcacheError: a run is not finished, or the data do not fit it.
    """
    start_s = time.monotonic()
    # First, so that a cache that cannot be used is refused before models are loaded, which takes long.
    readers = open_caches(listed(config.cache))
    device = resolve_device(config.device)
    loaded = [load_run(folder, device) for folder in config.runs]
    for folder, (student, _) in zip(config.runs, loaded, strict=True):
        if not student.num_classes:
            raise ConfigError(
                f"{folder} was trained with --attention-only: it has no head, so it predicts no classes. Finetune its "
                f"weights on images with labels first: --mode finetune --weights {folder / WEIGHTS_FILE}."
            )
    students = [student for student, _ in loaded]
    copied = [record for _, record in loaded if record.mode == "copy"]
    teacher = copied[0].teacher if copied else None
    if config.live_teacher and teacher is None:
        raise ConfigError("--live-teacher: none of these runs copies attention, so no teacher is needed. Leave it out.")
    if len({record.teacher.weights_sha256 for record in copied if record.teacher is not None}) > 1:
        raise ConfigError("the copying runs have different teachers. Evaluate them one by one.")
    pairings = [record.pairing for record in copied if record.pairing is not None]
    live_teacher = start_teacher(teacher, config.weights, pairings, device) if teacher and config.live_teacher else None
    data = open_validation(
        readers=readers,
        data=config.data,
        students=students,
        teacher=teacher,
        live_teacher=live_teacher,
        batch_size=config.batch_size,
        workers=config.workers,
        device=device,
        label_key=config.label_key,
        known=[
            ClassNames(record.classes or (), f"the run {folder}")
            for folder, (_, record) in zip(config.runs, loaded, strict=True)
        ],
    )
    dtype = resolve_precision(config.precision, device)
    score = score_students(students, data, device, dtype, by_class=config.by_class)
    return EvaluateSummary(
        runs=tuple(map(str, config.runs)),
        modes=tuple(record.mode for _, record in loaded),
        score=score,
        seconds=time.monotonic() - start_s,
    )
