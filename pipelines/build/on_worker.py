"""A build whose work is done by the workers of a dask cluster: what a worker does.

Each process loads the teacher once for a build, however many tasks it gets.
"""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch

from atcache.errors import CorruptCacheError, WorkerLostError
from atcache.files.location import Location
from atcache.store.layout import StoreLayout, Task
from atcache.store.manifest import check_commit, read_commit
from atcache.teachers.run import TeacherRun

from ..cluster.worker import log_event, own_processors
from .board import Counts
from .config import BuildConfig
from .joining import Job, join
from .prepare import Complete, Prepared, prepare
from .tasks import TaskRunner
from .wanted import load_teacher

Value = TypeVar("Value")

_SECONDS_BETWEEN_REPORTS = 1.0
_STOPPED = "the build that this task is for was stopped, so the task is, too."

_kept: dict[str, tuple[str, Any]] = {}
"""By kind: the build that it is for, and the thing."""
_ended: set[str] = set()
"""Builds whose client has ended. A task of theirs that waited here would load the teacher again, and keep it."""
_one_at_a_time = threading.Lock()
"""A worker with several threads may get several tasks, but there is one teacher, which needs all its processors."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ClusterJob:
    """What all tasks of a build need to know."""

    id: str
    """Of this run of the build; also the topic of its reports."""
    config: BuildConfig
    job: Job
    workers_on_machine: int
    """Workers on the machine that has most of them."""


def prepare_here(given: tuple[str, BuildConfig], _: None) -> Prepared | Complete:
    """What `prepare` finds here."""
    build_id, config = given
    with _turn(build_id):
        return prepare(config, partial(_load, build_id))[1]


def run_task(job: ClusterJob, number: int) -> Counts:
    """Do one task of a build.

    Args:
        job: the build.
        number: of the task.

    Returns:
        What was done.

    Raises:
        WorkerLostError: the client has stopped the build.
        AtcacheError: as `join` and `TaskRunner.run_tasks`.
    """
    with _turn(job.id):
        return _run_task(job, number)


@contextmanager
def _turn(build_id: str) -> Generator[None]:
    """The only work at once in this process, for a build that goes on. What it keeps is dropped if the build ends."""
    with _one_at_a_time:
        _check_goes_on(build_id)
        try:
            yield
        finally:
            if build_id in _ended:
                _drop(build_id)


def _run_task(job: ClusterJob, number: int) -> Counts:
    runner = _keep("runner", job.id, lambda: _join(job))
    task = runner.layout.tasks()[number]
    if (counts := _done_before(runner.out, runner.layout, task)) is not None:
        return counts
    board = _Board(job, number)
    runner.run_tasks([task], board)
    return board.total()


def forget(build_id: str) -> None:
    """End a build here: what it has begun stops at its next batch, and its teacher's memory is given back."""
    _ended.add(build_id)
    _drop(build_id)


def _drop(build_id: str) -> None:
    for kind, (owner, _) in list(_kept.items()):
        if owner == build_id:
            _kept.pop(kind, None)
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def _check_goes_on(build_id: str) -> None:
    if build_id in _ended:
        raise WorkerLostError(_STOPPED)


def _join(job: ClusterJob) -> TaskRunner:
    return join(job.config, job.job, own_processors(job.workers_on_machine), load=partial(_load, job.id))


def _load(build_id: str, config: BuildConfig) -> TeacherRun:
    return _keep("teacher", build_id, lambda: load_teacher(config))


def _keep(kind: str, build_id: str, make: Callable[[], Value]) -> Value:
    """What this process has made before for the build, or makes now. That of another build is dropped."""
    known = _kept.get(kind)
    if known is not None and known[0] == build_id:
        return known[1]
    _kept.pop(kind, None)
    value = make()
    _kept[kind] = build_id, value
    return value


def _done_before(path: Location, layout: StoreLayout, task: Task) -> Counts | None:
    """What another worker did, if it has done this task but was lost before the client knew."""
    try:
        # Where records are not joined, it can only be in one place, and the folder need not be listed for each task.
        commit = read_commit(path, task.name, layout if layout.records_per_file == 1 else None)
    except CorruptCacheError:
        return None
    if check_commit(path, commit, layout):
        return None
    num_checked = commit.num_checked or 0
    return Counts(
        num_views=task.num_samples,
        num_stored=commit.num_stored,
        nbytes=commit.nbytes,
        sum_nats=commit.quality.get("row_kl_nats", 0.0) * num_checked,
        num_checked=num_checked,
    )


class _Board:
    """Tells the client what this process has done of one task, and notices that the client has gone."""

    leads = False

    def __init__(self, job: ClusterJob, number: int) -> None:
        self._job, self._number = job, number
        self._counts = Counts()
        self._last_report_s = self._last_look_s = time.monotonic()

    def claims(self, num_tasks: int) -> Iterator[int]:
        """All: dask has given them to this worker."""
        yield from range(num_tasks)

    def report(self, counts: Counts) -> None:
        """Tell the client, but not more often than it looks."""
        self._counts = counts
        now_s = time.monotonic()
        if now_s - self._last_report_s > _SECONDS_BETWEEN_REPORTS:
            self._last_report_s = now_s
            log_event(self._job.id, {"number": self._number, "counts": asdict(counts)})

    def look(self) -> None:
        """Stop when the client has stopped. If it was killed, its mark in the folder tells; a bucket has none.

        Raises:
            WorkerLostError: the client has ended the build, or its mark has gone.
        """
        _check_goes_on(self._job.id)
        now_s = time.monotonic()
        if now_s - self._last_look_s > _SECONDS_BETWEEN_REPORTS:
            self._last_look_s = now_s
            out = self._job.config.out
            if isinstance(out, Path) and not (out / self._job.job.mark).exists():
                raise WorkerLostError(_STOPPED)

    def finish(self, each_look: Callable[[], None]) -> None:
        """Nobody is waited for."""

    def total(self) -> Counts:
        """What was done of the task."""
        return self._counts
