"""Draws a view: turns the random numbers of (seed, sample_key, view) into a crop, a flip, operations and erasing.

Pure arithmetic on a list of uniform numbers, one for each random word. Each step has its own fixed words, so that
`randaug` crops and flips just as `crop-flip` does."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from atcache.errors import BadImageError
from atcache.images.decode import MAX_PIXELS
from atcache.views.philox import uniforms
from atcache.views.policy import ViewPolicy
from atcache.views.randaugment import (
    MAGNITUDE_MAX,
    MAGNITUDE_MEAN,
    MAGNITUDE_STD,
    OPERATIONS,
    level_argument,
)

NO_OPERATIONS = (-1.0, 0.0, -1.0, 0.0)
NO_ERASING = (0.0, 0.0, 0.0, 0.0, 0.0)
NUM_WORDS = 64
"""How many uniform numbers a view is drawn from."""
_CROP_WORD, _FLIP_WORD, _OPERATION_WORD, _ERASE_WORD = 0, 22, 24, 34  # the first word of each step
_NUM_TRIES = 10  # as in torchvision's crop and timm's erasing


def draw_eval(height: int, width: int, *, image_height: int, image_width: int, crop_pct: float) -> tuple[int, ...]:
    """timm's `transforms_imagenet_eval` with `crop_mode` "center", whatever the model's own: crop box, resized size,
    window.

    Raises:
        BadImageError: the resized image would be over Pillow's pixel limit.
    """
    target_height = math.floor(image_height / crop_pct)
    target_width = math.floor(image_width / crop_pct)
    if target_height == target_width:  # torchvision's Resize, which cuts off the longer side's fraction
        longer = int(target_height * max(height, width) / min(height, width))
        resized = (target_height, longer) if height <= width else (longer, target_height)
    else:  # timm's ResizeKeepRatio, which rounds
        ratio = min(height / target_height, width / target_width)
        resized = (round(height / ratio), round(width / ratio))
    if math.prod(resized) > MAX_PIXELS:
        raise BadImageError(
            f"an image of {width} x {height} would be resized to {resized[1]} x {resized[0]} pixels, expected at most "
            f"{MAX_PIXELS} in all. Leave it out, or crop it."
        )
    window_top = round((resized[0] - image_height) / 2.0)
    window_left = round((resized[1] - image_width) / 2.0)
    return 0, 0, height, width, *resized, window_top, window_left


def draw_crop(words: list[float], height: int, width: int) -> tuple[int, int, int, int]:
    """The top, left, height and width of torchvision's RandomResizedCrop.

    Its area is 0.08 to 1 of the image, its ratio of width to height log-uniform from 3/4 to 4/3.
    """
    area, log_ratio = height * width, math.log(4 / 3)
    for attempt in range(_NUM_TRIES):
        first, second = words[_CROP_WORD + 2 * attempt : _CROP_WORD + 2 * attempt + 2]
        target_area = (0.08 + 0.92 * first) * area
        ratio = math.exp(log_ratio * (2.0 * second - 1.0))
        crop_width, crop_height = round(math.sqrt(target_area * ratio)), round(math.sqrt(target_area / ratio))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            position = _CROP_WORD + 2 * _NUM_TRIES
            top = int(words[position] * (height - crop_height + 1))
            left = int(words[position + 1] * (width - crop_width + 1))
            return top, left, crop_height, crop_width
    # The image is too long and thin: take the largest box in its middle whose ratio is allowed.
    crop_height, crop_width = height, width
    if width / height < 3 / 4:
        crop_height = round(width / (3 / 4))
    elif width / height > 4 / 3:
        crop_width = round(height * (4 / 3))
    return (height - crop_height) // 2, (width - crop_width) // 2, crop_height, crop_width


def draw_flip(words: list[float]) -> float:
    """1 in half of the views, else 0."""
    return float(words[_FLIP_WORD] < 0.5)


def draw_operations(words: list[float]) -> tuple[float, float, float, float]:
    """Two RandAugment operations, each with its argument."""
    return *_draw_operation(words, _OPERATION_WORD), *_draw_operation(words, _OPERATION_WORD + 5)


def _draw_operation(words: list[float], word: int) -> tuple[float, float]:
    """One RandAugment operation: none with probability 0.5, else any of them at a magnitude of N(9, 0.5)."""
    choice, apply, first, second, sign = words[word : word + 5]
    if apply >= 0.5:
        return -1.0, 0.0
    position = int(choice * len(OPERATIONS))
    # The Box-Muller transform; 1 - first is never 0.
    normal = math.sqrt(-2.0 * math.log(1.0 - first)) * math.cos(2.0 * math.pi * second)
    magnitude = min(max(MAGNITUDE_MEAN + MAGNITUDE_STD * normal, 0.0), MAGNITUDE_MAX)
    return float(position), level_argument(OPERATIONS[position], magnitude, 1 if sign < 0.5 else -1)


def draw_erasing(words: list[float], height: int, width: int) -> tuple[float, float, float, float, float]:
    """The box and noise seed of random erasing (Zhong et al. 2017, arXiv 1708.04896), the box drawn as timm does.

    Probability 0.25, area 0.02 to 1/3 of the view, ratio log-uniform from 0.3 to 1/0.3.
    """
    probability, top, left, seed = words[_ERASE_WORD : _ERASE_WORD + 4]
    if probability >= 0.25:
        return NO_ERASING
    log_ratio = math.log(1 / 0.3)
    for attempt in range(_NUM_TRIES):
        word = _ERASE_WORD + 4 + 2 * attempt
        area = (0.02 + (1 / 3 - 0.02) * words[word]) * height * width
        ratio = math.exp(log_ratio * (2.0 * words[word + 1] - 1.0))
        box_height, box_width = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < box_height < height and 0 < box_width < width:
            box_top, box_left = int(top * (height - box_height + 1)), int(left * (width - box_width + 1))
            # A seed of 24 bits, because float32 holds no more exactly.
            return float(box_top), float(box_left), float(box_height), float(box_width), float(int(seed * 2**24))
    return NO_ERASING


def draw_view(
    policy: ViewPolicy, sample_key: str, view: int, source_height: int, source_width: int
) -> np.ndarray[Any, np.dtype[np.float32]]:
    """The parameters of a view before mixing, float32: a pure function of its arguments.

    They are named by `PARAMETER_NAMES`; a policy that corrupts has one more, see `ViewPolicy.parameter_names`.

    Args:
        policy: its seed, name and size.
        sample_key: the sample's name, as `SampleIndex.sample_key` gives it.
        view: which view of the sample, from 0.
        source_height: the decoded image's height in pixels.
        source_width: the decoded image's width in pixels.

    Raises:
        BadImageError: the policy is `eval`, and the image is so long that the resized one is over Pillow's pixel limit.
    """
    height, width = policy.image_height, policy.image_width
    if policy.name == "eval":
        geometry = draw_eval(
            source_height, source_width, image_height=height, image_width=width, crop_pct=policy.crop_pct
        )
        corruption = policy.corruption
        corrupt_seed = () if corruption is None else (corruption.draw_seed(policy.seed, sample_key),)
        return np.array((*geometry, 0, *NO_OPERATIONS, *NO_ERASING, *corrupt_seed), dtype=np.float32)
    words = uniforms(policy.seed, sample_key, view, purpose=b"atcache view 1", num_words=NUM_WORDS)
    geometry = (*draw_crop(words, source_height, source_width), height, width, 0, 0)
    operations, erasing = NO_OPERATIONS, NO_ERASING
    if policy.name == "randaug":
        operations, erasing = draw_operations(words), draw_erasing(words, height, width)
    return np.array((*geometry, draw_flip(words), *operations, *erasing), dtype=np.float32)
