"""Corruptions by name and severity: `fog:3` as text, and the corrupted pixels of a view."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from atcache.errors import ConfigError
from atcache.views.corruptions import blur, digital, noise, weather
from atcache.views.corruptions.draws import Draws
from atcache.views.philox import uniforms

_Corrupt = Callable[[np.ndarray, int, Draws], np.ndarray]

_FUNCTIONS: dict[str, dict[str, _Corrupt]] = {
    "noise": {
        "gaussian_noise": noise.gaussian_noise,
        "shot_noise": noise.shot_noise,
        "impulse_noise": noise.impulse_noise,
    },
    "blur": {
        "defocus_blur": blur.defocus_blur,
        "glass_blur": blur.glass_blur,
        "motion_blur": blur.motion_blur,
        "zoom_blur": blur.zoom_blur,
    },
    "weather": {
        "snow": weather.snow,
        "frost": weather.frost,
        "fog": weather.fog,
        "brightness": weather.brightness,
    },
    "digital": {
        "contrast": digital.contrast,
        "elastic_transform": digital.elastic_transform,
        "pixelate": digital.pixelate,
        "jpeg_compression": digital.jpeg_compression,
    },
}
GROUPS: dict[str, tuple[str, ...]] = {group: tuple(functions) for group, functions in _FUNCTIONS.items()}
"""The names of the corruptions of each group, in the order of the paper."""
NAMES: tuple[str, ...] = tuple(name for names in GROUPS.values() for name in names)
"""The names of all corruptions."""
SEVERITIES = (1, 2, 3, 4, 5)
SEED_NAME = "corrupt_seed"
"""The name of the last number of `parameters_P` under a policy that corrupts: 24 bits, because float32 holds no more
exactly."""
MAX_DRAW_SEED = 2**24 - 1


@dataclass(frozen=True, slots=True)
class Corruption:
    """One corruption at one severity.

    >>> Corruption.parse("fog:3")
    Corruption(name='fog', severity=3)
    >>> str(Corruption("fog", 3))
    'fog:3'
    """

    name: str
    """One of `NAMES`."""
    severity: int
    """1 to 5."""

    def __post_init__(self) -> None:
        if self.name not in NAMES:
            raise ConfigError(f"corruption {self.name!r}: expected one of {', '.join(NAMES)}.")
        if isinstance(self.severity, bool) or self.severity not in SEVERITIES:
            raise ConfigError(f"corruption {self.name} of severity {self.severity!r}: expected 1 to 5.")

    def __str__(self) -> str:
        return f"{self.name}:{self.severity}"

    @classmethod
    def parse(cls, text: str) -> Corruption:
        """The one corruption that a text such as "fog:3" names.

        Raises:
            ConfigError: it names none, or several.
        """
        first, *others = parse_corruptions(text)
        if others:
            raise ConfigError(
                f"corruption {text!r} stands for {1 + len(others)} corruptions, expected one, such as {first}. Give "
                "one name with its severity."
            )
        return first

    def draw_seed(self, seed: int, sample_key: str) -> int:
        """The seed of the noise of one sample, in 0..2**24 - 1: the same for all severities of a corruption."""
        [word] = uniforms(seed, f"{self.name}/{sample_key}", 0, purpose=b"atcache corrupt1", num_words=1)
        return int(word * (MAX_DRAW_SEED + 1))

    def apply(self, pixels_HWC: np.ndarray, draw_seed: int) -> np.ndarray:
        """The corrupted pixels, new, uint8 of the same shape.

        Args:
            pixels_HWC: RGB, uint8 (height, width, 3).
            draw_seed: seed of what is random, see `draw_seed`.
        """
        corrupt = next(functions[self.name] for functions in _FUNCTIONS.values() if self.name in functions)
        return np.ascontiguousarray(corrupt(pixels_HWC, self.severity, Draws(draw_seed)))


def parse_corruptions(text: str) -> tuple[Corruption, ...]:
    """The corruptions that a text names: a name or a group, with or without a severity.

    Groups are noise, blur, weather, digital and all; without a severity, all five are meant.

    Raises:
        ConfigError: it names none.

    >>> [str(one) for one in parse_corruptions("noise:3")]
    ['gaussian_noise:3', 'shot_noise:3', 'impulse_noise:3']
    >>> len(parse_corruptions("fog")), len(parse_corruptions("all"))
    (5, 75)
    """
    word, colon, severity = text.strip().partition(":")
    names = NAMES if word == "all" else GROUPS.get(word, (word,))
    if names == (word,) and word not in NAMES:
        raise ConfigError(
            f"corruption {text!r}: there is no {word!r}. Expected a name or a group, with or without a severity, such "
            f"as fog:3 or noise. The names are {', '.join(NAMES)}; the groups are {', '.join(GROUPS)} and all."
        )
    if colon and severity not in map(str, SEVERITIES):
        raise ConfigError(f"corruption {text!r}: the severity is {severity!r}, expected 1 to 5, such as {word}:3.")
    severities = (int(severity),) if colon else SEVERITIES
    return tuple(Corruption(name, one) for name in names for one in severities)


def corrupt(image_HWC: np.ndarray, corruption: str, *, seed: int = 0, sample_key: str = "") -> np.ndarray:
    """An image with one of the 15 common corruptions of Hendrycks & Dietterich (2019), uint8 of the same shape.

    Frost is drawn, not photographed; the other constants are those of ImageNet-C, for views of 224 pixels. Lengths in
    pixels follow the shorter side. Equal arguments give equal pixels on every machine with the same Pillow, which
    resizes and compresses.

    Args:
        image_HWC: RGB, uint8, shape (height, width, 3). It is not changed.
        corruption: a name and a severity from 1 to 5, such as "fog:3".
        seed: with `sample_key`, decides everything that is random.
        sample_key: the sample's name, so that each has noise of its own. `build --corrupt` uses this key and seed too.

    Raises:
        ConfigError: there is no such corruption, or the image has another shape or type.

    Example:
        foggy = atcache.corrupt(cache.image(sample=0), "fog:3")
    """
    parsed = Corruption.parse(corruption)
    if image_HWC.dtype != np.uint8 or image_HWC.ndim != 3 or image_HWC.shape[2] != 3 or not image_HWC.size:
        raise ConfigError(
            f"an image of shape {image_HWC.shape} and type {image_HWC.dtype}: expected (height, width, 3) of uint8."
        )
    if seed < 0:
        raise ConfigError(f"seed {seed}: expected a whole number from 0.")
    return parsed.apply(image_HWC, parsed.draw_seed(seed, sample_key))
