"""How far decoded maps are from the teacher's, and when that is further than what was asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from atcache.attention.blocks import find_blocks
from atcache.attention.factors import LayerAttention, LayerFactors
from atcache.attention.geometry import FactorGeometry
from atcache.attention.intercept import AttentionCall, AttentionIntercept, MapCall
from atcache.codecs.base import Codec, Coder
from atcache.codecs.fidelity import mean_row_kl, value_error
from atcache.codecs.transform.codec import TransformCodec
from atcache.students.attend import attend_with_given
from atcache.students.pairing import TeacherFactors
from atcache.teachers.devices import autocast
from atcache.teachers.run import TeacherRun

ROW_KL_FLOOR_NATS = {torch.float32: 1e-6, torch.bfloat16: 2e-4}
"""A limit is never below this, by the type the teacher computes in: a lossless cache records next to nothing, and live
maps themselves differ between devices and versions of torch. In a 12-layer ViT those of bfloat16 and float32 are 2e-5
apart."""
INJECTED_ERROR_FLOOR = {torch.float32: 1e-3, torch.bfloat16: 1e-2}
"""The same for the error of the teacher's features."""
TIMES_THE_TARGET = 1.5
"""A build warns of more than so much."""
_LEAST_VIEWS = 12
"""Views differ: fewer say nothing about the others."""


def target_row_kl(codec: Codec) -> float | None:
    """The row KL that a codec is fitted to meet, in nats; None where it is fitted to a size, or to nothing."""
    return codec.target_kl if isinstance(codec, TransformCodec) and codec.target_nbytes is None else None


@dataclass(frozen=True, kw_only=True, slots=True)
class Expectation:
    """The row KL that a build's views should have."""

    row_kl_nats: float
    """The codec's target, or what calibration measured where it has none."""
    is_target: bool
    """Whether it is the target."""
    limit_nats: float
    """More than this on average is told."""

    @classmethod
    def of(cls, codec: Codec, calibrated_nats: float, dtype: torch.dtype) -> Expectation:
        """What `codec` should do in a cache whose held-back calibration views had a row KL of `calibrated_nats`.

        Args:
            codec: the cache's.
            calibrated_nats: mean row KL of held-back views.
            dtype: what the teacher computes in.
        """
        target = target_row_kl(codec)
        expected = calibrated_nats if target is None else target
        limit = max(TIMES_THE_TARGET * expected, ROW_KL_FLOOR_NATS[dtype])
        return cls(row_kl_nats=expected, is_target=target is not None, limit_nats=limit)

    def warn(self, row_kl_nats: float, num_views: int) -> str | None:
        """What to tell a person whose views have this mean row KL; None where all is well, or there are few views."""
        # Not "is it over": a KL that is no number must not pass.
        if num_views < _LEAST_VIEWS or row_kl_nats <= self.limit_nats:
            return None
        expected = "of the codec's target" if self.is_target else "measured in calibration"
        return (
            f"Warning: decoded maps have a row KL of {row_kl_nats:.2g} nats on average, over {TIMES_THE_TARGET} times "
            f"the {self.row_kl_nats:.2g} {expected}: these images are unlike the calibration's. Build anew with more "
            "--calibration-samples, or keep the cache if that KL will do."
        )


class Watch:
    """The mean row KL of the views that a running build has looked at; for one thread."""

    def __init__(self, expectation: Expectation) -> None:
        self._expectation = expectation
        self._has_warned = False

    def see(self, sum_nats: float, num_views: int) -> str | None:
        """The warning, the first time that the mean of so many views gives one."""
        warning = self._expectation.warn(sum_nats / max(1, num_views), num_views)
        if warning is None or self._has_warned:
            return None
        self._has_warned = True
        return warning


def layer_row_kl(coder: Coder, layers: Sequence[LayerAttention], codes_BLTC: Tensor) -> tuple[float, ...]:
    """Mean KL(A || decoded A) of each kept layer, in nats, over all rows of some views.

    Args:
        coder: decodes.
        layers: the attention as captured, one a stored layer.
        codes_BLTC: what the coder made of it.
    """
    return tuple(
        mean_row_kl(layer, lambda few, at=position: coder.decode(at, codes_BLTC[few, coder.code_layer(at)]))
        for position, layer in enumerate(layers)
    )


def layer_v_error(coder: Coder, layers: Sequence[LayerAttention], codes_BLTC: Tensor) -> tuple[float, ...] | None:
    """Relative error of each kept layer's decoded v, or None where v is not stored; arguments as `layer_row_kl`'s."""
    if not coder.geometry.v_head_dim:
        return None
    errors: list[float] = []
    for position, layer in enumerate(layers):
        decoded = coder.decode(position, codes_BLTC[:, coder.code_layer(position)])
        assert isinstance(layer, LayerFactors), "maps have no v"
        assert isinstance(decoded, LayerFactors), "maps have no v"
        errors.append(value_error(layer, decoded))
    return tuple(errors)


def injected_error(run: TeacherRun, pixels_BHWC: Tensor, geometry: FactorGeometry, decoded: TeacherFactors) -> float:
    """|features with decoded maps - features| / |features|, over the teacher's final tokens.

    Args:
        run: the teacher.
        pixels_BHWC: views, uint8.
        geometry: of the decoded factors; other blocks and heads attend as they do.
        decoded: gives each layer's factors for these views.
    """
    images = run.images(pixels_BHWC)

    def attend_with_decoded(call: AttentionCall | MapCall) -> Tensor:
        if call.block not in geometry.layers:
            return call.run()
        return attend_with_given(call, decoded.layer(call.block), geometry.heads)

    model: Any = run.teacher.model
    with torch.inference_mode(), autocast(run.device, run.dtype):
        features: Tensor = model.forward_features(images).float()
        with AttentionIntercept(find_blocks(model), attend_with_decoded):
            injected: Tensor = model.forward_features(images).float()
    return float(((injected - features).square().sum() / features.square().sum()).sqrt())
