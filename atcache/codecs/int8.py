"""`int8`: one scale a token and head, codes in -127..127."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from atcache.attention.factors import FactorGeometry, LayerAttention, LayerFactors
from atcache.codecs.base import Codec, Coder, State, only_factors
from atcache.errors import CodecError

_LARGEST_CODE = 127
_SCALE_NBYTES = 2  # a float16, stored as two int8 codes behind the vectors' codes


@dataclass(frozen=True, kw_only=True, slots=True)
class Int8Codec(Codec):
    """Each q and k vector divided by its own absolute maximum: no calibration, nothing clipped."""

    name: ClassVar[str] = "int8"

    def coder(
        self, geometry: FactorGeometry, state: State, *, bias_LHQK: Tensor | None = None, device: str = "cpu"
    ) -> Int8Coder:
        """See `Codec.coder`."""
        del state
        return Int8Coder(geometry, bias_LHQK, device)


class Int8Coder(Coder):
    """value = code * scale. C = head vectors * head_dim codes, then head vectors * 2 bytes of float16 scales."""

    factors_are_teachers = True
    codes_dtype = torch.int8

    def __init__(self, geometry: FactorGeometry, bias_LHQK: Tensor | None, device: str) -> None:
        super().__init__(geometry, bias_LHQK, device)
        self._num_vector_codes = self._num_head_vectors * geometry.head_dim
        self.num_components = self._num_vector_codes + self._num_head_vectors * _SCALE_NBYTES

    def encode(self, layers: Sequence[LayerAttention]) -> Tensor:
        """See `Coder.encode`."""
        factors = only_factors(layers, "int8")
        return torch.stack(
            [self._encode_layer(block, layer) for block, layer in zip(self.geometry.layers, factors, strict=True)],
            dim=1,
        )

    def _encode_layer(self, block: int, layer: LayerFactors) -> Tensor:
        vectors_BTND = self._join_BTND(layer).float()
        scale_BTN = (vectors_BTND.abs().amax(dim=-1) / _LARGEST_CODE).half()
        if not bool(torch.isfinite(scale_BTN).all()):
            raise CodecError(
                f"layer {block}: a factor of size {float(vectors_BTND.abs().max()):.4g} is no number or over "
                f"{_LARGEST_CODE * 65504}, the most codec int8 holds. Check the teacher's weights and precision."
            )
        # Dividing by the rounded scale, the one decoding multiplies by. Where float16 rounds a scale to 0 (every
        # value under 4e-6) the codes are 0; where it rounds a tiny scale down, the clamp keeps codes in range.
        divisor_BTN1 = torch.where(scale_BTN == 0, torch.inf, scale_BTN.float()).unsqueeze(-1)
        codes_BTND = (vectors_BTND / divisor_BTN1).round().clamp(-_LARGEST_CODE, _LARGEST_CODE).to(torch.int8)
        return torch.cat([codes_BTND.flatten(2), scale_BTN.contiguous().view(torch.int8)], dim=2)

    def decode(self, position: int, codes_BTC: Tensor) -> LayerFactors:
        """See `Coder.decode`."""
        codes_BTND = codes_BTC[..., : self._num_vector_codes].reshape(*codes_BTC.shape[:2], -1, self.geometry.head_dim)
        scale_BTN = codes_BTC[..., self._num_vector_codes :].contiguous().view(torch.float16)
        return self._split(position, codes_BTND.float() * scale_BTN.float().unsqueeze(-1))
