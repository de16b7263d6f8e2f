"""The long run of a build: tasks pass through overlapping stages.

render views (worker processes) -> teacher forward and encoding (device) -> compression (threads) -> shard writing (one
thread) -> commit. Queues between the stages are short, so memory holds a few batches, however large the dataset is.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from math import fsum
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from atcache.attention.capture import FactorCapture
from atcache.attention.factors import LayerAttention
from atcache.codecs.base import Coder
from atcache.errors import BadImageError
from atcache.feed.workers import read_ahead
from atcache.images.source import Source
from atcache.store.layout import StoreLayout, Task
from atcache.store.writer import TaskWriter, encode_pixels, encode_view
from atcache.teachers.run import TeacherRun
from atcache.views.policy import ViewPolicy
from atcache.views.rendering import STORED, Renderer

from ..fidelity import Expectation, Watch, layer_row_kl, layer_v_error
from ..running.progress import Progress
from .board import Board, Counts

_BATCHES_IN_FLIGHT = 3  # encoded batches that wait for compression and the disk
_CHECKED_VIEWS = 2  # of a checked batch; few, because their row KL is computed in float64
_LEAST_CHECKED_BATCHES = 8  # in all: if tasks are few, later batches are checked too
_KEPT_NBYTES = 64 * 2**20  # in each worker, for views that are mixed into others: about 450 at 224 pixels


class RenderedBatch(NamedTuple):
    """Consecutive samples of one task, rendered."""

    task: Task
    start: int
    status_B: np.ndarray
    parameters_BP: np.ndarray
    pixel_hashes: list[int]
    pixels_BHWC: Tensor


class RenderedBatches(Dataset[RenderedBatch]):
    """Batch number -> rendered views. Batches never cross tasks, so a continued build forms the same ones."""

    def __init__(
        self, source: Source, policy: ViewPolicy, tasks: Iterable[Task], batch_size: int, *, skip_bad: bool
    ) -> None:
        self._renderer = Renderer(source, policy, skip_bad=skip_bad, keep_nbytes=_KEPT_NBYTES)
        self._batches: list[tuple[Task, int, int]] = []
        self._numbers_of_tasks: list[range] = []
        for task in tasks:
            starts = range(task.start, task.stop, batch_size)
            self._numbers_of_tasks.append(range(len(self._batches), len(self._batches) + len(starts)))
            self._batches += [(task, start, min(start + batch_size, task.stop)) for start in starts]

    def __len__(self) -> int:
        return len(self._batches)

    def numbers_of(self, task_number: int) -> range:
        """The batch numbers of the task at this place in `tasks`."""
        return self._numbers_of_tasks[task_number]

    def __getitem__(self, number: int) -> RenderedBatch:
        task, start, stop = self._batches[number]
        block = range(task.start, task.stop)
        views = [self._renderer.render(sample, task.view, block) for sample in range(start, stop)]
        return RenderedBatch(
            task=task,
            start=start,
            status_B=np.array([view.status for view in views], np.uint8),
            parameters_BP=np.stack([view.parameters_P for view in views]),
            pixel_hashes=[view.pixel_hash for view in views],
            pixels_BHWC=torch.from_numpy(np.stack([view.pixels_HWC for view in views])),
        )


class _Chunks(NamedTuple):
    """One stored view, compressed or being compressed."""

    codes: Future[list[bytes]]
    pixels: Future[bytes] | None


class _Checked(NamedTuple):
    """How far the decoded attention of some views of a batch is from the teacher's."""

    num_views: int
    quality: dict[str, float]
    """`row_kl_nats`, the mean row KL, and if v is stored `v_error`, its relative error."""


