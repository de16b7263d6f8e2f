"""Which files of a folder are the cache's, and whether a hub takes that many in one folder."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from atcache.errors import CacheMismatchError
from atcache.files.ranges import list_files
from atcache.store.audit import known_files
from atcache.store.layout import StoreLayout
from atcache.store.records import COMMITS, RecordFile

MAX_ENTRIES = 10_000
"""The most files and folders that the Hugging Face hub takes in one folder."""


def cache_files(path: Path, layout: StoreLayout) -> list[str]:
    """Paths in a complete cache of its files, sorted; what else is in the folder is no part of it."""
    known = known_files(path, layout)
    known |= {spec.shard_file(task) for task in layout.tasks() for spec in layout.arrays()}
    return [name for name in list_files(path) if name in known or _is_record(name)]


def _is_record(name: str) -> bool:
    folder, _, file = name.rpartition("/")
    return folder == COMMITS and RecordFile.parse(file) is not None


def check_folder_sizes(path: Path, files: Iterable[str]) -> None:
    """Refuse a cache that has more entries in a folder than a hub takes.

    Raises:
        CacheMismatchError: there is such a folder.
    """
    entries: dict[str, set[str]] = defaultdict(set)
    for name in files:
        parts = name.split("/")
        for depth, part in enumerate(parts):
            entries["/".join(parts[:depth])].add(part)
    folder, names = max(entries.items(), key=lambda item: len(item[1]))
    if len(names) > MAX_ENTRIES:
        raise CacheMismatchError(
            f"{path / folder} has {len(names)} entries, and hubs take at most {MAX_ENTRIES} in a folder. Publish parts "
            "of the cache, made with `atcache pull CACHE PART --tars`, or build it with a larger --samples-per-shard."
        )
