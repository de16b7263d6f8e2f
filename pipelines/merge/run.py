"""Merge: caches of parts of a dataset, built on different machines, become one. Shards are linked, or copied."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from atcache.cache.differences import name_differences
from atcache.cache.record import CacheRecord
from atcache.errors import CacheMismatchError, DiskFullError
from atcache.fields import JsonFields
from atcache.files.sizes import size_text
from atcache.files.writers import sweep_partials
from atcache.store.joining import can_link, join_layouts, join_samples, write_joined
from atcache.store.manifest import read_commits
from atcache.store.parts import count_samples
from atcache.store.reader import CacheReader

from ..running.progress import Progress
from .config import MergeConfig

_OWN_LAYOUT = ("num_samples", "part_stops", "num_views", "records_per_file")
"""Members of the layout in which parts may differ."""
_ADVICE = (
    "Parts that are to be merged have the same options, --samples-per-shard included, and all but the first "
    "--codec-from the first."
)


@dataclass(frozen=True, kw_only=True, slots=True)
class MergeSummary(JsonFields):
    """What a merge has made."""

    out: str
    num_samples: int
    num_views: int
    complete: dict[str, Any]
    """The totals of the merged cache."""
    copied_nbytes: int
    """Bytes of shards that were copied; the others are shared with the parts, which may be deleted all the same."""
    notes: tuple[str, ...]
    """In what the parts differ, though they could be merged."""
    seconds: float


def merge(config: MergeConfig) -> MergeSummary:
    """Write complete caches of different samples as one. The parts stay as they are.

    Returns:
        What was made.

    Raises:
        CacheMismatchError: `out` exists, or two caches are not parts of one; the message names each difference.
        DiskFullError: shards must be copied, and do not fit.
        CorruptCacheError: a part is damaged.
    """
    start_s = time.monotonic()
    if config.out.exists():
        raise CacheMismatchError(f"{config.out} exists already: give another --out, or remove it.")
    readers = [CacheReader(path) for path in config.caches]
    for reader in readers:
        if not reader.is_complete:
            raise CacheMismatchError(
                f"{reader.path} is not complete: {len(reader.missing_tasks())} of {reader.layout.num_tasks} tasks are "
                "missing. Run its `atcache build` command again, then merge."
            )
    for reader in readers[1:]:
        _check_is_part(readers[0], reader)
    for first, second in combinations(readers, 2):
        _check_other_samples(first, second)
    layout = join_layouts([reader.layout for reader in readers])
    index = join_samples(readers)
    copied = _copied_nbytes(readers, config.out)
    sweep_partials(config.out)
    source: dict[str, Any] = {"fingerprint": index.fingerprint, "num_samples": count_samples(index)}
    choices = {CacheRecord.of(reader).choice for reader in readers}
    if len(choices) == 1 and (choice := choices.pop()) is not None:
        source["choice"] = choice.to_json()
    with Progress("merge", total=layout.num_tasks, unit="tasks") as progress:
        complete = write_joined(config.out, layout, index, source, readers, lambda _: progress.advance(1))
    return MergeSummary(
        out=str(config.out),
        num_samples=layout.num_real_samples,
        num_views=layout.num_views,
        complete=complete,
        copied_nbytes=copied,
        notes=tuple(_notes(readers)),
        seconds=time.monotonic() - start_s,
    )


def _check_is_part(first: CacheReader, other: CacheReader) -> None:
    """Refuse a cache that another build than the first one's has made."""
    places = f"in {first.path}", f"in {other.path}"
    differences = name_differences(_what_is_shared(first), _what_is_shared(other), places)
    if not differences:
        # By a reader that is dropped again, as readers keep what they read: there may be hundreds of parts.
        arrays, others = _arrays(first), _arrays(CacheReader(other.path, other.attributes))
        names = [name for name in sorted({*arrays, *others}) if not _are_same(arrays.get(name), others.get(name))]
        differences = [f"its {', '.join(names)} differ: their codecs were fitted apart"] if names else []
    if differences:
        raise CacheMismatchError(
            f"{first.path} and {other.path} are not parts of one cache: {'; '.join(differences)}. {_ADVICE}"
        )


def _what_is_shared(reader: CacheReader) -> dict[str, Any]:
    """What must be equal in all parts."""
    record = CacheRecord.of(reader)
    identity, layout = record.identity.to_json(), reader.layout.to_json()
    del identity["source"], identity["selection"]  # the geometry says which layers and heads; old caches hold text
    layout = {name: value for name, value in layout.items() if name not in _OWN_LAYOUT}
    return {**identity, "geometry": record.geometry.to_json(), "layout": layout}


def _arrays(reader: CacheReader) -> Mapping[str, np.ndarray]:
    bias_LHQK = reader.bias_LHQK
    return reader.state if bias_LHQK is None else {**reader.state, "bias": bias_LHQK}


def _are_same(array: np.ndarray | None, other: np.ndarray | None) -> bool:
    """Whether both are there and equal, bit for bit."""
    if array is None or other is None:
        return False
    return (array.dtype, array.shape, array.tobytes()) == (other.dtype, other.shape, other.tobytes())


def _check_other_samples(first: CacheReader, second: CacheReader) -> None:
    """Refuse two caches that name the same tar: samples are known by the names of their tars."""
    if shared := sorted({tar.name for tar in first.samples.tars} & {tar.name for tar in second.samples.tars}):
        raise CacheMismatchError(
            f"{first.path} and {second.path} both hold a tar called {shared[0]}, so its samples would be there twice. "
            "Merge caches of different tars; for more views of the same ones, use `atcache build --grow --views`."
        )


def _copied_nbytes(readers: Sequence[CacheReader], out: Path) -> int:
    """Bytes of shards that cannot be linked, if there is room for them.

    Raises:
        DiskFullError: there is not.
    """
    folder = next(folder for folder in out.absolute().parents if folder.is_dir())
    nbytes = sum(
        commit.nbytes
        for reader in readers
        if isinstance(reader.path, Path) and not can_link(reader.path, folder)
        for commit in read_commits(reader.path).values()
        if reader.layout.has_task(commit.task)
    )
    free_nbytes = shutil.disk_usage(folder).free
    if nbytes > free_nbytes:
        raise DiskFullError(
            f"{out}: {size_text(nbytes)} of shards must be copied, {size_text(free_nbytes)} are free. Free "
            "some space, or give an --out on the disk of the caches, where files are linked."
        )
    return nbytes


def _notes(readers: Sequence[CacheReader]) -> list[str]:
    """Sentences on parts that were made with other libraries than the first."""
    made_by = [CacheRecord.of(reader).created_by.to_json() for reader in readers]
    notes: list[str] = []
    for reader, made in zip(readers[1:], made_by[1:], strict=True):
        places = f"for {readers[0].path}", f"for {reader.path}"
        if differences := name_differences(made_by[0], made, places):
            notes.append(f"the parts were made with other versions: {'; '.join(differences)}; the first is recorded.")
    return notes
