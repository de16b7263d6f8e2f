"""What a run's folder records of its student, and how to load the student from it."""

from __future__ import annotations

import json
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

import torch

from atcache.choices import Mode
from atcache.errors import ConfigError
from atcache.fields import JsonFields, Omitted
from atcache.students.pairing import Pairing
from atcache.students.student import Student, new_student
from atcache.teachers.names import parse_model_name
from atcache.teachers.record import TeacherRecord

from ..running.run_files import RUN_FILE, WEIGHTS_FILE


@dataclass(frozen=True, kw_only=True, slots=True)
class RunRecord(JsonFields):
    """What is needed to make a run's student again."""

    is_strict: ClassVar[bool] = True
    mode: Mode
    student: str
    """The student's timm name, with arguments."""
    num_classes: int
    """Outputs of its head; 0 for a student without one."""
    pairing: Pairing | None
    """Which of the teacher's layers and heads go where in the student; None for scratch and finetune."""
    teacher: TeacherRecord | None
    """The teacher whose attention it uses; None for scratch and finetune."""
    classes: Annotated[tuple[str, ...] | None, Omitted] = None
    """Names of the classes; None if they were not known, or for a student without a head."""


def load_run(folder: Path, device: torch.device) -> tuple[Student, RunRecord]:
    """The student of a finished run, in eval mode, and the run's record.

    Raises:
        ConfigError: there is no finished run in the folder, or its weights do not fit its student.
    """
    from safetensors import SafetensorError, torch as safetensors_torch

    try:
        record = RunRecord.from_json(json.loads((folder / RUN_FILE).read_text())["record"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{folder} is not a run's folder: {RUN_FILE} cannot be read ({error}). Make one with `atcache train --out "
            f"{folder}`."
        ) from error
    if not (folder / WEIGHTS_FILE).exists():
        raise ConfigError(
            f"{folder} is not finished: {WEIGHTS_FILE} is missing. Run its `atcache train` command again."
        )
    student = new_student(
        record.mode,
        parse_model_name(record.student),
        record.num_classes,
        geometry=None if record.teacher is None else record.teacher.geometry,
        pairing=record.pairing,
    )
    try:
        student.model.load_state_dict(safetensors_torch.load_file(folder / WEIGHTS_FILE))
    except (SafetensorError, RuntimeError) as error:
        reason = textwrap.shorten(str(error), 200).rstrip(".")  # torch lists every tensor
        raise ConfigError(f"{folder / WEIGHTS_FILE} does not hold this run's weights: {reason}.") from error
    student.module.to(device).eval()
    return student, record
