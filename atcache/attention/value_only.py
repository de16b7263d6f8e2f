"""What remains of an attention module when its map is given, with or without its v."""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn

from atcache.attention.given import TakesGiven, projected_dtype
from atcache.attention.kernels import copy_attention, mixed_attention


class ValueOnlyAttention(TakesGiven):
    """The rest of an attention module when q and k are given: value, norm, gate and output projections.

    timm's attention classes (`Attention`, `AttentionRope`, `EvaAttention`, BEiT's, `RelPosAttention`, CaiT's
    `TalkingHeadAttn`) differ in how they make q and k; what comes after is the same, but for the talking heads' mixing
    behind the softmax, and is taken over from the replaced module, value weights included, unless v is given too.
    """

    def __init__(self, attention: nn.Module, *, own_values: bool = True) -> None:
        super().__init__()
        self.num_heads = cast("int", attention.num_heads)
        self.v = _value_projection(attention) if own_values else None
        self.norm = _submodule(attention, "norm") or nn.Identity()
        self.gate = _submodule(attention, "gate")
        self.mix = _submodule(attention, "proj_w")
        self.proj = cast("nn.Linear", attention.proj)
        self.proj_drop = cast("nn.Module", attention.proj_drop)

    @staticmethod
    def can_replace(attention: nn.Module) -> bool:
        """Whether this module is one of the classes whose value path is known."""
        fused = isinstance(getattr(attention, "qkv", None), nn.Linear)
        split = isinstance(getattr(attention, "v_proj", None), nn.Linear)
        return (fused or split) and all(hasattr(attention, part) for part in ("num_heads", "proj", "proj_drop"))

    def forward(self, x: Tensor, *_: object, **__: object) -> Tensor:
        """Attention output, shape (batch, token, dim). Rotary embeddings, masks and biases passed in are ignored."""
        teacher, block = self.given()
        if self.v is None:
            given = teacher.factors(block)
            value_BHTD = given.repeated_v_BHTD().to(projected_dtype(x))
        else:
            given = teacher.layer(block)
            value_BHTD = self._own_values(self.v(x))
        if self.mix is None:
            attended_BHTD = copy_attention(given, value_BHTD)
        else:
            attended_BHTD = mixed_attention(given.maps(), value_BHTD, self.mix)
        attended_BTC = self.norm(attended_BHTD.transpose(1, 2).flatten(2))
        if self.gate is not None:
            attended_BTC = attended_BTC * self.gate(x).sigmoid()
        return cast("Tensor", self.proj_drop(self.proj(attended_BTC)))

    def _own_values(self, value_BTC: Tensor) -> Tensor:
        """Values by head, one for every head of q."""
        head_dim = self.proj.in_features // self.num_heads
        value_BHTD = value_BTC.view(*value_BTC.shape[:2], -1, head_dim).transpose(1, 2)
        groups = self.num_heads // value_BHTD.shape[1]
        return value_BHTD if groups == 1 else value_BHTD.repeat_interleave(groups, dim=1)


def _submodule(module: nn.Module, name: str) -> nn.Module | None:
    found = getattr(module, name, None)
    return found if isinstance(found, nn.Module) else None


def _value_projection(attention: nn.Module) -> nn.Linear:
    """A linear layer with the attention's own value weights: the last third of a fused qkv, or its v_proj."""
    if isinstance(split := getattr(attention, "v_proj", None), nn.Linear):
        return split
    qkv = cast("nn.Linear", attention.qkv)
    # BEiT and EVA keep biases apart from the projection, which then has none of its own.
    own_bias = cast("Tensor | None", qkv.bias)
    v_bias: Tensor | None = getattr(attention, "v_bias", None)
    if v_bias is None and own_bias is not None:
        v_bias = own_bias.chunk(3)[2]
    weight = qkv.weight.chunk(3)[2]
    # Made without storage, so that no random numbers are drawn for weights that are replaced at once.
    value = nn.Linear(weight.shape[1], weight.shape[0], bias=v_bias is not None, device="meta")
    value.weight = nn.Parameter(weight.detach().clone())
    if v_bias is not None:
        value.bias = nn.Parameter(v_bias.detach().clone())
    return value
