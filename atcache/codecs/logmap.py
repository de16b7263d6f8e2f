"""`logmap`: the maps themselves, in logarithmic levels. For teachers whose maps are not the softmax of one q k^T."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from atcache.attention.factors import LayerAttention, LayerFactors, LayerMaps
from atcache.attention.geometry import FactorGeometry
from atcache.codecs.base import Codec, Coder, Queued, State
from atcache.errors import CodecError

_CURVE = 1 / 16
"""Steps are equal in log(1 + slope p), with slope = 2 ** bits T / 16 and T tokens. At 6 bits this gives equal ratios
for probabilities over a quarter of uniform (1 / T), and equal differences below. Equal ratios everywhere would take
more bytes at the same KL, and so would one slope for every number of bits (`docs/design.md`)."""
_OVER_1 = 0.01
"""The logarithm of a probability that is more than rounding above 1."""
_UNDER_HALF_A_STEP = 0.1
"""What a positive probability under half a step becomes, in steps. A 0 would make its row's KL infinite."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LogmapCodec(Codec):
    """Each probability rounded to equal logarithmic steps; rows are made to sum to 1 again.

    Nothing is fitted and nothing is clipped. Rows that are 1 at one key lose the most, to the row's other keys: 0.0022
    nats at 6 bits and 65 tokens, about a quarter of that with each further bit. 0 (a masked key) stays 0.
    """

    name: ClassVar[str] = "logmap"
    keeps_rows: ClassVar[bool] = True
    bits: int = 6
    """4 to 8: a code is below 2 ** bits. Codes take a byte each; fewer bits compress better."""

    def __post_init__(self) -> None:
        if self.bits not in range(4, 9):
            raise CodecError(f"codec logmap: bits={self.bits!r}, expected 4, 5, 6, 7 or 8.")

    def coder(
        self, geometry: FactorGeometry, state: State, *, bias_LHQK: Tensor | None = None, device: str = "cpu"
    ) -> LogmapCoder:
        """See `Codec.coder`."""
        if geometry.v_head_dim or geometry.input_width:
            self.refuse_values("v" if geometry.v_head_dim else "x")
        del state
        return LogmapCoder(self, geometry, bias_LHQK, device)


class LogmapCoder(Coder):
    """C = heads * tokens: a query's row in each head. Code 0 is probability 0, code 2 ** bits - 1 is probability 1.

    T has only the queries that are kept.
    """

    codes_dtype = torch.uint8

    def __init__(self, codec: LogmapCodec, geometry: FactorGeometry, bias_LHQK: Tensor | None, device: str) -> None:
        super().__init__(geometry, bias_LHQK, device)
        num_tokens = geometry.tokens.num_tokens
        self._slope = _CURVE * 2**codec.bits * num_tokens
        self._step = math.log1p(self._slope) / (2**codec.bits - 2)
        self.num_components = len(geometry.heads) * num_tokens

    def queue(self, layers: Sequence[LayerAttention]) -> Queued:
        """See `Coder.queue`."""
        codes, fits = zip(*itertools.starmap(self._encode_layer, enumerate(layers)), strict=True)
        return Queued(
            parts=(torch.stack(codes, dim=1),),
            is_fine_N=torch.stack(fits),
            problems=[partial(_no_distribution, block) for block in self.geometry.layers],
        )

    def _encode_layer(self, position: int, layer: LayerAttention) -> tuple[Tensor, Tensor]:
        """The layer's codes, and whether its rows are distributions, bool."""
        if isinstance(layer, LayerFactors) and layer.bias is None:
            # The bias is part of a map. Captured factors carry their own; others get the teacher's.
            layer = LayerFactors(q_BHTD=layer.q_BHTD, k_BHTD=layer.k_BHTD, scale=layer.scale, bias=self.bias(position))
        log_attn_BHQK = layer.log_maps()
        largest_BHQ = log_attn_BHQK.amax(dim=-1)
        is_fine = (torch.isfinite(largest_BHQ) & (largest_BHQ < _OVER_1)).all()  # codes of more than 1 would wrap
        masked_BHQK = log_attn_BHQK == -torch.inf  # before exp, which turns small probabilities into 0 too
        steps_BHQK = log_attn_BHQK.exp_().mul_(self._slope).log1p_().div_(self._step)
        codes_BHQK = steps_BHQK.round_().add_(1).masked_fill_(masked_BHQK, 0).to(torch.uint8)
        return codes_BHQK.transpose(1, 2).flatten(2), is_fine

    def decode_row(self, position: int, codes_BTC: Tensor) -> LayerMaps:
        """See `Coder.decode_row`."""
        num_heads, num_tokens = len(self.geometry.heads), self.geometry.tokens.num_tokens
        codes_BHQK = codes_BTC.reshape(*codes_BTC.shape[:2], num_heads, num_tokens).transpose(1, 2)
        steps_BHQK = (codes_BHQK.float() - 1).masked_fill_(codes_BHQK == 1, _UNDER_HALF_A_STEP)
        attn_BHQK = steps_BHQK.mul_(self._step).expm1_().masked_fill_(codes_BHQK == 0, 0)
        # The clamp keeps rows of zeros at zero. `encode` writes no such rows, but a cache may hold them.
        return LayerMaps(attn_BHQK=attn_BHQK / attn_BHQK.sum(dim=-1, keepdim=True).clamp_min_(1e-30))


def _no_distribution(block: int) -> CodecError:
    return CodecError(
        f"layer {block}: a row of a map is not a distribution: it holds a negative value, one above 1, NaN, "
        "infinity, or only zeros. Check the teacher's weights and precision."
    )
