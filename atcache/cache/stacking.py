"""Stack a batch sample by sample, in shared memory that the training process need not copy."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from atcache.cache.slots import take_memory


class Stack:
    """Arrays of one shape, stacked one by one, while each is still in the processor's cache.

    In a worker process the stack is in its slot of shared memory. Arrays whose last two axes are swapped, as in
    transposed codes, keep their order in memory: transposing integers would cost another pass.

    Args:
        num_rows: how many arrays will be added.
    """

    def __init__(self, num_rows: int) -> None:
        self._num_rows = num_rows
        self._num_added = 0
        self._is_swapped = False
        self._stored: Tensor | None = None

    def add(self, array: np.ndarray) -> None:
        """Copy one array into the next row."""
        if self._num_added == 0:
            self._is_swapped = not array.flags.c_contiguous
        stored = array.swapaxes(-1, -2) if self._is_swapped else array
        if self._stored is None:
            self._stored = _empty((self._num_rows, *stored.shape), stored.dtype)
        self._stored.numpy()[self._num_added] = stored
        self._num_added += 1

    @property
    def tensor(self) -> Tensor | None:
        """All rows; None if nothing was added."""
        if self._stored is None:
            return None
        assert self._num_added == self._num_rows, f"{self._num_added} of {self._num_rows} rows were added"
        return self._stored.transpose(-1, -2) if self._is_swapped else self._stored


def _empty(shape: tuple[int, ...], dtype: np.dtype) -> Tensor:
    """A new tensor; in a worker process in shared memory, if there is room."""
    like = torch.from_numpy(np.empty(0, dtype))
    taken = take_memory(math.prod(shape) * dtype.itemsize)
    return like.new_empty(shape) if taken is None else torch.from_numpy(taken).view(like.dtype).view(shape)
