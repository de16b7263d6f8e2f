"""Mixup and CutMix as part of a fixed view: the teacher sees the mixed image, and every student the same one.

A mixed view combines the sample's own view with the view of the same number of another sample of its block, its
partner. Which partner, how much and where is drawn like the rest of a view and stored. A replay therefore mixes exactly
the same: shares are whole 65536ths, and pixels are mixed in integers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np

from atcache.errors import ConfigError, CorruptCacheError
from atcache.fields import JsonFields
from atcache.views.philox import uniforms

MIXING_NAMES = ("mix_partner", "mix_share", "mix_top", "mix_left", "mix_height", "mix_width")
"""Names of the last numbers of `parameters_P` under a policy that mixes. `mix_partner` is the partner's row minus the
sample's; 0 if the view is not mixed, and then `mix_share` is 1. The box is 0 unless a box was pasted."""

_ONE = 2**16
"""A share of 1. Shares in 65536ths are exact in float32, and pixel * share is exact in int32."""

_PURPOSE = b"atcache mixing 1"
_NUM_WORDS = 7


@dataclass(frozen=True, kw_only=True, slots=True)
class MixPolicy(JsonFields):
    """How views are mixed: like timm's `Mixup` in mode "elem", which draws for each view separately."""

    is_strict: ClassVar[bool] = True
    mixup_alpha: float = 0.0
    """Mixup (Zhang et al. 2017, arXiv 1710.09412): the own image's share follows Beta(alpha, alpha). 0: no mixup."""
    cutmix_alpha: float = 0.0
    """CutMix (Yun et al. 2019, arXiv 1905.04899): a box of the partner, its area from Beta(alpha, alpha). 0: none."""
    prob: float = 1.0
    """Share of the views that are mixed at all."""
    switch_prob: float = 0.5
    """Share of the mixed views that use CutMix if both are wanted; timm's default."""

    def __post_init__(self) -> None:
        for name in ("mixup_alpha", "cutmix_alpha"):
            if not 0.0 <= getattr(self, name) <= 1e6:
                raise ConfigError(
                    f"{name.removesuffix('_alpha')}={getattr(self, name)}: expected 0 or more, such as 0.8."
                )
        if not self.mixup_alpha and not self.cutmix_alpha:
            raise ConfigError("mixup and cutmix are 0, so nothing is mixed; give one, such as mixup 0.8.")
        if not 0.0 < self.prob <= 1.0:
            raise ConfigError(f"mix_prob={self.prob}: expected more than 0, at most 1.")
        if not 0.0 <= self.switch_prob <= 1.0:
            raise ConfigError(f"mixing switch_prob {self.switch_prob}: expected 0 to 1.")


def mix_policy(mixup_alpha: float, cutmix_alpha: float, prob: float = 1.0) -> MixPolicy | None:
    """The policy for a user's options; None if they mix nothing.

    Raises:
        ConfigError: a number is out of range, or `prob` is given but both alphas are 0.
    """
    if not mixup_alpha and not cutmix_alpha:
        if prob != 1.0:
            raise ConfigError(f"mix_prob={prob} without mixup or cutmix: nothing is mixed. Give one of them too.")
        return None
    return MixPolicy(mixup_alpha=mixup_alpha, cutmix_alpha=cutmix_alpha, prob=prob)


class Mix(NamedTuple):
    """What is mixed into one view: the numbers of `MIXING_NAMES`."""

    partner: int
    """Rows from the sample to its partner; 0 for no mixing."""
    share: float
    """Share of the own image, in 0..1; labels mix in the same share. With a box: 1 - box area / image area, float32."""
    top: int = 0
    left: int = 0
    height: int = 0
    """Height of the partner's box; 0 if the whole images are blended."""
    width: int = 0


NOT_MIXED = Mix(0, 1.0)


def draw_mix(
    policy: MixPolicy,
    seed: int,
    sample_key: str,
    view: int,
    *,
    sample: int,
    partner_S: np.ndarray,
    image_height: int,
    image_width: int,
) -> Mix:
    """What is mixed into a view: a pure function of its arguments.

    Args:
        policy: how often views are mixed, and how much.
        seed: the seed of the views.
        sample_key: the sample's name.
        view: which of its views.
        sample: its row.
        partner_S: rows it may be mixed with, ascending; the sample itself is never chosen.
        image_height: height of the views, in pixels.
        image_width: width of the views, in pixels.
    """
    words = uniforms(seed, sample_key, view, purpose=_PURPOSE, num_words=_NUM_WORDS)
    mixed, switch, first, second, middle_y, middle_x, choice = words
    position = int(np.searchsorted(partner_S, sample))
    is_among = position < len(partner_S) and int(partner_S[position]) == sample
    num_partners = len(partner_S) - is_among
    if mixed >= policy.prob or not num_partners:
        return NOT_MIXED
    chosen = int(choice * num_partners)
    partner = int(partner_S[chosen + (is_among and chosen >= position)]) - sample
    cuts = policy.cutmix_alpha > 0 and (policy.mixup_alpha == 0 or switch < policy.switch_prob)
    own_share = _symmetric_beta(policy.cutmix_alpha if cuts else policy.mixup_alpha, first, second)
    if cuts:
        box = _cut_box(own_share, middle_y, middle_x, image_height, image_width)
        mix = Mix(partner, _share_beside(box[2] * box[3], image_height * image_width), *box)
    else:
        mix = Mix(partner, round(own_share * _ONE) / _ONE)
    return mix if mix.share < 1 else NOT_MIXED


