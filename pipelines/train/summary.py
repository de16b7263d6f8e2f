"""The results of a finished training run, kept in its folder."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from atcache.errors import CorruptCacheError
from atcache.fields import JsonFields

from ..running.run_files import WEIGHTS_FILE
from .scores import Score

SUMMARY_FILE = "summary.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainSummary(JsonFields):
    """The results of a training run."""

    out: str
    mode: str
    steps: int
    num_samples: int
    loss: float
    """Mean over the last tenth of the logged steps; includes the attention loss of a distilled student."""
    label_loss: float | None
    """The same mean of the labels' loss alone, which students of all modes have; None for attention-only."""
    validation: Score | None
    """At the end; None without validation data."""
    seconds: float
    """Time of all processes that trained it one after another, with validation; in a sweep, for all students."""
    img_per_s: float
    """Images per second over all ranks in the last process that trained it, without validation."""
    waited_for_data: float
    """Share of that process's training time spent waiting for batches."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SweepResult(JsonFields):
    """The result of one student of a sweep."""

    name: str
    """Its folder's name."""
    summary: TrainSummary | None = None
    """None for a student that was given up."""
    problem: str | None = None
    """Why it was given up; None for a finished one."""


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
        raise CorruptCacheError(
            f"{file} is damaged, or an older atcache wrote it ({error}). `atcache eval {folder}` scores the weights "
            f"beside it. Delete {folder} to train this run again."
        ) from error
