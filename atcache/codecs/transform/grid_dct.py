"""The 2-D discrete cosine transform of tokens over the patch grid; prefix tokens are left alone."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from atcache.attention.tokens import TokenLayout


class GridDCT:
    """Orthonormal DCT-II over rows and columns of the patch grid, coefficients ordered from low to high frequency.

    Orthonormal, so that rounding errors keep their size. Low frequencies first, so that the zeros of the high ones come
    in long runs, which general-purpose compressors are good at.
    """

    def __init__(self, tokens: TokenLayout, device: torch.device) -> None:
        self._num_prefix_tokens = tokens.num_prefix_tokens
        height, width = tokens.grid_height, tokens.grid_width
        self._rows, self._columns = _dct(height).to(device), _dct(width).to(device)
        frequencies = [(row + column, row, column) for row in range(height) for column in range(width)]
        order = torch.tensor([row * width + column for _, row, column in sorted(frequencies)])
        self._order_T, self._inverse_order_T = order.to(device), order.argsort().to(device)

    def forward(self, tokens_BTC: Tensor) -> Tensor:
        """Prefix tokens, then coefficients, same shape."""
        prefix_BTC, patches_BTC = self._cut(tokens_BTC)
        coefficients_BTC = self._apply(patches_BTC, self._rows, self._columns)[:, self._order_T]
        return torch.cat([prefix_BTC, coefficients_BTC], dim=1)

    def inverse(self, coefficients_BTC: Tensor) -> Tensor:
        """The tokens `forward` was given."""
        prefix_BTC, ordered_BTC = self._cut(coefficients_BTC)
        patches_BTC = self._apply(ordered_BTC[:, self._inverse_order_T], self._rows.mT, self._columns.mT)
        return torch.cat([prefix_BTC, patches_BTC], dim=1)

    def _cut(self, tokens_BTC: Tensor) -> tuple[Tensor, Tensor]:
        return tokens_BTC[:, : self._num_prefix_tokens], tokens_BTC[:, self._num_prefix_tokens :]

    def _apply(self, patches_BTC: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        """Multiply along both axes of the grid, one after the other."""
        num_views, num_patches, num_components = patches_BTC.shape
        height, width = len(rows), len(columns)
        half = rows @ patches_BTC.reshape(num_views, height, width * num_components)
        whole = columns @ half.reshape(num_views * height, width, num_components)
        return whole.reshape(num_views, num_patches, num_components)


def _dct(size: int) -> Tensor:
    """The orthonormal DCT-II as a matrix: row f is the cosine of frequency f (Ahmed, Natarajan and Rao, 1974)."""
    frequency, place = torch.arange(size, dtype=torch.float64)[:, None], torch.arange(size, dtype=torch.float64)
    cosines = torch.cos(math.pi / size * (place + 0.5) * frequency) * math.sqrt(2 / size)
    cosines[0] /= math.sqrt(2)
    return cosines.float()
