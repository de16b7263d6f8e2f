"""Commit records: what a finished task has written, recorded after its shards. Only these tasks are trusted."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, overload

import numpy as np

from atcache.errors import CorruptCacheError
from atcache.fields import JsonFields, Omitted, Range
from atcache.files.durable import encode_json, write_file
from atcache.files.location import Location, Url, parse_location
from atcache.files.remote.putting import patiently
from atcache.store.layout import ArraySpec, Status, StoreLayout, Task
from atcache.store.metadata import seal, seal_holds
from atcache.store.records import (
    COMMITS,
    Record,
    delete_records,
    find_joined_record,
    find_record,
    list_tasks,
    read_record,
    read_records,
)
from atcache.store.shard_check import ShardCheck, check_shard, name_samples

_REDO = "and run the same `atcache build` or `atcache pull` command again: only this task is redone."
_Count = Annotated[int, Range(at_least=0)]
# The totals of a cache take no larger ones, and sums of these do not overflow.
_Measured = Annotated[float, Range(at_least=-1e6, at_most=1e6)]


@dataclass(frozen=True, kw_only=True, slots=True)
class FileRecord(JsonFields):
    """The size and checksum that one shard file must have."""

    nbytes: _Count
    crc32: _Count
    """zlib's crc32 of the whole file. Not crc32c: bytes that end in their own crc32c all have the same one, so a
    shard's would depend only on the lengths of its parts."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Commit(JsonFields):
    """A finished task. Holds no time and no host, so that every build of the same thing writes the same bytes."""

    task: Task
    files: dict[str, FileRecord]
    """Shard files by their path inside the cache."""
    num_stored: _Count
    """Samples with codes."""
    num_bad: _Count
    """Samples without codes; their status says why."""
    quality: dict[str, _Measured]
    """Finite numbers the build measured on this task."""
    num_checked: Annotated[_Count | None, Omitted] = None
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
    """The path of a task's commit record, unless it has been joined with others."""
    return path / f"{COMMITS}/{task.name}.json"


def encode_commit(commit: Commit) -> bytes:
    """The bytes of a commit record."""
    return encode_json(seal(commit.to_json()))


def write_commit(path: Path | str, commit: Commit) -> None:
    """Record a task as finished, durably. Its shards must be durable already."""
    write_file(commit_path(Path(path), commit.task), encode_commit(commit))


def delete_commits(path: Location | str, names: Iterable[str]) -> list[str]:
    """Delete commit records, durably, so that the same build redoes their tasks. Nobody else may write meanwhile.

    Args:
        path: the cache.
        names: names of tasks; those without a record are skipped.

    Returns:
        The names whose record was deleted, in order. Records that cannot be read are lost with those of their file.
    """
    return delete_records(parse_location(path), names)


def list_commits(path: Location | str) -> set[str]:
    """Names of the committed tasks, from the folder's listing alone.

    Raises:
        RemoteError: the cache is on a web server, which cannot list files.
    """
    return list_tasks(parse_location(path))


def read_commit(path: Location | str, name: str, layout: StoreLayout | None = None) -> Commit:
    """One commit record. To read many, use `read_commits`: many may be in one file.

    Args:
        path: the cache.
        name: of the task.
        layout: as `read_commits` takes it.

    Raises:
        CorruptCacheError: it cannot be read, is the record of another task, or does not match its checksum.
    """
    return trusted_commit(read_record(parse_location(path), name, layout))


def find_commit(path: Url, name: str) -> bytes | None:
    """A task's record as its own file has it, or would have it if it had not been joined; None if there is none."""
    record = patiently(lambda: find_record(path, name))
    return None if record is None else encode_commit(trusted_commit(record))


def find_joined_commit(path: Path, layout: StoreLayout, task: Task) -> Commit | None:
    """The commit of a task whose record is joined with others already; None if it is not, or cannot be trusted."""
    record = find_joined_record(path, layout, task)
    if record is None:
        return None
    try:
        commit = trusted_commit(record)
    except CorruptCacheError:
        return None
    return None if check_commit(path, commit, layout) else commit


def read_commits(path: Location | str, layout: StoreLayout | None = None) -> dict[str, Commit]:
    """All commit records by task name, in task order.

    Args:
        path: the cache.
        layout: of a finished cache on a server that cannot list files; None to list them.

    Raises:
        CorruptCacheError: a record cannot be read, is that of another task, or does not match its checksum.
        AtcacheError: a file cannot be read now.
    """
    commits = sorted(map(trusted_commit, read_records(parse_location(path), layout)), key=lambda commit: commit.task)
    return {commit.task.name: commit for commit in commits}


