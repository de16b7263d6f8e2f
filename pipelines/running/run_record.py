"""What a run's folder records of its student, and how to load the student from it."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, cast

import torch

from atcache.choices import Mode
from atcache.errors import ConfigError
from atcache.fields import JsonFields, Omitted, Range
from atcache.students.pairing import Pairing
from atcache.students.student import Student, new_student
from atcache.teachers.names import parse_model_name
from atcache.teachers.record import TeacherRecord
from atcache.teachers.trained import Trained

from .run_files import RUN_FILE, WEIGHTS_FILE


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


@dataclass(frozen=True, kw_only=True, slots=True)
class _Settings(JsonFields):
    subset: Annotated[int | None, Range(at_least=1)] = None


@dataclass(frozen=True, kw_only=True, slots=True)
class _Data(JsonFields):
    views: Mapping[str, Any] | None = None
    initial_weights_sha256: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class RunFile(JsonFields):
    """What is read again of a run's `run.json`, when the run is finished."""

    record: RunRecord
    settings: _Settings = _Settings()
    data: _Data = _Data()
    caches: tuple[str, ...] = ()
    """Where the caches were that it was trained from; empty if it was trained without, or does not say."""
    places: Mapping[str, Any] | None = None
    """What was typed for caches, tars and folder, by option, and the "folder" it was typed in; None if not recorded."""

    @property
    def views_of_parts(self) -> list[Mapping[str, Any]]:
        """The identity of the views of each cache that it was trained from, or of its one set of tars."""
        views = self.data.views or {}
        joined: Any = views.get("joined")
        parts: list[Any] = list(cast("Mapping[str, Any]", joined).values()) if isinstance(joined, Mapping) else [views]
        return [part for part in parts if isinstance(part, Mapping) and "source" in part]

    @property
    def was_trained_from_caches(self) -> bool:
        """Whether its views were those of caches, not drawn anew from tars."""
        return any("num_views" in part for part in self.views_of_parts)

    def trained(self, folder: Path) -> Trained:
        """What a cache records of this run as the maker of its teacher."""
        record = self.record
        return Trained(
            run=folder.absolute().name,
            mode=record.mode,
            num_classes=record.num_classes,
            sources=tuple(str(part["source"]) for part in self.views_of_parts),
            subset=self.settings.subset,
            teacher=None if record.teacher is None else record.teacher.name,
            teacher_weights_sha256=None if record.teacher is None else record.teacher.weights_sha256,
            initial_weights_sha256=self.data.initial_weights_sha256,
        )


def read_run(folder: Path) -> RunFile:
    """What the folder of a run says about it.

    Raises:
        ConfigError: it is not the folder of an `atcache train`.
    """
    try:
        values = json.loads((folder / RUN_FILE).read_text())
        return RunFile.from_json({**values, "record": RunRecord.from_json(values["record"])})
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ConfigError(
            f"{folder} is not a run's folder: {_what_it_is(folder)}. Give the folder of a finished `atcache train`."
        ) from error
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ConfigError(
            f"{folder} is not a run's folder: {RUN_FILE} cannot be read ({error}). Give the folder of a finished "
            "`atcache train`."
        ) from error


def _what_it_is(path: Path) -> str:
    """What a path is that is given in place of a run's folder."""
    if not path.exists():
        return "it does not exist"
    if not path.is_dir():
        return "it is a file"
    return "it is a cache" if (path / "zarr.json").exists() else f"it holds no {RUN_FILE}"


def load_run(folder: Path, device: torch.device) -> tuple[Student, RunRecord]:
    """The student of a finished run, in eval mode, and the run's record.

    Raises:
        ConfigError: there is no finished run in the folder, or its weights do not fit its student.
    """
    from safetensors import SafetensorError, torch as safetensors_torch

    record = read_run(folder).record
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
