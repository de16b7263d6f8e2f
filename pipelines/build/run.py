"""Build: run the teacher once over a dataset and keep its attention.

index -> calibrate -> plan -> create the cache -> run the tasks -> declare it complete. Typing the same command again
continues where an earlier run stopped; other options for the same cache are refused, unless it is to grow.

One process leads and does all of this, but for what its crew does: the processes that torchrun has started, of which
it is one, or the workers of a dask cluster. They join it for the tasks, as if each continued the cache that the leader
has created.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from atcache.cache.record import CacheRecord
from atcache.errors import AtcacheError
from atcache.files.location import Location
from atcache.files.writers import only_writer
from atcache.machine import num_processors
from atcache.store.reader import CacheReader
from atcache.store.writer import finish_cache

from ..fidelity import Expectation
from ..running.ranks import Ranks
from .board import Board, Counts
from .config import BuildConfig
from .joining import Job, join
from .plan import BuildPlan
from .prepare import Complete, Prepared, numbered_tasks, prepare
from .shared_folder import marked, wait_for_commits
from .summary import BuildSummary
from .wanted import Wanted


class Crew(Protocol):
    """Who does the work of a build."""

    @property
    def num_spools(self) -> int:
        """How many processes of this machine do tasks."""
        ...

    def prepare(self, config: BuildConfig) -> Prepared | Complete:
        """Find out all that the build needs to know."""
        ...

    def run_tasks(self, prepared: Prepared, cache: CacheReader, mark: str) -> Counts:
        """Do all tasks, and say what was done. `mark` is for `check_mark`."""
        ...


def build(config: BuildConfig, on_plan: Callable[[BuildPlan], None] = lambda _: None) -> BuildSummary:
    """Build a cache, or continue one; under torchrun, together with the other processes, or on a dask cluster.

    Args:
        config: what to build.
        on_plan: called with the plan before anything is written, in the process that leads.

    Returns:
        What was planned and done. A dry run writes nothing, and only notes that the disk is too small.

    Raises:
        AtcacheError: a child of it names what does not fit. What was committed before stays.
    """
    ranks = Ranks.from_environment()
    if config.scheduler is not None or config.client is not None:
        from .on_cluster import ClusterCrew

        ranks.refuse_several("a build on a dask cluster")
        with ClusterCrew.of(config) as crew:
            return _lead(config, crew, on_plan)
    with Board.opened(ranks) as board:
        config = replace(config, device=ranks.device_name(config.device))
        own_processors = max(1, num_processors() // ranks.local_world_size)
        if ranks.leads:
            summary = _lead(config, _Processes(board, own_processors, ranks.local_world_size), on_plan)
            board.publish("end", summary.to_json())
            return summary
        if board.wait_for("job", "end") == "job":
            job = Job.from_json(board.receive("job"))
            runner = join(config, job, own_processors, each_look=board.look)
            runner.run_tasks(numbered_tasks(runner.layout, job.to_do), board)
        return BuildSummary.from_json(board.receive("end"))


def _lead(config: BuildConfig, crew: Crew, on_plan: Callable[[BuildPlan], None]) -> BuildSummary:
    start_s = time.monotonic()
    prepared, out = crew.prepare(config), str(config.out)
    if isinstance(prepared, Complete):
        record = CacheRecord.of(prepared.cache)
        complete = None if record.complete is None else record.complete.to_json()
        summary = BuildSummary(out=out, complete=complete, seconds=time.monotonic() - start_s)
        return summary.judged(Expectation.of_cache(prepared.cache.path, record))
    on_plan(prepared.plan)
    if config.dry_run:
        try:
            prepared.check_disk(crew.num_spools)
        except AtcacheError as error:
            logging.getLogger(__name__).warning("NOTE: this build would be refused. %s", error)
        return BuildSummary(out=out, plan=prepared.plan, seconds=time.monotonic() - start_s)
    prepared.check_disk(crew.num_spools)
    prepared.create()
    with _only_build(config.out):
        cache = prepared.begin()
        with marked(config.out) as mark:
            done = crew.run_tasks(prepared, cache, mark)
        wait_for_commits(config.out, prepared.layout)
        complete = finish_cache(config.out, grows=prepared.growth is not None)
    return BuildSummary(
        out=out,
        plan=prepared.plan,
        complete=complete,
        num_built_views=done.num_stored,
        seconds=time.monotonic() - start_s,
    ).judged(Expectation.of_cache(cache.path, CacheRecord.of(cache)))


def _only_build(out: Location) -> AbstractContextManager[None]:
    """Keep other builds out of a folder. An object store has no locks, and needs none: see `store.bucket`."""
    return only_writer(out) if isinstance(out, Path) else nullcontext()


class _Processes:
    """This process, and those that torchrun has started beside it."""

    def __init__(self, board: Board, own_processors: int, num_spools: int) -> None:
        self._board, self._own_processors, self._num_spools = board, own_processors, num_spools
        self._wanted: Wanted | None = None

    @property
    def num_spools(self) -> int:
        """See `Crew`."""
        return self._num_spools

    def prepare(self, config: BuildConfig) -> Prepared | Complete:
        self._wanted, prepared = prepare(config)
        return prepared

    def run_tasks(self, prepared: Prepared, cache: CacheReader, mark: str) -> Counts:
        assert self._wanted is not None, "prepared before"
        job = Job(mark=mark, attributes=cache.attributes, to_do=prepared.to_do)
        self._board.publish("job", job.to_json())
        runner = self._wanted.runner(prepared.config, self._own_processors, cache, prepared.index)
        runner.run_tasks(numbered_tasks(prepared.layout, prepared.to_do), self._board)
        return self._board.total()
