"""The results of a finished training run, kept in its folder."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from atcache.errors import CorruptCacheError

from ..running.run_files import WEIGHTS_FILE
from .validation import Score

SUMMARY_FILE = "summary.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainSummary:
    """The results of a training run."""

    out: str
    mode: str
    steps: int
    num_samples: int
    loss: float
    """Mean over the last tenth of the logged steps; includes the attention loss of a distilled student."""
    label_loss: float
    """The same mean of the labels' loss alone, which students of all modes have."""
    validation: Score | None
    """At the end; None without validation data."""
    seconds: float
    """Time of all processes that trained it one after another, with validation; in a sweep, for all students."""
    img_per_s: float
    """Images per second over all ranks in the last process that trained it, without validation."""
    waited_for_data: float
    """Share of that process's training time spent waiting for batches."""

    def to_json(self) -> dict[str, Any]:
        """The fields as a JSON object."""
        return asdict(self)

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> TrainSummary:
        """The summary that `to_json` wrote."""
        score = fields["validation"]
        values: dict[str, Any] = {**fields, "validation": None if score is None else Score(**score)}
        return cls(**values)


@dataclass(frozen=True, kw_only=True, slots=True)
class SweepResult:
    """The result of one student of a sweep."""

    name: str
    """Its folder's name."""
    summary: TrainSummary | None = None
    """None for a student that was given up."""
    problem: str | None = None
    """Why it was given up; None for a finished one."""

    def to_json(self) -> dict[str, Any]:
        """The fields as a JSON object."""
        summary = None if self.summary is None else self.summary.to_json()
        return {"name": self.name, "summary": summary, "problem": self.problem}


def read_finished(folder: Path) -> TrainSummary | None:
    """The summary of a finished run; None if the run is not finished.

    Raises:
        CorruptCacheError: the summary cannot be read.
    """
    file = folder / SUMMARY_FILE
    if not ((folder / WEIGHTS_FILE).exists() and file.exists()):
        return None
    try:
        return TrainSummary.from_json(json.loads(file.read_text()))
    except (KeyError, TypeError, ValueError) as error:
        raise CorruptCacheError(f"{file} is damaged ({error}). Delete {folder} to train this run again.") from error
