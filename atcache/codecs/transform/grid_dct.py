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

_MOST_DENSE_TOKENS = 640
"""Up to so many tokens a GPU applies the inverse as one matrix over all tokens: more operations, but one pass over
memory in place of five. On a CPU operations count."""


class GridDCT:
    """Orthonormal DCT-II over rows and columns of the patch grid; prefix tokens are left alone.

    Orthonormal, so that rounding errors keep their size. Coefficients are ordered from low to high frequency, so that
    each band of frequency is a slice of them. Tokens are the first axis here: then that slice is contiguous, and a
    product over some bands needs no copy.
    """

    def __init__(
        self, tokens: TokenLayout, device: torch.device, *, is_on: bool = True, is_dense: bool | None = None
    ) -> None:
        """Make the transform of a grid.

        Args:
            tokens: prefix tokens and patch grid.
            device: where `forward` and `inverse` run.
            is_on: False leaves patches as they are, in the order of the grid, all in one band.
            is_dense: whether `tokens` applies the inverse as one matrix over all tokens; None decides.
        """
        self._num_prefix_tokens = tokens.num_prefix_tokens
        self._is_on = is_on
        if is_dense is None:
            is_dense = device.type != "cpu" and tokens.num_tokens <= _MOST_DENSE_TOKENS
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
        self._inverse_TT: Tensor | None = None
        """`inverse` as a matrix, where `tokens` uses it."""
        if is_on and is_dense:
            one_TT = torch.eye(tokens.num_tokens, device=device)
            self._inverse_TT = self.inverse(one_TT.unsqueeze(1)).squeeze(1)

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

    def tokens(self, coefficients_TBC: Tensor, mean_TC: Tensor) -> Tensor:
        """The tokens that `forward` was given and a mean of each, batch first: shape (batch, token, C).

        Args:
            coefficients_TBC: what `forward` gave, of any float type.
            mean_TC: of the same type, which the sum has too.
        """
        if not self._is_on:
            return coefficients_TBC.transpose(0, 1) + mean_TC
        if self._inverse_TT is not None:
            num_views = coefficients_TBC.shape[1]
            inverse_TT = self._inverse_TT.to(coefficients_TBC.dtype)
            return torch.baddbmm(
                mean_TC.expand(num_views, -1, -1),
                inverse_TT.expand(num_views, -1, -1),
                coefficients_TBC.transpose(0, 1),
            )
        tokens_TBC = self.inverse(coefficients_TBC)
        return tokens_TBC.transpose(0, 1).contiguous().add_(mean_TC)

    def _cut(self, tokens_TBC: Tensor) -> tuple[Tensor, Tensor]:
        return tokens_TBC[: self._num_prefix_tokens], tokens_TBC[self._num_prefix_tokens :]

    def _apply(self, patches_TBC: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        """Multiply along both axes of the grid, one after the other, in the type of the patches."""
        height, width = len(rows), len(columns)
        rows, columns = rows.to(patches_TBC.dtype), columns.to(patches_TBC.dtype)
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
