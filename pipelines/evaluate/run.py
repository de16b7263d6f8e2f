"""Evaluate: accuracy, loss and calibration of finished runs, alone and together, on one or several sets of images."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from atcache.errors import CacheMismatchError, ConfigError
from atcache.feed.caches import open_caches
from atcache.files.durable import check_output_file, write_file
from atcache.images.class_names import ClassNames
from atcache.store.reader import CacheReader
from atcache.students.student import Student
from atcache.students.teacher_side import LiveTeacher, start_teacher
from atcache.teachers.devices import resolve_device, resolve_precision
from atcache.teachers.record import TeacherRecord

from ..running.run_files import WEIGHTS_FILE
from ..running.run_record import RunRecord, load_run, read_run
from ..train.scores import score_students
from ..train.validation import ValidationSet, open_validation
from .config import EvaluateConfig
from .corrupted import corrupted_set, has_same_images, maps_are_missing, maps_are_of_others, recorded_corruption
from .report import report_text
from .sets import EvalSet
from .summary import EvaluateSummary, SetScores


@dataclass(frozen=True, kw_only=True, slots=True)
class _Runs:
    """The runs, loaded."""

    students: tuple[Student, ...]
    teacher: TeacherRecord | None
    """Of the copying ones; None if none copies."""
    live_teacher: LiveTeacher | None
    classes: tuple[ClassNames, ...]


def evaluate(config: EvaluateConfig) -> EvaluateSummary:
    """Score finished runs, and write the report if one is wanted.

    Raises:
        AtcacheError: a run is not finished, or the data do not fit it.
    """
    summary = score_runs(config)
    write_report(config, summary)
    return summary


def write_report(config: EvaluateConfig, summary: EvaluateSummary) -> None:
    """Write the report, if one is wanted."""
    if config.report is not None:
        write_file(config.report, report_text(config, summary).encode())


def score_runs(config: EvaluateConfig) -> EvaluateSummary:
    """Score finished runs; of several, the means of their predictions and each pair of them too. Writes no report.

    Raises:
        AtcacheError: a run is not finished, the data do not fit it, or the report could not be written.
    """
    start_s, sets = time.monotonic(), config.sets
    if config.report is not None:
        check_output_file("report", config.report)
    # First, so that a cache that cannot be used is refused before models are loaded, which takes long.
    places = {caches: open_caches(caches) for caches in dict.fromkeys(each.caches for each in sets)}
    recorded = {caches: recorded_corruption(readers) for caches, readers in places.items()}
    if not config.live_teacher and any(read_run(folder).record.mode == "copy" for folder in config.runs):
        for each in sets:
            if each.corrupt is not None and each.corrupt not in recorded.values():
                raise maps_are_missing(each.corrupt)
    device = resolve_device(config.device)
    loaded = [load_run(folder, device) for folder in config.runs]
    runs = _fitting(config, loaded, device)
    # All are opened before the first is scored: what does not fit is said at once.
    given = [each for each in sets if each.corrupt is None]
    opened = {each: _open(each, places[each.caches], runs, config, device) for each in given}
    main = opened[given[0]]
    corruptions = {each: recorded[each.caches] for each in given if has_same_images(main, opened[each])}
    for each in sets:
        # A cache of these images with this corruption is the same set, with the teacher's maps.
        if each.corrupt is not None and each.corrupt not in corruptions.values():
            if runs.teacher is not None and runs.live_teacher is None:
                other = next(one for one in given if recorded[one.caches] == each.corrupt)
                raise maps_are_of_others(each.corrupt, other.name)
            opened[each] = corrupted_set(main, places[each.caches], each.corrupt)
            corruptions[each] = each.corrupt
    dtype = resolve_precision(config.precision, device)
    scores: list[SetScores] = []
    for each, data in opened.items():
        found = score_students(runs.students, data, device, dtype, by_class=config.by_class)
        scores.append(
            SetScores(
                name=each.name,
                runs=found.runs,
                mean_probabilities=found.mean_probabilities,
                mean_logits=found.mean_logits,
                pairs=found.pairs,
                num_left_out=data.num_left_out,
                corrupt=corruptions.get(each),
            )
        )
    return EvaluateSummary(
        runs=tuple(map(str, config.runs)),
        modes=tuple(record.mode for _, record in loaded),
        sets=tuple(scores),
        seconds=time.monotonic() - start_s,
    )


def _fitting(config: EvaluateConfig, loaded: Sequence[tuple[Student, RunRecord]], device: torch.device) -> _Runs:
    """The runs, if they can be scored together."""
    for folder, (student, _) in zip(config.runs, loaded, strict=True):
        if not student.num_classes:
            raise ConfigError(
                f"{folder} was trained with --attention-only: it has no head, so it predicts no classes. Finetune its "
                f"weights on images with labels first: --mode finetune --weights {folder / WEIGHTS_FILE}."
            )
    copied = [record for _, record in loaded if record.mode == "copy"]
    teacher = copied[0].teacher if copied else None
    if config.live_teacher and teacher is None:
        raise ConfigError("--live-teacher: none of these runs copies attention, so no teacher is needed. Leave it out.")
    if len({record.teacher.weights_sha256 for record in copied if record.teacher is not None}) > 1:
        raise ConfigError("the copying runs have different teachers. Evaluate them one by one.")
    pairings = [record.pairing for record in copied if record.pairing is not None]
    return _Runs(
        students=tuple(student for student, _ in loaded),
        teacher=teacher,
        live_teacher=start_teacher(teacher, config.weights, pairings, device)
        if teacher and config.live_teacher
        else None,
        classes=tuple(
            ClassNames(record.classes or (), f"the run {folder}")
            for folder, (_, record) in zip(config.runs, loaded, strict=True)
        ),
    )


def _open(
    each: EvalSet, readers: tuple[CacheReader, ...], runs: _Runs, config: EvaluateConfig, device: torch.device
) -> ValidationSet:
    try:
        return open_validation(
            readers=readers,
            data=each.data or None,
            students=runs.students,
            teacher=runs.teacher,
            live_teacher=runs.live_teacher,
            batch_size=config.batch_size,
            workers=config.workers,
            device=device,
            label_key=None if readers else config.label_key,
            known=runs.classes,
            kept=each.classes,
        )
    except (ConfigError, CacheMismatchError) as error:
        if len(config.sets) == 1:
            raise
        raise type(error)(f"set {each.name}: {error}") from error
