"""Batches of views for training and validation: batch N is the same whatever was read before it, and by whom."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from atcache.order import SampleOrder
from atcache.rendering import replay_view
from atcache.source import Source
from atcache.store.reader import CacheReader
from atcache.views import ViewPolicy, apply_view, draw_view
from atcache.worker_batches import read_ahead

Value = TypeVar("Value")


class Batch(NamedTuple):
    """What one step takes, in host memory."""

    sample_B: Tensor
    """Rows of the source, int64."""
    pixels_BHWC: Tensor
    """Views, uint8."""
    label_B: Tensor
    """Classes, int64."""
    codes_BLTC: Tensor | None
    """The teacher's codes of these views; None where they are not wanted."""


class Views(Protocol):
    """Where a sample's pixels and codes come from. May be forked or pickled to worker processes."""

    @property
    def identity(self) -> dict[str, Any]:
        """What must be equal for another run's views to be these, as JSON."""
        ...

    def read(self, sample: int, epoch: int) -> tuple[np.ndarray, np.ndarray | None]:
        """The view of `sample` that `epoch` uses: pixels_HWC uint8, and codes_LTC or None. Not to be written to."""
        ...


class Kept(Generic[Value]):
    """Values read once and then kept in memory, as long as they fit in a budget.

    What was kept first stays: with a new permutation every epoch no other choice would be better, and evicting costs.
    """

    def __init__(self, budget_nbytes: int) -> None:
        self._free_nbytes = budget_nbytes
        self._values: dict[Hashable, Value] = {}

    def get(self, key: Hashable, read: Callable[[], Value], count_nbytes: Callable[[Value], int]) -> Value:
        """The value of `key`, read if it is not kept."""
        value = self._values.get(key)
        if value is None:
            value = read()
            if (nbytes := count_nbytes(value)) <= self._free_nbytes:
                self._free_nbytes -= nbytes
                self._values[key] = value
        return value


class CachedViews:
    """The fixed views of a cache; epoch e uses view e modulo their number.

    Pixels come from the cache where it stores them; else they are replayed from the tars and checked by their hash.

    Args:
        reader: the cache.
        source: the tars; needed where the cache stores no pixels.
        with_codes: whether codes are wanted.
        positions: which stored layers' codes.
        keep_nbytes: memory for views that were read, in each process that reads.
    """

    def __init__(
        self,
        reader: CacheReader,
        source: Source | None,
        *,
        with_codes: bool,
        positions: slice = slice(None),
        keep_nbytes: int = 0,
    ) -> None:
        self._reader, self._source = reader, source
        self._with_codes, self._positions = with_codes, positions
        self._kept = Kept[tuple[np.ndarray, np.ndarray | None]](keep_nbytes)
        self._policy = ViewPolicy.from_json(reader.attributes["views"]["policy"])
        self._versions: dict[str, str] = reader.attributes["created_by"]["views"]

    @property
    def identity(self) -> dict[str, Any]:
        """See `Views.identity`."""
        attributes = self._reader.attributes
        return {
            "source": attributes["source"]["fingerprint"],
            "policy": attributes["views"]["policy"],
            "num_views": attributes["views"]["num_views"],
            "codec": attributes["codec"] if self._with_codes else None,
        }

    def read(self, sample: int, epoch: int) -> tuple[np.ndarray, np.ndarray | None]:
        """See `Views.read`."""
        view = epoch % self._reader.layout.num_views
        return self._kept.get((view, sample), lambda: self._read(view, sample), _count_nbytes)

    def _read(self, view: int, sample: int) -> tuple[np.ndarray, np.ndarray | None]:
        codes_LTC = self._reader.read_codes(view, sample, self._positions) if self._with_codes else None
        return self._read_pixels(view, sample), codes_LTC

    def _read_pixels(self, view: int, sample: int) -> np.ndarray:
        if self._reader.layout.pixels is not None:
            return self._reader.read_pixels(view, sample)
        assert self._source is not None, "views that are not stored are replayed from a source"
        return replay_view(
            self._source,
            self._policy,
            sample,
            self._reader.parameters(view, sample),
            self._reader.pixel_hash(view, sample),
            self._versions,
        )


