"""How an image becomes a model's input: size, filter, crop and normalisation."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Annotated, Any, cast

from atcache.choices import Decoding, PolicyName
from atcache.errors import TeacherError
from atcache.fields import JsonFields, Range
from atcache.views.mixing import MixPolicy
from atcache.views.policy import ViewPolicy

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True, slots=True)
class InputConfig(JsonFields):
    """How an image becomes a model's input; what timm calls its data config."""

    height: Annotated[int, Range(at_least=1, at_most=8192)]
    """Pixels."""
    width: Annotated[int, Range(at_least=1, at_most=8192)]
    """Pixels."""
    mean: tuple[float, float, float]
    """Subtracted from red, green, blue in [0, 1]."""
    std: Annotated[tuple[float, float, float], Range(above=0)]
    """The differences are divided by these."""
    interpolation: str
    """Filter of the resize: "bicubic", "bilinear" ..."""
    crop_pct: Annotated[float, Range(above=0, at_most=1e6)]
    """Side of the centre crop divided by the side of the resized image, in evaluation."""

    def view_policy(
        self,
        name: PolicyName,
        seed: int,
        mixing: MixPolicy | None = None,
        decoding: Decoding = "full",
        corrupt: str | None = None,
    ) -> ViewPolicy:
        """The policy that draws views of this size, filter and crop.

        Raises:
            ConfigError: the name, the seed or the corruption cannot be used, or `mixing` is given with "eval", or
                `corrupt` with another policy.
        """
        return ViewPolicy(
            name=name,
            seed=seed,
            image_height=self.height,
            image_width=self.width,
            interpolation=self.interpolation,
            crop_pct=self.crop_pct,
            mixing=mixing,
            decoding=decoding,
            corrupt=corrupt,
        )


def input_config(model: nn.Module) -> InputConfig:
    """The input that `model` was made for: its own image size, and timm's record of the rest.

    Raises:
        TeacherError: the recorded normalisation is not for three colours.
    """
    from timm.data import config as timm_data

    config = cast("dict[str, Any]", timm_data.resolve_model_data_config(model))
    size: Any = getattr(getattr(model, "patch_embed", None), "img_size", None) or config["input_size"][-2:]
    height, width = (size, size) if isinstance(size, int) else size
    mean, std = tuple(map(float, config["mean"])), tuple(map(float, config["std"]))
    if config["input_size"][0] != 3 or len(mean) != 3 or len(std) != 3:
        raise TeacherError(f"mean {mean} and std {std}: expected three values each, for red, green and blue.")
    return InputConfig(
        height=int(height),
        width=int(width),
        mean=mean,
        std=std,
        interpolation=str(config["interpolation"]),
        crop_pct=float(config["crop_pct"]),
    )


def crop_mode(model: nn.Module) -> str:
    """What a timm model's own transform does to images of another shape than its input, in timm's words."""
    from timm.data import config as timm_data

    return str(cast("dict[str, Any]", timm_data.resolve_model_data_config(model))["crop_mode"])


def note_crop(label: object, mode: str) -> None:
    """Say in the log that a teacher's own transform does not crop the centre, as policy eval does, if so.

    Args:
        label: the teacher's name.
        mode: timm's word: "center" crops it, "squash" resizes both sides, whatever the image's shape, and "border"
            keeps the whole image and fills up what is left. All others are taken to be "center".
    """
    does = {"squash": "squashes", "border": "pads"}.get(mode)
    if does is not None:
        logging.getLogger(__name__).warning(
            "NOTE: %s: its own transform %s images of another shape than its input. atcache crops the centre instead, "
            "so it sees such images otherwise than it was made for.",
            label,
            does,
        )


def normalise_images(
    pixels_BHWC: Tensor, mean: tuple[float, ...], std: tuple[float, ...], device: torch.device | str
) -> Tensor:
    """A model's input: float32 (batch, channel, height, width) on `device`, (pixels / 255 - mean) / std.

    Args:
        pixels_BHWC: uint8; converted only on the device, so that the copy is small.
        mean: mean of each channel, in 0..1.
        std: standard deviation of each channel, in 0..1.
        device: the device of the result.
    """
    pixels_BCHW = pixels_BHWC.to(device, non_blocking=True).permute(0, 3, 1, 2).float()
    return (pixels_BCHW - _of_channels(mean, str(device))) / _of_channels(std, str(device))


@lru_cache(maxsize=16)
def _of_channels(values: tuple[float, ...], device: str) -> Tensor:
    """255 times each channel's value, shape (1, channel, 1, 1); cached, since each copy to a GPU makes it wait."""
    import torch  # imported here, because reading the record of a cache's input should not wait for torch

    with torch.inference_mode(False):  # the first caller may be in it, and later ones may train
        return torch.tensor([255 * value for value in values], device=device).view(1, -1, 1, 1)