def _symmetric_beta(alpha: float, first: float, second: float) -> float:
    """A number drawn from Beta(alpha, alpha), made of two uniform ones without rejection.

    If T is Student's t with 2 alpha degrees of freedom, 1/2 + T / (2 sqrt(2 alpha + T^2)) is Beta(alpha, alpha)
    (Devroye 1986, IX.3.2); T is drawn by Bailey's polar method (1994). Both steps are one formula here, which does not
    overflow for any alpha.
    """
    cosine = math.cos(2.0 * math.pi * second)
    radius = (1.0 - first) ** (1.0 / alpha)
    square = cosine**2 * (1.0 - radius)
    return 0.5 + math.copysign(0.5 * math.sqrt(square / (radius + square)) if square else 0.0, cosine)


def _cut_box(own_share: float, middle_y: float, middle_x: float, height: int, width: int) -> tuple[int, int, int, int]:
    """Top, left, height, width of CutMix's box, clipped at the borders: timm's `rand_bbox`; all 0 if it is empty."""
    side = math.sqrt(1.0 - own_share)
    cut_height, cut_width = int(height * side), int(width * side)
    row, column = int(middle_y * height), int(middle_x * width)
    top, bottom = max(0, row - cut_height // 2), min(height, row + (cut_height + 1) // 2)
    left, right = max(0, column - cut_width // 2), min(width, column + (cut_width + 1) // 2)
    if bottom <= top or right <= left:
        return 0, 0, 0, 0
    return top, left, bottom - top, right - left


def _share_beside(box_area: int, image_area: int) -> float:
    return float(np.float32(1.0 - box_area / image_area))


def parse_mix(numbers_P: np.ndarray[Any, Any], image_height: int, image_width: int) -> Mix:
    """The stored numbers of `MIXING_NAMES`, checked to fit views of this size.

    Raises:
        CorruptCacheError: `draw_mix` never gives such numbers.
    """
    if numbers_P.shape != (len(MIXING_NAMES),):
        raise CorruptCacheError(f"mixing parameters of shape {numbers_P.shape}, expected ({len(MIXING_NAMES)},).")
    numbers: list[float] = numbers_P.tolist()
    partner, share, *box = numbers
    if all(abs(number) < 2**24 and number == int(number) for number in (partner, *box)):
        mix = Mix(int(partner), share, *(int(number) for number in box))
        if _fits(mix, image_height, image_width):
            return mix
    named = ", ".join(f"{name} {number:g}" for name, number in zip(MIXING_NAMES, numbers, strict=True))
    raise CorruptCacheError(f"stored mixing does not fit views of {image_width} x {image_height}: {named}.")


def _fits(mix: Mix, height: int, width: int) -> bool:
    if not mix.partner:
        return mix == NOT_MIXED
    if not any(mix[2:]):
        return 0 <= mix.share < 1 and mix.share * _ONE == int(mix.share * _ONE)
    return (
        mix.top >= 0
        and mix.left >= 0
        and 1 <= mix.height <= height - mix.top
        and 1 <= mix.width <= width - mix.left
        and mix.share == _share_beside(mix.height * mix.width, height * width)
    )


def mix_pixels(
    own_HWC: np.ndarray[Any, np.dtype[np.uint8]], partner_HWC: np.ndarray[Any, np.dtype[np.uint8]], mix: Mix
) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """The mixed view, a new uint8 array.

    With a box, the pixels in it are the partner's. Without one, each value is the blend
    (w * own + (65536 - w) * partner + 32768) >> 16 with w = 65536 * share: rounded to the nearest, halves up.
    """
    if mix.height:
        mixed_HWC = own_HWC.copy()
        box = slice(mix.top, mix.top + mix.height), slice(mix.left, mix.left + mix.width)
        mixed_HWC[box] = partner_HWC[box]
        return mixed_HWC
    weight = int(mix.share * _ONE)
    sums_HWC = weight * own_HWC.astype(np.int32) + (_ONE - weight) * partner_HWC.astype(np.int32)
    return ((sums_HWC + _ONE // 2) >> 16).astype(np.uint8)
