"""Modules that use what a copying student is given, in place of the weights that would compute it."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from atcache.attention.kernels import copy_attention, mixed_attention
from atcache.students.pairing import PairedFactors


class TakesGiven(nn.Module):
    """A module of a copying student that takes from the teacher's side of the batch what it does not compute."""

    def __init__(self) -> None:
        super().__init__()
        self._given: tuple[PairedFactors, int] | None = None

    def give(self, teacher: PairedFactors, block: int) -> None:
        """Use what the teacher has for the student's `block` in the following forward calls."""
        self._given = (teacher, block)

    def take_back(self) -> None:
        """Forget what `give` gave."""
        self._given = None

    def given(self) -> tuple[PairedFactors, int]:
        """What `give` gave."""
        assert self._given is not None, "CopyStudent.forward gives the factors"
        return self._given


def projected_dtype(x: Tensor) -> torch.dtype:
    """The dtype that a linear layer returns for `x`: under autocast, autocast's."""
    device_type = x.device.type
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else x.dtype


class GivenValues(TakesGiven):
    """Replaces a value projection: returns the teacher's v, by token, with the heads side by side."""

    def forward(self, x: Tensor) -> Tensor:
        """Shape (batch, token, heads * head dim), in the type a projection of `x` would have."""
        return self.of_dtype(projected_dtype(x))

    def of_dtype(self, dtype: torch.dtype) -> Tensor:
        """The same, in another type."""
        teacher, block = self.given()
        return teacher.factors(block).repeated_v_BHTD().transpose(1, 2).flatten(2).to(dtype)


class QueryKeyProjection(GivenValues):
    """Replaces a fused projection to q, k and v: computes q and k, and appends the teacher's v."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        """Take the rows of q and k.

        Args:
            weight: of q and k.
            bias: of both, of q alone (BEiT and EVA have none on k), or None.
        """
        super().__init__()
        self.weight = nn.Parameter(weight.detach().clone())
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        """Shape (batch, token, 3 * heads * head dim)."""
        bias = self.bias
        if bias is not None and len(bias) < len(self.weight):
            bias = functional.pad(bias, (0, len(self.weight) - len(bias)))
        qk_BTC = functional.linear(x, self.weight, bias)
        return torch.cat([qk_BTC, self.of_dtype(qk_BTC.dtype)], dim=-1)


def can_give_values(attention: nn.Module) -> bool:
    """Whether v can be given by replacing this attention module's projection: it has one head of v for each of q."""
    fused, split, proj = (getattr(attention, name, None) for name in ("qkv", "v_proj", "proj"))
    if not isinstance(proj, nn.Linear):
        return False
    if isinstance(fused, nn.Linear):
        return fused.out_features == 3 * proj.in_features
    return isinstance(split, nn.Linear) and split.out_features == proj.in_features


def give_values(attention: nn.Module) -> GivenValues:
    """Replace an attention module's projection by one that is given v; returns the new one.

    The module itself makes q and k as before: with its norms, rotary embedding and bias. Weights of q and k are kept.
    """
    if isinstance(getattr(attention, "v_proj", None), nn.Linear):
        attention.v_proj = GivenValues()
        return attention.v_proj
    qkv = cast("nn.Linear", attention.qkv)
    num_rows = 2 * qkv.out_features // 3
    bias: Tensor | None = getattr(attention, "q_bias", None)
    if bias is not None:
        # BEiT and EVA keep biases apart. While they have any, they use the projection's weight and never call it.
        for name in ("q_bias", "k_bias", "v_bias"):
            setattr(attention, name, None)
    elif (own_bias := cast("Tensor | None", qkv.bias)) is not None:
        bias = own_bias[:num_rows]
    attention.qkv = QueryKeyProjection(qkv.weight[:num_rows], bias)
    return attention.qkv


class ValueOnlyAttention(TakesGiven):
    """The rest of an attention module when q and k are given: value, norm, gate and output projections.

    timm's attention classes (`Attention`, `AttentionRope`, `EvaAttention`, BEiT's, `RelPosAttention`, CaiT's
    `TalkingHeadAttn`) differ in how they make q and k. What comes after is the same, except that talking heads are
    mixed after the softmax. It is taken over from the replaced module, value weights included, unless v is given too.
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
