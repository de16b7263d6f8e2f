"""Which files of a folder are the cache's, and whether a hub takes that many in one folder."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from atcache.errors import CacheMismatchError
from atcache.files.ranges import list_files
from atcache.store.audit import known_files
from atcache.store.layout import StoreLayout
from atcache.store.records import COMMITS, list_record_files

MAX_ENTRIES = 10_000
"""The most files and folders that the Hugging Face hub takes in one folder."""


def cache_files(path: Path, layout: StoreLayout) -> list[str]:
    """Paths in a complete cache of its files, sorted; what else is in the folder is no part of it.

    Files that are missing are not: that is for their commit records to tell.

    Raises:
        CacheMismatchError: a file is in a folder that is a symbolic link.
    """
    known = known_files(path, layout)
    known |= {spec.shard_file(task) for task in layout.tasks() for spec in layout.arrays()}
    known |= {f"{COMMITS}/{file.name}" for file in list_record_files(path)}
    files = [name for name in list_files(path) if name in known]
    # Reading follows links, listing does not: such files would be left out without a word.
    linked = [name for name in sorted(known.difference(files)) if (path / name).exists()]
    if linked:
        link = next((folder for folder in (path / linked[0]).parents if folder.is_symlink()), path / linked[0])
        raise CacheMismatchError(
            f"{link} is a symbolic link, and {len(linked)} files of the cache are behind such links, as {linked[0]} "
            "is. Copy each linked folder into the place of its link, then push."
        )
    return files


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
