"""Batches of views for training and validation. Batch N is always the same, whatever was read before it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from threading import Thread
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from atcache.cache.stacking import Stack
from atcache.errors import AtcacheError, ConfigError
from atcache.feed.batch import Batch, Codes
from atcache.feed.order import SampleOrder
from atcache.feed.sample_views import Views
from atcache.feed.workers import read_ahead
from atcache.views.mixing import Mix


class _Batches(Dataset[Batch]):
    """Number -> batch of (sample, epoch) pairs."""

    def __init__(self, views: Views, label_S: np.ndarray, order: SampleOrder | Sequence[list[tuple[int, int]]]) -> None:
        self._views, self._label_S, self._order = views, label_S, order
        self._expected: list[tuple[int, int]] = []
        self._has_planned = False

    def __getitem__(self, number: int) -> Batch:
        order = self._order
        if self._views.is_remote and not self._has_planned:
            self._has_planned = True  # in each process that reads
            self._views.plan(self._all_samples())
        if isinstance(order, SampleOrder):
            self._expect(order, number)
        pairs = order.batch(number) if isinstance(order, SampleOrder) else order[number]
        sample_B = np.array([sample for sample, _ in pairs], np.int64)
        if self._views.is_remote:
            for epoch in {epoch for _, epoch in pairs}:
                self._views.expect(np.unique([sample for sample, its_epoch in pairs if its_epoch == epoch]), epoch)
        part_B = self._views.part_of(sample_B)
        pixels = Stack(len(pairs))
        codes = {part: Stack(count) for part, count in enumerate(np.bincount(part_B).tolist())}
        beside: list[Stack] = []
        mixes: list[Mix] = []
        for part, (sample, epoch) in zip(part_B.tolist(), pairs, strict=True):
            view = self._views.read(sample, epoch)
            pixels.add(view.pixels_HWC)
            if view.codes_LTC is not None:
                codes[part].add(view.codes_LTC)
            beside = beside or [Stack(len(pairs)) for _ in view.beside]
            for stack, codes_LTC in zip(beside, view.beside, strict=True):
                stack.add(codes_LTC)
            mixes.append(view.mix)
        partner_B = sample_B + np.array([mix.partner for mix in mixes], np.int64)
        pixels_BHWC = pixels.tensor
        assert pixels_BHWC is not None, "a batch has samples"
        return Batch(
            sample_B=torch.from_numpy(sample_B),
            pixels_BHWC=pixels_BHWC,
            label_B=torch.from_numpy(self._label_S[sample_B]),
            mix_label_B=torch.from_numpy(self._label_S[partner_B]),
            mix_share_B=torch.tensor([mix.share for mix in mixes], dtype=torch.float32),
            codes=tuple(
                Codes(part, np.flatnonzero(part_B == part), stack.tensor)
                for part, stack in codes.items()
                if stack.tensor is not None
            ),
            beside=tuple(Codes(0, np.arange(len(pairs)), stack.tensor) for stack in beside if stack.tensor is not None),
            is_mixed=any(mix.share != 1 for mix in mixes),
        )

    def _all_samples(self) -> np.ndarray:
        if isinstance(self._order, SampleOrder):
            return np.unique(self._order.sample_S)
        return np.unique([sample for pairs in self._order for sample, _ in pairs])

    def _expect(self, order: SampleOrder, step: int) -> None:
        """Start to read this step's windows and the next ones ahead, each only once."""
        coming = [(epoch, window + ahead) for epoch, window in order.windows(step) for ahead in (0, 1)]
        new = [place for place in dict.fromkeys(coming) if place not in self._expected]
        if new:
            # In a thread, as a busy disk makes even the request to read ahead wait.
            Thread(target=self._expect_windows, args=(order, new), name="atcache-expect", daemon=True).start()
        self._expected = coming or self._expected

    def _expect_windows(self, order: SampleOrder, windows: Sequence[tuple[int, int]]) -> None:
        for epoch, window in windows:
            # If something is wrong, reading the batch itself will raise it.
            with suppress(AtcacheError, OSError):
                if len(sample_S := order.window_samples(epoch, window)):
                    self._views.expect(sample_S, epoch)


class BatchStream:
    """The batches of a training, which can stop after any batch and continue there in another process.

    Iterating gives the remaining batches. `state_dict` counts what was handed out, not what was read ahead.

    Args:
        views: where samples are read.
        label_S: class of every row of the source.
        order: which samples a batch has.
        num_steps: batches in all.
        first_step: how many of them were handed out before, by another stream.
        workers: processes that read ahead; 0 for none. The stream may continue with another number.
    """

    def __init__(
        self,
        views: Views,
        label_S: np.ndarray,
        order: SampleOrder,
        *,
        num_steps: int,
        first_step: int = 0,
        workers: int = 0,
    ) -> None:
        self._views, self._label_S, self._order = views, label_S, order
        self._num_steps, self._workers = num_steps, workers
        self._step = first_step

    def __len__(self) -> int:
        return self._num_steps - self._step

    def __iter__(self) -> Iterator[Batch]:
        batches = _Batches(self._views, self._label_S, self._order)
        for batch in _load(batches, range(self._step, self._num_steps), self._workers):
            self._step += 1
            yield batch

    @property
    def step(self) -> int:
        """How many batches were handed out."""
        return self._step

    def state_dict(self) -> dict[str, Any]:
        """The position in the stream, and what identifies the stream; JSON values."""
        return {"step": self._step, "order": self._order.identity, "views": self._views.identity}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue after the last batch that was handed out when `state` was taken.

        Raises:
            ConfigError: `state` is that of another stream.
        """
        ours = self.state_dict()
        for part in ("order", "views"):
            differences = [name for name, value in ours[part].items() if state[part].get(name) != value]
            if differences or state[part].keys() != ours[part].keys():
                raise ConfigError(
                    f"the state is of another stream of batches: {part} differ in {', '.join(differences) or 'kind'}. "
                    "Make this stream with the samples, seed, batch size, shuffle and views of that one."
                )
        if not 0 <= state["step"] <= self._num_steps:
            raise ConfigError(
                f"the state is at step {state['step']}, but this stream has {self._num_steps} steps. Make it with as "
                "many steps as that one."
            )
        self._step = int(state["step"])


def validation_batches(
    views: Views, label_S: np.ndarray, sample_S: np.ndarray, *, batch_size: int, workers: int
) -> Iterator[Batch]:
    """All samples of `sample_S` once, in order, in view 0; the last batch may be smaller."""
    starts = range(0, len(sample_S), batch_size)
    pairs = [[(int(sample), 0) for sample in sample_S[start : start + batch_size]] for start in starts]
    return _load(_Batches(views, label_S, pairs), range(len(pairs)), workers)


def _load(batches: _Batches, numbers: range, workers: int) -> Iterator[Batch]:
    # Not where there is a GPU that nothing runs on: pinning would take memory of it.
    return read_ahead(batches, numbers, workers=workers, pin_memory=torch.cuda.is_initialized())
