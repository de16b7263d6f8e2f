"""A cache that grows: more views, or more samples, beside what is there.

What it is to become is in one file, and new shards lie beyond the arrays as they are. So readers see the old cache
until `finish_cache` replaces the root's zarr.json, and then the new one. What an open reader uses is never changed or
removed.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Set
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from atcache.errors import CorruptCacheError
from atcache.files.durable import disk_errors_explained, encode_json, fsync_path, fsync_tree, write_file
from atcache.files.ranges import read_file, unreadable
from atcache.store.layout import StoreLayout
from atcache.store.manifest import delete_commits, list_commits
from atcache.store.metadata import ATTRIBUTES, SEAL, load_root, parse_json, seal, seal_holds, split_root
from atcache.store.records import COMMITS
from atcache.store.tables import write_samples

if TYPE_CHECKING:
    from atcache.images.source import SampleIndex

GROWTH = f"{COMMITS}/growth.json"
"""Holds the attributes that the root will have, without totals. It is in the group of the commit records, which has no
arrays, so that Zarr libraries do not wonder about it.
"""


def read_growth(path: Path) -> tuple[dict[str, Any], StoreLayout] | None:
    """The attributes and layout that a cache is growing to; None if it is not growing.

    Raises:
        CorruptCacheError: the file that says so is damaged.
        AtcacheError: it cannot be read. It may be whole, and to delete it would lose what was built.
    """
    file = path / GROWTH
    try:
        growth: Any = parse_json(read_file(file))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise unreadable(file, error) from error
    except ValueError as error:
        raise _damaged(file, str(error)) from error
    growth = cast("dict[str, Any]", growth) if isinstance(growth, dict) else {}
    if SEAL not in growth or not seal_holds(growth):
        raise _damaged(file, "its checksum does not match")
    ours, _ = split_root(path, load_root(path))
    # A kill just after the root was replaced leaves the file behind.
    return None if _are_same(growth, ours) else split_root(path, {"attributes": {ATTRIBUTES: growth}})


def describe_growth(path: Path, committed: Set[str]) -> dict[str, int] | None:
    """What a cache is growing to, and how many of its tasks are among those committed; None if it is not growing."""
    growth = read_growth(path)
    if growth is None:
        return None
    layout = growth[1]
    return {
        "num_samples": layout.num_real_samples,
        "num_views": layout.num_views,
        "num_tasks": layout.num_tasks,
        "num_tasks_done": sum(task.name in committed for task in layout.tasks()),
    }


def _are_same(growth: Mapping[str, Any], ours: Mapping[str, Any]) -> bool:
    return seal({**growth, "complete": None}) == seal({**ours, "complete": None})


def _damaged(file: Path, reason: str) -> CorruptCacheError:
    return CorruptCacheError(
        f"{file} is damaged: {reason}. Delete it to give up the growth that was begun; the cache is as it was before."
    )


def begin_growth(path: Path, attributes: Mapping[str, Any], index: SampleIndex) -> None:
    """Write what a cache is to become; the cache itself stays as it is. The caller is its only writer.

    Tasks of the new layout may be written next, and `finish_cache` ends the growth. Deleting the file gives it up.

    Args:
        path: the cache.
        attributes: what `attributes["atcache"]` will be, with the new layout.
        index: all samples, `num_samples` of that layout.

    Raises:
        DiskFullError: no space is left.
    """
    _, old_layout = split_root(path, load_root(path))
    _, layout = split_root(path, {"attributes": {ATTRIBUTES: attributes}})
    assert len(index.keys_S) == layout.num_samples, "the layout is made from the index"
    # Records of a growth that was given up: their rows may have been other samples.
    known = {task.name for task in old_layout.tasks()}
    delete_commits(path, list_commits(path) - known)
    with disk_errors_explained(path):
        if layout.samples_group != old_layout.samples_group:
            table = path / layout.samples_group
            shutil.rmtree(table, ignore_errors=True)
            write_samples(path, index, layout.samples_group)
            fsync_tree(table)
            fsync_path(path)
        write_file(path / GROWTH, encode_json(seal({**attributes, "complete": None})))


def enlarge_arrays(path: Path, layout: StoreLayout) -> None:
    """Give all arrays that tasks write their shape in this layout; those that have it are left alone."""
    for spec in layout.arrays():
        file = path / spec.name / "zarr.json"
        metadata: dict[str, Any] = parse_json(read_file(file))
        if metadata["shape"] != list(spec.shape):
            metadata["shape"] = list(spec.shape)
            write_file(file, json.dumps(metadata, indent=2).encode())  # as zarr-python writes it


def end_growth(path: Path) -> None:
    """Remove the file of a growth that is finished."""
    (path / GROWTH).unlink(missing_ok=True)
    fsync_path(path / COMMITS)
