"""Blur: out of focus, through frosted glass, moved, and zoomed while the picture was taken."""

from __future__ import annotations

from functools import lru_cache
from itertools import product

import numpy as np

from atcache.views.corruptions.draws import Draws
from atcache.views.corruptions.filters import (
    ONE,
    gaussian,
    gaussian_blur,
    motion_blur as smeared,
    padded_by,
    scale_of,
    sides_of,
    to_pixels,
    whole_weights,
)

_DEFOCUS = ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5))
"""Radius of the disk, and the sigma of the blur that smooths its edge."""
_GLASS = ((0.7, 1, 2), (0.9, 2, 1), (1.0, 2, 3), (1.1, 3, 2), (1.5, 4, 2))
"""Sigma of the blur, longest distance of a swap, and how often each pixel is swapped."""
_MOTION = ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15))
"""Radius and sigma."""
_ZOOM = ((11, 0.01), (16, 0.01), (11, 0.02), (13, 0.02), (11, 0.03))
"""How many zooms, and the step between them."""


def defocus_blur(pixels_HWC: np.ndarray, severity: int, draws: Draws) -> np.ndarray:
    """Averages over a disk with a radius of 3 to 10 pixels of 224, at least 1: a lens out of focus."""
    del draws
    radius, sigma = _DEFOCUS[severity - 1]
    weights_NN = _disk(max(1.0, radius * scale_of(pixels_HWC)), sigma, 1 if radius <= 8 else 2)
    height, width = sides_of(pixels_HWC)
    margin = len(weights_NN) - 1
    padded = padded_by(pixels_HWC.astype(np.int32), margin)
    sums = np.zeros(pixels_HWC.shape, np.int32)
    # The disk is the same above and below, left and right: add the mirrored pixels before they are weighted.
    for dy in range(margin + 1):
        rows = padded[margin + dy : margin + dy + height]
        rows = rows + padded[margin - dy : margin - dy + height] if dy else rows
        for dx in range(margin + 1):
            if weight := int(weights_NN[dy, dx]):
                columns = rows[:, margin + dx : margin + dx + width]
                columns = columns + rows[:, margin - dx : margin - dx + width] if dx else columns
                sums += weight * columns
    return to_pixels(sums / ONE)


@lru_cache(maxsize=8)
def _disk(radius: float, sigma: float, reach: int) -> np.ndarray:
    """A quarter of a disk with a smoothed edge as whole weights, int64: [0, 0] is its middle, the whole has sum `ONE`.

    Args:
        radius: in pixels.
        sigma: of the blur of its edge.
        reach: the blur ends at so many pixels.
    """
    side = int(radius) + reach
    grid = range(-side - reach, side + reach + 1)
    disk = np.array([[float(y * y + x * x <= radius * radius) for x in grid] for y in grid])
    weights = whole_weights(gaussian(sigma, range(-reach, reach + 1)))
    for axis in (0, 1):
        turned = np.moveaxis(disk, axis, 0)
        length = len(turned) - 2 * reach
        smooth = sum(weight * turned[tap : tap + length] for tap, weight in enumerate(weights))
        disk = np.moveaxis(np.asarray(smooth), 0, axis)
    whole = np.rint(disk / disk.sum() * ONE).astype(np.int64)
    whole[side, side] += ONE - whole.sum()
    return whole[side:, side:]


def glass_blur(pixels_HWC: np.ndarray, severity: int, draws: Draws) -> np.ndarray:
    """Blurs, swaps each pixel with one near it, and blurs again: frosted glass.

    The published program swaps the pixels one after another. Here those that are too far apart to meet are swapped at
    once, so the same swaps happen in another order. In small views, where the distance is below one pixel, so much
    fewer pixels are swapped.
    """
    sigma, distance, num_rounds = _GLASS[severity - 1]
    scale = scale_of(pixels_HWC)
    share = min(1.0, distance * scale)
    sigma, distance = max(0.3, sigma * scale), max(1, round(distance * scale))
    blurred_HWC = _blurred(pixels_HWC, sigma)
    height, width = sides_of(pixels_HWC)
    place_HW = np.arange(height * width).reshape(height, width)
    for _ in range(num_rounds):
        # As in the published program, a pixel moves by -distance .. distance - 1.
        step_HW2 = draws.levels(height, width, 2) * 2 * distance // 2**16 - distance
        step_HW2 *= draws.levels(height, width, 1) < share * 2**16
        # Neighbours of the same turn are 2 * distance apart, and reach distance and distance - 1 towards each other.
        for top, left in product(reversed(range(2 * distance)), repeat=2):
            row_N1 = np.arange(top, height, 2 * distance)[:, None]
            column_1N = np.arange(left, width, 2 * distance)[None]
            step_NN2 = step_HW2[row_N1, column_1N]
            other_row_NN = np.clip(row_N1 + step_NN2[..., 0], 0, height - 1)
            other_column_NN = np.clip(column_1N + step_NN2[..., 1], 0, width - 1)
            own_NN = place_HW[row_N1, column_1N]
            place_HW[row_N1, column_1N] = place_HW[other_row_NN, other_column_NN]
            place_HW[other_row_NN, other_column_NN] = own_NN
    shuffled_HWC = blurred_HWC.reshape(height * width, -1)[place_HW]
    return _blurred(shuffled_HWC, sigma)


def _blurred(pixels_HWC: np.ndarray, sigma: float) -> np.ndarray:
    return to_pixels(gaussian_blur(pixels_HWC.transpose(2, 0, 1), sigma)).transpose(1, 2, 0)


def motion_blur(pixels_HWC: np.ndarray, severity: int, draws: Draws) -> np.ndarray:
    """Smears the image in a direction within 45 degrees of the horizontal: the camera moved."""
    radius, sigma = _MOTION[severity - 1]
    scale = scale_of(pixels_HWC)
    smeared_HWC = smeared(pixels_HWC, max(1.0, radius * scale), max(1.0, sigma * scale), draws.uniform(-45, 45))
    return to_pixels(smeared_HWC / ONE)


def zoom_blur(pixels_HWC: np.ndarray, severity: int, draws: Draws) -> np.ndarray:
    """Averages the image with its centre enlarged by up to 10 % to 30 %: the camera came nearer."""
    del draws
    from PIL import Image

    image = Image.fromarray(pixels_HWC)
    number, step = _ZOOM[severity - 1]
    sums = pixels_HWC.astype(np.int32)
    for index in range(number):
        share = 1 / (1 + index * step)
        left, top = image.width * (1 - share) / 2, image.height * (1 - share) / 2
        box = (left, top, image.width - left, image.height - top)
        sums += np.asarray(image.resize(image.size, Image.Resampling.BILINEAR, box))
    return to_pixels(sums / (number + 1))
