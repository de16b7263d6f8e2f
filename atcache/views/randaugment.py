"""RandAugment as timm's `rand-m9-mstd0.5-inc1`, split in two: drawing an operation's argument, and applying it."""

from __future__ import annotations

import math
from functools import cache
from typing import TYPE_CHECKING, Any

from atcache.errors import CorruptCacheError

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

OPERATIONS = (
    "AutoContrast",
    "Equalize",
    "Invert",
    "Rotate",
    "PosterizeIncreasing",
    "SolarizeIncreasing",
    "SolarizeAdd",
    "ColorIncreasing",
    "ContrastIncreasing",
    "BrightnessIncreasing",
    "SharpnessIncreasing",
    "ShearX",
    "ShearY",
    "TranslateXRel",
    "TranslateYRel",
)
"""timm's `_RAND_INCREASING_TRANSFORMS`. A stored operation is a position here, so the order belongs to the format."""

RESAMPLE = "bicubic"
"""Interpolation of rotations, shears and translations."""
FILL = (124, 116, 104)
"""Colour of the pixels these pull in from outside the image: ImageNet's mean."""

MAGNITUDE_MEAN, MAGNITUDE_STD, MAGNITUDE_MAX = 9.0, 0.5, 10.0

# The largest argument of the signed operations, reached at magnitude 10.
_SIGNED = {"Rotate": 30.0, "ShearX": 0.3, "ShearY": 0.3, "TranslateXRel": 0.45, "TranslateYRel": 0.45}
_WITHOUT_ARGUMENT = ("AutoContrast", "Equalize", "Invert")
_WHOLE_LIMITS = {"PosterizeIncreasing": (1, 4), "SolarizeIncreasing": (0, 256), "SolarizeAdd": (0, 110)}


def level_argument(name: str, magnitude: float, sign: int) -> float:
    """The argument of an operation at a magnitude from 0 to 10, as timm's `LEVEL_TO_ARG` but with an explicit sign.

    Operations without argument get 0; only those with a direction use the sign, -1 or 1. One difference from timm: at
    magnitude 10 it posterizes to 0 bits, a black image, which newer Pillow refuses. Here 1 bit is left.
    """
    level = magnitude / MAGNITUDE_MAX
    if name in _WITHOUT_ARGUMENT:
        return 0.0
    if name in _SIGNED:
        return sign * level * _SIGNED[name]
    if name == "PosterizeIncreasing":
        return max(1, 4 - int(level * 4))
    if name == "SolarizeIncreasing":
        return 256 - int(level * 256)
    if name == "SolarizeAdd":
        return int(level * 110)
    return max(0.1, 1.0 + sign * level * 0.9)


def check_operation(position: int, argument: float) -> None:
    """Refuse what `level_argument` never gives: a cache may come from anybody.

    Raises:
        CorruptCacheError: there is no such operation, or its argument is out of range.
    """
    if not -1 <= position < len(OPERATIONS):
        raise CorruptCacheError(f"operation {position} in a stored view, expected -1 (none) to {len(OPERATIONS) - 1}.")
    if position < 0:
        return
    name = OPERATIONS[position]
    if name in _WITHOUT_ARGUMENT:
        low, high = 0.0, 0.0
    elif name in _SIGNED:
        low, high = -_SIGNED[name], _SIGNED[name]
    elif name in _WHOLE_LIMITS:
        low, high = _WHOLE_LIMITS[name]
    else:
        low, high = 0.1, 1.9
    # Some slack, because float32 rounds 0.3 and 1.9 up. NaN fails the comparison too.
    if not low - 1e-5 <= argument <= high + 1e-5 or (name in _WHOLE_LIMITS and argument != int(argument)):
        raise CorruptCacheError(f"{name} with argument {argument} in a stored view, expected {low} to {high}.")


def apply_operation(image: Image, position: int, argument: float) -> Image:
    """`image` after the operation at `position` of `OPERATIONS`, by timm's own function."""
    from PIL.Image import Resampling

    name = OPERATIONS[position]
    arguments: tuple[float, ...] = (argument,)
    if name in _WITHOUT_ARGUMENT:
        arguments = ()
    elif name in _WHOLE_LIMITS:
        arguments = (int(argument),)
    return _timm_operations()[name](image, *arguments, resample=Resampling[RESAMPLE.upper()], fillcolor=FILL)


def moved_points(position: int, argument: float, height: int, width: int) -> np.ndarray:
    """Where an operation takes a point of the image from: a float64 matrix (2, 3) that maps the point (x, y, 1) of its
    result to a point (x, y) of its input. Points are in pixels, and the first pixel's centre is (0.5, 0.5).

    The matrices are those which timm gives to Pillow. Operations on colours move nothing.
    """
    import numpy as np

    name = OPERATIONS[position] if position >= 0 else ""
    matrix_23 = np.eye(2, 3)
    if name == "ShearX":
        matrix_23[0, 1] = argument
    elif name == "ShearY":
        matrix_23[1, 0] = argument
    elif name == "TranslateXRel":
        matrix_23[0, 2] = argument * width
    elif name == "TranslateYRel":
        matrix_23[1, 2] = argument * height
    elif name == "Rotate":
        angle, middle_2 = math.radians(argument), np.array([width / 2, height / 2])
        matrix_23[:, :2] = [[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]]
        matrix_23[:, 2] = middle_2 - matrix_23[:, :2] @ middle_2
    return matrix_23


@cache
def _timm_operations() -> dict[str, Any]:
    from timm.data import auto_augment

    return dict[str, Any](auto_augment.NAME_TO_OP)  # pyright: ignore[reportUnknownMemberType, reportUnknownArgumentType]