def parse_commit(record: Record) -> Commit:
    """The commit that a record holds.

    Its checksum is not looked at: see `check_seal` and `trusted_commit`.

    Raises:
        CorruptCacheError: it cannot be read, or is the record of another task.
    """
    is_joined = record.file.name != f"{record.task}.json"
    name = f"{record.file}, task {record.task}" if is_joined else str(record.file)
    redo = how_to_redo(record.file.parent.parent, record.task, is_joined=True) if is_joined else f"Delete it {_REDO}"
    problem = record.problem
    if record.value is not None:
        try:
            commit = Commit.from_json(record.value)
        except (KeyError, TypeError, ValueError) as error:
            problem = f"{type(error).__name__}: {error}"
        else:
            if commit.task.name == record.task:
                return commit
            raise CorruptCacheError(f"{name} records task {commit.task.name}. {redo}")
    raise CorruptCacheError(f"{name} is not a commit record ({problem}). {redo}")


def trusted_commit(record: Record) -> Commit:
    """The commit that a record holds, for totals and copies: what is damaged would get a checksum there that holds.

    Raises:
        CorruptCacheError: it cannot be read, is the record of another task, or does not match its own checksum.
    """
    commit = parse_commit(record)
    if problems := check_seal(record):
        is_joined = record.file.name != f"{record.task}.json"
        redo = how_to_redo(record.file.parent.parent, record.task, is_joined=is_joined)
        raise CorruptCacheError(f"{problems[0]} {redo}")
    return commit


def how_to_redo(path: Location, task: str, *, is_joined: bool) -> str:
    """A sentence that says how to have a damaged task written again; a joined record cannot be deleted by hand."""
    delete = f"Type `atcache verify {path} --repair`" if is_joined else f"Delete {path}/{COMMITS}/{task}.json"
    return f"{delete} {_REDO}"


def check_commit(path: Location, commit: Commit, layout: StoreLayout, *, deep: bool = False) -> list[str]:
    """What is wrong with a committed task, one sentence each; empty if it can be trusted.

    Checks the size and the index of every shard. With `deep` it reads every byte and also checks the checksums of the
    files and the chunks, that each chunk decompresses to its size, and that status, chunks and counts agree. Memory is
    one chunk. The record's own checksum is checked by `check_seal`.

    Raises:
        AtcacheError: a shard cannot be read now, which says nothing about it.
    """
    task = commit.task
    if not layout.has_task(task):
        return [f"{_name_record(path, task, layout)} is for {task}, which is not a task of this cache."]
    specs = {spec.shard_file(task): spec for spec in layout.arrays()}
    if set(commit.files) != set(specs):
        return [f"{_name_record(path, task, layout)} lists {sorted(commit.files)}, expected {sorted(specs)}."]
    problems: list[str] = []
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


def _name_record(path: Location, task: Task, layout: StoreLayout) -> str:
    is_joined = layout.records_per_file > 1
    return f"the record of task {task.name} in {path / COMMITS}" if is_joined else str(commit_path(path, task))


def check_seal(record: Record) -> list[str]:
    """A sentence if a record that could be read does not match its own checksum."""
    if record.value is None or seal_holds(record.value):
        return []
    return [f"{record.file}: the record of task {record.task} is damaged: its checksum does not match."]


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
            f"{_name_record(path, task, layout)} counts {recorded[0]} views with codes and {recorded[1]} without, "
            f"{file} has {counted[0]} and {counted[1]}."
        )
    return problems


def _check_presence(
    path: Location, spec: ArraySpec, task: Task, check: ShardCheck, is_stored_S: np.ndarray
) -> str | None:
    """A sentence if a shard lacks views that the statuses say are stored, or has others; None if it is right."""
    if check.is_there_N is None:
        return None  # its damage is reported already
    if not spec.num_chunks_per_sample or spec.name.startswith("views/"):  # the latter also where a shard has one row
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
            if weight:
                values.setdefault(name, []).append((float(value), weight))
    return {
        name: {
            "mean": math.fsum(value * weight for value, weight in pairs) / sum(weight for _, weight in pairs),
            "max": max(value for value, _ in pairs),
        }
        for name, pairs in sorted(values.items())
    }
