"""Clouds and ice that are drawn from random numbers."""

from __future__ import annotations

import numpy as np

from atcache.views.corruptions.draws import Draws
from atcache.views.corruptions.filters import ONE, motion_blur

_NUM_FEATHERS = 6
"""Directions in which ice grows."""
_FEATHER_RADIUS, _FEATHER_SIGMA = 15, 8
"""How long feathers of ice are, in pixels."""


def clouds(height: int, width: int, decay: float, draws: Draws) -> np.ndarray:
    """A height map of clouds, float64 (height, width), within 0..1: diamond-square midpoint displacement.

    Fournier, Fussell & Carpenter (1982). The map is made for a square of a power of two, which wraps around, and cut.

    Args:
        height: in pixels.
        width: in pixels.
        decay: how much less each halving of the step displaces, before squaring: large gives smooth clouds.
        draws: where the numbers come from.
    """
    side = max(2, 1 << (max(height, width) - 1).bit_length())
    map_NN = np.zeros((side, side))
    step, reach = side, 1.0
    while step >= 2:
        half = step // 2
        corner = map_NN[::step, ::step]
        row_sums = corner + np.roll(corner, -1, axis=0)
        map_NN[half::step, half::step] = _displaced(row_sums + np.roll(row_sums, -1, axis=1), reach, draws)
        middle = map_NN[half::step, half::step]
        beside = corner + np.roll(corner, -1, axis=1) + (middle + np.roll(middle, 1, axis=0))
        below = corner + np.roll(corner, -1, axis=0) + (middle + np.roll(middle, 1, axis=1))
        map_NN[::step, half::step] = _displaced(beside, reach, draws)
        map_NN[half::step, ::step] = _displaced(below, reach, draws)
        step, reach = half, reach / (decay * decay)
    map_NN -= map_NN.min()
    return map_NN[:height, :width] / map_NN.max()


def _displaced(sum_of_four: np.ndarray, reach: float, draws: Draws) -> np.ndarray:
    return sum_of_four / 4 + reach * (2 * draws.uniforms(*sum_of_four.shape) - 1)


def ice(height: int, width: int, draws: Draws) -> np.ndarray:
    """A window covered with frost, float64 (height, width, 3) in 0..255.

    Feathers of ice grow in some directions from random points, denser where a cloud map is high. This stands for the
    photographs of ImageNet-C, which are not here.

    Args:
        height: in pixels.
        width: in pixels.
        draws: where the numbers come from.
    """
    density_HW = clouds(height, width, 1.6, draws)
    grain_HW = clouds(height, width, 1.15, draws)
    feathers_HW = np.zeros((height, width), np.int32)
    first = draws.uniform(0, 360)
    for number in range(_NUM_FEATHERS):
        # A point is a seed of ice in up to 8 % of the pixels.
        is_seed_HW = draws.levels(height, width) < density_HW * (0.08 * 2**16)
        angle = first + number * (360 / _NUM_FEATHERS) + draws.uniform(-15, 15)
        grown_HW = motion_blur(is_seed_HW * 255, _FEATHER_RADIUS, _FEATHER_SIGMA, angle)
        feathers_HW = np.maximum(feathers_HW, grown_HW)
    bright_HW = 45 + 120 * density_HW * grain_HW + np.minimum(4 * feathers_HW / ONE, 190) * (0.35 + 0.65 * grain_HW)
    tint_C = np.array([0.93, 0.98, 1.04])  # ice is a little blue
    return np.clip(bright_HW[..., None] * tint_C, 0, 255)
