"""The samples that a build or a plan is about: all of the data, or the part that was asked for."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Literal, Protocol

import numpy as np

from atcache.choices import Labels
from atcache.errors import ConfigError
from atcache.feed.classes import count_classes
from atcache.feed.order import choose_subset
from atcache.images.selection import select_keys
from atcache.images.source import SampleIndex, index_source
from atcache.images.tar_samples import Problem

_SEED = 0
"""Always the same, so that caches of several seeds, teachers or codecs hold the same samples."""


class Choice(Protocol):
    """The options that say which samples are wanted."""

    @property
    def labels(self) -> Labels:
        """Whether samples need labels."""
        ...

    @property
    def label_key(self) -> str | None:
        """Where labels are in `.json` files."""
        ...

    @property
    def keys(self) -> Path | None:
        """A file that lists the wanted samples."""
        ...

    @property
    def max_samples(self) -> int | None:
        """How many samples are wanted."""
        ...


def index_samples(data: str, choice: Choice, *, on_bad: Literal["raise", "skip"]) -> SampleIndex:
    """The index of the wanted samples.

    With `max_samples`, samples without problems are drawn at random, as evenly over the classes as possible. More
    samples always include those of fewer.

    Raises:
        SourceError: as `index_source`.
        ConfigError: the file of keys does not fit the data.
    """
    return choose_samples(index_source(data, labels=choice.labels, label_key=choice.label_key, on_bad=on_bad), choice)


def choose_samples(index: SampleIndex, choice: Choice) -> SampleIndex:
    """The wanted samples of an index, as `index_samples` chooses them.

    Raises:
        ConfigError: the file of keys does not fit the data.
    """
    if choice.keys is not None:
        index = select_keys(index, choice.keys)
    good_S = np.flatnonzero(index.problem_S == Problem.NONE)
    if choice.max_samples is not None and choice.max_samples < len(good_S):
        index = index.select(choose_subset(index.label_S, good_S, choice.max_samples, _SEED))
    _note_far_labels(index)
    return index


def _note_far_labels(index: SampleIndex) -> None:
    """Tell of a label that training would refuse, before hours of work. A build itself needs no classes."""
    try:
        count_classes([index], np.arange(index.num_samples))
    except ConfigError as error:
        logging.getLogger(__name__).warning("NOTE: %s", error)
