"""Where a training sample's pixels and codes come from: the fixed views of a cache, or new ones every epoch."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from functools import partial
from itertools import accumulate
from typing import Any, NamedTuple, Protocol

import numpy as np
from PIL import Image

from atcache.cache.record import CacheRecord
from atcache.errors import ConfigError, CorruptCacheError
from atcache.images.source import Source
from atcache.images.tar_samples import Problem
from atcache.store.reader import CacheReader
from atcache.views.apply import apply_view, render_alone
from atcache.views.kept import Kept
from atcache.views.mixing import NOT_MIXED, Mix, mix_pixels
from atcache.views.policy import ViewPolicy
from atcache.views.rendering import draw_sample_view, draw_view_mix, replay_view, stored_mix


class SampleView(NamedTuple):
    """One view of one sample. Its arrays are kept and given again, so do not write to them."""

    pixels_HWC: np.ndarray
    """uint8."""
    codes_LTC: np.ndarray | None
    """None if they are not wanted."""
    mix: Mix = NOT_MIXED
    """Which other sample the pixels show too, and its share."""
    beside: tuple[np.ndarray, ...] = ()
    """Codes of the same view from the caches of other teachers, each (layer, token, component)."""


class Views(Protocol):
    """Where a sample's pixels and codes come from. May be forked or pickled to worker processes."""

    @property
    def identity(self) -> dict[str, Any]:
        """What another run's views must have in common with these to be the same, as JSON."""
        ...

    @property
    def num_samples(self) -> int:
        """Number of rows, those with problems included: samples are 0 .. num_samples - 1."""
        ...

    def part_of(self, sample_B: np.ndarray) -> np.ndarray:
        """Which of several caches each sample is in, int64 from 0: only codes of the same cache can be stacked."""
        return np.zeros(len(sample_B), np.int64)

    def read(self, sample: int, epoch: int) -> SampleView:
        """The view of `sample` that `epoch` uses."""
        ...

    @property
    def is_remote(self) -> bool:
        """Whether samples are read from a server: it is best to request those of a batch together."""
        ...

    def plan(self, sample_S: np.ndarray) -> None:
        """Take note of all samples, ascending, that an epoch will read: how they are fetched may depend on it."""
        ...

    def expect(self, sample_S: np.ndarray, epoch: int) -> None:
        """Take note of the samples, ascending, that will be read soon; may read or fetch them ahead."""
        ...


class DerivedViews(Views):
    """Views that are made of other views: the same samples, read in the same way.

    Args:
        views: the views they are made of.
    """

    def __init__(self, views: Views) -> None:
        self._views = views

    @property
    def num_samples(self) -> int:
        """See `Views.num_samples`."""
        return self._views.num_samples

    def part_of(self, sample_B: np.ndarray) -> np.ndarray:
        """See `Views.part_of`."""
        return self._views.part_of(sample_B)

    @property
    def is_remote(self) -> bool:
        """See `Views.is_remote`."""
        return self._views.is_remote

    def plan(self, sample_S: np.ndarray) -> None:
        """See `Views.plan`."""
        self._views.plan(sample_S)

    def expect(self, sample_S: np.ndarray, epoch: int) -> None:
        """See `Views.expect`."""
        self._views.expect(sample_S, epoch)


