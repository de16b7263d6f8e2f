"""How many classes labels have. A label far beyond the others is a typing error, not a head of a million outputs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from atcache.errors import ConfigError
from atcache.images.class_names import same_classes
from atcache.images.source import SampleIndex

_FAR = 1000
_FAR_TIMES = 10
"""A label is far beyond the next lower one if it is more than `_FAR` above it and about this many times as large."""


def count_classes(indexes: Sequence[SampleIndex], rows: np.ndarray, wanted: int | None = None) -> int:
    """The number of classes: as many as are named, and at least one more than the largest label.

    Args:
        indexes: the sample tables, whose rows are numbered one after another.
        rows: the rows that are used. Those without a label do not count.
        wanted: the number that a user gave; None to find it.

    Returns:
        `wanted` if it is given; else the number that was found, 0 if there are neither names nor labels.

    Raises:
        ConfigError: a label is beyond `wanted`; or, without it, so far beyond the others that it must be wrong.
        CacheMismatchError: the tables name classes differently.
    """
    label_S = np.concatenate([index.label_S for index in indexes])
    labels = np.unique(label_S[rows])
    labels = labels[labels >= 0]
    largest = int(labels[-1]) if len(labels) else -1
    if wanted is not None:
        refuse_beyond(indexes, rows, wanted, f"num_classes={wanted}. Give as many as there are, or correct the label.")
        return wanted
    before = np.concatenate([[-1], labels[:-1]])
    far = (labels - before > _FAR) & (labels >= _FAR_TIMES * (before + 1))
    if far.any():
        label, lower = int(labels[far][0]), int(before[far][0])
        raise ConfigError(
            f"{_first_with(indexes, rows, label)} has the label {label}, "
            + (f"and the next lower label is {lower}. " if lower >= 0 else "and that is the lowest. ")
            + "If it is a typing error, correct it in the tar and build again; if there are so many classes, give "
            f"num_classes={largest + 1} (--num-classes)."
        )
    return max(len(same_classes([index.classes for index in indexes]).names), largest + 1)


def refuse_beyond(indexes: Sequence[SampleIndex], rows: np.ndarray, num_classes: int, expected: str) -> None:
    """Refuse labels that are not below `num_classes`.

    Args:
        indexes: as in `count_classes`.
        rows: the rows that are used.
        num_classes: how many classes there are.
        expected: the end of the sentence, after "but": what was expected, and what to do.

    Raises:
        ConfigError: a label is too large; the message names the sample.
    """
    label_S = np.concatenate([index.label_S for index in indexes])
    largest = int(label_S[rows].max(initial=-1))
    if largest >= num_classes:
        raise ConfigError(f"{_first_with(indexes, rows, largest)} has the label {largest}, but {expected}")


def _first_with(indexes: Sequence[SampleIndex], rows: np.ndarray, label: int) -> str:
    """The sample_key of the first of these rows that has a label."""
    start = 0
    for index in indexes:
        its_rows = rows[(rows >= start) & (rows < start + index.num_samples)] - start
        found = its_rows[index.label_S[its_rows] == label]
        if len(found):
            return index.sample_key(int(found[0]))
        start += index.num_samples
    raise AssertionError("a label that the rows have")
