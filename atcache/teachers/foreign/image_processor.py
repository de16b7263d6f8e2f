"""The input that a transformers model was made for, read from its `preprocessor_config.json`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, cast

from PIL.Image import Resampling

from atcache.errors import TeacherError
from atcache.teachers.inputs import InputConfig

_NEAR_ONE_255TH = 1e-3  # files have 0.00392156862745098, or 0.00392156862


def processor_input(name: str, settings: Mapping[str, Any], model_size: tuple[int, int] | None) -> InputConfig:
    """The input that an image processor makes.

    A processor that resizes without cropping distorts images that are not square. Views never distort: they crop.

    Args:
        name: the model's name, for messages.
        settings: what `preprocessor_config.json` holds.
        model_size: height and width that the model's config names, for processors that do not resize.

    Raises:
        TeacherError: a setting is missing, or makes what views cannot be.
    """
    try:
        height, width, crop_pct = _sizes(settings, model_size)
        mean, std = _normalisation(settings)
        return InputConfig(
            height=height,
            width=width,
            mean=mean,
            std=std,
            interpolation=Resampling(settings.get("resample", Resampling.BILINEAR)).name.lower(),
            crop_pct=crop_pct,
        )
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        reason = f"it has no {error}" if isinstance(error, KeyError) else str(error)
        raise TeacherError(
            f"model {name}: its image processor (preprocessor_config.json) cannot be used: {reason}. Correct a copy of "
            "the model's folder and give that, or hand the model over from Python with atcache.own_teacher."
        ) from error


def squashes(settings: Mapping[str, Any]) -> bool:
    """Whether an image processor resizes both sides of an image, whatever its shape.

    Args:
        settings: as for `processor_input`.
    """
    size = settings.get("size") if settings.get("do_resize", True) else None
    # One number is the shortest side if a crop follows, and else both sides.
    return _sides(size) is not None and not (isinstance(size, int) and settings.get("do_center_crop", False))


def _sizes(settings: Mapping[str, Any], model_size: tuple[int, int] | None) -> tuple[int, int, float]:
    """Height, width, and the crop's share of the resized image."""
    resized = settings["size"] if settings.get("do_resize", True) else None
    crop = settings["crop_size"] if settings.get("do_center_crop", False) else None
    sides = _sides(resized)
    if crop is not None:
        height, width = _checked(_sides(crop) or _square(crop))
        shortest = min(sides) if sides else _shortest_edge(resized)
        return height, width, 1.0 if shortest is None else _share(min(height, width), shortest)
    if sides is None and _shortest_edge(resized) is not None:
        raise ValueError("it resizes images and does not crop them, so they have no common size")
    height, width = _checked(sides or model_size)
    return height, width, 1.0


def _share(crop: int, resized: int) -> float:
    """The crop's share of the resized side, from which that side can be found again, rounded down as views do it.

    Rounding makes a share such as 384 / 450 a little too large, and the side that is found one pixel too short.
    """
    share = crop / resized
    return share if math.floor(crop / share) == resized else math.nextafter(share, 0.0)


def _sides(size: Any) -> tuple[int, int] | None:  # noqa: ANN401 - JSON
    if isinstance(size, Mapping) and "height" in size:
        sides = cast("Mapping[str, int]", size)
        return sides["height"], sides["width"]
    return _square(size)


def _square(size: Any) -> tuple[int, int] | None:  # noqa: ANN401 - JSON
    """Processors of before 2022 write one number."""
    return (size, size) if isinstance(size, int) else None


def _shortest_edge(size: Any) -> int | None:  # noqa: ANN401 - JSON
    return cast("Mapping[str, int]", size).get("shortest_edge") if isinstance(size, Mapping) else None


def _checked(sides: Any) -> tuple[int, int]:  # noqa: ANN401 - JSON
    if sides is None or not all(isinstance(side, int) and side > 0 for side in sides):
        raise ValueError(f"the size of its images is {sides}, expected height and width in pixels")
    return sides


def _normalisation(settings: Mapping[str, Any]) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    factor = settings.get("rescale_factor", 1 / 255)
    if not settings.get("do_rescale", True) or not math.isclose(factor, 1 / 255, rel_tol=_NEAR_ONE_255TH):
        raise ValueError("it does not divide pixels by 255")
    if not settings.get("do_normalize", True):
        return (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    return _colours(settings["image_mean"]), _colours(settings["image_std"])


def _colours(values: Any) -> tuple[float, float, float]:  # noqa: ANN401 - JSON
    red, green, blue = map(float, values)
    return red, green, blue
