"""Views: one fixed augmentation of a sample, drawn from (seed, sample_key, view), stored as numbers and replayed.

A view is one vector of float32 parameters, the same for every policy: crop a box of the source image, resize it, cut a
window of the wanted size, flip, up to two RandAugment operations, erase a box. The parameters are stored, not only the
seed, because drawing them again may give others: between versions numpy keeps the raw stream of a bit generator but not
the methods of `numpy.random.Generator`, and `log` and `cos` differ between machines in the last bit. So views use only
raw Philox words, and replaying a view draws only the erase noise, which is raw words too.

A policy that corrupts views adds the seed of the corruption, which comes last. One that mixes views adds the parameters
of `atcache.views.mixing`; everything here is about the view before that.
"""

from __future__ import annotations

import hashlib
from importlib import metadata
from typing import TYPE_CHECKING, Any

import numpy as np

from atcache.errors import CorruptCacheError
from atcache.images.decode import MAX_PIXELS, EncodedImage
from atcache.views.corrupt import MAX_DRAW_SEED, SEED_NAME
from atcache.views.policy import PARAMETER_NAMES, ViewPolicy
from atcache.views.randaugment import apply_operation, check_operation

if TYPE_CHECKING:
    from PIL.Image import Image


_ARGUMENTS = (PARAMETER_NAMES.index("argument_1"), PARAMETER_NAMES.index("argument_2"))


def apply_view(
    image: Image, parameters_P: np.ndarray[Any, Any], policy: ViewPolicy
) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """The view's pixels before mixing, uint8, shape (image_height, image_width, 3): a pure function.

    The policy's `decoding` plays no part: the image is whole. `render_alone` follows it.

    Args:
        image: the decoded source image, mode RGB; it is not changed.
        parameters_P: what `draw_view` gave for an image of this size, or stored parameters without `MIXING_NAMES`.
        policy: only its size, interpolation and corruption are used.

    Raises:
        CorruptCacheError: the parameters do not fit the image or the policy.
    """
    parameters_P, corrupt_seed = _split(parameters_P, policy)
    values = checked_parameters(parameters_P, image.height, image.width, policy)
    pixels_HWC = _finish(_resize_box(image, values, 1, policy), values, parameters_P, policy)
    return _corrupted(pixels_HWC, corrupt_seed, policy)


