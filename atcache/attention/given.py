"""What a copying student has in place of the weights whose results it is given: modules that take these instead."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from atcache.attention.pairing import PairedFactors


class TakesGiven(nn.Module):
    """A part of a copying student that asks the teacher's side of the batch for what it does not compute."""

    def __init__(self) -> None:
        super().__init__()
        self._given: tuple[PairedFactors, int] | None = None

    def give(self, teacher: PairedFactors, block: int) -> None:
        """Use what the teacher has for the student's `block` in the forward calls that follow."""
        self._given = (teacher, block)

    def take_back(self) -> None:
        """Forget what `give` gave."""
        self._given = None

    def given(self) -> tuple[PairedFactors, int]:
        """What `give` gave."""
        assert self._given is not None, "CopyStudent.forward gives the factors"
        return self._given


def projected_dtype(x: Tensor) -> torch.dtype:
    """The type of what a linear layer makes of `x`: under autocast, its type."""
    device_type = x.device.type
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else x.dtype


class GivenValues(TakesGiven):
    """In place of a value projection: the teacher's v, by token, with the heads side by side."""

    def forward(self, x: Tensor) -> Tensor:
        """Shape (batch, token, heads * head dim), in the type a projection of `x` would have."""
        return self.of_dtype(projected_dtype(x))

    def of_dtype(self, dtype: torch.dtype) -> Tensor:
        """The same, in another type."""
        teacher, block = self.given()
        return teacher.factors(block).repeated_v_BHTD().transpose(1, 2).flatten(2).to(dtype)


class QueryKeyProjection(GivenValues):
    """In place of a fused projection to q, k and v: its first two thirds, with the teacher's v behind."""

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
    """Whether v can be given to this attention module by exchanging its projection: one head of v for each of q."""
    fused, split, proj = (getattr(attention, name, None) for name in ("qkv", "v_proj", "proj"))
    if not isinstance(proj, nn.Linear):
        return False
    if isinstance(fused, nn.Linear):
        return fused.out_features == 3 * proj.in_features
    return isinstance(split, nn.Linear) and split.out_features == proj.in_features


def give_values(attention: nn.Module) -> GivenValues:
    """Exchange an attention module's projection for one that is given v; returns what is to be given it.

    The module itself makes q and k as before: with its norms, rotary embedding and bias. Weights of q and k are kept.
    """
    if isinstance(getattr(attention, "v_proj", None), nn.Linear):
        attention.v_proj = GivenValues()
        return attention.v_proj
    qkv = cast("nn.Linear", attention.qkv)
    num_rows = 2 * qkv.out_features // 3
    bias: Tensor | None = getattr(attention, "q_bias", None)
    if bias is not None:
        # BEiT and EVA keep biases apart, and use the projection's weight without calling it unless there are none.
        for name in ("q_bias", "k_bias", "v_bias"):
            setattr(attention, name, None)
    elif (own_bias := cast("Tensor | None", qkv.bias)) is not None:
        bias = own_bias[:num_rows]
    attention.qkv = QueryKeyProjection(qkv.weight[:num_rows], bias)
    return attention.qkv
