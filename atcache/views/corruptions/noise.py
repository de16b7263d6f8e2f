"""Noise: Gaussian, shot and impulse noise, drawn for each value of each pixel."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np

from atcache.views.corruptions.draws import Draws
from atcache.views.corruptions.filters import to_pixels

_GAUSSIAN_SIGMA = (0.08, 0.12, 0.18, 0.26, 0.38)
_PHOTONS = (60, 25, 12, 5, 3)
_REPLACED = (0.03, 0.06, 0.09, 0.17, 0.27)


def gaussian_noise(pixels_HWC: np.ndarray, severity: int, draws: Draws) -> np.ndarray:
    """Adds normal numbers, with a standard deviation of 0.08 to 0.38 of white: the noise of low light."""
    return to_pixels(pixels_HWC + 255 * _GAUSSIAN_SIGMA[severity - 1] * draws.normals(*pixels_HWC.shape))


def shot_noise(pixels_HWC: np.ndarray, severity: int, draws: Draws) -> np.ndarray:
    """Counts photons: a Poisson number whose mean is 60 to 3 for white and falls with the value."""
    photons = _PHOTONS[severity - 1]
    thresholds, first_of_value = _photon_thresholds(photons)
    values = pixels_HWC.astype(np.int64)
    found = np.searchsorted(thresholds, values * 2**16 + draws.levels(*pixels_HWC.shape), side="right")
    return to_pixels((found - first_of_value[values]) * (255 / photons))


@lru_cache(maxsize=5)
def _photon_thresholds(photons: int) -> tuple[np.ndarray, np.ndarray]:
    """The Poisson distributions of all 256 values in one ascending row, and where that of each value begins.

    A level of 16 bits gives the count k if it is from threshold k - 1 and below threshold k, which are the distribution
    function in levels; those of value v are raised by v * 2**16.
    """
    most = 2 * photons + 40  # far beyond what 16 bits reach
    rows: list[list[int]] = []
    for value in range(256):
        mean = photons * value / 255
        chance, below = math.exp(-mean), 0.0
        row: list[int] = []
        for count in range(most):
            below += chance
            row.append(value * 2**16 + min(2**16, round(below * 2**16)))
            chance *= mean / (count + 1)
        rows.append(row)
    return np.array(rows).ravel(), np.arange(256) * most


def impulse_noise(pixels_HWC: np.ndarray, severity: int, draws: Draws) -> np.ndarray:
    """Makes 3 % to 27 % of the values black or white: salt and pepper, as of broken pixels."""
    level_HWC, limit = draws.levels(*pixels_HWC.shape), round(_REPLACED[severity - 1] * 2**16)
    noisy_HWC = pixels_HWC.copy()
    noisy_HWC[level_HWC < limit] = 0
    noisy_HWC[level_HWC < limit // 2] = 255
    return noisy_HWC
