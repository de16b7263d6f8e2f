"""The part of a call's factors that is wanted: some heads, some queries, with or without v."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from atcache.attention.calls import AttentionCall
from atcache.attention.factors import LayerFactors, head_index


def factors_of(
    call: AttentionCall, heads: tuple[int, ...] | None, num_queries: int | None = None, *, with_values: bool
) -> LayerFactors:
    """The factors of an intercepted call, detached.

    Args:
        call: the call.
        heads: the heads to take; None for all.
        num_queries: takes only the first queries; None takes all.
        with_values: whether to take v too.
    """
    query, key = call.query.detach(), call.key.detach()
    value = call.value.detach() if with_values else None
    if query.dtype != call.value.dtype:
        # Only autocast allows this: a q/k norm returns float32, and the call then casts q and k to v's dtype.
        query, key = query.to(call.value.dtype), key.to(call.value.dtype)
    bias = _whole_bias(call)
    if num_queries is not None:  # before anything is copied: the other rows are never made
        query = query[:, :, :num_queries]
        bias = None if bias is None else bias[:, :, :num_queries]
    if heads is not None:
        groups = query.shape[1] // key.shape[1]
        index = head_index(heads, query.device)
        whole_groups = len(heads) == query.shape[1]
        query = query.index_select(1, index)
        if not whole_groups:
            key = key.index_select(1, index // groups)
            value = None if value is None else value.index_select(1, index // groups)
        if bias is not None and bias.shape[1] > 1:
            bias = bias.index_select(1, index)
    return LayerFactors(
        q_BHTD=owning(query),
        k_BHTD=owning(key),
        scale=float(call.scale),
        bias=bias,
        v_BHTD=None if value is None else owning(value),
    )


def chosen_factors(factors: LayerFactors, heads: tuple[int, ...] | None, num_queries: int | None) -> LayerFactors:
    """Some heads and the first queries of factors without a bias; None for all."""
    if heads is not None:
        factors = factors.select_heads(heads)
    return factors if num_queries is None else replace(factors, q_BHTD=owning(factors.q_BHTD[:, :, :num_queries]))


def owning(tensor: Tensor) -> Tensor:
    """The tensor, or a copy if its storage holds more: q, k and v are often views of one tensor with all three."""
    if tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size():
        return tensor
    # Keep the order in memory, mostly token by token: it is faster to copy, and codecs read this order.
    return tensor.clone(memory_format=torch.preserve_format)


def _whole_bias(call: AttentionCall) -> Tensor | None:
    """The call's bias for every query and key: shape (1 or batch, 1 or head, token, token)."""
    bias, num_tokens = call.bias(), call.query.shape[2]
    return None if bias is None else bias.detach().expand(-1, -1, num_tokens, num_tokens)
