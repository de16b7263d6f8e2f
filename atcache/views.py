"""Views: one fixed augmentation of a sample, drawn from (seed, sample_key, view), stored as numbers and replayed.

A view is one vector of float32 parameters, the same for every policy: crop a box of the source image, resize it, cut a
window of the wanted size, flip, up to two RandAugment operations, erase a box. The parameters are stored, not only the
seed, because what draws them may change: numpy keeps the raw stream of a bit generator but not the methods of
`numpy.random.Generator` across versions, and `log` and `cos` differ between machines in the last bit. So only raw
Philox words are used here, and replaying a view draws nothing but the erase noise, which is raw words too.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import asdict, dataclass
from importlib import metadata
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from atcache.errors import BadImageError, ConfigError, CorruptCacheError
from atcache.images import MAX_PIXELS
from atcache.randaugment import (
    FILL,
    MAGNITUDE_MAX,
    MAGNITUDE_MEAN,
    MAGNITUDE_STD,
    OPERATIONS,
    RESAMPLE,
    apply_operation,
    check_operation,
    level_argument,
)

if TYPE_CHECKING:
    from PIL.Image import Image

PolicyName = Literal["eval", "crop-flip", "randaug"]

SPEC = 1
"""Version of the meaning of policies and parameters; raised when equal parameters would give other pixels."""

PARAMETER_NAMES = (
    "crop_top",
    "crop_left",
    "crop_height",
    "crop_width",
    "resize_height",
    "resize_width",
    "window_top",
    "window_left",
    "flip",
    "operation_1",
    "argument_1",
    "operation_2",
    "argument_2",
    "erase_top",
    "erase_left",
    "erase_height",
    "erase_width",
    "erase_seed",
)
"""What the numbers of `parameters_P` are, for every policy. Unused: operation -1, everything else 0. Whole numbers
below 2**24 but for the arguments, so float32 holds them exactly."""

INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")

_ARGUMENTS = (PARAMETER_NAMES.index("argument_1"), PARAMETER_NAMES.index("argument_2"))
_NO_OPERATIONS = (-1.0, 0.0, -1.0, 0.0)
_NO_ERASING = (0.0, 0.0, 0.0, 0.0, 0.0)
_NUM_TRIES = 10
# Each use has raw words of its own, so that `randaug` crops and flips just as `crop-flip` does.
_NUM_WORDS = 64
_CROP_WORD, _FLIP_WORD, _OPERATION_WORD, _ERASE_WORD = 0, 22, 24, 34


@dataclass(frozen=True, kw_only=True, slots=True)
class ViewPolicy:
    """How the views of a cache are drawn."""

    name: PolicyName
    """`eval`: timm's evaluation transform. `crop-flip`: random resized crop and flip. `randaug`: that, RandAugment and
    random erasing."""
    seed: int = 0
    """Any whole number from 0; with sample_key and view it decides everything."""
    image_height: int
    """Height of the views, in pixels: what the teacher takes."""
    image_width: int
    """Width of the views, in pixels."""
    interpolation: str = "bicubic"
    """How boxes are resized: one of `INTERPOLATIONS`, always antialiased (Pillow)."""
    crop_pct: float = 0.875
    """`eval` only: the shortest side is resized to size / crop_pct before the centre is cut; timm's default."""

    def __post_init__(self) -> None:
        if self.name not in get_args(PolicyName):
            raise ConfigError(f"view policy {self.name!r}: expected one of {', '.join(get_args(PolicyName))}.")
        if self.interpolation not in INTERPOLATIONS:
            raise ConfigError(f"interpolation {self.interpolation!r}: expected one of {', '.join(INTERPOLATIONS)}.")
        if self.seed < 0:
            raise ConfigError(f"seed {self.seed}: expected a whole number from 0.")
        if not (1 <= self.image_height <= 8192 and 1 <= self.image_width <= 8192):
            raise ConfigError(f"views of {self.image_height} x {self.image_width}: expected 1 to 8192 pixels a side.")
        if not 0.0 < self.crop_pct <= 1.0:
            raise ConfigError(f"crop_pct {self.crop_pct}: expected more than 0, at most 1.")

    def to_json(self) -> dict[str, Any]:
        """The fields as a JSON object, with the spec version and its fixed choices."""
        return {"spec": SPEC, **asdict(self), "operations": {"resample": RESAMPLE, "fill": list(FILL)}}

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> ViewPolicy:
        """The policy `to_json` came from.

        Raises:
            ConfigError: it was written for another spec.
        """
        rest = dict(fields)
        spec, operations = rest.pop("spec", None), rest.pop("operations", None)
        if spec != SPEC or operations != {"resample": RESAMPLE, "fill": list(FILL)}:
            raise ConfigError(
                f"views of spec {spec} with operations {operations}, this atcache knows spec {SPEC} with {RESAMPLE} "
                f"and fill {list(FILL)}. Use the version that wrote the cache."
            )
        return cls(**rest)


