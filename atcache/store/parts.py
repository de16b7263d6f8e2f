"""The samples of a cache that has several parts: the rows of each part begin a block, and rows between have no sample.

Pure functions on sample tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from atcache.images.class_names import same_classes
from atcache.store.layout import Status

if TYPE_CHECKING:
    from atcache.images.source import SampleIndex

_COLUMNS = ("keys_S", "tar_S", "offset_S", "nbytes_S", "label_S", "problem_S")


def count_samples(index: SampleIndex) -> int:
    """Samples of a table, without rows that have none."""
    return int(np.count_nonzero(index.problem_S != Status.NO_SAMPLE))


def take_tars(index: SampleIndex, numbers: Sequence[int]) -> SampleIndex:
    """The samples of some tars, tar by tar in this order, as a table of their own."""
    has_gaps = bool((index.problem_S == Status.NO_SAMPLE).any())
    if not has_gaps and list(numbers) == list(range(len(index.tars))) and (np.diff(index.tar_S) >= 0).all():
        return index  # tables of millions of rows are not copied for nothing
    rows_S = np.flatnonzero(index.problem_S != Status.NO_SAMPLE)
    rows_S = rows_S[np.argsort(index.tar_S[rows_S], kind="stable")]
    edges = np.searchsorted(index.tar_S[rows_S], np.arange(len(index.tars) + 1))
    pieces = [rows_S[edges[number] : edges[number + 1]] for number in numbers]
    chosen_S = np.concatenate([*pieces, np.empty(0, rows_S.dtype)])
    tar_S = np.repeat(np.arange(len(numbers), dtype=np.int32), [len(piece) for piece in pieces])
    return _part(index, chosen_S, tar_S, numbers)


def take_rows(index: SampleIndex, rows_S: np.ndarray) -> SampleIndex:
    """The samples of some rows, in this order, as a table of their own; it lists only their tars."""
    numbers = np.unique(index.tar_S[rows_S])
    tar_S = np.searchsorted(numbers, index.tar_S[rows_S]).astype(np.int32)
    return _part(index, rows_S, tar_S, numbers.tolist())


def _part(index: SampleIndex, rows_S: np.ndarray, tar_S: np.ndarray, numbers: Sequence[int]) -> SampleIndex:
    """A table of these rows, in which `numbers` are the tars and `tar_S` are positions in them."""
    columns: dict[str, Any] = {name: getattr(index, name)[rows_S] for name in _COLUMNS}
    return replace(
        index,
        **{**columns, "tar_S": tar_S},
        tars=tuple(index.tars[number] for number in numbers),
        tar_nbytes=tuple(index.tar_nbytes[number] for number in numbers),
        tar_versions=tuple(index.tar_versions[number] for number in numbers) if index.tar_versions else (),
    )


def find_changed_tar(first: SampleIndex, second: SampleIndex) -> str | None:
    """The first tar that does not have the same samples in two tables that list the same tars; None if all have."""
    for number, tar in enumerate(first.tars):
        if first.tar_nbytes[number] != second.tar_nbytes[number]:
            return tar.name
    counts, others = (np.bincount(index.tar_S, minlength=len(first.tars)) for index in (first, second))
    if (differing := np.flatnonzero(counts != others)).size:
        return first.tars[int(differing[0])].name
    is_other_S = np.zeros(len(first.keys_S), bool)
    for name in _COLUMNS:
        is_other_S |= getattr(first, name) != getattr(second, name)
    return first.tars[int(first.tar_S[int(np.argmax(is_other_S))])].name if is_other_S.any() else None


def append_part(index: SampleIndex, part: SampleIndex, samples_per_shard: int) -> SampleIndex:
    """A table with the rows of another behind its own, from the next multiple of `samples_per_shard` on.

    Args:
        index: the table so far.
        part: other samples, of other tars.
        samples_per_shard: of the cache.

    Raises:
        CacheMismatchError: the tables name a class differently.
    """
    gap = -len(index.keys_S) % samples_per_shard
    # Empty keys, and no image. The tar must be one of those listed, so it is the one before.
    between: dict[str, Any] = {
        "keys_S": np.zeros(gap, "S1"),
        "tar_S": np.full(gap, index.tar_S[-1]),
        "offset_S": np.zeros(gap, np.int64),
        "nbytes_S": np.zeros(gap, np.int64),
        "label_S": np.full(gap, -1, np.int64),
        "problem_S": np.full(gap, Status.NO_SAMPLE, np.uint8),
    }
    behind: dict[str, Any] = {name: getattr(part, name) for name in _COLUMNS}
    behind["tar_S"] = (part.tar_S + len(index.tars)).astype(np.int32)
    columns = {name: np.concatenate([getattr(index, name), between[name], behind[name]]) for name in _COLUMNS}
    versions = [table.tar_versions or ("",) * len(table.tars) for table in (index, part)]
    return replace(
        index,
        **columns,
        tars=index.tars + part.tars,
        tar_nbytes=index.tar_nbytes + part.tar_nbytes,
        tar_versions=versions[0] + versions[1],
        classes=same_classes([index.classes, part.classes]),
    )
