"""Random numbers of one corruption of one view: raw Philox words, which numpy keeps stable between versions."""

from __future__ import annotations

import math
from functools import lru_cache
from statistics import NormalDist

import numpy as np

_LEVELS = 2**16
"""Noise is drawn from 16 bits a value: a normal number is at most 4.3 standard deviations."""


class Draws:
    """A stream of random numbers; equal seeds give equal streams.

    Args:
        seed: a whole number from 0, below 2**128.
    """

    def __init__(self, seed: int) -> None:
        self._philox = np.random.Philox(key=seed)

    def levels(self, *shape: int) -> np.ndarray:
        """Uniform whole numbers, int64, 0 to 65535."""
        count = math.prod(shape)
        words = self._philox.random_raw(-(-count // 4))
        return words.astype("<u8").view("<u2")[:count].astype(np.int64).reshape(shape)

    def uniforms(self, *shape: int) -> np.ndarray:
        """Uniform float64 in [0, 1), with 53 bits each."""
        words = self._philox.random_raw(math.prod(shape))
        return ((words >> np.uint64(11)) * 2.0**-53).reshape(shape)

    def uniform(self, low: float, high: float) -> float:
        """One uniform number from `low` to `high`."""
        return low + (high - low) * float(self.uniforms(1)[0])

    def normals(self, *shape: int) -> np.ndarray:
        """Standard normal numbers, float64, in steps of 2**-20."""
        return _normal_of_level()[self.levels(*shape)]


@lru_cache(maxsize=1)
def _normal_of_level() -> np.ndarray:
    """The quantile of the middle of each level. Rounded, because logarithms differ between machines in the last bit."""
    quantile = NormalDist().inv_cdf
    upper = [quantile((level + 0.5) / _LEVELS) for level in range(_LEVELS // 2, _LEVELS)]
    rounded = np.rint(np.array(upper) * 2**20) / 2**20
    return np.concatenate([-rounded[::-1], rounded])
