"""From a stored sample to the pixels of a view: drawn for the first time, or replayed and proved."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from atcache.errors import BadImageError, CacheMismatchError
from atcache.source import Problem, Source
from atcache.views import PARAMETER_NAMES, ViewPolicy, apply_view, draw_view, library_versions, pixel_hash

STORED = 1
"""The status of a view that was rendered; the others are `Problem`s."""


class Rendered(NamedTuple):
    """One view of one sample."""

    status: int
    """STORED, or the `Problem` that kept it from being rendered."""
    parameters_P: np.ndarray
    """What was drawn, float32; all 0 where nothing could be drawn."""
    pixel_hash: int
    """Hash of the pixels; 0 where there are none."""
    pixels_HWC: np.ndarray
    """uint8 (height, width, 3); all 0 where there are none."""


def render_view(source: Source, policy: ViewPolicy, sample: int, view: int, *, skip_bad: bool) -> Rendered:
    """Draw a view's parameters and apply them.

    Args:
        source: where the images are.
        policy: how views are drawn.
        sample: row of the source's index.
        view: which of the sample's views.
        skip_bad: give a problem back as the status instead of raising.

    Raises:
        BadImageError: the image cannot be read and `skip_bad` is False.
    """
    problem = int(source.index.problem_S[sample])
    if problem != Problem.NONE:
        return _not_rendered(policy, problem)
    try:
        image = source.read_image(sample)
        parameters_P = draw_view(policy, source.index.sample_key(sample), view, image.height, image.width)
    except BadImageError:
        if not skip_bad:
            raise
        return _not_rendered(policy, Problem.UNDECODABLE)
    pixels_HWC = apply_view(image, parameters_P, policy)
    return Rendered(STORED, parameters_P, pixel_hash(pixels_HWC), pixels_HWC)


def _not_rendered(policy: ViewPolicy, problem: int) -> Rendered:
    pixels_HWC = np.zeros((policy.image_height, policy.image_width, 3), np.uint8)
    return Rendered(int(problem), np.zeros(len(PARAMETER_NAMES), np.float32), 0, pixels_HWC)


def replay_view(
    source: Source,
    policy: ViewPolicy,
    sample: int,
    parameters_P: np.ndarray,
    expected_hash: int,
    recorded_versions: dict[str, str],
) -> np.ndarray:
    """The pixels of a stored view, uint8 (height, width, 3), bit for bit what the teacher saw.

    Raises:
        CacheMismatchError: the replayed pixels have another hash; the message names the libraries that changed.
    """
    pixels_HWC = apply_view(source.read_image(sample), parameters_P, policy)
    if pixel_hash(pixels_HWC) != expected_hash:
        now = library_versions()
        changed = [
            f"{name} {recorded_versions.get(name, 'unknown')} at build time and {version} now"
            for name, version in now.items()
            if recorded_versions.get(name) != version
        ]
        raise CacheMismatchError(
            f"{source.where(sample)}: the replayed image differs from the one the teacher saw "
            f"({'; '.join(changed) or 'with the same library versions: was the image changed?'}). Install the recorded "
            "versions, or build the cache with --pixels store."
        )
    return pixels_HWC


def normalise_images(
    pixels_BHWC: Tensor, mean: tuple[float, ...], std: tuple[float, ...], device: torch.device | str
) -> Tensor:
    """What a model takes: float32 (batch, channel, height, width) on `device`, (pixels / 255 - mean) / std.

    Args:
        pixels_BHWC: uint8; travels to the device as bytes.
        mean: of each channel, in 0..1.
        std: of each channel, in 0..1.
        device: where the result is wanted.
    """
    pixels_BCHW = pixels_BHWC.to(device, non_blocking=True).permute(0, 3, 1, 2).float()
    return (pixels_BCHW - _of_channels(mean, str(device))) / _of_channels(std, str(device))


@lru_cache(maxsize=16)
def _of_channels(values: tuple[float, ...], device: str) -> Tensor:
    """255 times each channel's value, shape (1, channel, 1, 1); made once, since a copy to a GPU makes it wait."""
    with torch.inference_mode(False):  # whoever asks first
        return torch.tensor([255 * value for value in values], device=device).view(1, -1, 1, 1)
