"""The views that a codec is fitted and measured on: of good samples, spread evenly over the dataset."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from atcache.errors import ConfigError
from atcache.rendering import STORED, Renderer
from atcache.source import SampleIndex, Source
from atcache.views import ViewPolicy


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class CalibrationViews:
    """Rendered views, in the order of their samples."""

    pixels_NHWC: Tensor
    """uint8."""
    parameters_NP: np.ndarray
    """What was drawn for each, float32."""
    parameter_names: tuple[str, ...]
    """What its columns mean."""
    render_s: float
    """Seconds a view takes to load in one process."""


def render_calibration_views(
    index: SampleIndex, policy: ViewPolicy, num_samples: int, *, skip_bad: bool
) -> CalibrationViews:
    """View 0 of `num_samples` good samples, or of all where there are fewer.

    Args:
        index: the samples.
        policy: how views are drawn.
        num_samples: wanted.
        skip_bad: leave out images that turn out to be undecodable.

    Raises:
        BadImageError: an image cannot be decoded, and bad ones are not to be skipped.
        ConfigError: there is not one view.
    """
    good = np.flatnonzero(index.problem_S == 0)
    chosen = good[np.unique(np.linspace(0, len(good) - 1, min(len(good), num_samples)).astype(int))]
    # Blocks are not known yet, so these are mixed with any sample: as good to calibrate on.
    renderer = Renderer(Source(index), policy, skip_bad=skip_bad)
    seconds: list[float] = []
    pixels: list[np.ndarray] = []
    parameters: list[np.ndarray] = []
    for sample in chosen.tolist():
        start_s = time.perf_counter()
        view = renderer.render(sample, 0)
        if view.status == STORED:
            seconds.append(time.perf_counter() - start_s)
            pixels.append(view.pixels_HWC)
            parameters.append(view.parameters_P)
    if not pixels:
        folder = index.tars[0].parent if index.tars else "the data"
        raise ConfigError(f"{folder}: none of {len(chosen)} calibration images can be read. Check the data.")
    return CalibrationViews(
        pixels_NHWC=torch.from_numpy(np.stack(pixels)),
        parameters_NP=np.stack(parameters),
        parameter_names=policy.parameter_names,
        render_s=statistics.fmean(seconds[1:] or seconds),  # the first one also imports the decoder
    )
