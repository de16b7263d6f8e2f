"""Commit records: one small JSON file per finished task, written after its shards. Only these tasks are trusted."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, cast, overload

import numpy as np

from atcache.errors import CorruptCacheError
from atcache.fields import JsonFields, Omitted
from atcache.files.durable import encode_json, fsync_path, write_file
from atcache.files.location import Location, parse_location
from atcache.files.ranges import list_files, read_file
from atcache.store.layout import ArraySpec, Status, StoreLayout, Task
from atcache.store.metadata import seal, seal_holds
from atcache.store.shard_check import ShardCheck, check_shard, name_samples

COMMITS = "commits"
COMMIT_NAME = re.compile(r"v(\d{4,})-b(\d{6,})\.json")
"""File names of commit records."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FileRecord(JsonFields):
    """The size and checksum that one shard file must have."""

    nbytes: int
    crc32: int
    """zlib's crc32 of the whole file. Not crc32c: bytes that end in their own crc32c all have the same one, so a
    shard's would depend only on the lengths of its parts."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Commit(JsonFields):
    """A finished task. Holds no time and no host, so that every build of the same thing writes the same bytes."""

    task: Task
    files: dict[str, FileRecord]
    """Shard files by their path inside the cache."""
    num_stored: int
    """Samples with codes."""
    num_bad: int
    """Samples without codes; their status says why."""
    quality: dict[str, Any]
    """Numbers the build measured on this task."""
    num_checked: Annotated[int | None, Omitted] = None
    """How many views they were measured on; None in records that do not say."""

    @property
    def nbytes(self) -> int:
        """Bytes of the task's shards together."""
        return sum(record.nbytes for record in self.files.values())

    @property
    def codes_nbytes(self) -> int:
        """Bytes of the shard of codes."""
        return sum(record.nbytes for name, record in self.files.items() if name.startswith("attention/codes/"))


@overload
def commit_path(path: Path, task: Task) -> Path: ...


@overload
def commit_path(path: Location, task: Task) -> Location: ...


def commit_path(path: Location, task: Task) -> Location:
    """The path of a task's commit record."""
    return path / f"{COMMITS}/{task.name}.json"


def write_commit(path: Path | str, commit: Commit) -> None:
    """Record a task as finished, durably. Its shards must be durable already."""
    write_file(commit_path(Path(path), commit.task), encode_json(seal(commit.to_json())))


def delete_commits(path: Path | str, names: Iterable[str]) -> list[str]:
    """Delete commit records, durably, so that the same build redoes their tasks. Nobody else may write meanwhile.

    Args:
        path: the cache.
        names: names of tasks; those without a record are skipped.

    Returns:
        The names whose record was deleted, in order.
    """
    folder = Path(path) / COMMITS
    deleted: list[str] = []
    for name in sorted(set(names)):
        file = folder / f"{name}.json"
        if COMMIT_NAME.fullmatch(file.name) and file.exists():
            file.unlink()
            deleted.append(name)
    if deleted:
        fsync_path(folder)
    return deleted


def list_commits(path: Location | str) -> set[str]:
    """Names of the committed tasks, from the folder's listing alone.

    Raises:
        RemoteError: the cache is on a web server, which cannot list files.
    """
    names = list_files(parse_location(path) / COMMITS)
    return {name.removesuffix(".json") for name in names if COMMIT_NAME.fullmatch(name)}


def read_commit(path: Location | str, name: str) -> Commit:
    """One commit record.

    Raises:
        CorruptCacheError: it cannot be read, or is the record of another task.
    """
    file = parse_location(path) / f"{COMMITS}/{name}.json"
    try:
        commit = Commit.from_json(json.loads(read_file(file)))
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise CorruptCacheError(
            f"{file} is not a commit record ({type(error).__name__}: {error}). Delete it and run the same "
            "`atcache build` command again: only this task is redone."
        ) from error
    if commit.task.name != name:
        raise CorruptCacheError(
            f"{file} records task {commit.task.name}. Delete it and run the same `atcache build` command again."
        )
    return commit


def read_commits(path: Location | str) -> dict[str, Commit]:
    """All commit records by task name, in task order."""
    commits = sorted((read_commit(path, name) for name in list_commits(path)), key=lambda commit: commit.task)
    return {commit.task.name: commit for commit in commits}


