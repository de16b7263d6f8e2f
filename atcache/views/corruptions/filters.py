"""Blur, shift and move pixels, with weights that are whole numbers: the sums are exact in any order."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

ONE = 2**16
"""The sum of the weights of a filter."""
STEP = 2**8
"""Steps of a pixel in which positions are given."""
PUBLISHED_SIDE = 224
"""The side of the views that the published constants are for, in pixels."""


def sides_of(pixels_HWC: np.ndarray) -> tuple[int, int]:
    """Height and width."""
    return int(pixels_HWC.shape[0]), int(pixels_HWC.shape[1])


def scale_of(pixels_HWC: np.ndarray) -> float:
    """By how much lengths in pixels differ from the published ones: the shorter side divided by 224."""
    return min(sides_of(pixels_HWC)) / PUBLISHED_SIDE


def published_size(pixels_HWC: np.ndarray) -> tuple[int, int]:
    """Height and width that the image would have if its shorter side were 224 pixels; each at most four times that."""
    height, width = sides_of(pixels_HWC)
    sides = (round(side * PUBLISHED_SIDE / min(height, width)) for side in (height, width))
    height, width = (min(side, 4 * PUBLISHED_SIDE) for side in sides)  # a line of pixels must not need gigabytes
    return height, width


def resized(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """uint8 pixels at another size, bilinear and antialiased; with or without three channels."""
    from PIL import Image

    return np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.BILINEAR))


def to_pixels(values: np.ndarray) -> np.ndarray:
    """Numbers as uint8: rounded, and cut to 0..255."""
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)


def whole_weights(weights: Sequence[float]) -> list[int]:
    """Weights as whole numbers of sum `ONE`; the largest takes what rounding leaves."""
    total = math.fsum(weights)
    whole = [round(ONE * weight / total) for weight in weights]
    whole[max(range(len(whole)), key=whole.__getitem__)] += ONE - sum(whole)
    return whole


def gaussian(sigma: float, distances: Sequence[float]) -> list[float]:
    """The bell curve at some distances, without its constant factor."""
    return [math.exp(-0.5 * (distance / sigma) ** 2) for distance in distances]


def gaussian_blur(values_CHW: np.ndarray, sigma: float, *, truncate: float = 4.0, reflects: bool = False) -> np.ndarray:
    """Blurred values, float64 (channel, height, width), exact.

    Args:
        values_CHW: whole numbers of at most 16 bits, any type.
        sigma: standard deviation, in pixels.
        truncate: the filter ends at so many standard deviations.
        reflects: beyond an edge, values are mirrored; otherwise the last one is repeated.
    """
    height, width = values_CHW.shape[1:]
    down_HH, across_WW = (_blur_matrix(side, sigma, truncate, reflects) for side in (height, width))
    # Products of whole numbers below 2**53: the matrix product is exact, however it is computed.
    return (down_HH @ values_CHW.astype(np.float64) @ across_WW.T) / float(ONE) ** 2


@lru_cache(maxsize=4)
def _blur_matrix(length: int, sigma: float, truncate: float, reflects: bool) -> np.ndarray:
    """A blur along an axis as a matrix, float64 (length, length): row i has the weights that make value i."""
    radius = int(truncate * sigma + 0.5)
    offset_N = np.arange(-radius, radius + 1)
    weight_N = whole_weights(gaussian(sigma, offset_N.tolist()))
    matrix_NN = np.zeros((length, length))
    from_NN = inside(np.arange(length)[:, None] + offset_N, length, reflects=reflects)
    np.add.at(matrix_NN, (np.arange(length)[:, None], from_NN), weight_N)
    matrix_NN.setflags(write=False)
    return matrix_NN


def inside(positions: np.ndarray, length: int, *, reflects: bool) -> np.ndarray:
    """Positions of any size as 0 .. length - 1: mirrored at the edges (each edge value twice), or cut.

    >>> inside(np.arange(-2, 5), 3, reflects=True)
    array([1, 0, 0, 1, 2, 2, 1])
    """
    if not reflects:
        return np.clip(positions, 0, length - 1)
    folded = positions % (2 * length)
    return np.minimum(folded, 2 * length - 1 - folded)


def motion_blur(values_HWC: np.ndarray, radius: float, sigma: float, angle_degrees: float) -> np.ndarray:
    """Values smeared in one direction, int32, `ONE` times too large: half a bell curve, as ImageMagick's MotionBlur.

    Args:
        values_HWC: whole numbers 0..255, with or without channels.
        radius: the filter has 2 * radius + 1 taps.
        sigma: standard deviation, in pixels.
        angle_degrees: the direction from which pixels come; 0 is from the right, 90 from below.
    """
    num_taps = 2 * math.ceil(radius) + 1
    weights = whole_weights(gaussian(sigma, range(num_taps)))
    cosine, sine = math.cos(math.radians(angle_degrees)), math.sin(math.radians(angle_degrees))
    height, width = sides_of(values_HWC)
    padded = padded_by(values_HWC.astype(np.int32), num_taps)
    sums = np.zeros(values_HWC.shape, np.int32)
    for tap, weight in enumerate(weights):
        if weight:
            top, left = num_taps + round(tap * sine), num_taps + round(tap * cosine)
            sums += weight * padded[top : top + height, left : left + width]
    return sums


def padded_by(values_HWC: np.ndarray, margin: int) -> np.ndarray:
    """Values with a margin in which those at the edges are repeated, with or without channels."""
    return np.pad(values_HWC, [(margin, margin)] * 2 + [(0, 0)] * (values_HWC.ndim - 2), mode="edge")


def moved(pixels_HWC: np.ndarray, y_HW: np.ndarray, x_HW: np.ndarray) -> np.ndarray:
    """The pixels at other positions, bilinear and mirrored at the edges, uint8.

    Args:
        pixels_HWC: uint8.
        y_HW: where each pixel comes from, in rows; float64. Rounded to 1/256.
        x_HW: the same in columns.
    """
    height, width, num_channels = pixels_HWC.shape
    flat_NC = pixels_HWC.reshape(-1, num_channels).astype(np.int32)
    top_HW, down_HW = _split(y_HW)
    left_HW, right_HW = _split(x_HW)
    sums = np.zeros((*y_HW.shape, num_channels), np.int32)
    for row_HW, row_weight in ((top_HW, STEP - down_HW), (top_HW + 1, down_HW)):
        for column_HW, column_weight in ((left_HW, STEP - right_HW), (left_HW + 1, right_HW)):
            place_HW = inside(row_HW, height, reflects=True) * width + inside(column_HW, width, reflects=True)
            sums += (row_weight * column_weight).astype(np.int32)[..., None] * flat_NC[place_HW]
    return ((sums + STEP * STEP // 2) // (STEP * STEP)).astype(np.uint8)


def _split(positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Positions as a whole number of pixels, and the rest in 1/256."""
    steps = np.rint(positions * STEP).astype(np.int64)
    return steps // STEP, steps % STEP
