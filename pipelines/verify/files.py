"""The files of a cache, proved without tars and teacher: metadata, tables, codec, and every byte of each task."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import numpy as np
import torch

from atcache.cache.cache import Cache
from atcache.errors import AtcacheError, CorruptCacheError
from atcache.files.location import Location
from atcache.store.audit import check_metadata, check_tables, find_strays
from atcache.store.layout import StoreLayout, Task
from atcache.store.manifest import COMMITS, Commit, check_commit, read_commit, summarise_commits

from ..running.progress import Progress

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """One thing that is not as it should be."""

    message: str
    """One sentence that names the file."""
    task: str | None = None
    """The task whose redoing mends it; None where a build does not write again what is wrong."""


class Report:
    """Collects findings and tells each at once; for one thread."""

    def __init__(self, on_finding: Callable[[Finding], None]) -> None:
        self.findings: list[Finding] = []
        self._on_finding = on_finding
        self._seen: set[Finding] = set()

    def add(self, message: str, task: str | None = None) -> None:
        """Take one finding, see `Finding` for the arguments; the same one again is passed over."""
        finding = Finding(message=message, task=task)
        if finding not in self._seen:
            self._seen.add(finding)
            self.findings.append(finding)
            self._on_finding(finding)

    @property
    def damaged_tasks(self) -> list[str]:
        """Names of the tasks a build would have to redo, in order."""
        return sorted({finding.task for finding in self.findings if finding.task is not None})


def in_threads(work: Callable[[Item], Result], items: Iterable[Item], num_threads: int) -> Iterator[Result]:
    """The results in the items' order, some items ahead: memory does not grow with their number."""
    waiting: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(num_threads) as pool:
        try:
            for item in items:
                waiting.append(pool.submit(work, item))
                if len(waiting) > 2 * num_threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


class CheckedMetadata(NamedTuple):
    """What a look at all that no task writes found."""

    is_whole: bool
    """Whether the zarr.json files can be trusted; if not, what the tasks should be is not known for sure."""
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
    """Why nothing can be decoded, where the codec cannot be made of its stored state or does not fit the layout."""
    layout = cache.reader.layout
    try:
        coder = cache.coder
        zeros_BTC = np.zeros((1, layout.num_tokens, layout.num_components), layout.codes_dtype)
        for position in range(len(cache.geometry.layers)):
            coder.decode(position, torch.from_numpy(zeros_BTC))
    except AtcacheError as error:
        return [str(error)]
    except Exception as error:  # a codec stumbles over its damaged state in ways of its own
        reason = f"{type(error).__name__}: {error}"
        return [f"{cache.path}: its codec cannot be made of zarr.json and attention/state ({reason})."]
    return []


class CheckedTasks(NamedTuple):
    """What a look at all tasks found."""

    whole: list[Task]
    """Committed, and nothing is wrong with them."""
    num_committed: int
    nbytes: int
    """Of the shards that were read."""
    is_complete: bool
    notes: list[str]
    """What is odd but harms nothing."""


def check_all_tasks(cache: Cache, num_threads: int, report: Report) -> CheckedTasks:
    """Read every byte of each committed task; compare totals and the list of files."""
    path, layout = cache.path, cache.reader.layout
    committed = cache.reader.committed_tasks()
    tasks = {task.name: task for task in layout.tasks()}
    is_finished = cache.record.complete is not None
    notes = find_strays(path, layout, committed)
    for name in sorted(committed - tasks.keys()):
        report.add(f"{path / COMMITS}/{name}.json is for a task that this cache does not have.", name)
    missing = sorted(tasks.keys() - committed)
    if is_finished:
        for name in missing:
            report.add(f"{path / COMMITS}/{name}.json is missing, though the cache was finished.", name)
    elif missing:
        notes.append(f"{path}: {len(missing)} of {len(tasks)} tasks are not built yet, the first is {missing[0]}.")
    names = sorted(tasks.keys() & committed)
    whole: list[Task] = []
    commits: list[Commit] = []
    nbytes = 0
    with Progress("checksums", total=len(names), unit="tasks") as progress:
        checks = in_threads(lambda name: _check_task(path, name, layout), names, num_threads)
        for name, (commit, problems) in zip(names, checks, strict=True):
            for message in problems:
                report.add(message, name)
            if not problems:
                whole.append(tasks[name])
            if commit is not None:
                commits.append(commit)
                nbytes += commit.nbytes
            progress.advance(1, note=f"{nbytes / 2**20:.0f} MiB")
    if is_finished and len(whole) == len(tasks):  # else their sums are wrong for a reason that is known
        _check_totals(cache, sorted(commits, key=lambda commit: commit.task), report)
    return CheckedTasks(whole, len(committed), nbytes, is_finished and committed == tasks.keys(), notes)


def _check_task(path: Location, name: str, layout: StoreLayout) -> tuple[Commit | None, list[str]]:
    try:
        commit = read_commit(path, name)
    except CorruptCacheError as error:
        return None, [str(error)]
    return commit, check_commit(path, commit, layout, deep=True)


def _check_totals(cache: Cache, commits: list[Commit], report: Report) -> None:
    recorded = {} if cache.record.complete is None else cache.record.complete.to_json()
    for name, value in summarise_commits(commits).items():
        if recorded.get(name) != value:
            report.add(
                f'{cache.path}/zarr.json: "complete" says {recorded.get(name)} for {name}, its commit records add up '
                f"to {value}."
            )