def draw_view(
    policy: ViewPolicy, sample_key: str, view: int, source_height: int, source_width: int
) -> np.ndarray[Any, np.dtype[np.float32]]:
    """The parameters of a view, shape (len(PARAMETER_NAMES),), float32: a pure function of its arguments.

    Args:
        policy: its seed, name and size.
        sample_key: the sample's name, as `SampleIndex.sample_key` gives it.
        view: which view of the sample, from 0.
        source_height: the decoded image's height in pixels.
        source_width: the decoded image's width in pixels.

    Raises:
        BadImageError: `eval` of so long and thin an image that the resized one would be over Pillow's pixel limit.
    """
    if policy.name == "eval":
        geometry = _draw_eval(policy, source_height, source_width)
        return np.array((*geometry, 0, *_NO_OPERATIONS, *_NO_ERASING), dtype=np.float32)
    uniforms = _uniforms(policy.seed, sample_key, view)
    crop = _draw_crop(uniforms, source_height, source_width)
    geometry = (*crop, policy.image_height, policy.image_width, 0, 0)
    flip = float(uniforms[_FLIP_WORD] < 0.5)
    operations, erasing = _NO_OPERATIONS, _NO_ERASING
    if policy.name == "randaug":
        operations = (*_draw_operation(uniforms, _OPERATION_WORD), *_draw_operation(uniforms, _OPERATION_WORD + 5))
        erasing = _draw_erasing(uniforms, policy.image_height, policy.image_width)
    return np.array((*geometry, flip, *operations, *erasing), dtype=np.float32)


def _uniforms(seed: int, sample_key: str, view: int) -> list[float]:
    """Doubles in [0, 1) from the raw words of a Philox keyed by the three."""
    text = f"{seed}/{view}/{sample_key}".encode()
    key = hashlib.blake2b(text, digest_size=16, person=b"atcache view 1").digest()
    words = np.random.Philox(key=int.from_bytes(key, "little")).random_raw(_NUM_WORDS)
    return ((words >> np.uint64(11)) * 2.0**-53).tolist()


def _draw_eval(policy: ViewPolicy, height: int, width: int) -> tuple[int, ...]:
    """timm's `transforms_imagenet_eval` with a centre crop: crop box, resized size, window."""
    target_height = math.floor(policy.image_height / policy.crop_pct)
    target_width = math.floor(policy.image_width / policy.crop_pct)
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
    window_top = round((resized[0] - policy.image_height) / 2.0)
    window_left = round((resized[1] - policy.image_width) / 2.0)
    return 0, 0, height, width, *resized, window_top, window_left


def _draw_crop(uniforms: list[float], height: int, width: int) -> tuple[int, int, int, int]:
    """The top, left, height and width of torchvision's RandomResizedCrop.

    Its area is 0.08 to 1 of the image, its ratio of width to height log-uniform from 3/4 to 4/3.
    """
    area, log_ratio = height * width, math.log(4 / 3)
    for attempt in range(_NUM_TRIES):
        first, second = uniforms[_CROP_WORD + 2 * attempt : _CROP_WORD + 2 * attempt + 2]
        target_area = (0.08 + 0.92 * first) * area
        ratio = math.exp(log_ratio * (2.0 * second - 1.0))
        crop_width, crop_height = round(math.sqrt(target_area * ratio)), round(math.sqrt(target_area / ratio))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            position = _CROP_WORD + 2 * _NUM_TRIES
            top = int(uniforms[position] * (height - crop_height + 1))
            left = int(uniforms[position + 1] * (width - crop_width + 1))
            return top, left, crop_height, crop_width
    # The image is too long: the largest box in its middle whose ratio is allowed.
    crop_height, crop_width = height, width
    if width / height < 3 / 4:
        crop_height = round(width / (3 / 4))
    elif width / height > 4 / 3:
        crop_width = round(height * (4 / 3))
    return (height - crop_height) // 2, (width - crop_width) // 2, crop_height, crop_width


