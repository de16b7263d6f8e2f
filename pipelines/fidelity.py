"""Measures how far decoded maps are from the teacher's, and warns when that is further than expected."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from atcache.attention.blocks import attention_way, find_blocks
from atcache.attention.calls import AttentionCall, MapCall
from atcache.attention.factors import LayerAttention
from atcache.attention.finite import NotFinite, NotFiniteError, positions
from atcache.attention.geometry import FactorGeometry
from atcache.attention.intercept import AttentionIntercept
from atcache.cache.record import CacheRecord
from atcache.codecs.base import Codec, Coder
from atcache.codecs.fidelity import mean_row_kl, relative_error
from atcache.codecs.transform.codec import TransformCodec
from atcache.files.location import Location
from atcache.students.attend import attend_with_given
from atcache.students.pairing import TeacherFactors
from atcache.teachers.devices import autocast
from atcache.teachers.run import TeacherRun

ROW_KL_FLOOR_NATS = {torch.float32: 1e-6, torch.bfloat16: 2e-4}
"""The lowest limit of row KL, by the dtype that the teacher computes in. A lossless cache records almost no error, but
live maps differ between devices and versions of torch. In a 12-layer ViT, bfloat16 and float32 maps are 2e-5 apart."""
INJECTED_ERROR_FLOOR = {torch.float32: 1e-3, torch.bfloat16: 1e-2}
"""The lowest limit of the error of the teacher's features, in the same way."""
TIMES_THE_TARGET = 1.5
"""A build warns if row KL is more than this many times what was expected."""
_LEAST_VIEWS = 12
"""Views needed before a build warns. Views differ, so fewer say little about the others."""


def target_row_kl(codec: Codec) -> float | None:
    """The row KL that a codec is fitted to meet, in nats; None if it is fitted to a size, or not fitted."""
    return codec.target_kl if isinstance(codec, TransformCodec) and codec.target_nbytes is None else None


@dataclass(frozen=True, kw_only=True, slots=True)
class Expectation:
    """The row KL that a build's views should have."""

    row_kl_nats: float
    """The codec's target or, if it has none, what calibration measured."""
    is_target: bool
    """Whether `row_kl_nats` is the codec's target."""
    limit_nats: float
    """A mean row KL above this is warned of."""

    @classmethod
    def of(cls, codec: Codec, calibrated_nats: float, dtype: torch.dtype) -> Expectation:
        """The row KL to expect of `codec` in a cache that was calibrated to `calibrated_nats`.

        Args:
            codec: the codec of the cache.
            calibrated_nats: mean row KL of the calibration views that were held back from fitting.
            dtype: what the teacher computes in.
        """
        target = target_row_kl(codec)
        expected = calibrated_nats if target is None else target
        limit = max(TIMES_THE_TARGET * expected, ROW_KL_FLOOR_NATS[dtype])
        return cls(row_kl_nats=expected, is_target=target is not None, limit_nats=limit)

    @classmethod
    def of_cache(cls, path: Location, record: CacheRecord) -> Expectation:
        """The row KL that a cache's views should have, by what was measured when it was begun."""
        dtype = torch.bfloat16 if record.identity.precision == "bfloat16" else torch.float32
        return cls.of(record.make_codec(path), record.calibration.row_kl_nats, dtype)

    def warn(self, row_kl_nats: float, num_views: int) -> str | None:
        """The warning for views with this mean row KL; None if it is within the limit, or the views are too few."""
        # Not `row_kl_nats > limit_nats`: that would let NaN pass.
        if num_views < _LEAST_VIEWS or row_kl_nats <= self.limit_nats:
            return None
        expected = "of the codec's target" if self.is_target else "measured in calibration"
        return (
            f"Warning: decoded maps have a row KL of {row_kl_nats:.2g} nats on average, over {TIMES_THE_TARGET} times "
            f"the {self.row_kl_nats:.2g} {expected}: the codec was calibrated on other images, or on too few. Keep the "
            "cache if that KL is good enough; a new one with more --calibration-samples and without --codec-from would "
            "be nearer."
        )


