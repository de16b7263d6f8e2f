"""The long run of a build: tasks pass through overlapping stages.

render views (worker processes) -> copy to the device -> teacher forward and encoding -> copy to the host -> compression
(threads) -> shard writing (one thread) -> commit (another thread). Queues between the stages are short, so memory holds
a few batches, however large the dataset is.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass
from functools import partial
from math import fsum

import torch

from atcache.codecs.base import Coder
from atcache.errors import BadImageError
from atcache.feed.workers import read_ahead
from atcache.files.location import Location
from atcache.images.source import Source
from atcache.store.layout import StoreLayout, Task
from atcache.store.writer import TaskWriter
from atcache.teachers.devices import rounded_products
from atcache.teachers.run import TeacherRun
from atcache.views.policy import ViewPolicy
from atcache.views.rendering import STORED

from ..fidelity import Expectation
from .board import Counts, TaskBoard
from .encoder import BatchEncoder, Checked, EncodedBatch
from .given_views import ReplayedViews
from .rendered import RenderedBatch, RenderedBatches
from .telling import telling
from .transfers import Transfers

_BATCHES_IN_FLIGHT = 3  # encoded batches that wait for compression and the disk


class _ShardWriter:
    """Writes batches into their tasks' shards, in order; for one thread.

    A task is committed while the next one is written, so that the device waits neither for a disk to have all bytes nor
    for the network. At most one task is committed at a time, and tasks are committed in order.
    """

    def __init__(self, out: Location, layout: StoreLayout) -> None:
        self._out, self._layout = out, layout
        self._writer: TaskWriter | None = None
        self._checked: list[Checked] = []
        self._committer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="commit")
        self._committing: Future[int] | None = None

    def write(self, encoded: EncodedBatch) -> Counts:
        """Add a batch. The first batch of a task opens its shards, the last one has it committed.

        Returns:
            What this call has done, and the bytes of a task that was committed meanwhile.

        Raises:
            DiskFullError: no space is left, also for the task before.
            NotWritableError: the object store refuses the task before, or fails for minutes.
        """
        batch, chunks = encoded.batch, encoded.chunks
        # A commit that has failed is told of now, not at the end of a long task.
        done = self.finish() if self._committing is not None and self._committing.done() else Counts()
        if self._writer is None:
            self._writer = TaskWriter(self._out, self._layout, batch.task)
            self._checked = []
        checked = None if encoded.checked is None else encoded.checked.result()
        if checked is not None:
            self._checked.append(checked)
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
            commit = partial(self._writer.commit, _mean_quality(self._checked), num_checked)
            done += self.finish()
            self._committing = self._committer.submit(lambda: commit().nbytes)
            self._writer = None
        return done + Counts(
            num_views=len(batch.status_B),
            num_stored=len(chunks),
            sum_nats=0.0 if checked is None else checked.quality["row_kl_nats"] * checked.num_views,
            num_checked=0 if checked is None else checked.num_views,
        )

    def finish(self) -> Counts:
        """Wait until the task that is being committed, if any, is. Returns its bytes, which `write` left out."""
        committing, self._committing = self._committing, None
        return Counts() if committing is None else Counts(nbytes=committing.result())

    def abort(self) -> None:
        """Remove the temp files of a task that was not committed. One that is being committed is waited for."""
        self._committer.shutdown()
        if self._writer is not None:
            self._writer.abort()


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class TaskRunner:
    """Runs the tasks of a build."""

    out: Location
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
    replayed: ReplayedViews | None = None
    """The views of another cache; None if they are drawn."""

    def run_tasks(self, tasks: list[Task], board: TaskBoard) -> None:
        """Write the shards of all `tasks` that no other process takes, and commit each when it is finished.

        In the leading process this shows the progress of all processes, and returns when all have finished.

        Args:
            tasks: the same list in all processes.
            board: hands out the tasks, and knows at the end what was done.

        Raises:
            BadImageError: an image cannot be read, and `skip_bad` is False.
            DiskFullError: no space is left; tasks committed before stay.
        """
        transfers = Transfers(self.run.device)
        waiting: deque[Future[Counts]] = deque()
        shards = _ShardWriter(self.out, self.layout)
        done = Counts()
        with (
            self._telling(tasks, board) as tell,
            ThreadPoolExecutor(max_workers=self.threads, thread_name_prefix="compress") as compressors,
            ThreadPoolExecutor(max_workers=1, thread_name_prefix="check") as checker,
            ThreadPoolExecutor(max_workers=1, thread_name_prefix="write") as writer,
            transfers.on_device(),
            self._rounding(),
        ):
            encoder = BatchEncoder(
                layout=self.layout,
                run=self.run,
                coder=self.coder,
                capture=self.run.capture(self.coder.geometry, self.coder.input_calls),
                transfers=transfers,
                batch_size=self.batch_size,
                name_of=self.source.where,
                compressors=compressors,
                checker=checker,
            )

            def finish_oldest(done: Counts) -> Counts:
                done += waiting.popleft().result()
                board.report(done)
                tell()
                return done

            try:
                with closing(self._batches(tasks, board)) as rendered, closing(encoder.encoded(rendered)) as batches:
                    for encoded in batches:
                        board.look()
                        waiting.append(writer.submit(shards.write, encoded))
                        if len(waiting) > _BATCHES_IN_FLIGHT:
                            done = finish_oldest(done)
                while waiting:
                    done = finish_oldest(done)
                waiting.append(writer.submit(shards.finish))
                done = finish_oldest(done)
                board.finish(tell)
                tell()
            except BaseException as error:
                # The batches before a bad image are good, so they are still stored.
                gives_up = not isinstance(error, BadImageError)
                for pool in (compressors, checker):
                    pool.shutdown(wait=not gives_up, cancel_futures=gives_up)
                writer.shutdown(wait=True, cancel_futures=gives_up)
                raise
            finally:
                shards.abort()

    def _rounding(self) -> AbstractContextManager[None]:
        """Rounded products if neither the teacher nor the codec is more exact than they are: in float32, a GPU needs
        nearly as long to encode as for the teacher's forward pass.
        """
        is_coarse = self.run.dtype == torch.bfloat16 and self.coder.products_may_round
        return rounded_products(self.run.device) if is_coarse else nullcontext()

    def _telling(self, tasks: list[Task], board: TaskBoard) -> AbstractContextManager[Callable[[], None]]:
        """A function to call now and then: in the leader it shows what all processes have done, elsewhere nothing."""
        if not board.leads:
            return nullcontext(lambda: None)
        return telling(self.out, self.layout, self.expectation, tasks, board.total)

    def _batches(self, tasks: list[Task], board: TaskBoard) -> Generator[RenderedBatch]:
        batches = RenderedBatches(
            self.source, self.policy, tasks, self.batch_size, skip_bad=self.skip_bad, replayed=self.replayed
        )
        # A task is claimed only when its first batch is needed, so that no process holds tasks that others could do.
        numbers = (number for claimed in board.claims(len(tasks)) for number in batches.numbers_of(claimed))
        pins = self.run.device.type == "cuda"
        return read_ahead(batches, numbers, workers=min(self.workers, len(batches)), pin_memory=pins)


def _mean_quality(checks: Sequence[Checked]) -> dict[str, float]:
    """The mean of each number over the checked views; empty if there are none."""
    num_views = sum(check.num_views for check in checks)
    names = checks[0].quality if checks else ()
    return {name: fsum(check.quality[name] * check.num_views for check in checks) / num_views for name in names}