def check_commit(path: Location, commit: Commit, layout: StoreLayout, *, deep: bool = False) -> list[str]:
    """What is wrong with a committed task, one sentence each; empty if it can be trusted.

    Checks the size and the index of every shard. With `deep` it reads every byte and also checks the checksums of the
    record, the files and the chunks, that each chunk decompresses to its size, and that status, chunks and counts
    agree. Memory is one chunk.
    """
    task = commit.task
    if not layout.has_task(task):
        return [f"{commit_path(path, task)} is for {task}, which is not a task of this cache."]
    specs = {spec.shard_file(task): spec for spec in layout.arrays()}
    if set(commit.files) != set(specs):
        return [f"{commit_path(path, task)} lists {sorted(commit.files)}, expected {sorted(specs)}."]
    problems: list[str] = []
    if deep and not _record_seal_holds(path, task):
        problems.append(f"{commit_path(path, task)} is damaged: its checksum does not match.")
    checks: dict[str, ShardCheck] = {}
    for name, spec in sorted(specs.items()):
        record = commit.files[name]
        check = check_shard(path / name, spec, record.nbytes, record.crc32, first_sample=task.start, deep=deep)
        checks[spec.name] = check
        problems += [] if check.problem is None else [check.problem]
    status = checks[layout.status.name]
    if deep and status.problem is None:
        is_stored_S = status.content == Status.STORED
        problems += _check_counts(path, commit, layout, status.content)
        problems += [
            problem
            for spec in layout.arrays()
            if (problem := _check_presence(path, spec, task, checks[spec.name], is_stored_S)) is not None
        ]
    return problems


def _record_seal_holds(path: Location, task: Task) -> bool:
    try:
        record: Any = json.loads(read_file(commit_path(path, task)))
    except (OSError, ValueError):  # it was valid when `commit` was read from it, and has changed since
        return False
    return isinstance(record, dict) and seal_holds(cast("dict[str, Any]", record))


def _check_counts(path: Location, commit: Commit, layout: StoreLayout, status_S: np.ndarray) -> list[str]:
    """A sentence if there are statuses that a finished task cannot have, and one if the record counts other numbers."""
    task, file = commit.task, path / layout.status.shard_file(commit.task)
    rows_S, padding_S = status_S[: task.num_samples], status_S[task.num_samples :]
    problems: list[str] = []
    possible = [status for status in Status if status not in (Status.PENDING, Status.NO_SAMPLE)]
    if not np.isin(rows_S, possible).all() or padding_S.any():
        problems.append(f"{file} holds statuses that a finished task does not have.")
    num_stored = int((rows_S == Status.STORED).sum())
    counted, recorded = (num_stored, task.num_samples - num_stored), (commit.num_stored, commit.num_bad)
    if counted != recorded:
        problems.append(
            f"{commit_path(path, task)} counts {recorded[0]} views with codes and {recorded[1]} without, {file} has "
            f"{counted[0]} and {counted[1]}."
        )
    return problems


def _check_presence(
    path: Location, spec: ArraySpec, task: Task, check: ShardCheck, is_stored_S: np.ndarray
) -> str | None:
    """A sentence if a shard lacks views that the statuses say are stored, or has others; None if it is right."""
    if check.is_there_N is None:
        return None  # its damage is reported already
    if not spec.num_chunks_per_sample:
        return None if check.is_there_N.all() else f"{path / spec.shard_file(task)} lacks its only chunk."
    is_there_SN = check.is_there_N.reshape(-1, spec.num_chunks_per_sample)
    lacking, extra = is_stored_S & ~is_there_SN.all(axis=1), ~is_stored_S & is_there_SN.any(axis=1)
    wrong_S = np.flatnonzero(lacking | extra)
    if not len(wrong_S):
        return None
    samples = name_samples((wrong_S + task.start).tolist())
    return f"{path / spec.shard_file(task)} does not hold exactly the views whose status is STORED: see {samples}."


def summarise_commits(commits: Iterable[Commit]) -> dict[str, Any]:
    """The totals of a complete cache, as `attributes["atcache"]["complete"]` has them.

    Args:
        commits: all of them, in task order: sums of floats depend on it.
    """
    commits = list(commits)
    num_checked = [commit.num_checked for commit in commits if commit.num_checked is not None]
    return {
        "num_tasks": len(commits),
        "num_stored": sum(commit.num_stored for commit in commits),
        "num_bad": sum(commit.num_bad for commit in commits),
        "nbytes": sum(commit.nbytes for commit in commits),
        "codes_nbytes": sum(commit.codes_nbytes for commit in commits),
        "quality": summarise_quality(commits),
        **({"num_checked": sum(num_checked)} if len(num_checked) == len(commits) else {}),
    }


def summarise_quality(commits: Iterable[Commit]) -> dict[str, dict[str, float]]:
    """Mean and maximum of each number in the commits' `quality`.

    The mean is weighted by the number of views measured, or of views stored if any record does not say how many were.
    """
    commits = list(commits)
    all_say = all(commit.num_checked is not None for commit in commits)
    values: dict[str, list[tuple[float, int]]] = {}
    for commit in commits:
        weight = (commit.num_checked if all_say else None) or commit.num_stored
        for name, value in commit.quality.items():
            if isinstance(value, int | float) and not isinstance(value, bool) and weight:
                values.setdefault(name, []).append((float(value), weight))
    return {
        name: {
            "mean": math.fsum(value * weight for value, weight in pairs) / sum(weight for _, weight in pairs),
            "max": max(value for value, _ in pairs),
        }
        for name, pairs in sorted(values.items())
    }