class _ShardWriter:
    """Writes batches into their tasks' shards, in order; for one thread."""

    def __init__(self, out: Path, layout: StoreLayout) -> None:
        self._out, self._layout = out, layout
        self._writer: TaskWriter | None = None
        self._checked: list[_Checked] = []

    def write(self, batch: RenderedBatch, chunks: list[_Chunks], checked: _Checked | None) -> Counts:
        """Add a batch. The first batch of a task opens its shards, the last one commits it.

        Returns:
            What this call has done.
        """
        if self._writer is None:
            self._writer = TaskWriter(self._out, self._layout, batch.task)
            self._checked = []
        if checked is not None:
            self._checked.append(checked)
        nbytes = 0
        remaining = iter(chunks)
        for row, status in enumerate(batch.status_B.tolist()):
            chunk = next(remaining) if status == STORED else None
            self._writer.add(
                batch.start + row,
                status=status,
                parameters_P=batch.parameters_BP[row],
                pixel_hash=batch.pixel_hashes[row],
                chunks=None if chunk is None else chunk.codes.result(),
                pixels_chunk=None if chunk is None or chunk.pixels is None else chunk.pixels.result(),
            )
        if batch.start + len(batch.status_B) == batch.task.stop:
            num_checked = sum(check.num_views for check in self._checked)
            nbytes = self._writer.commit(_mean_quality(self._checked), num_checked).nbytes
            self._writer = None
        return Counts(
            num_views=len(batch.status_B),
            num_stored=len(chunks),
            nbytes=nbytes,
            sum_nats=0.0 if checked is None else checked.quality["row_kl_nats"] * checked.num_views,
            num_checked=0 if checked is None else checked.num_views,
        )

    def abort(self) -> None:
        """Remove the temp files of a task that was not committed."""
        if self._writer is not None:
            self._writer.abort()


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class TaskRunner:
    """Runs the tasks of a build."""

    out: Path
    layout: StoreLayout
    source: Source
    policy: ViewPolicy
    run: TeacherRun
    coder: Coder
    batch_size: int
    workers: int
    """Processes that render."""
    threads: int
    """Threads that compress."""
    skip_bad: bool
    expectation: Expectation

    def run_tasks(self, tasks: list[Task], board: Board) -> None:
        """Write the shards of all `tasks` that no other process takes, and commit each when it is finished.

        In the leading process this shows the progress of all processes, and returns when all have finished.

        Args:
            tasks: the same list in all processes.
            board: hands out the tasks, and knows at the end what was done.

        Raises:
            BadImageError: an image cannot be read, and `skip_bad` is False.
            DiskFullError: no space is left; tasks committed before stay.
        """
        capture = self.run.capture(self.coder.geometry, self.coder.input_calls)
        waiting: deque[Future[Counts]] = deque()
        shards = _ShardWriter(self.out, self.layout)
        done = Counts()
        with (
            self._telling(tasks, board) as tell,
            ThreadPoolExecutor(max_workers=self.threads, thread_name_prefix="compress") as compressors,
            ThreadPoolExecutor(max_workers=1, thread_name_prefix="write") as writer,
        ):

            def finish_oldest(done: Counts) -> Counts:
                done += waiting.popleft().result()
                board.report(done)
                tell()
                return done

            try:
                for batch in self._batches(tasks, board):
                    board.look()
                    checked, chunks = self._encode(capture, batch, compressors)
                    waiting.append(writer.submit(shards.write, batch, chunks, checked))
                    if len(waiting) > _BATCHES_IN_FLIGHT:
                        done = finish_oldest(done)
                while waiting:
                    done = finish_oldest(done)
                board.finish(tell)
                tell()
            except BaseException as error:
                # The batches before a bad image are good, so they are still stored.
                gives_up = not isinstance(error, BadImageError)
                compressors.shutdown(wait=not gives_up, cancel_futures=gives_up)
                writer.shutdown(wait=True, cancel_futures=gives_up)
                raise
            finally:
                shards.abort()

    @contextmanager
    def _telling(self, tasks: list[Task], board: Board) -> Generator[Callable[[], None]]:
        """A function to call now and then: in the leader it shows what all processes have done, elsewhere nothing."""
        if not board.leads:
            yield lambda: None
            return
        watch, start_s = Watch(self.expectation), time.monotonic()
        all_views = self.layout.num_views * self.layout.num_samples
        done_views = all_views - sum(task.num_samples for task in tasks)
        with Progress("build", total=all_views, unit="views", done=done_views) as progress:

            def tell() -> None:
                total = board.total()
                speed = total.nbytes / 1e6 / (time.monotonic() - start_s)
                news = done_views + total.num_views - progress.done
                progress.advance(news, f"{total.nbytes / 1e6:.4g} MB, {speed:.3g} MB/s")
                if (warning := watch.see(total.sum_nats, total.num_checked)) is not None:
                    progress.say(warning)

            yield tell

    def _batches(self, tasks: list[Task], board: Board) -> Iterator[RenderedBatch]:
        batches = RenderedBatches(self.source, self.policy, tasks, self.batch_size, skip_bad=self.skip_bad)
        # A task is claimed only when its first batch is needed, so that no process holds tasks that others could do.
        numbers = (number for claimed in board.claims(len(tasks)) for number in batches.numbers_of(claimed))
        return read_ahead(batches, numbers, workers=min(self.workers, len(batches)))

    def _is_checked(self, batch: RenderedBatch) -> bool:
        """Whether row KL is measured: in each task's first batch and, if tasks are few, in more, spaced evenly."""
        num_batches = -(-batch.task.num_samples // self.batch_size)
        num_checks = -(-_LEAST_CHECKED_BATCHES // (self.layout.num_views * self.layout.num_blocks))
        number = (batch.start - batch.task.start) // self.batch_size
        return number * num_checks % num_batches < num_checks

    def _encode(
        self, capture: FactorCapture, batch: RenderedBatch, compressors: ThreadPoolExecutor
    ) -> tuple[_Checked | None, list[_Chunks]]:
        """Run the teacher on a batch, and begin to compress its codes.

        Returns:
            The quality of a few views, if the batch is one to check, and the chunks of each stored view, in order.
        """
        stored = np.flatnonzero(batch.status_B == STORED)
        if not len(stored):
            return None, []
        pixels_BHWC = batch.pixels_BHWC if len(stored) == len(batch.status_B) else batch.pixels_BHWC[stored]
        layers = self.run.factors(capture, pixels_BHWC)
        codes_BLTC = self.coder.encode(layers)
        checked = None
        if self._is_checked(batch):
            few = slice(0, min(_CHECKED_VIEWS, len(stored)))
            checked = _Checked(few.stop, self._quality([layer.select(few) for layer in layers], codes_BLTC[few]))
        return checked, [
            _Chunks(
                compressors.submit(encode_view, self.layout, codes_LTC),
                None
                if self.layout.pixels is None
                else compressors.submit(encode_pixels, self.layout, pixels_HWC.numpy()),
            )
            for codes_LTC, pixels_HWC in zip(codes_BLTC.cpu().numpy(), pixels_BHWC, strict=True)
        ]

    def _quality(self, layers: Sequence[LayerAttention], codes_BLTC: Tensor) -> dict[str, float]:
        """See `_Checked.quality`."""
        quality = {"row_kl_nats": fmean(layer_row_kl(self.coder, layers, codes_BLTC))}
        v_errors = layer_v_error(self.coder, layers, codes_BLTC)
        return quality if v_errors is None else {**quality, "v_error": fmean(v_errors)}


def _mean_quality(checks: Sequence[_Checked]) -> dict[str, float]:
    """The mean of each number over the checked views; empty if there are none."""
    num_views = sum(check.num_views for check in checks)
    names = checks[0].quality if checks else ()
    return {name: fsum(check.quality[name] * check.num_views for check in checks) / num_views for name in names}
