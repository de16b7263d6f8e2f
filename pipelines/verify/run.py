"""Verify: check that a cache is what its build wrote and, given its teacher, that its maps are close to the teacher's.

metadata -> tables and codec -> every byte of every committed task -> totals -> pixels of some views -> the teacher.
Nothing is written, except that `repair` deletes the commit records of damaged tasks.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from atcache.errors import ConfigError
from atcache.fields import JsonFields
from atcache.files.writers import only_writer
from atcache.store.manifest import delete_commits
from atcache.teachers.devices import resolve_device

from ..cluster.connect import mapper_of, open_for
from .config import VerifyConfig
from .files import Finding, Report, check_all_metadata, check_all_tasks
from .teacher import Fidelity, check_fidelity, open_teacher
from .views import check_views, spread_views


@dataclass(frozen=True, kw_only=True, slots=True)
class VerifySummary(JsonFields):
    """What was checked and found."""

    path: str
    is_complete: bool
    """Whether all tasks are committed and the build declared the cache finished; before any repair."""
    num_tasks: int
    num_committed: int
    """Tasks with a commit record; only these are checked."""
    nbytes: int
    """Size of the shards that were read."""
    num_views: int
    """Views whose pixels were compared with their hash."""
    problems: tuple[Finding, ...]
    notes: tuple[str, ...]
    """What is odd but harmless: files that do not belong to the cache, tasks not built yet."""
    repaired_tasks: tuple[str, ...]
    """Tasks whose commit record was deleted."""
    is_metadata_whole: bool
    """If False, nothing is repaired: it is not certain what the tasks should hold."""
    fidelity: Fidelity | None
    """The comparison with the teacher; None without a teacher, or if nothing can be decoded."""
    seconds: float


def verify(config: VerifyConfig, on_finding: Callable[[Finding], None] = lambda _: None) -> VerifySummary:
    """Find everything that is wrong with a cache.

    Args:
        config: what to check.
        on_finding: called with each problem as soon as it is found.

    Returns:
        All problems, and what was checked. After a repair, the problems are those found before it.

    Raises:
        CacheMissError, CorruptCacheError: there is no cache, or its zarr.json cannot be used.
        CacheMismatchError: the teacher is not the one that the cache was built with.
        SourceError: the tars are not where `data` says.
        ConfigError: another process is writing the cache that is to be repaired, or `data` is given for a
            cache that stores its images.
    """
    start_s = time.monotonic()
    sends = config.scheduler is not None or config.client is not None
    cache = open_for(config.cache, config.data, sends=sends)
    if config.data is not None and cache.reader.layout.pixels is not None:
        raise ConfigError(f"data={config.data}: {cache.path} stores its images and reads no tars. Leave --data out.")
    # First, so that a wrong teacher is refused before hours of reading.
    run = None
    if config.teacher is not None:
        run = open_teacher(cache, config.teacher, config.weights, resolve_device(config.device))
    report = Report(on_finding)
    repaired: list[str] = []
    # Locked from the first check to the deletion, so that no build changes in between what is deleted.
    locked = only_writer(cache.path) if config.repair and isinstance(cache.path, Path) else nullcontext()
    with locked, mapper_of(config.scheduler, config.client, config.workers) as mapper:
        if config.repair:
            # A growth may have ended before the lock was held: by the older layout all of its tasks would be strangers.
            cache = open_for(config.cache, config.data, sends=sends)
        metadata = check_all_metadata(cache, report)
        checked = check_all_tasks(cache, mapper, report)
        num_views = check_views(cache, checked.whole, config.num_compared_views, mapper, report)
        fidelity = None
        if run is not None and metadata.is_decodable:
            places = spread_views(checked.whole, config.teacher_sample)
            fidelity = check_fidelity(cache, run, places, config.threshold, report)
        if config.repair and metadata.is_whole:
            repaired = delete_commits(cache.path, report.damaged_tasks)
    return VerifySummary(
        path=str(cache.path),
        is_complete=checked.is_complete,
        num_tasks=cache.reader.layout.num_tasks,
        num_committed=checked.num_committed,
        nbytes=checked.nbytes,
        num_views=num_views,
        problems=tuple(report.findings),
        notes=tuple(checked.notes),
        repaired_tasks=tuple(repaired),
        is_metadata_whole=metadata.is_whole,
        fidelity=fidelity,
        seconds=time.monotonic() - start_s,
    )
