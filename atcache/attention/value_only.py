"""What remains of an attention module when its map is given."""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn

from atcache.attention.kernels import copy_attention, mixed_attention
from atcache.attention.pairing import PairedFactors


class ValueOnlyAttention(nn.Module):
    """The rest of an attention module when q and k are given: value, norm, gate and output projections.

    timm's attention classes (`Attention`, `AttentionRope`, `EvaAttention`, BEiT's, `RelPosAttention`, CaiT's
    `TalkingHeadAttn`) differ in how they make q and k; what comes after is the same, but for the talking heads' mixing
    behind the softmax, and is taken over from the replaced module, value weights included.
    """

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.num_heads = cast("int", attention.num_heads)
        self.v = _value_projection(attention)
        self.norm = _submodule(attention, "norm") or nn.Identity()
        self.gate = _submodule(attention, "gate")
        self.mix = _submodule(attention, "proj_w")
        self.proj = cast("nn.Linear", attention.proj)
        self.proj_drop = cast("nn.Module", attention.proj_drop)
        self._given: tuple[PairedFactors, int] | None = None

    @staticmethod
    def can_replace(attention: nn.Module) -> bool:
        """Whether this module is one of the classes whose value path is known."""
        fused = isinstance(getattr(attention, "qkv", None), nn.Linear)
        split = isinstance(getattr(attention, "v_proj", None), nn.Linear)
        return (fused or split) and all(hasattr(attention, part) for part in ("num_heads", "proj", "proj_drop"))

    def give(self, teacher: PairedFactors, block: int) -> None:
        """Use what the teacher has for the student's `block` in the forward calls that follow."""
        self._given = (teacher, block)

    def take_back(self) -> None:
        """Forget what `give` gave."""
        self._given = None

    def forward(self, x: Tensor, *_: object, **__: object) -> Tensor:
        """Attention output, shape (batch, token, dim). Rotary embeddings, masks and biases passed in are ignored."""
        assert self._given is not None, "CopyStudent.forward gives the factors"
        teacher, block = self._given
        value_BHTD = self.v(x).view(*x.shape[:2], self._num_value_heads(), self._head_dim()).transpose(1, 2)
        groups = self.num_heads // value_BHTD.shape[1]
        if groups > 1:
            value_BHTD = value_BHTD.repeat_interleave(groups, dim=1)
        given = teacher.layer(block)
        if self.mix is None:
            attended_BHTD = copy_attention(given, value_BHTD)
        else:
            attended_BHTD = mixed_attention(given.maps(), value_BHTD, self.mix)
        attended_BTC = self.norm(attended_BHTD.transpose(1, 2).flatten(2))
        if self.gate is not None:
            attended_BTC = attended_BTC * self.gate(x).sigmoid()
        return cast("Tensor", self.proj_drop(self.proj(attended_BTC)))

    def _head_dim(self) -> int:
        return self.proj.in_features // self.num_heads

    def _num_value_heads(self) -> int:
        return self.v.out_features // self._head_dim()


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
