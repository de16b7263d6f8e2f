"""Checks that need neither tars nor teacher: of metadata, tables, codec, and every byte of each task."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from atcache.cache.cache import Cache
from atcache.errors import AtcacheError, CorruptCacheError
from atcache.files.location import Location, Url
from atcache.files.sizes import size_text
from atcache.store.audit import check_metadata, check_tables, find_strays
from atcache.store.committed import check_record
from atcache.store.growth import read_growth
from atcache.store.layout import StoreLayout, Task
from atcache.store.manifest import Commit, summarise_commits
from atcache.store.records import COMMITS, Record, read_records

from ..cluster.mapping import Mapper
from ..running.progress import Progress


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """One problem of a cache."""

    message: str
    """One sentence that names the file."""
    task: str | None = None
    """The task that a build must redo to repair it; None if no build would write the damaged part again."""
    is_of_tars: bool = False
    """Whether it is about the tars of the images, not about the cache."""


class Report:
    """Collects findings and reports each at once. Only one thread may use it."""

    def __init__(self, on_finding: Callable[[Finding], None]) -> None:
        self.findings: list[Finding] = []
        self._on_finding = on_finding
        self._seen: set[Finding] = set()

    def add(self, message: str, task: str | None = None, *, is_of_tars: bool = False) -> None:
        """Add one finding, unless it was added before; see `Finding` for the arguments."""
        finding = Finding(message=message, task=task, is_of_tars=is_of_tars)
        if finding not in self._seen:
            self._seen.add(finding)
            self.findings.append(finding)
            self._on_finding(finding)

    @property
    def damaged_tasks(self) -> list[str]:
        """Names of the tasks that a build must redo, in order."""
        return sorted({finding.task for finding in self.findings if finding.task is not None})


class CheckedMetadata(NamedTuple):
    """What the check of the parts that no task writes found."""

    is_whole: bool
    """Whether the zarr.json files can be trusted; if not, it is not certain what the tasks should hold."""
    is_decodable: bool
    """Whether there is a codec to decode with."""


def check_all_metadata(cache: Cache, report: Report) -> CheckedMetadata:
    """Check what is written once, when a cache is created: zarr.json files, sample table, codec state."""
    problems = check_metadata(cache.path)
    codec_problems = _check_codec(cache)
    for message in [*problems, *check_tables(cache.path, cache.attributes, cache.reader.layout), *codec_problems]:
        report.add(message)
    return CheckedMetadata(not problems, not codec_problems)


def _check_codec(cache: Cache) -> list[str]:
    """Why nothing can be decoded: the codec's stored state cannot be used, or does not fit the layout. Else empty."""
    layout = cache.reader.layout
    try:
        coder = cache.coder
        shape = (1, layout.num_layers, layout.num_tokens, layout.num_components)
        decoded = coder.decode(torch.from_numpy(np.zeros(shape, layout.codes_dtype)))
        for position in range(len(cache.geometry.layers)):
            decoded.layer(position)
    except AtcacheError as error:
        return [str(error)]
    except Exception as error:  # damaged state can make a codec raise anything
        reason = f"{type(error).__name__}: {error}"
        return [f"{cache.path}: its codec cannot be made from zarr.json and attention/state ({reason})."]
    return []


class CheckedTasks(NamedTuple):
    """What the check of all tasks found."""

    whole: list[Task]
    """Committed tasks without a problem."""
    num_committed: int
    nbytes: int
    """Size of the shards that were read."""
    is_complete: bool
    notes: list[str]
    """What is odd but harmless."""


def check_all_tasks(cache: Cache, mapper: Mapper, report: Report) -> CheckedTasks:
    """Read every byte of each committed task; compare totals and the list of files."""
    path, layout = cache.path, cache.reader.layout
    committed = cache.reader.committed_tasks()
    tasks = {task.name: task for task in layout.tasks()}
    is_finished = cache.record.complete is not None
    growth = read_growth(path) if isinstance(path, Path) else None
    to_come = set[str]() if growth is None else {task.name for task in growth[1].tasks()} - tasks.keys()
    notes = find_strays(path, layout, committed)
    if to_come:
        notes.append(
            f"{path} is growing: {len(to_come - committed)} of {len(to_come)} new tasks are not built yet. The new "
            "ones are not checked; type the `atcache build --grow` command again to continue."
        )
    committed -= to_come
    for name in sorted(committed - tasks.keys()):
        report.add(f"{path / COMMITS}/{name}.json is for a task that this cache does not have.", name)
    missing = sorted(tasks.keys() - committed)
    if is_finished:
        for name in missing:
            report.add(f"{path / COMMITS}/{name}.json is missing, though the cache was finished.", name)
    elif missing:
        notes.append(f"{path}: {len(missing)} of {len(tasks)} tasks are not built yet, the first is {missing[0]}.")
    is_listed = not isinstance(path, Url) or path.can_list
    records = (record for record in read_records(path, None if is_listed else layout) if record.task in tasks)
    whole: list[Task] = []
    commits: list[Commit] = []
    nbytes = 0
    with Progress("checksums", total=len(tasks.keys() & committed), unit="tasks") as progress:
        for name, commit, problems in mapper.map(_check_task, (path, layout), records):
            for message in problems:
                report.add(message, name)
            if not problems:
                whole.append(tasks[name])
            if commit is not None:
                commits.append(commit)
                nbytes += commit.nbytes
            progress.advance(1, note=size_text(nbytes))
    if is_finished and len(whole) == len(tasks):  # otherwise the totals differ for a reason that is reported already
        _check_totals(cache, sorted(commits, key=lambda commit: commit.task), report)
    return CheckedTasks(whole, len(committed), nbytes, is_finished and committed == tasks.keys(), notes)


def _check_task(given: tuple[Location, StoreLayout], record: Record) -> tuple[str, Commit | None, list[str]]:
    path, layout = given
    try:
        checked = check_record(path, record, layout, deep=True)
    except CorruptCacheError as error:
        return record.task, None, [str(error)]
    return record.task, checked.commit, checked.problems


def _check_totals(cache: Cache, commits: list[Commit], report: Report) -> None:
    recorded = {} if cache.record.complete is None else cache.record.complete.to_json()
    for name, value in summarise_commits(commits).items():
        if recorded.get(name) != value:
            report.add(
                f'{cache.path}/zarr.json: "complete" says {recorded.get(name)} for {name}, but its commit records add '
                f"up to {value}."
            )
