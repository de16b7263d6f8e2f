"""A run's metrics: one JSON object a line in metrics.jsonl, and the same numbers for TensorBoard."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from atcache.errors import CorruptCacheError
from atcache.store.durable import write_file

METRICS_FILE = "metrics.jsonl"


class MetricsLog:
    """Writes metrics of one run; a context manager for one thread.

    A continued run drops what was written after its checkpoint, so that every step stands there once.

    Args:
        folder: the run's folder.
        first_step: steps the run continues from; 0 for a new one.
        validates_first_step: whether that step's validation is still to come, or comes once more.
    """

    def __init__(self, folder: Path, *, first_step: int, validates_first_step: bool = False) -> None:
        from torch.utils.tensorboard import SummaryWriter

        path = folder / METRICS_FILE
        kept = [row for row in read_metrics(folder) if row["step"] <= first_step]
        rewritten: list[dict[str, Any]] = []
        if validates_first_step:  # TensorBoard can only be told to forget a whole step
            rewritten = [row for row in kept if row["step"] == first_step and row["kind"] == "train"]
            kept = [row for row in kept if row["step"] < first_step]
        write_file(path, "".join(json.dumps(row) + "\n" for row in kept).encode())
        self._file = path.open("a")
        self._board = SummaryWriter(str(folder), purge_step=first_step + (not validates_first_step))
        for row in rewritten:
            values = {name: value for name, value in row.items() if name not in ("kind", "step")}
            self.write("train", first_step, values)

    def write(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        """Add the values of one step; `kind` is "train" or "validation"."""
        self._file.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")
        self._file.flush()
        for name, value in values.items():
            self._board.add_scalar(f"{kind}/{name}", value, step)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._file.close()
        self._board.close()


def read_metrics(folder: Path, kind: str | None = None) -> list[dict[str, Any]]:
    """A run's metrics, oldest first; `kind` None for all. Half a line, left by a killed run, is dropped.

    Raises:
        CorruptCacheError: a whole line is no record of a step.
    """
    path = folder / METRICS_FILE
    text = path.read_text() if path.exists() else ""
    try:
        rows = [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
        return [row for row in rows if row["step"] >= 0 and kind in (None, row["kind"])]
    except (KeyError, TypeError, ValueError) as error:
        raise CorruptCacheError(f"{path} is damaged ({error}). Delete {folder} to start this run anew.") from error
