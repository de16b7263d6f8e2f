"""`exact`: the factors themselves, as the bits of float16 or float32."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from atcache.attention.factors import LayerAttention, LayerFactors
from atcache.attention.geometry import FactorGeometry
from atcache.codecs.base import Codec, Coder, State, only_factors
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
        del state
        return ExactCoder(self, geometry, bias_LHQK, device)


class ExactCoder(Coder):
    """Codes are the float's bits read as a signed integer: C = (q heads + k heads) * head_dim, followed by
    v heads * v head dim if v is stored."""

    factors_are_teachers = True

    def __init__(self, codec: ExactCodec, geometry: FactorGeometry, bias_LHQK: Tensor | None, device: str) -> None:
        super().__init__(geometry, bias_LHQK, device)
        self._float_dtype: torch.dtype = getattr(torch, codec.dtype)
        self.codes_dtype = _INTEGER_OF[codec.dtype]
        self._part_sizes = [num_vectors * width for num_vectors, width in self._part_shapes]
        self.num_components = sum(self._part_sizes)

    def encode(self, layers: Sequence[LayerAttention]) -> Tensor:
        """See `Coder.encode`."""
        codes: list[Tensor] = []
        for block, layer in zip(self.geometry.layers, only_factors(layers, "exact"), strict=True):
            parts_BTND = self._parts_BTND(layer)
            floats_BTC = torch.cat([part.flatten(2) for part in parts_BTND], dim=2).to(self._float_dtype)
            if not bool(torch.isfinite(floats_BTC).all()):
                largest = max(float(part.abs().max()) for part in parts_BTND)
                raise CodecError(
                    f"layer {block}: a factor of size {largest:.4g} does not fit in {self._float_dtype}. "
                    "Build with --codec exact:dtype=float32 or --codec int8."
                )
            codes.append(floats_BTC.view(self.codes_dtype))
        return torch.stack(codes, dim=1)

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
