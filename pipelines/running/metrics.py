"""A run's metrics: one JSON object per line in metrics.jsonl, and the same numbers for TensorBoard."""

from __future__ import annotations

import io
import itertools
import json
import logging
import os
import socket
import time
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Self

import numpy as np

from atcache.errors import CorruptCacheError
from atcache.feed.batch import Batch
from atcache.files.durable import disk_errors_explained, write_file

METRICS_FILE = "metrics.jsonl"
_numbers = itertools.count()  # of TensorBoard's files that this process has made


class MetricsLog:
    """Writes metrics of one run; a context manager for one thread.

    A continued run drops what was written after its checkpoint, so that the file holds each step once.

    Args:
        folder: the run's folder.
        first_step: the step that the run continues from; 0 for a new run.
        validates_first_step: whether the run will validate after that step, for the first time or again.
    """

    def __init__(self, folder: Path, *, first_step: int, validates_first_step: bool = False) -> None:
        path = folder / METRICS_FILE
        kept = [row for row in read_metrics(folder) if row["step"] <= first_step]
        rewritten: list[dict[str, Any]] = []
        if validates_first_step:  # TensorBoard can only forget whole steps, so the step's training is written again
            rewritten = [row for row in kept if row["step"] == first_step and row["kind"] == "train"]
            kept = [row for row in kept if row["step"] < first_step]
        write_file(path, "".join(json.dumps(row) + "\n" for row in kept).encode())
        self._folder = folder
        with disk_errors_explained(folder):
            self._file = path.open("a")
            purge_step = first_step + (not validates_first_step)
            self._board = _Board(folder, purge_step=purge_step) if _has_tensorboard() else None
        for row in rewritten:
            values = {name: value for name, value in row.items() if name not in ("kind", "step")}
            self.write("train", first_step, values)

    def write(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        """Add the values of one step; `kind` is "train" or "validation"."""
        with disk_errors_explained(self._folder / METRICS_FILE):
            self._file.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")
            self._file.flush()
        if self._board is not None:
            with disk_errors_explained(self._folder):
                self._board.add(kind, step, values)

    def write_pictures(self, kind: str, step: int, pictures: Mapping[str, np.ndarray]) -> None:
        """Add the pictures of one step, uint8 (height, width, 3), by name; to TensorBoard only."""
        if self._board is not None:
            with disk_errors_explained(self._folder):
                self._board.add_pictures(kind, step, pictures)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with disk_errors_explained(self._folder):
            try:
                self._file.close()  # tries again to write what a full disk did not take
            finally:
                if self._board is not None:
                    self._board.close()


class _Board:
    """A file of TensorBoard's, which forgets what earlier files of the folder say from `purge_step` on.

    It is written at once: torch's own writer has a thread, which prints a traceback of its own when the disk is full.
    """

    def __init__(self, folder: Path, *, purge_step: int) -> None:
        from tensorboard.compat.proto import event_pb2
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._protocol: Any = event_pb2
        # TensorBoard wants this name. The time in it orders the files of a run that was continued.
        name = (
            f"events.out.tfevents.{time.time_ns() // 10**9:010d}.{socket.gethostname()}.{os.getpid()}.{next(_numbers)}"
        )
        self._file = (folder / name).open("wb")
        self._records: Any = RecordWriter(self._file)
        self._write(file_version="brain.Event:2")
        self._write(step=purge_step, session_log={"status": self._protocol.SessionLog.START})

    def add(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        """Add the values of one step."""
        self._write(
            step=step,
            summary={"value": [{"tag": f"{kind}/{name}", "simple_value": value} for name, value in values.items()]},
        )

    def add_pictures(self, kind: str, step: int, pictures: Mapping[str, np.ndarray]) -> None:
        """Add the pictures of one step."""
        from PIL import Image

        values: list[dict[str, Any]] = []
        for name, picture_HWC in pictures.items():
            file = io.BytesIO()
            Image.fromarray(picture_HWC).save(file, format="PNG")
            height, width = picture_HWC.shape[:2]
            image = {"height": height, "width": width, "colorspace": 3, "encoded_image_string": file.getvalue()}
            values.append({"tag": f"{kind}/{name}", "image": image})
        self._write(step=step, summary={"value": values})

    def _write(self, **event: Any) -> None:  # noqa: ANN401 - members of TensorBoard's Event
        self._records.write(self._protocol.Event(wall_time=time.time(), **event).SerializeToString())
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


@cache
def _has_tensorboard() -> bool:
    """Whether TensorBoard is installed. If it is not, the first call tells the user."""
    if find_spec("tensorboard") is not None:
        return True
    logging.getLogger(__name__).info(
        f"NOTE: TensorBoard is not installed, so metrics are written to {METRICS_FILE} only. To have them in "
        "TensorBoard too, pip install 'atcache[tensorboard]'."
    )
    return False


def read_metrics(folder: Path, kind: str | None = None) -> list[dict[str, Any]]:
    """A run's metrics of one `kind`, oldest first; None takes all. Half a line, left by a killed run, is dropped.

    Raises:
        CorruptCacheError: a whole line is not the record of a step.
    """
    path = folder / METRICS_FILE
    text = path.read_text() if path.exists() else ""
    try:
        rows = [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
        return [row for row in rows if row["step"] >= 0 and kind in (None, row["kind"])]
    except (KeyError, TypeError, ValueError) as error:
        raise CorruptCacheError(f"{path} is damaged ({error}). Delete {folder} to start this run again.") from error


class Speed:
    """Images per second of training, over all ranks, and the share of the time that was spent waiting for batches.

    Args:
        num_ranks: processes that train together. Each is as fast as this one, because they wait for each other.
    """

    def __init__(self, num_ranks: int = 1) -> None:
        self._num_ranks = num_ranks
        self._start_s = time.monotonic()
        self._waited_s = self._paused_s = 0.0
        self.num_images = 0
        """Images trained on so far, over all ranks."""

    @property
    def seconds(self) -> float:
        """Seconds since the start, including what was not training."""
        return max(1e-9, time.monotonic() - self._start_s)

    @property
    def training_s(self) -> float:
        """Seconds of training, with those of waiting for batches."""
        return max(1e-9, self.seconds - self._paused_s)

    def timed(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The same batches; the time until each arrives counts as waiting, and its images as trained on."""
        while True:
            start_s = time.monotonic()
            batch = next(batches, None)
            self._waited_s += time.monotonic() - start_s
            if batch is None:
                return
            self.num_images += len(batch.label_B) * self._num_ranks
            yield batch

    @contextmanager
    def paused(self) -> Generator[None]:
        """Do not count the time of this block, such as validation, as training."""
        start_s = time.monotonic()
        try:
            yield
        finally:
            self._paused_s += time.monotonic() - start_s

    def values(self) -> dict[str, float]:
        """Both numbers, by the names that metrics.jsonl has for them."""
        training_s = self.training_s  # once: the clock goes on
        return {"img_per_s": self.num_images / training_s, "waited_for_data": self._waited_s / training_s}

    def __str__(self) -> str:
        values = self.values()
        return f"{values['img_per_s']:.4g} img/s  waited {values['waited_for_data']:.0%}"
