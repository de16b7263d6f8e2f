"""The attention inside `torch.nn.MultiheadAttention`, taken apart: projections, the attention call, and the output.

`TorchFunctionMode` sees torch's function as one call, not what happens in it. So a handler that wants to see or replace
the attention takes it apart here and puts it together again. `check_capture` compares the result with torch's own.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from atcache.attention.calls import AttentionCall
from atcache.errors import UnsupportedAttentionError

MULTI_HEAD = F.multi_head_attention_forward
"""The function that every `nn.MultiheadAttention` calls, as long as a mode keeps it off torch's fast path."""
_SIGNATURE = inspect.signature(MULTI_HEAD)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class MultiHeadCall:
    """One intercepted call of `MULTI_HEAD`."""

    attention: AttentionCall
    """What it attends with."""
    out_weight_NC: Tensor
    out_bias_N: Tensor | None
    need_weights: bool
    """Whether the caller wants the maps too."""
    average_weights: bool
    """Whether as the mean over heads."""

    def finish(self, attended_BHTD: Tensor) -> tuple[Tensor, Tensor | None]:
        """What the call returns, if this is what its attention gives: output (token, batch, width), and the maps."""
        output_TBC = F.linear(attended_BHTD.permute(2, 0, 1, 3).flatten(2), self.out_weight_NC, self.out_bias_N)
        if not self.need_weights:
            return output_TBC, None
        call, bias = self.attention, self.attention.bias()
        logits_BHQK = (call.query * call.scale) @ call.key.mT
        attn_BHQK = torch.softmax(logits_BHQK if bias is None else logits_BHQK + bias, dim=-1)
        return output_TBC, attn_BHQK.mean(dim=1) if self.average_weights else attn_BHQK


def multi_head_call(
    block: int,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    linear: Callable[[Tensor, Tensor, Tensor | None], Tensor] = F.linear,
) -> MultiHeadCall:
    """The call of `MULTI_HEAD` that block `block` made with these arguments.

    Args:
        block: index of the block.
        args: as torch got them.
        kwargs: as torch got them.
        linear: projects inputs (batch, token, width) to q, k and v; called once if all three come from one input.

    Raises:
        UnsupportedAttentionError: the call adds tokens, masks keys by sample, or has no batch.
    """
    bound = _SIGNATURE.bind(*args, **kwargs)
    bound.apply_defaults()
    given = bound.arguments
    query, key, value = given["query"], given["key"], given["value"]
    for is_used, what in (
        (query.ndim != 3, "is called without a batch axis"),
        (given["key_padding_mask"] is not None, "has a key_padding_mask, so maps have other keys in each image"),
        (given["bias_k"] is not None or given["add_zero_attn"], "adds a token to the keys, so the map is not square"),
        (given["static_k"] is not None or given["static_v"] is not None, "is given k or v as they are"),
    ):
        if is_used:
            raise UnsupportedAttentionError(f"the nn.MultiheadAttention of block {block} {what}: it cannot be cached.")
    bias = given["in_proj_bias"]
    if not given["use_separate_proj_weight"] and query is key is value:
        projected = linear(query.transpose(0, 1), given["in_proj_weight"], bias).chunk(3, dim=-1)
    else:
        names = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
        separate = given["use_separate_proj_weight"]
        weights = [given[name] for name in names] if separate else given["in_proj_weight"].chunk(3)
        biases = (None, None, None) if bias is None else bias.chunk(3)
        inputs = (query, key, value)
        projected = [linear(x.transpose(0, 1), w, b) for x, w, b in zip(inputs, weights, biases, strict=True)]
    num_heads = given["num_heads"]
    q_BHTD, k_BHTD, v_BHTD = (_split_heads(part, num_heads) for part in projected)
    return MultiHeadCall(
        attention=AttentionCall(
            block=block,
            query=q_BHTD,
            key=k_BHTD,
            value=v_BHTD,
            attn_mask=_float_mask(given["attn_mask"], q_BHTD),
            dropout_p=given["dropout_p"] if given["training"] else 0.0,
            is_causal=False,  # torch wants the mask too, and this is only a hint
            scale=q_BHTD.shape[-1] ** -0.5,
            enable_gqa=False,
        ),
        out_weight_NC=given["out_proj_weight"],
        out_bias_N=given["out_proj_bias"],
        need_weights=given["need_weights"],
        average_weights=given["average_attn_weights"],
    )


def _split_heads(x_BTC: Tensor, num_heads: int) -> Tensor:
    return x_BTC.view(*x_BTC.shape[:2], num_heads, -1).transpose(1, 2)


def _float_mask(mask: Tensor | None, q_BHTD: Tensor) -> Tensor | None:
    """The mask as a bias on the logits. Here, unlike in `scaled_dot_product_attention`, True leaves a key out."""
    if mask is None:
        return None
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=q_BHTD.dtype).masked_fill_(mask, float("-inf"))
    mask = mask.to(q_BHTD.dtype)
    return mask if mask.ndim == 2 else mask.view(*q_BHTD.shape[:2], *mask.shape[1:])
