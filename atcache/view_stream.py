"""Batches of fresh random views for training without labels: batch `step` is a pure function of (seed, step)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from atcache.source import Source
from atcache.views import ViewPolicy, apply_view, draw_view

MAX_RESIDENT_NBYTES = 512 * 2**20
"""Datasets whose decoded pixels fit in this are decoded once and kept in memory."""


class ViewBatches(Dataset[Tensor]):
    """Batch `step` as uint8 pixels, shape (batch, height, width, 3).

    Samples follow one random order after another without a gap, so every batch is full; the view of a sample is the
    number of the order it is in. May be forked or pickled to worker processes.
    """

    def __init__(self, source: Source, policy: ViewPolicy, *, batch_size: int, seed: int) -> None:
        """Choose the samples without problems, and keep their pixels if they are few.

        Args:
            source: where the images are.
            policy: how views are drawn; under "eval" every epoch is the same.
            batch_size: samples in a batch.
            seed: of the order of the samples; that of the views is in `policy`.

        Raises:
            BadImageError: an image cannot be decoded.
        """
        self.source, self.policy = source, policy
        self.batch_size, self.seed = batch_size, seed
        self.samples = np.flatnonzero(source.index.problem_S == 0)
        self.pixels: Tensor | None = None
        self.images: list[Tensor] | None = None
        if policy.name == "eval":
            self._keep_views()
        else:
            self._keep_images()
        self._order: tuple[int, Tensor] = (-1, torch.empty(0))

    @property
    def is_resident(self) -> bool:
        """Whether the dataset is in memory."""
        return self.pixels is not None or self.images is not None

    def __getitem__(self, step: int) -> Tensor:
        """Batch `step`."""
        first = step * self.batch_size
        places = range(first, first + self.batch_size)
        num_samples = len(self.samples)
        picks = [(place // num_samples, place % num_samples) for place in places]
        rows = [(epoch, int(self._epoch_order(epoch)[position])) for epoch, position in picks]
        if self.pixels is not None:
            return self.pixels[torch.tensor([row for _, row in rows])]
        return torch.from_numpy(np.stack([self._view(row, epoch) for epoch, row in rows]))

    def _epoch_order(self, epoch: int) -> Tensor:
        if self._order[0] != epoch:
            generator = torch.Generator().manual_seed(mixed_seed(self.seed, epoch))
            self._order = (epoch, torch.randperm(len(self.samples), generator=generator))
        return self._order[1]

    def _view(self, row: int, view: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
        sample = int(self.samples[row])
        image = self.source.read_image(sample) if self.images is None else Image.fromarray(self.images[row].numpy())
        key = self.source.index.sample_key(sample)
        parameters_P = draw_view(self.policy, key, view, image.height, image.width)
        return apply_view(image, parameters_P, self.policy)

    def _keep_views(self) -> None:
        height, width = self.policy.image_height, self.policy.image_width
        if len(self.samples) * height * width * 3 > MAX_RESIDENT_NBYTES:
            return
        pixels = np.empty((len(self.samples), height, width, 3), dtype=np.uint8)
        for row in range(len(self.samples)):
            pixels[row] = self._view(row, 0)
        self.pixels = torch.from_numpy(pixels)

    def _keep_images(self) -> None:
        images: list[Tensor] = []
        nbytes = 0
        for sample in self.samples:
            pixels = np.array(self.source.read_image(int(sample)))
            nbytes += pixels.nbytes
            # The first images tell whether all of them will fit, before half a minute is lost in decoding.
            if nbytes / (len(images) + 1) * len(self.samples) > MAX_RESIDENT_NBYTES and len(images) >= 16:
                return
            images.append(torch.from_numpy(pixels))
        if nbytes <= MAX_RESIDENT_NBYTES:
            self.images = images


def stream_batches(batches: ViewBatches, *, start: int, stop: int, num_workers: int) -> Iterator[Tensor]:
    """Batches `start` to `stop` - 1 in order, made by worker processes when `num_workers` > 0."""
    steps = list(range(start, stop))
    if num_workers == 0 or batches.pixels is not None:
        yield from (batches[step] for step in steps)
        return
    yield from DataLoader(batches, batch_size=None, sampler=steps, num_workers=num_workers)


def mixed_seed(*numbers: int) -> int:
    """One 63-bit seed from several numbers, so that (0, 1) and (1, 0) share nothing."""
    words = np.random.SeedSequence(numbers).generate_state(1, np.uint64)
    return int(words[0]) >> 1
