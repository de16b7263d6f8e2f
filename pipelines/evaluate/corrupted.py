"""Sets of corrupted images: made of the main set on the fly, or read from caches that were built corrupted."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from atcache.cache.record import CacheRecord
from atcache.errors import ConfigError
from atcache.feed.corrupted import CorruptedViews, Drawn
from atcache.feed.sample_views import FreshViews
from atcache.store.reader import CacheReader
from atcache.views.corrupt import NAMES, Corruption

from ..train.validation import ValidationSet
from .summary import EvaluateSummary, SetScores


def recorded_corruption(readers: Sequence[CacheReader]) -> str | None:
    """How the views of these caches were corrupted; None if they were not.

    Raises:
        ConfigError: each was corrupted in another way.
    """
    found = {CacheRecord.of(reader).policy.corrupt for reader in readers}
    if len(found) > 1:
        ways = ", ".join(f"{reader.path}: {CacheRecord.of(reader).policy.corrupt or 'clean'}" for reader in readers)
        raise ConfigError(f"the caches of one set are not corrupted alike ({ways}). Give each a set of its own.")
    return found.pop() if found else None


def has_same_images(main: ValidationSet, other: ValidationSet) -> bool:
    """Whether a set has the images and the classes of the main one, so that only a corruption is between them."""
    if main.kept_K is None or other.kept_K is None:
        same_classes = main.kept_K is other.kept_K
    else:
        same_classes = np.array_equal(main.kept_K, other.kept_K)
    return same_classes and [index.fingerprint for index in main.indexes] == [
        index.fingerprint for index in other.indexes
    ]


def corrupted_set(main: ValidationSet, readers: Sequence[CacheReader], corrupt: str) -> ValidationSet:
    """The main set under a corruption: the same samples, classes and live teacher.

    Args:
        main: the main set.
        readers: its caches; empty if its views are drawn from tars.
        corrupt: the corruption, such as "fog:3".

    Raises:
        ConfigError: the main set is not clean.
    """
    if readers:
        parts = [Drawn(CacheRecord.of(reader).policy, reader.samples, str(reader.path)) for reader in readers]
    else:
        assert isinstance(main.views, FreshViews), "views without a cache are drawn"
        parts = [Drawn(main.views.policy, main.views.source.index, "the tars")]
    return replace(main, views=CorruptedViews(main.views, Corruption.parse(corrupt), parts))


def maps_are_missing(corrupt: str) -> ConfigError:
    """The error for a copying run that is to be scored under a corruption of which no cache has the maps."""
    name = corrupt.replace(":", "-")
    return ConfigError(
        "a copying student needs the teacher's maps of the corrupted images. Build a cache of them with --policy "
        f"eval --corrupt {corrupt}, and give it as --val-cache {name}=CACHE; or give --live-teacher."
    )


def maps_are_of_others(corrupt: str, name: str) -> ConfigError:
    """The error if the set that has the teacher's maps under a corruption is not of the main set's images."""
    return ConfigError(
        f"a copying student needs the teacher's maps of the main set under {corrupt}, but the set {name}, which has "
        "this corruption, has other images or other classes than the main set. Build both caches of the same --data, "
        f"--keys and --max-samples, or leave --corrupt {corrupt} out: {name} is scored as it is."
    )


def corruption_rows(summary: EvaluateSummary) -> Iterator[tuple[str, str, tuple[float, ...]]]:
    """For each corruption its severities and each prediction's mean top-1 over them, in percent; then over all.

    The last row of several corruptions is the mean of the others, so that each corruption counts the same. Nothing if
    there is no corrupted set.
    """
    means: list[tuple[float, ...]] = []
    scored = [(Corruption.parse(each.corrupt), each) for each in summary.sets if each.corrupt is not None]
    for name in NAMES:
        found = sorted(((one.severity, each) for one, each in scored if one.name == name), key=lambda pair: pair[0])
        if found:
            means.append(_mean([_top1s(each) for _, each in found]))
            yield name, ", ".join(str(severity) for severity, _ in found), means[-1]
    if len(means) > 1:
        yield f"mean of {len(means)}", "", _mean(means)


def _top1s(each: SetScores) -> tuple[float, ...]:
    averages = (each.mean_probabilities, each.mean_logits)
    return (*(score.top1 for score in each.runs), *(score.top1 for score in averages if score is not None))


def _mean(rows: Sequence[tuple[float, ...]]) -> tuple[float, ...]:
    return tuple(sum(column) / len(rows) for column in zip(*rows, strict=True))