class Watch:
    """Warns once if the views that a running build has checked have a high mean row KL; for one thread."""

    def __init__(self, expectation: Expectation) -> None:
        self._expectation = expectation
        self._has_warned = False

    def see(self, sum_nats: float, num_views: int) -> str | None:
        """The warning, if the mean over these views calls for one and none was given before."""
        warning = self._expectation.warn(sum_nats / max(1, num_views), num_views)
        if warning is None or self._has_warned:
            return None
        self._has_warned = True
        return warning


def layer_row_kl(coder: Coder, layers: Sequence[LayerAttention], codes_BLTC: Tensor) -> tuple[float, ...]:
    """Mean KL(A || decoded A) of each kept layer, in nats, over all rows of some views.

    Args:
        coder: decodes.
        layers: the captured attention, one for each stored layer.
        codes_BLTC: the codes that the coder made of it.
    """
    decoded = coder.decode(codes_BLTC)
    return tuple(mean_row_kl(layer, decoded.layer(position).select) for position, layer in enumerate(layers))


def layer_v_error(coder: Coder, layers: Sequence[LayerAttention], codes_BLTC: Tensor) -> tuple[float, ...] | None:
    """Relative error of each kept layer's decoded v; None if v is not stored. Takes the arguments of `layer_row_kl`."""
    return _layer_error("v_BHTD", coder, layers, codes_BLTC) if coder.geometry.v_head_dim else None


def layer_x_error(coder: Coder, layers: Sequence[LayerAttention], codes_BLTC: Tensor) -> tuple[float, ...] | None:
    """The same for what attention and MLP get; None if that is not stored."""
    return _layer_error("inputs_BNTC", coder, layers, codes_BLTC) if coder.geometry.input_width else None


def _layer_error(
    name: Literal["v_BHTD", "inputs_BNTC"], coder: Coder, layers: Sequence[LayerAttention], codes_BLTC: Tensor
) -> tuple[float, ...]:
    decoded = coder.decode(codes_BLTC)
    return tuple(
        relative_error(getattr(layer, name), getattr(decoded.layer(position), name))
        for position, layer in enumerate(layers)
    )


def injected_error(run: TeacherRun, pixels_BHWC: Tensor, geometry: FactorGeometry, decoded: TeacherFactors) -> float:
    """Relative error of the teacher's final features when it attends with decoded maps.

    This is |features with decoded maps - features| / |features|, over all final tokens.

    Args:
        run: the teacher.
        pixels_BHWC: views, uint8.
        geometry: of the decoded factors; other blocks and heads attend as usual.
        decoded: gives each layer's factors for these views.

    Raises:
        NotFiniteError: the teacher's own features have NaN or infinity.
    """
    return injected_errors(run, pixels_BHWC, geometry.heads, [geometry.layers], decoded)[0]


def injected_errors(
    run: TeacherRun,
    pixels_BHWC: Tensor,
    heads: tuple[int, ...],
    choices: Iterable[Sequence[int]],
    decoded: TeacherFactors,
) -> list[float]:
    """The `injected_error` of each choice of blocks that attend with decoded maps. The plain features are made once.

    Args:
        run: the teacher.
        pixels_BHWC: views, uint8.
        heads: that the decoded factors have; others attend as usual.
        choices: block indices of each choice.
        decoded: gives each layer's factors for these views.

    Raises:
        NotFiniteError: the teacher's own features have NaN or infinity.
    """
    images = run.images(pixels_BHWC)
    model: Any = run.teacher.model
    with torch.inference_mode(), autocast(run.device, run.dtype):
        features: Tensor = model.forward_features(images).float()
        if views := positions(~features.isfinite().flatten(1).all(dim=1)):
            where = "in its final features, after all of its attention"
            precision = str(run.dtype).removeprefix("torch.")
            raise NotFiniteError(NotFinite(where=where, views=views, num_views=len(features), precision=precision))
        errors: list[float] = []
        for layers in choices:
            attend = partial(_attend_with_decoded, layers, heads, decoded)
            with AttentionIntercept(find_blocks(model), attend, way=attention_way(model)):
                injected: Tensor = model.forward_features(images).float()
            errors.append(float(((injected - features).square().sum() / features.square().sum()).sqrt()))
    return errors


def _attend_with_decoded(
    layers: Sequence[int], heads: tuple[int, ...], decoded: TeacherFactors, call: AttentionCall | MapCall
) -> Tensor:
    if call.block not in layers:
        return call.run()
    return attend_with_given(call, decoded.layer(call.block), heads)
