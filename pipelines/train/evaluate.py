"""Evaluate: accuracy and loss of one finished run, or of several together."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from atcache.errors import ConfigError
from atcache.files.location import Location
from atcache.students.teacher_side import start_teacher
from atcache.teachers.devices import resolve_device, resolve_precision

from .record import load_run
from .validation import Score, check_records, open_validation, score_ensemble


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluateConfig:
    """What to measure."""

    runs: tuple[Path, ...]
    """Folders of finished runs; several are an ensemble."""
    cache: Location | tuple[Location, ...] | None = None
    """A validation cache, or several as one; copying students take their maps from it."""
    data: str | tuple[str, ...] | None = None
    """Validation images, or where the caches' tars now are."""
    live_teacher: bool = False
    """Run the teacher for copying students instead of reading its maps."""
    weights: Path | None = None
    """The live teacher's weights; None takes timm's."""
    batch_size: int = 256
    """Samples a forward; does not change the result."""
    workers: int = 0
    """Processes that read ahead."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    precision: str = "auto"
    """auto, fp32 or bf16."""

    def __post_init__(self) -> None:
        if not self.runs:
            raise ConfigError("no run to evaluate: name the folder of a finished `atcache train`.")
        if self.cache is None and self.data is None:
            raise ConfigError("nothing to evaluate on: give --cache or --data.")
        if self.weights is not None and not self.live_teacher:
            raise ConfigError(f"weights={self.weights}: only a live teacher has any. Give --live-teacher too.")
        if self.batch_size < 1:
            raise ConfigError(f"batch_size={self.batch_size}: expected at least 1.")
        if self.workers < 0:
            raise ConfigError(f"workers={self.workers}: expected 0 or more.")


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluateSummary:
    """What came out."""

    runs: tuple[str, ...]
    modes: tuple[str, ...]
    score: Score
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """The fields as a JSON object."""
        return asdict(self)


def evaluate(config: EvaluateConfig) -> EvaluateSummary:
    """Score a finished run, or several as an ensemble.

    Raises:
        AtcacheError: a run is not finished, or the data do not fit it.
    """
    start_s = time.monotonic()
    # First of all: a cache that cannot be used shall not be found out after the models were loaded.
    check_records(config.cache)
    device = resolve_device(config.device)
    loaded = [load_run(folder, device) for folder in config.runs]
    copied = [record for _, record in loaded if record.mode == "copy"]
    teacher = copied[0].teacher if copied else None
    if config.live_teacher and teacher is None:
        raise ConfigError("--live-teacher: none of these runs copies attention, so no teacher is needed. Leave it out.")
    if len({record.teacher.weights_sha256 for record in copied if record.teacher is not None}) > 1:
        raise ConfigError("the copying runs have different teachers. Evaluate them one by one.")
    pairings = [record.pairing for record in copied if record.pairing is not None]
    live_teacher = start_teacher(teacher, config.weights, pairings, device) if teacher and config.live_teacher else None
    data = open_validation(
        cache=config.cache,
        data=config.data,
        students=[student for student, _ in loaded],
        teacher=teacher,
        live_teacher=live_teacher,
        batch_size=config.batch_size,
        workers=config.workers,
        device=device,
    )
    score = score_ensemble(
        [student for student, _ in loaded], data, device, resolve_precision(config.precision, device)
    )
    return EvaluateSummary(
        runs=tuple(map(str, config.runs)),
        modes=tuple(record.mode for _, record in loaded),
        score=score,
        seconds=time.monotonic() - start_s,
    )
