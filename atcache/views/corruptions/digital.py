"""Digital: contrast, elastic transform, pixelate and JPEG compression."""

from __future__ import annotations

import io
import math

import numpy as np

from atcache.views.corruptions.draws import Draws
from atcache.views.corruptions.filters import gaussian_blur, moved, scale_of, sides_of, to_pixels

_CONTRAST = (0.4, 0.3, 0.2, 0.1, 0.05)
_ELASTIC = (
    (244 * 2.0, 244 * 0.7, 244 * 0.1),
    (244 * 2.0, 244 * 0.08, 244 * 0.2),
    (244 * 0.05, 244 * 0.01, 244 * 0.02),
    (244 * 0.07, 244 * 0.01, 244 * 0.02),
    (244 * 0.12, 244 * 0.01, 244 * 0.02),
)
"""Strength of the displacement, sigma of its blur, and how far three points move; in pixels of 224. The 244 is
published so."""
_PIXELATE = (0.6, 0.5, 0.4, 0.3, 0.25)
_JPEG_QUALITY = (25, 18, 15, 10, 7)


def contrast(pixels_HWC: np.ndarray, severity: int, draws: Draws) -> np.ndarray:
    """Pulls each channel towards its mean, until 0.4 to 0.05 of the differences are left."""
    del draws
    mean_C = pixels_HWC.sum(axis=(0, 1), dtype=np.int64) / math.prod(sides_of(pixels_HWC))
    return to_pixels((pixels_HWC - mean_C) * _CONTRAST[severity - 1] + mean_C)


def elastic_transform(pixels_HWC: np.ndarray, severity: int, draws: Draws) -> np.ndarray:
    """Stretches the image by a random affine map and bends it by smooth random displacements.

    The published severities are of two kinds: 1 and 2 mostly stretch, 3 to 5 mostly bend. So 3 may be milder than 2.
    Here three random points say where pixels come from, and stretching and bending interpolate once, not twice.
    """
    height, width = sides_of(pixels_HWC)
    strength, sigma, shift = (value * scale_of(pixels_HWC) for value in _ELASTIC[severity - 1])
    centre_y, centre_x = height / 2, width / 2
    third = min(height, width) / 3
    # The corners (1, 1), (1, -1) and (-1, -1) of a square around the centre, moved by up to `shift`.
    corners = [
        (centre_y + y * third + draws.uniform(-shift, shift), centre_x + x * third + draws.uniform(-shift, shift))
        for y, x in ((1, 1), (1, -1), (-1, -1))
    ]
    push_2HW = draws.levels(2, height, width) - 2**15
    dy_HW, dx_HW = gaussian_blur(push_2HW, max(0.3, sigma), truncate=3.0, reflects=True) * (strength / 2**15)
    y_HW = np.arange(height)[:, None] + dy_HW - (centre_y - third)  # from the corner (-1, -1)
    x_HW = np.arange(width)[None] + dx_HW - (centre_x - third)
    from_y_HW, from_x_HW = (
        corners[2][axis]
        + y_HW * ((corners[1][axis] - corners[2][axis]) / (2 * third))
        + x_HW * ((corners[0][axis] - corners[1][axis]) / (2 * third))
        for axis in (0, 1)
    )
    return moved(pixels_HWC, from_y_HW, from_x_HW)


def pixelate(pixels_HWC: np.ndarray, severity: int, draws: Draws) -> np.ndarray:
    """Makes the image 0.6 to 0.25 times as large and enlarges it again."""
    del draws
    from PIL import Image

    image, share = Image.fromarray(pixels_HWC), _PIXELATE[severity - 1]
    small = max(1, int(image.width * share)), max(1, int(image.height * share))
    return np.array(image.resize(small, Image.Resampling.BOX).resize(image.size, Image.Resampling.BOX))


def jpeg_compression(pixels_HWC: np.ndarray, severity: int, draws: Draws) -> np.ndarray:
    """Saves the image as a JPEG of quality 25 to 7 and reads it again."""
    del draws
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(pixels_HWC).save(file, "JPEG", quality=_JPEG_QUALITY[severity - 1])
    with Image.open(file) as image:
        return np.array(image.convert("RGB"))
