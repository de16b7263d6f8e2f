"""Before the long run: fit the codec on a sample of views, check the teacher on it, measure what a view will cost."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from atcache.attention.capture import FactorCapture, check_capture, find_blocks
from atcache.attention.factors import FactorGeometry, LayerFactors
from atcache.attention.intercept import AttentionCall, AttentionIntercept
from atcache.attention.transfer import CachedFactors, TeacherFactors, attend_with_given
from atcache.codecs import Codec, Coder, State
from atcache.codecs.fidelity import row_kl
from atcache.precision import autocast
from atcache.rendering import normalise_images
from atcache.teachers import Teacher

_CHECKED_VIEWS = 4  # maps are formed for these, so few
_FIDELITY_VIEWS = 8


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Calibration:
    """What was learnt from the calibration views."""

    geometry: FactorGeometry
    state: State
    """The codec's fitted arrays."""
    bias_LHQK: Tensor | None
    coder: Coder
    codes_BLTC: Tensor
    """Codes of some calibration views, to measure how they compress."""
    pixels_BHWC: Tensor
    """The same views, uint8."""
    row_kl_nats: float
    """Mean KL(A || decoded A) over rows, heads, layers of these views."""
    injected_error: float
    """Relative error of the teacher's final features when it attends with decoded factors."""
    teacher_views_per_s: float
    """Speed of capture and encoding, without loading images."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class TeacherRun:
    """A teacher with the precision it runs in: what calibration and building share."""

    teacher: Teacher
    device: torch.device
    dtype: torch.dtype

    def images(self, pixels_BHWC: Tensor) -> Tensor:
        """The teacher's input, on its device."""
        return normalise_images(pixels_BHWC, self.teacher.input.mean, self.teacher.input.std, self.device)

    def factors(self, capture: FactorCapture, pixels_BHWC: Tensor) -> list[LayerFactors]:
        """The wanted layers' factors of a batch of views."""
        with autocast(self.device, self.dtype):
            return capture(self.images(pixels_BHWC))


def calibrate(
    run: TeacherRun,
    codec: Codec,
    pixels_NHWC: Tensor,
    *,
    layers: Sequence[int] | None,
    heads: Sequence[int] | None,
    batch_size: int,
) -> Calibration:
    """Check the teacher's attention, fit the codec, and measure fidelity and speed.

    Args:
        run: the teacher.
        codec: to be fitted.
        pixels_NHWC: calibration views, uint8.
        layers: block indices to keep; None for all.
        heads: head indices to keep; None for all.
        batch_size: views a forward.

    Raises:
        UnsupportedAttentionError: the teacher's attention cannot be captured.
        CodecError: the codec cannot hold it.
    """
    model = run.teacher.model
    with autocast(run.device, run.dtype):
        check = check_capture(model, run.images(pixels_NHWC[:_CHECKED_VIEWS]), layers, heads)
    capture = FactorCapture(model, layers, heads)

    def batches() -> Iterator[list[LayerFactors]]:
        for start in range(0, len(pixels_NHWC), batch_size):
            yield run.factors(capture, pixels_NHWC[start : start + batch_size])

    state = codec.fit(check.geometry, batches())
    coder = codec.coder(check.geometry, state, bias_LHQK=check.bias_LHQK, device=str(run.device))
    start_s = time.monotonic()
    codes_BLTC = coder.encode(run.factors(capture, pixels_NHWC[:batch_size])).cpu()
    seconds = time.monotonic() - start_s
    few_BHWC = pixels_NHWC[:_FIDELITY_VIEWS]
    few_layers = run.factors(capture, few_BHWC)
    few_codes_BLTC = coder.encode(few_layers)
    return Calibration(
        geometry=check.geometry,
        state=state,
        bias_LHQK=check.bias_LHQK,
        coder=coder,
        codes_BLTC=codes_BLTC,
        pixels_BHWC=pixels_NHWC[:batch_size],
        row_kl_nats=mean_row_kl(coder, few_layers, few_codes_BLTC),
        injected_error=_injected_error(run, few_BHWC, coder.geometry, CachedFactors(coder, few_codes_BLTC)),
        teacher_views_per_s=len(codes_BLTC) / seconds,
    )


def mean_row_kl(coder: Coder, layers: Sequence[LayerFactors], codes_BLTC: Tensor) -> float:
    """Mean KL(A || decoded A), in nats, over all rows of all layers of a few views.

    Args:
        coder: decodes.
        layers: the factors as captured, one a stored layer.
        codes_BLTC: what the coder made of them.
    """
    layer_means = [
        float(row_kl(layer, coder.decode(position, codes_BLTC[:, position])).mean())
        for position, layer in enumerate(layers)
    ]
    return max(0.0, float(np.mean(layer_means)))


def _injected_error(run: TeacherRun, pixels_BHWC: Tensor, geometry: FactorGeometry, decoded: TeacherFactors) -> float:
    """|features with decoded maps - features| / |features|, over the teacher's final tokens."""
    images = run.images(pixels_BHWC)

    def attend_with_decoded(call: AttentionCall) -> Tensor:
        if call.block not in geometry.layers:
            return call.run()
        return attend_with_given(call, decoded.layer(call.block), geometry.heads)

    model: Any = run.teacher.model
    with torch.inference_mode(), autocast(run.device, run.dtype):
        features: Tensor = model.forward_features(images).float()
        with AttentionIntercept(find_blocks(model), attend_with_decoded):
            injected: Tensor = model.forward_features(images).float()
    return float(((injected - features).square().sum() / features.square().sum()).sqrt())
