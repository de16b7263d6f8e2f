"""Photometric jitter of a student's images: other light and colours, while every token stays where the teacher saw it.

Does what torchvision's `ColorJitter` does (brightness, then contrast, then saturation), but each image of a batch has
its own factors, and the work is done on the device the batch is on.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

_LUMA = (0.2989, 0.587, 0.114)
"""Weights of red, green and blue in torchvision's grey (ITU-R 601-2)."""


def draw_jitter(strength: float, num_images: int) -> Tensor:
    """Factors of brightness, contrast and saturation, shape (image, 3), uniform in 1 - strength .. 1 + strength.

    Drawn on the CPU from torch's global generator, so that they are the same for every device.

    Args:
        strength: 0..1.
        num_images: how many images the whole batch has.
    """
    return 1 + strength * (2 * torch.rand(num_images, 3) - 1)


def jitter_pixels(pixels_BHWC: Tensor, factors_B3: Tensor) -> Tensor:
    """The images in other light, float32 in 0..255, same shape and device; not rounded.

    Args:
        pixels_BHWC: RGB in 0..255, any type.
        factors_B3: what `draw_jitter` drew; factors of 1 do not change an image.
    """
    brightness, contrast, saturation = factors_B3.to(pixels_BHWC.device).view(-1, 3, 1, 1, 1).unbind(1)
    luma = _luma(str(pixels_BHWC.device))
    pixels_BHWC = (pixels_BHWC.float() * brightness).clamp(0, 255)
    mean_B111 = (pixels_BHWC @ luma).mean(dim=(1, 2)).view(-1, 1, 1, 1)
    pixels_BHWC = mean_B111.lerp(pixels_BHWC, contrast).clamp(0, 255)
    grey_BHW1 = (pixels_BHWC @ luma).unsqueeze(-1)
    return grey_BHW1.lerp(pixels_BHWC, saturation).clamp(0, 255)


@lru_cache(maxsize=16)
def _luma(device: str) -> Tensor:
    """`_LUMA` on a device; cached, since each copy to a GPU makes it wait."""
    with torch.inference_mode(False):
        return torch.tensor(_LUMA, device=device)
