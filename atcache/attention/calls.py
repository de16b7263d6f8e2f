"""Calls that a forward pass makes where it attends: their arguments, and what they return."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from atcache.attention.factors import LayerFactors

SDPA = F.scaled_dot_product_attention
_SOFTMAXES = (F.softmax, torch.softmax, Tensor.softmax)
_POSITIONAL = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class AttentionCall:
    """One intercepted call of scaled_dot_product_attention, with its arguments."""

    block: int
    """Index of the block that made it."""
    query: Tensor
    key: Tensor
    value: Tensor
    attn_mask: Tensor | None
    """As the block passed it: float and added to the logits, or boolean (True keeps the key)."""
    dropout_p: float
    is_causal: bool
    scale: float
    """Multiplies query key^T. If the block gave none, this is the default of the call."""
    enable_gqa: bool

    def run(self) -> Tensor:
        """What the call would have returned."""
        return SDPA(
            self.query,
            self.key,
            self.value,
            attn_mask=self.attn_mask,
            dropout_p=self.dropout_p,
            is_causal=self.is_causal,
            scale=self.scale,
            enable_gqa=self.enable_gqa,
        )

    def bias(self) -> Tensor | None:
        """The mask as a float bias on the logits, which broadcasts to (batch, head, query, key); None if no mask."""
        if self.is_causal:
            keep = torch.ones(
                self.query.shape[-2], self.key.shape[-2], dtype=torch.bool, device=self.query.device
            ).tril()
        elif self.attn_mask is not None and self.attn_mask.dtype == torch.bool:
            keep = self.attn_mask
        else:
            mask = self.attn_mask
            return None if mask is None else mask.reshape((1,) * (4 - mask.ndim) + mask.shape)
        bias = torch.zeros_like(keep, dtype=self.query.dtype).masked_fill_(~keep, float("-inf"))
        return bias.reshape((1,) * (4 - bias.ndim) + bias.shape)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class MapCall:
    """One intercepted softmax, of a block that forms its own maps. The softmax returns the maps."""

    block: int
    """Index of the block that made it."""
    logits_BHQK: Tensor

    def run(self) -> Tensor:
        """What the call would have returned: attn_BHQK."""
        return torch.softmax(self.logits_BHQK, dim=-1)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class LinearCall:
    """One observed call of torch.nn.functional.linear, with its output."""

    input_BTC: Tensor
    """What is projected; any number of axes, but (batch, token, width) where q and k are made."""
    weight_NC: Tensor
    bias_N: Tensor | None
    output_BTN: Tensor
    """What the call returned. The model may have changed it in place since."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class SeenAttention:
    """One layer's attention, with what is needed to check it."""

    layer: int
    factors: LayerFactors
    """Of all heads, with v if the model shows it."""
    linear_calls: Sequence[LinearCall]
    """The calls of `linear` that the block made before."""
    output: Tensor
    """What the model's own attention returned."""
    expected: Callable[[Tensor], Tensor]
    """What it returns if its maps, attn_BHQK in float32, are these."""
    formula: str
    """The same in words."""


def attention_call(block: int, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> AttentionCall:
    """The call of `scaled_dot_product_attention` that block `block` made with these arguments."""
    given = {**dict(zip(_POSITIONAL, args, strict=False)), **kwargs}
    scale = given.get("scale")
    return AttentionCall(
        block=block,
        query=given["query"],
        key=given["key"],
        value=given["value"],
        attn_mask=given.get("attn_mask"),
        dropout_p=given.get("dropout_p", 0.0),
        is_causal=given.get("is_causal", False),
        scale=given["query"].shape[-1] ** -0.5 if scale is None else scale,
        enable_gqa=given.get("enable_gqa", False),
    )


def linear_call(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> LinearCall:
    """Runs `linear` with these arguments, and returns the call."""
    given = {**dict(zip(("input", "weight", "bias"), args, strict=False)), **kwargs}
    bias = given.get("bias")
    return LinearCall(
        input_BTC=given["input"].detach(),
        weight_NC=given["weight"].detach(),
        bias_N=None if bias is None else bias.detach(),
        output_BTN=F.linear(*args, **kwargs),
    )


def map_call(block: int, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> MapCall | None:
    """The call, if `func` is a softmax over the last axis of (batch, head, query, key); None for anything else."""
    if func not in _SOFTMAXES:
        return None
    given = {**dict(zip(("input", "dim"), args, strict=False)), **kwargs}
    logits_BHQK: Tensor = given["input"]
    over_keys = logits_BHQK.ndim == 4 and given.get("dim") in (-1, 3)
    return MapCall(block=block, logits_BHQK=logits_BHQK) if over_keys else None
