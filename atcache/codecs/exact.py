"""`exact`: the factors themselves, as the bits of float16 or float32."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor

from atcache.attention.factors import LayerAttention, LayerFactors
from atcache.attention.geometry import FactorGeometry
from atcache.codecs.base import Codec, Coder, Queued, State, only_factors
from atcache.errors import CodecError

_INTEGER_OF = {"float16": torch.int16, "float32": torch.int32}


@dataclass(frozen=True, kw_only=True, slots=True)
class ExactCodec(Codec):
    """Factors rounded to a float type and stored bit for bit. The reference every other codec is compared with."""

    name: ClassVar[str] = "exact"
    keeps_values: ClassVar[bool] = True
    dtype: Literal["float16", "float32"] = "float16"
    """float16 is what mixed-precision teachers compute in; float32 is for exact checks and for factors over 65504."""

    def __post_init__(self) -> None:
        if self.dtype not in _INTEGER_OF:
            raise CodecError(f"codec exact: dtype={self.dtype!r}, expected one of {', '.join(_INTEGER_OF)}.")

    def coder(
        self, geometry: FactorGeometry, state: State, *, bias_LHQK: Tensor | None = None, device: str = "cpu"
    ) -> ExactCoder:
        """See `Codec.coder`."""
        if not geometry.keeps_all_queries:
            self.refuse_rows()
        del state
        return ExactCoder(self, geometry, bias_LHQK, device)


class ExactCoder(Coder):
    """Codes are the float's bits read as a signed integer: C = (q heads + k heads) * head_dim, followed by
    v heads * v head dim, and 2 * the width of the inputs of attention and MLP, as far as they are stored."""

    factors_are_teachers = True

    def __init__(self, codec: ExactCodec, geometry: FactorGeometry, bias_LHQK: Tensor | None, device: str) -> None:
        super().__init__(geometry, bias_LHQK, device)
        self._float_dtype: torch.dtype = getattr(torch, codec.dtype)
        self.codes_dtype = _INTEGER_OF[codec.dtype]
        self._part_sizes = [num_vectors * width for num_vectors, width in self._part_shapes]
        self.num_components = sum(self._part_sizes)

    def queue(self, layers: Sequence[LayerAttention]) -> Queued:
        """See `Coder.queue`."""
        factors = only_factors(layers, "exact")
        codes: list[Tensor] = []
        fits: list[Tensor] = []
        for layer in factors:
            floats_BTC = torch.cat([part.flatten(2) for part in self._parts_BTND(layer)], dim=2).to(self._float_dtype)
            fits.append(torch.isfinite(floats_BTC).all())
            codes.append(floats_BTC.view(self.codes_dtype))
        return Queued(
            parts=(torch.stack(codes, dim=1),),
            is_fine_N=torch.stack(fits),
            problems=[
                partial(self._too_large, block, layer)
                for block, layer in zip(self.geometry.layers, factors, strict=True)
            ],
        )

    def _too_large(self, block: int, layer: LayerFactors) -> CodecError:
        largest = max(float(part.abs().max()) for part in self._parts_BTND(layer))
        if not math.isfinite(largest):
            return CodecError(f"layer {block}: a factor is {largest}. Check the teacher's weights and precision.")
        return CodecError(
            f"layer {block}: a factor of size {largest:.4g} does not fit in {self._float_dtype}. "
            "Build with --codec exact:dtype=float32 or --codec int8."
        )

    def decode_row(self, position: int, codes_BTC: Tensor) -> LayerFactors:
        """See `Coder.decode_row`."""
        floats_BTC = codes_BTC.contiguous().view(self._float_dtype).float()
        parts_BTC: tuple[Tensor, ...] = torch.split(floats_BTC, self._part_sizes, dim=2)
        return self._split(
            position,
            *(
                part_BTC.reshape(*part_BTC.shape[:2], *shape)
                for part_BTC, shape in zip(parts_BTC, self._part_shapes, strict=True)
            ),
        )
