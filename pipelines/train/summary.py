"""What a finished training run came to, kept in its folder."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from atcache.errors import CorruptCacheError
from atcache.fields import JsonFields

from ..running.run_files import WEIGHTS_FILE
from .validation import Score

SUMMARY_FILE = "summary.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainSummary(JsonFields):
    """What a run came to."""

    out: str
    mode: str
    steps: int
    num_samples: int
    loss: float
    """The mean over the last tenth of the logged steps; of a distilled student with its attention loss."""
    label_loss: float
    """The same of the labels' part alone, which students of all modes have."""
    validation: Score | None
    """At the end; None without validation data."""
    seconds: float
    """Of all processes that trained it one after another, with validation; in a sweep, of all its students."""
    img_per_s: float
    """Speed of the training in the last process, over all ranks, without validation."""
    waited_for_data: float
    """Share of that training's time spent waiting for batches."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SweepResult(JsonFields):
    """What one student of a sweep came to."""

    name: str
    """Its folder's name."""
    summary: TrainSummary | None = None
    """None for a student that was given up."""
    problem: str | None = None
    """Why it was given up; None for a finished one."""


def read_finished(folder: Path) -> TrainSummary | None:
    """The summary of a finished run; None where the run is not finished.

    Raises:
        CorruptCacheError: the summary cannot be read.
    """
    file = folder / SUMMARY_FILE
    if not ((folder / WEIGHTS_FILE).exists() and file.exists()):
        return None
    try:
        return TrainSummary.from_json(json.loads(file.read_text()))
    except (KeyError, TypeError, ValueError) as error:
        raise CorruptCacheError(f"{file} is damaged ({error}). Delete {folder} to train this run anew.") from error