class FreshViews:
    """A new random view every epoch, without a cache.

    Args:
        source: the tars.
        policy: how views are drawn; under "eval" all epochs see the same one.
        keep_nbytes: memory for decoded images (for finished views under "eval"), in each process that reads.
    """

    def __init__(self, source: Source, policy: ViewPolicy, *, keep_nbytes: int = 0) -> None:
        self._source, self._policy = source, policy
        self._kept_images = Kept[Image.Image](keep_nbytes)
        self._kept_views = Kept[np.ndarray](keep_nbytes)

    @property
    def identity(self) -> dict[str, Any]:
        """See `Views.identity`."""
        return {"source": self._source.index.fingerprint, "policy": self._policy.to_json()}

    def read(self, sample: int, epoch: int) -> tuple[np.ndarray, None]:
        """See `Views.read`."""
        if self._policy.name == "eval":
            view = self._kept_views.get(
                sample, lambda: self._draw(self._source.read_image(sample), sample, 0), lambda pixels: pixels.nbytes
            )
            return view, None
        image = self._kept_images.get(sample, lambda: self._source.read_image(sample), _count_image_nbytes)
        return self._draw(image, sample, epoch), None

    def _draw(self, image: Image.Image, sample: int, view: int) -> np.ndarray:
        key = self._source.index.sample_key(sample)
        return apply_view(image, draw_view(self._policy, key, view, image.height, image.width), self._policy)


def _count_nbytes(view: tuple[np.ndarray, np.ndarray | None]) -> int:
    return sum(array.nbytes for array in view if array is not None)


def _count_image_nbytes(image: Image.Image) -> int:
    return image.width * image.height * 4  # Pillow spends four bytes on an RGB pixel


class _Batches(Dataset[Batch]):
    """Number -> batch of (sample, epoch) pairs."""

    def __init__(self, views: Views, label_S: np.ndarray, order: SampleOrder | Sequence[list[tuple[int, int]]]) -> None:
        self._views, self._label_S, self._order = views, label_S, order

    def __getitem__(self, number: int) -> Batch:
        order = self._order
        pairs = order.batch(number) if isinstance(order, SampleOrder) else order[number]
        views = [self._views.read(sample, epoch) for sample, epoch in pairs]
        sample_B = np.array([sample for sample, _ in pairs], np.int64)
        codes = [codes_LTC for _, codes_LTC in views if codes_LTC is not None]
        return Batch(
            sample_B=torch.from_numpy(sample_B),
            pixels_BHWC=torch.from_numpy(np.stack([pixels_HWC for pixels_HWC, _ in views])),
            label_B=torch.from_numpy(self._label_S[sample_B]),
            codes_BLTC=torch.from_numpy(np.stack(codes)) if codes else None,
        )


def training_batches(
    views: Views, label_S: np.ndarray, order: SampleOrder, *, first_step: int, stop_step: int, workers: int
) -> Iterator[Batch]:
    """The batches of steps first_step .. stop_step - 1, read ahead by `workers` processes (0: in this one)."""
    return _load(_Batches(views, label_S, order), range(first_step, stop_step), workers)


def validation_batches(
    views: Views, label_S: np.ndarray, sample_S: np.ndarray, *, batch_size: int, workers: int
) -> Iterator[Batch]:
    """All samples of `sample_S` once, in order, in view 0; the last batch may be smaller."""
    starts = range(0, len(sample_S), batch_size)
    pairs = [[(int(sample), 0) for sample in sample_S[start : start + batch_size]] for start in starts]
    return _load(_Batches(views, label_S, pairs), range(len(pairs)), workers)


def _load(batches: _Batches, numbers: range, workers: int) -> Iterator[Batch]:
    return read_ahead(batches, numbers, workers=workers, pin_memory=torch.cuda.is_available())