def render_alone(
    encoded: EncodedImage, parameters_P: np.ndarray[Any, Any], policy: ViewPolicy
) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Like `apply_view`, of an image that is not decoded yet: it is decoded as the policy says.

    Raises:
        BadImageError: the image is truncated or damaged.
        CorruptCacheError: the parameters do not fit the image or the policy.
    """
    parameters_P, corrupt_seed = _split(parameters_P, policy)
    values = checked_parameters(parameters_P, encoded.height, encoded.width, policy)
    reduction = 1
    if policy.decoding == "reduced" and encoded.can_reduce:
        reduction = reduction_of(values[2], values[3], values[4], values[5])
    image = _resize_box(encoded.decode(reduction), values, reduction, policy)
    pixels_HWC = _finish(image, values, parameters_P, policy)
    return _corrupted(pixels_HWC, corrupt_seed, policy)


def _split(parameters_P: np.ndarray[Any, Any], policy: ViewPolicy) -> tuple[np.ndarray[Any, Any], int]:
    """The parameters that every policy has, and the seed of the corruption; 0 if the policy does not corrupt."""
    if policy.corrupt is None:
        return parameters_P, 0
    if parameters_P.shape != (len(PARAMETER_NAMES) + 1,):
        raise CorruptCacheError(
            f"view parameters of shape {parameters_P.shape}, expected ({len(PARAMETER_NAMES) + 1},) for corrupted "
            "views."
        )
    seed = float(parameters_P[-1])
    if not 0 <= seed <= MAX_DRAW_SEED or seed != int(seed):
        raise CorruptCacheError(
            f"{SEED_NAME} is {seed} in a stored view, expected a whole number from 0 to {MAX_DRAW_SEED}."
        )
    return parameters_P[:-1], int(seed)


def _corrupted(
    pixels_HWC: np.ndarray[Any, np.dtype[np.uint8]], corrupt_seed: int, policy: ViewPolicy
) -> np.ndarray[Any, np.dtype[np.uint8]]:
    corruption = policy.corruption
    return pixels_HWC if corruption is None else corruption.apply(pixels_HWC, corrupt_seed)


def reduction_of(height: int, width: int, resize_height: int, resize_width: int) -> int:
    """By how much an image is reduced when it is decoded: the most that leaves its box at least as large as wanted.

    >>> reduction_of(448, 500, 224, 224), reduction_of(447, 500, 224, 224), reduction_of(4000, 4000, 224, 224)
    (2, 1, 8)
    """
    for reduction in (8, 4, 2):
        if height >= reduction * resize_height and width >= reduction * resize_width:
            return reduction
    return 1


def _resize_box(image: Image, values: list[int], reduction: int, policy: ViewPolicy) -> Image:
    """The box of the source image at its new size. `image` is the source at 1 / reduction of its size."""
    from PIL.Image import Resampling

    top, left, height, width, resize_height, resize_width = values[:6]
    size, filter = (resize_width, resize_height), Resampling[policy.interpolation.upper()]
    # Cropped before it is resized: antialiasing must not see pixels outside the box, as in torchvision.
    outer_top, outer_left = top // reduction, left // reduction
    bottom, right = -(-(top + height) // reduction), -(-(left + width) // reduction)
    if (outer_top, outer_left, bottom, right) != (0, 0, image.height, image.width):
        image = image.crop((outer_left, outer_top, right, bottom))
    if reduction == 1:
        return image.resize(size, filter)
    # A reduced pixel is exactly `reduction` source pixels wide, so the box's edges may be inside of one. The fractions
    # are eighths, exact in Pillow's float32.
    box_left, box_top = left / reduction - outer_left, top / reduction - outer_top
    return image.resize(size, filter, (box_left, box_top, box_left + width / reduction, box_top + height / reduction))


def _finish(
    image: Image, values: list[int], parameters_P: np.ndarray[Any, Any], policy: ViewPolicy
) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """All that follows the resize: window, flip, operations and erasing."""
    from PIL.Image import Transpose

    resize_height, resize_width, window_top, window_left = values[4:8]
    if (resize_height, resize_width) != (policy.image_height, policy.image_width):
        image = image.crop(
            (window_left, window_top, window_left + policy.image_width, window_top + policy.image_height)
        )
    if values[8]:
        image = image.transpose(Transpose.FLIP_LEFT_RIGHT)
    for position, argument in ((values[9], float(parameters_P[10])), (values[11], float(parameters_P[12]))):
        if position >= 0:
            image = apply_operation(image, position, argument)
    pixels = np.array(image)
    erase_top, erase_left, erase_height, erase_width, erase_seed = values[13:]
    if erase_height:
        box = _noise(erase_seed, erase_height, erase_width)
        pixels[erase_top : erase_top + erase_height, erase_left : erase_left + erase_width] = box
    return pixels


def _noise(seed: int, height: int, width: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Uniform random pixels: the bytes of raw Philox words, a stream numpy keeps stable between versions."""
    num_values = height * width * 3
    words = np.random.Philox(key=seed).random_raw(-(-num_values // 8))
    return words.astype("<u8").view(np.uint8)[:num_values].reshape(height, width, 3)


def checked_parameters(parameters_P: np.ndarray[Any, Any], height: int, width: int, policy: ViewPolicy) -> list[int]:
    """The parameters as whole numbers (0 for the arguments), checked to fit the image and the policy.

    Raises:
        CorruptCacheError: they do not fit.
    """
    if parameters_P.shape != (len(PARAMETER_NAMES),):
        raise CorruptCacheError(f"view parameters of shape {parameters_P.shape}, expected ({len(PARAMETER_NAMES)},).")
    numbers: list[float] = parameters_P.tolist()
    arguments = [numbers[position] for position in _ARGUMENTS]
    for position in _ARGUMENTS:
        numbers[position] = 0.0
    # Whole numbers below 2**24 are exact in float32; -1 stands for no operation.
    for name, number in zip(PARAMETER_NAMES, numbers, strict=True):
        if not -1 <= number < 2**24 or number != int(number):
            raise CorruptCacheError(f"{name} is {number} in a stored view, expected a whole number.")
    values = [int(number) for number in numbers]
    fits = (
        _inside(values[0], values[2], height)
        and _inside(values[1], values[3], width)
        and _inside(values[6], policy.image_height, values[4])
        and _inside(values[7], policy.image_width, values[5])
        and values[4] * values[5] <= MAX_PIXELS
        and values[8] in (0, 1)
        and (values[15:] == [0, 0, 0] or _inside(values[13], values[15], policy.image_height))
        and (values[15:] == [0, 0, 0] or _inside(values[14], values[16], policy.image_width))
        and values[17] >= 0
    )
    if not fits:
        named = ", ".join(f"{name} {value}" for name, value in zip(PARAMETER_NAMES, values, strict=True))
        raise CorruptCacheError(
            f"stored view parameters do not fit an image of {width} x {height} and views of {policy.image_width} x "
            f"{policy.image_height}: {named}. Is this the image the cache was built from?"
        )
    check_operation(values[9], arguments[0])
    check_operation(values[11], arguments[1])
    return values


def _inside(start: int, length: int, limit: int) -> bool:
    return start >= 0 and length >= 1 and start + length <= limit


def pixel_hash(pixels: np.ndarray[Any, np.dtype[np.uint8]]) -> int:
    """A 64-bit BLAKE2b of a view's pixels, in [0, 2**64)."""
    digest = hashlib.blake2b(np.ascontiguousarray(pixels).data, digest_size=8, person=b"atcache pixels 1")
    return int.from_bytes(digest.digest(), "little")


def library_versions() -> dict[str, str]:
    """Versions of the libraries that make a view's pixels; an error names them if a replayed view differs."""
    from PIL import features

    versions = {name: metadata.version(name) for name in ("numpy", "pillow", "timm", "torchvision")}
    for name, feature in (("libjpeg_turbo", "libjpeg_turbo"), ("zlib", "zlib"), ("libwebp", "webp")):
        version: str | None = features.version(feature)
        if version is not None:
            versions[name] = version
    return versions