class CachedViews(Views):
    """The fixed views of a cache; epoch e uses view e modulo the number of views.

    Pixels come from the cache if it stores them; else they are replayed from the tars and checked by their hash.

    Args:
        reader: the cache.
        source: the tars; needed if the cache stores no pixels.
        code_layers: which rows of L of the codes to read; None if no codes are wanted.
        keep_nbytes: memory in which views that were read are kept, in each process that reads.
    """

    def __init__(
        self,
        reader: CacheReader,
        source: Source | None,
        *,
        code_layers: slice | None,
        keep_nbytes: int = 0,
    ) -> None:
        self._reader, self._source, self._code_layers = reader, source, code_layers
        self._kept = Kept[SampleView](keep_nbytes)
        self._record = CacheRecord.of(reader)
        self._policy = self._record.policy

    @property
    def identity(self) -> dict[str, Any]:
        """See `Views.identity`."""
        identity = self._record.identity
        return {
            "source": identity.fingerprint,
            "policy": identity.policy.to_json(),
            "num_views": identity.num_views,
            "codec": dict(identity.codec) if self._code_layers is not None else None,
        }

    @property
    def num_samples(self) -> int:
        """See `Views.num_samples`."""
        return self._reader.layout.num_samples

    def read(self, sample: int, epoch: int) -> SampleView:
        """See `Views.read`."""
        view = epoch % self._reader.layout.num_views
        return self._kept.get((view, sample), lambda: self._read(view, sample), _count_nbytes)

    def plan(self, sample_S: np.ndarray) -> None:
        """See `Views.plan`."""
        self._reader.plan(sample_S)
        if self._source is not None:
            self._source.plan(sample_S)

    def expect(self, sample_S: np.ndarray, epoch: int) -> None:
        """See `Views.expect`."""
        view = epoch % self._reader.layout.num_views
        if self.is_remote:
            sample_S = np.array([row for row in sample_S.tolist() if (view, row) not in self._kept], np.int64)
        if len(sample_S):
            self._reader.expect(view, sample_S, codes=self._code_layers is not None)
        if self._source is not None:
            self._source.expect(sample_S)

    @property
    def is_remote(self) -> bool:
        """See `Views.is_remote`."""
        return self._reader.is_remote or (self._source is not None and self._source.is_remote)

    def _read(self, view: int, sample: int) -> SampleView:
        layers = self._code_layers
        codes_LTC = None if layers is None else self._reader.read_codes(view, sample, layers)
        mix = NOT_MIXED
        if self._policy.mixing is not None:
            mix = stored_mix(self._policy, self._reader.parameters(view, sample))
            partner = sample + mix.partner
            if not 0 <= partner < self.num_samples or partner >= self._reader.layout.task_of(view, partner).stop:
                raise CorruptCacheError(
                    f"{self._reader.path}: view {view} of sample {sample} is mixed with sample {partner}, which is not "
                    "in the cache. Build or pull it again."
                )
        return SampleView(self._read_pixels(view, sample), codes_LTC, mix)

    def _read_pixels(self, view: int, sample: int) -> np.ndarray:
        if self._reader.layout.pixels is not None:
            return self._reader.read_pixels(view, sample)
        assert self._source is not None, "views that are not stored are replayed from a source"
        return replay_view(
            self._source,
            self._policy,
            sample,
            partial(self._reader.parameters, view),
            self._reader.pixel_hash(view, sample),
            self._record.created_by.views,
        )


class FreshViews(Views):
    """A new random view every epoch, without a cache.

    Args:
        source: the tars.
        policy: how views are drawn; under "eval" all epochs see the same view.
        partner_S: rows, ascending, that views are mixed with if the policy mixes; None for all rows without problems.
        keep_nbytes: memory in which decoded images (under "eval" finished views) are kept, in each process that reads.
    """

    def __init__(
        self, source: Source, policy: ViewPolicy, *, partner_S: np.ndarray | None = None, keep_nbytes: int = 0
    ) -> None:
        self._source, self._policy = source, policy
        self._partner_S = np.flatnonzero(source.index.problem_S == Problem.NONE) if partner_S is None else partner_S
        self._kept_images = Kept[Image.Image](keep_nbytes)
        self._kept_views = Kept[np.ndarray](keep_nbytes)

    @property
    def source(self) -> Source:
        """Where the images are."""
        return self._source

    @property
    def policy(self) -> ViewPolicy:
        """How views are drawn."""
        return self._policy

    @property
    def identity(self) -> dict[str, Any]:
        """See `Views.identity`."""
        return {"source": self._source.index.fingerprint, "policy": self._policy.to_json()}

    @property
    def num_samples(self) -> int:
        """See `Views.num_samples`."""
        return self._source.index.num_samples

    def read(self, sample: int, epoch: int) -> SampleView:
        """See `Views.read`."""
        if self._policy.name == "eval":
            view = self._kept_views.get(sample, lambda: self._draw(sample, 0), lambda pixels: pixels.nbytes)
            return SampleView(view, None)
        pixels_HWC = self._draw(sample, epoch)
        mix = draw_view_mix(self._policy, self._source, sample, epoch, self._partner_S)
        if mix != NOT_MIXED:
            partner = sample + mix.partner
            pixels_HWC = mix_pixels(pixels_HWC, self._draw(partner, epoch), mix)
        return SampleView(pixels_HWC, None, mix)

    def plan(self, sample_S: np.ndarray) -> None:
        """See `Views.plan`."""
        self._source.plan(sample_S)

    def expect(self, sample_S: np.ndarray, epoch: int) -> None:
        """See `Views.expect`."""
        del epoch
        if self.is_remote:
            kept = self._kept_views if self._policy.name == "eval" else self._kept_images
            self._source.expect(np.array([row for row in sample_S.tolist() if row not in kept], np.int64))

    @property
    def is_remote(self) -> bool:
        """See `Views.is_remote`."""
        return self._source.is_remote

    def _draw(self, sample: int, view: int) -> np.ndarray:
        if self._policy.decoding == "reduced":  # each view may need another reduction, so none is worth keeping
            encoded = self._source.read_encoded(sample)
            parameters_P = draw_sample_view(self._policy, self._source, sample, view, encoded.height, encoded.width)
            return render_alone(encoded, parameters_P, self._policy)
        read, keeps = self._source.read_image, self._policy.name != "eval"
        image = self._kept_images.get(sample, lambda: read(sample), _count_image_nbytes) if keeps else read(sample)
        parameters_P = draw_sample_view(self._policy, self._source, sample, view, image.height, image.width)
        return apply_view(image, parameters_P, self._policy)


