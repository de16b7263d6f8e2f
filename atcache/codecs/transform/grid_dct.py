"""The 2-D discrete cosine transform of tokens over the patch grid, and its bands of frequency."""

from __future__ import annotations

import itertools
import math
from functools import cached_property

import torch
from torch import Tensor

from atcache.attention.tokens import TokenLayout

_BAND_ENDS = (0.0, 0.1, 0.2, 0.32, 0.5, 0.75)
"""The largest frequency of each band but the last. 1 is the highest that one axis of the grid can have. Part of the
format: the codec's state has a number for each band."""


class GridDCT:
    """Orthonormal DCT-II over rows and columns of the patch grid; prefix tokens are left alone.

    Orthonormal, so that rounding errors keep their size. Coefficients are ordered from low to high frequency, so that
    each band of frequency is a slice of them. Tokens are the first axis here: then that slice is contiguous, and a
    product over some bands needs no copy.
    """

    def __init__(self, tokens: TokenLayout, device: torch.device, *, is_on: bool = True) -> None:
        """Make the transform of a grid.

        Args:
            tokens: prefix tokens and patch grid.
            device: where `forward` and `inverse` run.
            is_on: False leaves patches as they are, in the order of the grid, all in one band.
        """
        self._num_prefix_tokens = tokens.num_prefix_tokens
        self._is_on = is_on
        height, width = tokens.grid_height, tokens.grid_width
        self._rows, self._columns = _dct(height).to(device), _dct(width).to(device)
        # In whole numbers, so that every machine finds the same order.
        frequency_2 = [
            ((row * width) ** 2 + (column * height) ** 2) for row in range(height) for column in range(width)
        ]
        order = sorted(range(height * width), key=lambda place: (frequency_2[place], place))
        self._order_T = torch.tensor(order, device=device)
        self._inverse_order_T = self._order_T.argsort()
        self._frequency_T = [math.sqrt(frequency_2[place]) / (height * width) for place in order]

    @cached_property
    def bands(self) -> tuple[slice, ...]:
        """The coefficients of each band along T: prefix tokens first, if there are any, then from low to high."""
        first = self._num_prefix_tokens
        ends = [0, len(self._frequency_T)]
        if self._is_on:
            ends[1:1] = [sum(frequency <= end for frequency in self._frequency_T) for end in _BAND_ENDS]
        starts = [0, *(first + end for end in ends)]
        return tuple(slice(start, stop) for start, stop in itertools.pairwise(starts) if stop > start)

    def forward(self, tokens_TBC: Tensor) -> Tensor:
        """Prefix tokens, then coefficients, same shape."""
        if not self._is_on:
            return tokens_TBC
        prefix_TBC, patches_TBC = self._cut(tokens_TBC)
        coefficients_TBC = self._apply(patches_TBC, self._rows, self._columns)
        return torch.cat([prefix_TBC, coefficients_TBC[self._order_T]])

    def inverse(self, coefficients_TBC: Tensor) -> Tensor:
        """The tokens that `forward` was given."""
        if not self._is_on:
            return coefficients_TBC
        prefix_TBC, ordered_TBC = self._cut(coefficients_TBC)
        patches_TBC = self._apply(ordered_TBC[self._inverse_order_T], self._rows.mT, self._columns.mT)
        return torch.cat([prefix_TBC, patches_TBC])

    def _cut(self, tokens_TBC: Tensor) -> tuple[Tensor, Tensor]:
        return tokens_TBC[: self._num_prefix_tokens], tokens_TBC[self._num_prefix_tokens :]

    def _apply(self, patches_TBC: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        """Multiply along both axes of the grid, one after the other."""
        height, width = len(rows), len(columns)
        half = rows @ patches_TBC.reshape(height, -1)
        return (columns @ half.view(height, width, -1)).view(patches_TBC.shape)

    @property
    def macs_per_token(self) -> int:
        """Multiply-adds that transforming one token of one value takes."""
        return len(self._rows) + len(self._columns) if self._is_on else 0


def _dct(size: int) -> Tensor:
    """The orthonormal DCT-II as a matrix: row f is the cosine of frequency f (Ahmed, Natarajan and Rao, 1974)."""
    frequency, place = torch.arange(size, dtype=torch.float64)[:, None], torch.arange(size, dtype=torch.float64)
    cosines = torch.cos(math.pi / size * (place + 0.5) * frequency) * math.sqrt(2 / size)
    cosines[0] /= math.sqrt(2)
    return cosines.float()
