"""`int8`: one scale for each token and head, codes in -127..127."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from atcache.attention.factors import LayerAttention, LayerFactors
from atcache.attention.geometry import FactorGeometry
from atcache.codecs.base import Codec, Coder, Queued, State, only_factors
from atcache.errors import CodecError

_LARGEST_CODE = 127
_SCALE_NBYTES = 2  # a float16, stored as two int8 codes after the vectors' codes


@dataclass(frozen=True, kw_only=True, slots=True)
class Int8Codec(Codec):
    """Each vector of q, k and v divided by its own absolute maximum: no calibration, nothing clipped.

    A component is wrong by at most half a step, which is 1/254 of its vector's largest component; by slightly more if
    float16 rounds the scale down.
    """

    name: ClassVar[str] = "int8"
    keeps_values: ClassVar[bool] = True

    def coder(
        self, geometry: FactorGeometry, state: State, *, bias_LHQK: Tensor | None = None, device: str = "cpu"
    ) -> Int8Coder:
        """See `Codec.coder`."""
        if not geometry.keeps_all_queries:
            self.refuse_rows()
        del state
        return Int8Coder(geometry, bias_LHQK, device)


class Int8Coder(Coder):
    """value = code * scale. C = head vectors * head_dim codes, then head vectors * 2 bytes of float16 scales: first
    for q and k, then the same for v and for the inputs of attention and MLP, as far as they are stored."""

    factors_are_teachers = True
    codes_dtype = torch.int8

    def __init__(self, geometry: FactorGeometry, bias_LHQK: Tensor | None, device: str) -> None:
        super().__init__(geometry, bias_LHQK, device)
        self._part_sizes = [num_vectors * (width + _SCALE_NBYTES) for num_vectors, width in self._part_shapes]
        self.num_components = sum(self._part_sizes)

    def queue(self, layers: Sequence[LayerAttention]) -> Queued:
        """See `Coder.queue`."""
        codes: list[Tensor] = []
        fits: list[Tensor] = []
        problems: list[Callable[[], CodecError]] = []
        for block, layer in zip(self.geometry.layers, only_factors(layers, "int8"), strict=True):
            parts: list[Tensor] = []
            for number, part_BTND in enumerate(self._parts_BTND(layer)):
                codes_BTC, part_fits = _quantise(part_BTND)
                parts.append(codes_BTC)
                fits.append(part_fits)
                problems.append(partial(self._too_large, block, layer, number))
            codes.append(torch.cat(parts, dim=2))
        return Queued(parts=(torch.stack(codes, dim=1),), is_fine_N=torch.stack(fits), problems=problems)

    def _too_large(self, block: int, layer: LayerFactors, number: int) -> CodecError:
        largest = float(self._parts_BTND(layer)[number].float().abs().max())
        return CodecError(
            f"layer {block}: a factor of size {largest:.4g} is NaN or over {_LARGEST_CODE * 65504}, the most codec "
            "int8 holds. Check the teacher's weights and precision."
        )

    def decode_row(self, position: int, codes_BTC: Tensor) -> LayerFactors:
        """See `Coder.decode_row`."""
        parts_BTC: tuple[Tensor, ...] = torch.split(codes_BTC, self._part_sizes, dim=2)
        return self._split(
            position,
            *(_dequantise(part_BTC, *shape) for part_BTC, shape in zip(parts_BTC, self._part_shapes, strict=True)),
        )


def _quantise(vectors_BTND: Tensor) -> tuple[Tensor, Tensor]:
    """Codes, then scales, of some vectors of each token; and whether the scales are finite, bool."""
    vectors_BTND = vectors_BTND.float()
    scale_BTN = (vectors_BTND.abs().amax(dim=-1) / _LARGEST_CODE).half()
    # Divide by the rounded scale, because decoding multiplies by it. If float16 rounds a scale to 0 (every value
    # is under 4e-6), the codes are 0; if it rounds a tiny scale down, the clamp keeps codes in range.
    divisor_BTN1 = torch.where(scale_BTN == 0, torch.inf, scale_BTN.float()).unsqueeze(-1)
    # In place after the division: memory bandwidth limits all of this.
    codes_BTND = (vectors_BTND / divisor_BTN1).round_().clamp_(-_LARGEST_CODE, _LARGEST_CODE).to(torch.int8)
    codes_BTC = torch.cat([codes_BTND.flatten(2), scale_BTN.contiguous().view(torch.int8)], dim=2)
    return codes_BTC, torch.isfinite(scale_BTN).all()


def _dequantise(codes_BTC: Tensor, num_vectors: int, width: int) -> Tensor:
    """The vectors of one part, float32."""
    codes_BTND = codes_BTC[..., : num_vectors * width].reshape(*codes_BTC.shape[:2], num_vectors, width)
    scale_BTN = codes_BTC[..., num_vectors * width :].contiguous().view(torch.float16)
    return codes_BTND.float() * scale_BTN.float().unsqueeze(-1)
