"""Batches for training and validation, in an order that is a pure function of (seed, step).

The order is one endless stream: epoch 0's permutation of the samples, then epoch 1's, and so on, cut into batches. So
every sample comes once an epoch, all batches are full, and a run that stops after step N continues with batch N,
whatever the number of workers was or is.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from atcache.errors import ConfigError
from atcache.rendering import replay_view
from atcache.source import Source
from atcache.store.reader import CacheReader
from atcache.views import ViewPolicy, apply_view, draw_view


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
    """Where a sample's pixels and codes come from."""

    def read(self, sample: int, epoch: int) -> tuple[np.ndarray, np.ndarray | None]:
        """The view of `sample` that `epoch` uses: pixels_HWC uint8, and codes_LTC or None."""
        ...


class CachedViews:
    """The fixed views of a cache; epoch e uses view e modulo their number.

    Pixels come from the cache where it stores them; else they are replayed from the tars and checked by their hash.

    Args:
        reader: the cache.
        source: the tars; needed where the cache stores no pixels.
        with_codes: whether codes are wanted.
        positions: which stored layers' codes.
        keep_nbytes: views kept in memory, decoded, up to this many bytes in each worker process. What was kept first
            stays: with a new permutation every epoch no other choice would be better, and evicting costs.
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
        self._keep_nbytes = keep_nbytes
        self._kept_nbytes = 0
        self._kept: dict[tuple[int, int], tuple[np.ndarray, np.ndarray | None]] = {}
        self._policy = ViewPolicy.from_json(reader.attributes["views"]["policy"])
        self._versions: dict[str, str] = reader.attributes["created_by"]["views"]

    def read(self, sample: int, epoch: int) -> tuple[np.ndarray, np.ndarray | None]:
        """See `Views.read`."""
        view = epoch % self._reader.layout.num_views
        kept = self._kept.get((view, sample))
        if kept is not None:
            return kept
        pixels_HWC = self._read_pixels(view, sample)
        codes_LTC = self._reader.read_codes(view, sample, self._positions) if self._with_codes else None
        nbytes = pixels_HWC.nbytes + (0 if codes_LTC is None else codes_LTC.nbytes)
        if self._kept_nbytes + nbytes <= self._keep_nbytes:
            self._kept[view, sample] = pixels_HWC, codes_LTC
            self._kept_nbytes += nbytes
        return pixels_HWC, codes_LTC

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
    """A new random view every epoch, without a cache: what training from scratch and fine-tuning usually use."""

    def __init__(self, source: Source, policy: ViewPolicy) -> None:
        self._source, self._policy = source, policy

    def read(self, sample: int, epoch: int) -> tuple[np.ndarray, None]:
        """See `Views.read`."""
        image = self._source.read_image(sample)
        key = self._source.index.sample_key(sample)
        return apply_view(image, draw_view(self._policy, key, epoch, image.height, image.width), self._policy), None


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class SampleOrder:
    """The endless stream of (sample, epoch), cut into batches."""

    sample_S: np.ndarray
    """The samples to train on, int64."""
    seed: int
    """Another seed, another order."""
    batch_size: int
    """Samples a step, over all processes."""

    def batch(self, step: int) -> list[tuple[int, int]]:
        """The (sample, epoch) pairs of one step; equal for equal arguments, everywhere."""
        num_samples = len(self.sample_S)
        pairs: list[tuple[int, int]] = []
        position, stop = step * self.batch_size, (step + 1) * self.batch_size
        while position < stop:
            epoch, start = divmod(position, num_samples)
            end = min(num_samples, start + stop - position)
            order = epoch_permutation(num_samples, self.seed, epoch)[start:end]
            pairs += [(int(sample), epoch) for sample in self.sample_S[order]]
            position += end - start
        return pairs


@lru_cache(maxsize=4)
def epoch_permutation(num_samples: int, seed: int, epoch: int) -> np.ndarray:
    """The order of `num_samples` things in an epoch, int64: sorted by raw Philox words.

    numpy keeps a bit generator's raw stream the same for ever, but not `Generator.permutation`. The last few orders are
    remembered, since every step of an epoch asks for the same one.
    """
    digest = hashlib.blake2b(f"order {seed} {epoch}".encode(), digest_size=16).digest()
    words = np.random.Philox(key=int.from_bytes(digest, "little")).random_raw(num_samples)
    order = np.argsort(words, kind="stable")
    order.flags.writeable = False
    return order


def choose_subset(label_S: np.ndarray, eligible_S: np.ndarray, num_samples: int, seed: int) -> np.ndarray:
    """`num_samples` of the eligible samples, as evenly over the classes as they go, ascending int64.

    Args:
        label_S: class of every sample of the source.
        eligible_S: rows that may be chosen.
        num_samples: how many.
        seed: which ones.

    Raises:
        ConfigError: there are fewer.
    """
    if num_samples > len(eligible_S):
        raise ConfigError(f"subset of {num_samples} samples: only {len(eligible_S)} can be used. Choose at most that.")
    shuffled = eligible_S[epoch_permutation(len(eligible_S), seed, -1)]
    # A sample's rank within its class: all first ones of a class come before all second ones.
    rank = np.zeros(len(shuffled), np.int64)
    for label in np.unique(label_S[shuffled]):
        of_class = np.flatnonzero(label_S[shuffled] == label)
        rank[of_class] = np.arange(len(of_class))
    return np.sort(shuffled[np.argsort(rank, kind="stable")[:num_samples]])


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
    return iter(
        DataLoader(
            batches,
            batch_size=None,
            sampler=numbers,
            num_workers=workers,
            collate_fn=_as_it_is,
            pin_memory=torch.cuda.is_available(),
        )
    )


def _as_it_is(batch: Batch) -> Batch:
    return batch
