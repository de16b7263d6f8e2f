"""Commit records: one small JSON a finished task, written after its shards. They say what can be trusted."""

from __future__ import annotations

import json
import math
import re
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from atcache.errors import CorruptCacheError
from atcache.store.chunks import DamagedChunkError, decode_index
from atcache.store.durable import encode_json, write_file
from atcache.store.layout import ArraySpec, StoreLayout, Task

COMMITS = "commits"
_COMMIT_NAME = re.compile(r"v(\d{4,})-b(\d{6,})\.json")


@dataclass(frozen=True, kw_only=True, slots=True)
class FileRecord:
    """What one shard file must be."""

    nbytes: int
    crc32: int
    """zlib's, of the whole file. Not crc32c: what ends in its own crc32c has a constant one, so that a shard's crc32c
    would depend on the lengths of its parts alone."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Commit:
    """A finished task. Holds no time and no host, so that every build of the same thing writes the same bytes."""

    task: Task
    files: dict[str, FileRecord]
    """Shard files by their path inside the cache."""
    num_stored: int
    """Samples with codes."""
    num_bad: int
    """Samples without, whose status says why."""
    quality: dict[str, Any]
    """Numbers the build measured on this task."""

    @property
    def nbytes(self) -> int:
        """Bytes of the task's shards together."""
        return sum(record.nbytes for record in self.files.values())

    @property
    def codes_nbytes(self) -> int:
        """Bytes of the shard of codes."""
        return sum(record.nbytes for name, record in self.files.items() if name.startswith("attention/codes/"))

    def to_json(self) -> dict[str, Any]:
        """The fields as a JSON object."""
        task = self.task
        return {
            "task": {"view": task.view, "block": task.block, "start": task.start, "stop": task.stop},
            "files": {name: {"nbytes": record.nbytes, "crc32": record.crc32} for name, record in self.files.items()},
            "num_stored": self.num_stored,
            "num_bad": self.num_bad,
            "quality": self.quality,
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Commit:
        """The commit `to_json` came from; KeyError, TypeError or ValueError when it is none."""
        files = {
            str(name): FileRecord(nbytes=int(record["nbytes"]), crc32=int(record["crc32"]))
            for name, record in dict(values["files"]).items()
        }
        return cls(
            task=Task(**{name: int(value) for name, value in dict(values["task"]).items()}),
            files=files,
            num_stored=int(values["num_stored"]),
            num_bad=int(values["num_bad"]),
            quality=dict(values["quality"]),
        )


def commit_path(path: Path | str, task: Task) -> Path:
    """Where a task's commit record lies."""
    return Path(path) / COMMITS / f"{task.name}.json"


def write_commit(path: Path | str, commit: Commit) -> None:
    """Record a task as finished, durably. Its shards must be durable already."""
    write_file(commit_path(path, commit.task), encode_json(commit.to_json()))


def list_commits(path: Path | str) -> set[str]:
    """Names of the committed tasks, from the folder's listing alone."""
    folder = Path(path) / COMMITS
    if not folder.is_dir():
        return set()
    return {entry.name.removesuffix(".json") for entry in folder.iterdir() if _COMMIT_NAME.fullmatch(entry.name)}


def read_commit(path: Path | str, name: str) -> Commit:
    """One commit record.

    Raises:
        CorruptCacheError: it cannot be read, or is another task's.
    """
    file = Path(path) / COMMITS / f"{name}.json"
    try:
        commit = Commit.from_json(json.loads(file.read_bytes()))
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise CorruptCacheError(
            f"{file} is no commit record ({type(error).__name__}: {error}). Delete it and run the same "
            "`atcache build` command again: only this task is redone."
        ) from error
    if commit.task.name != name:
        raise CorruptCacheError(
            f"{file} records task {commit.task.name}. Delete it and run the same `atcache build` command again."
        )
    return commit


def read_commits(path: Path | str) -> dict[str, Commit]:
    """All commit records by task name, in task order."""
    commits = sorted((read_commit(path, name) for name in list_commits(path)), key=lambda commit: commit.task)
    return {commit.task.name: commit for commit in commits}


def check_commit(path: Path | str, commit: Commit, layout: StoreLayout, *, deep: bool = False) -> list[str]:
    """What is wrong with a committed task, one sentence each; empty when it can be trusted.

    Looks at the size and the index of every shard; with `deep` also at every byte (the whole file's checksum).
    """
    task = commit.task
    if task.block >= layout.num_blocks or task.view >= layout.num_views or task != layout.task(task.view, task.block):
        return [f"{commit_path(path, task)} is for {task}, which is no task of this cache."]
    specs = {spec.shard_file(task): spec for spec in layout.arrays()}
    if set(commit.files) != set(specs):
        return [f"{commit_path(path, task)} lists {sorted(commit.files)}, expected {sorted(specs)}."]
    problems = [
        _check_shard(Path(path) / name, spec, commit.files[name], deep=deep) for name, spec in sorted(specs.items())
    ]
    return [problem for problem in problems if problem is not None]


def _check_shard(file: Path, spec: ArraySpec, record: FileRecord, *, deep: bool) -> str | None:
    try:
        nbytes = file.stat().st_size
        if nbytes != record.nbytes:
            return f"{file} has {nbytes} bytes, {record.nbytes} were committed."
        with file.open("rb") as shard:
            shard.seek(max(0, nbytes - spec.index_nbytes))
            decode_index(shard.read(), spec, nbytes)
            if deep and _file_crc32(file) != record.crc32:
                return f"{file} is damaged: its checksum is not the committed one."
    except DamagedChunkError as error:
        return f"{file} is damaged: {error}."
    except OSError as error:
        return f"{file} cannot be read: {error.strerror}."
    return None


def _file_crc32(file: Path) -> int:
    checksum = 0
    with file.open("rb") as stream:
        while block := stream.read(2**22):
            checksum = zlib.crc32(block, checksum)
    return checksum


def summarise_quality(commits: Iterable[Commit]) -> dict[str, dict[str, float]]:
    """Mean (weighted by stored samples) and maximum of each number in the commits' `quality`."""
    values: dict[str, list[tuple[float, int]]] = {}
    for commit in commits:
        for name, value in commit.quality.items():
            if isinstance(value, int | float) and not isinstance(value, bool) and commit.num_stored:
                values.setdefault(name, []).append((float(value), commit.num_stored))
    return {
        name: {
            "mean": math.fsum(value * weight for value, weight in pairs) / sum(weight for _, weight in pairs),
            "max": max(value for value, _ in pairs),
        }
        for name, pairs in sorted(values.items())
    }