def _draw_operation(uniforms: list[float], word: int) -> tuple[float, float]:
    """One RandAugment operation: none with probability 0.5, else any of them at a magnitude of N(9, 0.5)."""
    choice, apply, first, second, sign = uniforms[word : word + 5]
    if apply >= 0.5:
        return -1.0, 0.0
    position = int(choice * len(OPERATIONS))
    # Box and Muller; 1 - first is never 0.
    normal = math.sqrt(-2.0 * math.log(1.0 - first)) * math.cos(2.0 * math.pi * second)
    magnitude = min(max(MAGNITUDE_MEAN + MAGNITUDE_STD * normal, 0.0), MAGNITUDE_MAX)
    return float(position), level_argument(OPERATIONS[position], magnitude, 1 if sign < 0.5 else -1)


def _draw_erasing(uniforms: list[float], height: int, width: int) -> tuple[float, float, float, float, float]:
    """The box and noise seed of random erasing (Zhong et al. 2017, arXiv 1708.04896), with timm's law for the box.

    Probability 0.25, area 0.02 to 1/3 of the view, ratio log-uniform from 0.3 to 1/0.3.
    """
    probability, top, left, seed = uniforms[_ERASE_WORD : _ERASE_WORD + 4]
    if probability >= 0.25:
        return _NO_ERASING
    log_ratio = math.log(1 / 0.3)
    for attempt in range(_NUM_TRIES):
        word = _ERASE_WORD + 4 + 2 * attempt
        area = (0.02 + (1 / 3 - 0.02) * uniforms[word]) * height * width
        ratio = math.exp(log_ratio * (2.0 * uniforms[word + 1] - 1.0))
        box_height, box_width = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < box_height < height and 0 < box_width < width:
            box_top, box_left = int(top * (height - box_height + 1)), int(left * (width - box_width + 1))
            # 24 bits of seed: what float32 holds exactly.
            return float(box_top), float(box_left), float(box_height), float(box_width), float(int(seed * 2**24))
    return _NO_ERASING


def apply_view(
    image: Image, parameters_P: np.ndarray[Any, Any], policy: ViewPolicy
) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """The view's pixels, uint8, shape (image_height, image_width, 3): a pure function, for any stored parameters.

    Args:
        image: the decoded source image, mode RGB; it is left as it is.
        parameters_P: what `draw_view` gave for an image of this size.
        policy: only its size and interpolation are used.

    Raises:
        CorruptCacheError: the parameters do not fit the image or the policy.
    """
    from PIL.Image import Resampling, Transpose

    values = _checked(parameters_P, image.height, image.width, policy)
    top, left, height, width, resize_height, resize_width, window_top, window_left = values[:8]
    # Cropped before it is resized: antialiasing must not see pixels outside the box, as in torchvision.
    if (height, width) != (image.height, image.width):
        image = image.crop((left, top, left + width, top + height))
    image = image.resize((resize_width, resize_height), Resampling[policy.interpolation.upper()])
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


def _checked(parameters_P: np.ndarray[Any, Any], height: int, width: int, policy: ViewPolicy) -> list[int]:
    """The parameters as whole numbers (0 for the arguments), once they are known to fit."""
    if parameters_P.shape != (len(PARAMETER_NAMES),):
        raise CorruptCacheError(f"view parameters of shape {parameters_P.shape}, expected ({len(PARAMETER_NAMES)},).")
    numbers: list[float] = parameters_P.tolist()
    arguments = [numbers[position] for position in _ARGUMENTS]
    for position in _ARGUMENTS:
        numbers[position] = 0.0
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
    """Versions of what makes a view's pixels: named when a replayed view differs from the stored one."""
    from PIL import features

    versions = {name: metadata.version(name) for name in ("numpy", "pillow", "timm", "torchvision")}
    for name, feature in (("libjpeg_turbo", "libjpeg_turbo"), ("zlib", "zlib"), ("libwebp", "webp")):
        version: str | None = features.version(feature)
        if version is not None:
            versions[name] = version
    return versions
