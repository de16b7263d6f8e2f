"""Several teachers in one loop: the codes of other caches for the views of the first, read beside its own."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np

from atcache.cache.differences import name_differences
from atcache.cache.record import CacheRecord
from atcache.errors import CacheMismatchError
from atcache.feed.sample_views import DerivedViews, SampleView, Views
from atcache.images.source import SampleIndex
from atcache.store.reader import CacheReader
from atcache.views.rendering import STORED


class Other(NamedTuple):
    """The cache of another teacher, whose codes are read beside those of the first."""

    reader: CacheReader
    code_layers: slice
    """Rows of L of its codes to read."""
    row_S: np.ndarray
    """Where it has each sample of the first, int64; -1 for samples that it lacks."""


class BesideViews(DerivedViews):
    """The views of one teacher's caches, with other teachers' codes of the same views.

    Args:
        views: the views of the first teacher, from `open_joined_views`.
        readers: their caches, in the same order.
        others: the caches of the other teachers.
    """

    def __init__(self, views: Views, readers: Sequence[CacheReader], others: Sequence[Other]) -> None:
        super().__init__(views)
        self._readers, self._others = tuple(readers), tuple(others)
        self._starts = [0, *accumulate(reader.layout.num_samples for reader in readers)]

    @property
    def identity(self) -> dict[str, Any]:
        """See `Views.identity`."""
        beside = {str(number): _identity_of(other.reader) for number, other in enumerate(self._others)}
        return {**self._views.identity, "beside": beside}

    @property
    def is_remote(self) -> bool:
        """See `Views.is_remote`."""
        return super().is_remote or any(other.reader.is_remote for other in self._others)

    def read(self, sample: int, epoch: int) -> SampleView:
        """See `Views.read`.

        Raises:
            CacheMismatchError: another cache's view is not the same image.
        """
        found = self._views.read(sample, epoch)
        part = bisect_right(self._starts, sample) - 1
        reader, row = self._readers[part], sample - self._starts[part]
        view = epoch % reader.layout.num_views
        pixel_hash = reader.pixel_hash(view, row)
        codes: list[np.ndarray] = []
        for other in self._others:
            its_row = int(other.row_S[sample])
            if other.reader.pixel_hash(view, its_row) != pixel_hash:
                raise _other_views(reader, other.reader, reader.samples.sample_key(row), view)
            codes.append(other.reader.read_codes(view, its_row, other.code_layers))
        return found._replace(beside=tuple(codes))

    def plan(self, sample_S: np.ndarray) -> None:
        """See `Views.plan`."""
        super().plan(sample_S)
        for other in self._others:
            rows = other.row_S[sample_S]
            other.reader.plan(rows[rows >= 0])

    def expect(self, sample_S: np.ndarray, epoch: int) -> None:
        """See `Views.expect`."""
        super().expect(sample_S, epoch)
        part_S = self._views.part_of(sample_S)
        for part in range(len(self._readers)):
            view = epoch % self._readers[part].layout.num_views
            for other in self._others:
                rows = np.sort(other.row_S[sample_S[part_S == part]])
                if len(rows := rows[rows >= 0]):
                    other.reader.expect(view, rows, pixels=False)


def rows_beside(readers: Sequence[CacheReader], other: CacheReader) -> np.ndarray:
    """Where another teacher's cache has the samples of these caches; samples are the same if their keys are.

    Returns:
        Its row for every row of the caches together, int64; -1 for samples that it lacks or could not store.

    Raises:
        CacheMismatchError: it is not complete, or has fewer views than one of the caches.
    """
    if not other.is_complete:
        raise CacheMismatchError(f"{other.path} is not complete. Run its `atcache build` command again.")
    for reader in readers:
        if other.layout.num_views < reader.layout.num_views:
            raise CacheMismatchError(
                f"{other.path} has {other.layout.num_views} views of each sample, {reader.path} has "
                f"{reader.layout.num_views}. Build it with as many views, or more."
            )
    num_views = max(reader.layout.num_views for reader in readers)
    is_stored_S = (other.status_VS[:num_views] == STORED).all(axis=0)
    found = np.concatenate([_rows_of(reader.samples, other.samples) for reader in readers])
    return np.where((found >= 0) & is_stored_S[found], found, -1)


def _rows_of(samples: SampleIndex, other: SampleIndex) -> np.ndarray:
    """The row in `other` of each of the samples, int64; -1 for those that it lacks."""
    if samples.fingerprint == other.fingerprint:
        return np.arange(samples.num_samples)
    row_of = {other.sample_key(row): row for row in range(other.num_samples)}
    return np.array([row_of.get(samples.sample_key(row), -1) for row in range(samples.num_samples)], np.int64)


def _identity_of(reader: CacheReader) -> dict[str, Any]:
    identity = CacheRecord.of(reader).identity
    return {
        "teacher": identity.teacher,
        "weights_sha256": identity.weights_sha256,
        "source": identity.fingerprint,
        "num_views": identity.num_views,
        "codec": dict(identity.codec),
    }


def _other_views(first: CacheReader, other: CacheReader, sample_key: str, view: int) -> CacheMismatchError:
    policies: list[Mapping[str, Any]] = [CacheRecord.of(reader).policy.to_json() for reader in (first, other)]
    differences = name_differences(policies[0], policies[1], (f"in {first.path}", f"in {other.path}"))
    return CacheMismatchError(
        f"view {view} of {sample_key} is not the same image in {first.path} and in {other.path}: "
        f"{'; '.join(differences) or 'the policies are equal, so the image was another one'}. To use two teachers "
        "together, build both caches from the same images with the same policy, seed, image size and interpolation."
    )
