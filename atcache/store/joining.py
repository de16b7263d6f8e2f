"""Several caches as one: their shards are linked or copied under new numbers, unchanged, with new commit records."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from atcache.errors import CorruptCacheError
from atcache.files.durable import encode_json, partial_path
from atcache.store.committed import check_record
from atcache.store.layout import StoreLayout, Task
from atcache.store.manifest import Commit, commit_path
from atcache.store.metadata import refuse_damaged_root, seal
from atcache.store.parts import append_part
from atcache.store.reader import CacheReader
from atcache.store.records import Record, read_records
from atcache.store.writer import RESERVED_ATTRIBUTES, finish_cache, new_cache_folder, write_empty_cache

if TYPE_CHECKING:
    from atcache.images.source import SampleIndex


def join_layouts(layouts: Sequence[StoreLayout]) -> StoreLayout:
    """The layout of a cache with the samples of several, which agree in all but samples, in their order."""
    joined = layouts[0]
    for layout in layouts[1:]:
        joined = joined.with_part(layout.part_stops or (layout.num_samples,))
    return joined.with_joined_records()


def join_samples(readers: Sequence[CacheReader]) -> SampleIndex:
    """The sample table of the same cache."""
    joined = readers[0].samples
    for reader in readers[1:]:
        joined = append_part(joined, reader.samples, reader.layout.samples_per_shard)
    return joined


def can_link(source: Path, folder: Path) -> bool:
    """Whether files of a cache can get a second name in another folder, so that they need no space."""
    probe = partial_path(folder / "link")
    try:
        os.link(source / "zarr.json", probe)
    except OSError:
        return False
    probe.unlink()
    return True


def write_joined(
    path: Path,
    layout: StoreLayout,
    index: SampleIndex,
    source_attributes: Mapping[str, Any],
    readers: Sequence[CacheReader],
    on_task: Callable[[int], None],
) -> dict[str, Any]:
    """Write complete caches as one. Until it is whole, it is a temp folder beside `path`.

    Args:
        path: the cache to make.
        layout: from `join_layouts`.
        index: from `join_samples`.
        source_attributes: its member `source`; the other members are those of the first cache.
        readers: the caches, on local disks. They are not changed.
        on_task: called after each task with the bytes of its shards.

    Returns:
        The totals of the new cache, see `finish_cache`.

    Raises:
        CacheMismatchError: `path` exists.
        CorruptCacheError: a cache is damaged: its metadata, a commit record, or the size or index of a shard.
        DiskFullError: no space is left.
    """
    for reader in readers:
        refuse_damaged_root(reader.path, reader.attributes, "Restore it from a copy, then merge.")
    first = readers[0]
    kept = {name: value for name, value in first.attributes.items() if name not in RESERVED_ATTRIBUTES}
    attributes = {**kept, "source": dict(source_attributes)}
    with new_cache_folder(path) as temp:
        write_empty_cache(temp, layout, attributes, index, first.state, first.bias_LHQK)
        for reader, first_block in zip(readers, _first_blocks(readers), strict=True):
            records = {record.task: record for record in read_records(_folder(reader))}
            for task in reader.layout.tasks():
                new_task = layout.task(task.view, first_block + task.block)
                on_task(_join_task(temp, layout, reader, records[task.name], new_task))
        return finish_cache(temp)


def _first_blocks(readers: Sequence[CacheReader]) -> list[int]:
    """The block in which each cache begins."""
    starts = [0]
    for reader in readers[:-1]:
        starts.append(starts[-1] + reader.layout.num_blocks)
    return starts


def _folder(reader: CacheReader) -> Path:
    assert isinstance(reader.path, Path), "caches on servers are refused"
    return reader.path


def _join_task(path: Path, layout: StoreLayout, reader: CacheReader, record: Record, new_task: Task) -> int:
    """Take over the shards of one task and its record. Returns the bytes of the shards."""
    source = _folder(reader)
    commit, problems = check_record(source, record, reader.layout)  # the new record gets a checksum of its own
    if problems:
        raise CorruptCacheError(
            f"{problems[0]} Repair it with `atcache verify --repair` and its `atcache build` command, then merge again."
        )
    new_names = {spec.shard_file(commit.task): spec.shard_file(new_task) for spec in layout.arrays()}
    for old, new in new_names.items():
        _link_or_copy(source / old, path / new)
    files = {new_names[name]: about for name, about in commit.files.items()}
    _write_record(path, replace(commit, task=new_task, files=files))
    return commit.nbytes


def _link_or_copy(source: Path, target: Path) -> None:
    """Give a file a second name, or copy it. A shard is replaced, but never changed, so caches may share it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with suppress(OSError):  # another file system, or one without links
        os.link(source, target)
        return
    shutil.copyfile(source, target)


def _write_record(path: Path, commit: Commit) -> None:
    # Not durable by itself, as all of the folder is made durable before it gets its name.
    commit_path(path, commit.task).write_bytes(encode_json(seal(commit.to_json())))
