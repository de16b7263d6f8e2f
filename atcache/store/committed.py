"""Commit records with what is wrong with their tasks; those of a server, many at a time."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from atcache.files.location import Location
from atcache.store.layout import StoreLayout
from atcache.store.manifest import Commit, check_commit, check_seal, parse_commit
from atcache.store.records import Record, read_records

_NUM_THREADS = 24
"""Requests at a time, as many as the process that talks to servers answers."""


class CheckedCommit(NamedTuple):
    """A commit record, and what is wrong with its task."""

    commit: Commit
    problems: list[str]


def check_record(path: Location, record: Record, layout: StoreLayout, *, deep: bool = False) -> CheckedCommit:
    """The commit that a record holds, checked by its checksum, and size and index of its shards.

    Args:
        path: the cache.
        record: one of its records.
        layout: its layout, or the one that it grows to. The record of a task that it lacks is a problem.
        deep: read every byte of the shards, see `check_commit`.

    Raises:
        CorruptCacheError: the record cannot be read.
        AtcacheError: a shard cannot be read now.
    """
    commit = parse_commit(record)
    return CheckedCommit(commit, [*check_seal(record), *check_commit(path, commit, layout, deep=deep)])


def check_commits(path: Location, layout: StoreLayout) -> dict[str, CheckedCommit]:
    """All commit records by task name, in task order, each as `check_record` checks it.

    Args:
        path: the cache.
        layout: as for `check_record`.

    Raises:
        CorruptCacheError: a record cannot be read.
        AtcacheError: a file cannot be read now.
        RemoteError: the server does not answer, or cannot list files.
    """

    def check(record: Record) -> CheckedCommit:
        return check_record(path, record, layout)

    records = list(read_records(path))
    if isinstance(path, Path):
        checked = list(map(check, records))
    else:
        with ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="check") as threads:
            checked = list(threads.map(check, records))
    checked.sort(key=lambda one: one.commit.task)
    return {one.commit.task.name: one for one in checked}
