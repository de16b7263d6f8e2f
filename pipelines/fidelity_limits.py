"""When decoded maps are further from the teacher's than was asked for: what a build warns of and `verify` refuses."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from atcache.codecs import Codec
from atcache.codecs.transform import TransformCodec

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
