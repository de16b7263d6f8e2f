"""A batch: what one step of training or validation takes. Its codes come in one part for each cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class Codes(NamedTuple):
    """The teacher's codes of the samples of a batch that are in one cache."""

    part: int
    """Which of the joined caches, from 0; 0 if there is only one."""
    row_B: np.ndarray
    """Their rows in the batch, ascending int64. They stay in host memory, where batches are cut."""
    codes_BLTC: Tensor
    """Codes of their views, of the cache's own type; L, T and C are this cache's own."""
    extent: int | None = None
    """What the cache's `Coder.extent` says of these codes; None if it was not asked yet."""


class Batch(NamedTuple):
    """What one step takes."""

    sample_B: Tensor
    """Rows of the source, int64."""
    pixels_BHWC: Tensor
    """Views, uint8."""
    label_B: Tensor
    """Classes, int64."""
    mix_label_B: Tensor
    """Classes of the samples that are mixed in, int64; equal to `label_B` where none is."""
    mix_share_B: Tensor
    """Share of each sample's own image, and so of `label_B`, float32 in 0..1; `mix_label_B` has the rest. 1 if not
    mixed."""
    codes: tuple[Codes, ...] = ()
    """The teacher's codes, one part for each cache that has samples of the batch; empty if they are not wanted."""
    beside: tuple[Codes, ...] = ()
    """Codes of other teachers, one part of all rows for each, see `BesideViews`."""
    is_mixed: bool | None = None
    """Whether any sample is mixed with another; None if `mix_share_B` has to tell."""

    def targets(self, num_classes: int) -> Tensor:
        """What to predict: classes, int64 (batch,); for mixed views, class probabilities, float32 (batch, class)."""
        is_mixed = bool((self.mix_share_B != 1).any()) if self.is_mixed is None else self.is_mixed
        return self.class_probabilities(num_classes) if is_mixed else self.label_B

    def class_probabilities(self, num_classes: int) -> Tensor:
        """The share of each class in each image, float32 (batch, class): two classes where two samples are mixed.

        With label smoothing on top they equal the targets of timm's `Mixup`, and cross-entropy with them equals its
        `SoftTargetCrossEntropy`.
        """
        # Not torch's `one_hot`, which looks at the labels to check them, and so waits for the device.
        class_C = torch.arange(num_classes, device=self.label_B.device)
        own_BC, mixed_in_BC = ((each.unsqueeze(1) == class_C).float() for each in (self.label_B, self.mix_label_B))
        share_B1 = self.mix_share_B.unsqueeze(1)
        return share_B1 * own_BC + (1 - share_B1) * mixed_in_BC

    def to(self, device: torch.device) -> Batch:
        """The batch on a device."""
        return self._changed(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """The batch in pinned memory, from which a GPU copies without waiting; torch's `DataLoader` calls this."""
        return self._changed(lambda tensor: tensor.pin_memory())

    def tensors(self) -> Iterator[Tensor]:
        """All tensors of the batch."""
        yield from (self.sample_B, self.pixels_BHWC, self.label_B, self.mix_label_B, self.mix_share_B)
        yield from (part.codes_BLTC for part in (*self.codes, *self.beside))

    def _changed(self, change: Callable[[Tensor], Tensor]) -> Batch:
        codes, beside = (
            tuple(part._replace(codes_BLTC=change(part.codes_BLTC)) for part in parts)
            for parts in (self.codes, self.beside)
        )
        return Batch(*map(change, self[:5]), codes=codes, beside=beside, is_mixed=self.is_mixed)

    def rows(self, first: int, stop: int) -> Batch:
        """The rows first .. stop - 1 as a batch; views, not copies."""
        tensors = (tensor[first:stop] for tensor in self[:5])
        codes, beside = (_rows_of(parts, first, stop) for parts in (self.codes, self.beside))
        return Batch(*tensors, codes=codes, beside=beside, is_mixed=self.is_mixed)

    def cut(self, num_parts: int) -> list[Batch]:
        """The batch in equal parts; its size must be a multiple of `num_parts`."""
        if num_parts == 1:
            return [self]
        size = len(self.label_B) // num_parts
        return [self.rows(first, first + size) for first in range(0, num_parts * size, size)]


def _rows_of(parts: tuple[Codes, ...], first: int, stop: int) -> tuple[Codes, ...]:
    """The parts' rows from `first` to before `stop`, without the parts that have none."""
    found: list[Codes] = []
    for part in parts:
        start, end = np.searchsorted(part.row_B, [first, stop]).tolist()
        if start < end:
            row_B, codes_BLTC = part.row_B[start:end] - first, part.codes_BLTC[start:end]
            found.append(part._replace(row_B=row_B, codes_BLTC=codes_BLTC))
    return tuple(found)