def _count_nbytes(view: SampleView) -> int:
    return sum(_held_nbytes(array) for array in (view.pixels_HWC, view.codes_LTC) if array is not None)


def _held_nbytes(array: np.ndarray) -> int:
    """Memory that lives as long as the array: a slice of a chunk's layers keeps the whole chunk."""
    return array.base.nbytes if isinstance(array.base, np.ndarray) else array.nbytes


def _count_image_nbytes(image: Image.Image) -> int:
    return image.width * image.height * 4  # Pillow spends four bytes on an RGB pixel


class JoinedViews(Views):
    """The views of several parts as one: the rows of each part follow those of the part before.

    Each part keeps its own number of views, so epoch e takes view e modulo that number. It also keeps its own codec, so
    the codes in a batch come in one part for each cache. Join the labels in the same order, by `np.concatenate`.

    Args:
        parts: the views to join, in this order; none of them is a JoinedViews.

    Raises:
        ConfigError: there are no parts.
    """

    def __init__(self, parts: Sequence[Views]) -> None:
        if not parts:
            raise ConfigError("no views to join: give at least one.")
        self._parts = tuple(parts)
        self._stops = list(accumulate(part.num_samples for part in parts))
        self._starts = [0, *self._stops[:-1]]

    @property
    def identity(self) -> dict[str, Any]:
        """See `Views.identity`; the order of the parts matters, as row numbers depend on it."""
        return {"joined": {str(number): part.identity for number, part in enumerate(self._parts)}}

    @property
    def num_samples(self) -> int:
        """See `Views.num_samples`."""
        return self._stops[-1]

    def part_of(self, sample_B: np.ndarray) -> np.ndarray:
        """See `Views.part_of`."""
        return np.searchsorted(self._stops, sample_B, side="right")

    def read(self, sample: int, epoch: int) -> SampleView:
        """See `Views.read`."""
        part = bisect_right(self._stops, sample)
        return self._parts[part].read(sample - self._starts[part], epoch)

    @property
    def is_remote(self) -> bool:
        """See `Views.is_remote`."""
        return any(part.is_remote for part in self._parts)

    def plan(self, sample_S: np.ndarray) -> None:
        """See `Views.plan`."""
        part_S = self.part_of(sample_S)
        for part in np.unique(part_S).tolist():
            self._parts[part].plan(sample_S[part_S == part] - self._starts[part])

    def expect(self, sample_S: np.ndarray, epoch: int) -> None:
        """See `Views.expect`; each part is told of its own samples."""
        part_S = self.part_of(sample_S)
        for part in np.unique(part_S).tolist():
            self._parts[part].expect(sample_S[part_S == part] - self._starts[part], epoch)
