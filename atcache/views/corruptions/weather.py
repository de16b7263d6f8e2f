"""Weather: snow, frost, fog and brightness."""

from __future__ import annotations

import numpy as np

from atcache.views.corruptions.draws import Draws
from atcache.views.corruptions.filters import ONE, motion_blur, published_size, resized, sides_of, to_pixels
from atcache.views.corruptions.plasma import clouds, ice

_SNOW = (
    (0.1, 0.3, 3, 0.5, 10, 4, 0.8),
    (0.2, 0.3, 2, 0.5, 12, 4, 0.7),
    (0.55, 0.3, 4, 0.9, 12, 8, 0.7),
    (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65),
    (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55),
)
"""Mean and deviation of the flakes' noise, its enlargement, the value from which it is a flake, radius and sigma of the
smear, and the share of the image that is not whitened."""
_FROST = ((1.0, 0.4), (0.8, 0.6), (0.7, 0.7), (0.65, 0.7), (0.6, 0.75))
"""Shares of the image and of the ice."""
_FOG = ((1.5, 2.0), (2.0, 2.0), (2.5, 1.7), (2.5, 1.5), (3.0, 1.4))
"""How thick it is, and how smooth."""
_BRIGHTNESS = (0.1, 0.2, 0.3, 0.4, 0.5)
_NOISE_STEPS = 85
"""Levels of the flakes' noise from 0 to 1."""


def snow(pixels_HWC: np.ndarray, severity: int, draws: Draws) -> np.ndarray:
    """Whitens the image and lets smeared flakes fall in two directions.

    The flakes are drawn for a view of 224 pixels and resized.
    """
    from PIL import Image

    mean, deviation, enlargement, threshold, radius, sigma, kept = _SNOW[severity - 1]
    height, width = published_size(pixels_HWC)
    noise_HW = mean + deviation * draws.normals(height, width)
    # Pillow resizes bytes the same on every machine: these are the numbers from -1 to 2.
    noise = Image.fromarray(to_pixels((noise_HW + 1) * _NOISE_STEPS))
    left, top = width * (1 - 1 / enlargement) / 2, height * (1 - 1 / enlargement) / 2
    noise = noise.resize(noise.size, Image.Resampling.BILINEAR, (left, top, width - left, height - top))
    flakes_HW = np.asarray(noise) / _NOISE_STEPS - 1
    flakes_HW = to_pixels(np.where(flakes_HW < threshold, 0, flakes_HW) * 255)
    angle = draws.uniform(-135, -45)
    fallen_HW = to_pixels(motion_blur(flakes_HW, radius, sigma, angle) / ONE)
    fallen_HW = resized(fallen_HW, *sides_of(pixels_HWC)).astype(np.float64)
    red_HW, green_HW, blue_HW = pixels_HWC.transpose(2, 0, 1).astype(np.float64)
    grey_HW = 0.299 * red_HW + 0.587 * green_HW + 0.114 * blue_HW
    whitened_HWC = np.maximum(pixels_HWC, grey_HW[..., None] * 1.5 + 127.5)
    return to_pixels(kept * pixels_HWC + (1 - kept) * whitened_HWC + (fallen_HW + fallen_HW[::-1, ::-1])[..., None])


def frost(pixels_HWC: np.ndarray, severity: int, draws: Draws) -> np.ndarray:
    """Looks through a frozen window, whose ice is drawn (see `ice`): not the photographs of ImageNet-C.

    The ice is drawn for a view of 224 pixels and resized.
    """
    own, cover = _FROST[severity - 1]
    ice_HWC = resized(to_pixels(ice(*published_size(pixels_HWC), draws)), *sides_of(pixels_HWC))
    return to_pixels(own * pixels_HWC + cover * ice_HWC)


def fog(pixels_HWC: np.ndarray, severity: int, draws: Draws) -> np.ndarray:
    """Adds clouds of 1.5 to 3 times white, then scales back to the range of the image."""
    thickness, smoothness = _FOG[severity - 1]
    white = 255.0 * thickness
    brightest = float(pixels_HWC.max())
    height, width = sides_of(pixels_HWC)
    clouds_HW = clouds(height, width, smoothness, draws)
    return to_pixels((pixels_HWC + white * clouds_HW[..., None]) * (brightest / (brightest + white)))


def brightness(pixels_HWC: np.ndarray, severity: int, draws: Draws) -> np.ndarray:
    """Adds 0.1 to 0.5 of white to the value of HSV, and keeps hue and saturation."""
    del draws
    value_HW1 = pixels_HWC.max(axis=-1, keepdims=True).astype(np.float64)
    raised_HW1 = np.minimum(value_HW1 + 255 * _BRIGHTNESS[severity - 1], 255)
    scale_HW1 = raised_HW1 / np.maximum(value_HW1, 1)
    # Black has no hue: it becomes grey.
    return to_pixels(pixels_HWC * scale_HW1 + raised_HW1 * (value_HW1 == 0))
