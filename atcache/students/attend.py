"""Attention calls of a student that use a given map or a given factor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from atcache.attention.calls import AttentionCall, MapCall
from atcache.attention.factors import LayerAttention, LayerFactors, head_index, take_heads
from atcache.attention.kernels import copy_attention
from atcache.choices import What


def attend_with_given(
    call: AttentionCall | MapCall, given: LayerAttention, heads: Sequence[int], *, with_values: bool = False
) -> Tensor:
    """The result of an attention call in which some heads attend with what is given, and the others with their own.

    Args:
        call: the call, on any timm ViT.
        given: factors or maps of the heads `heads`; or maps with only the first tokens' rows: then the other tokens
            attend as usual.
        heads: indices, ascending, of the heads that are given; if these are all, with all rows, the call itself is not
            made.
        with_values: whether these heads also use the given v instead of their own; `given` must be factors with v.

    Returns:
        Shape (batch, head, token, head dim), or maps for a `MapCall`; no gradient reaches q and k of the given heads.
    """
    num_queries = given.shape_BHT[2]
    all_rows = num_queries == given.num_keys
    if isinstance(call, MapCall):
        if all_rows and len(heads) == call.logits_BHQK.shape[1]:
            return given.maps().to(call.logits_BHQK.dtype)
        attn_BHQK = call.run().clone()  # autograd keeps the call's own result, which must not be written to
        _replace_heads(attn_BHQK[:, :, :num_queries], heads, given.maps())
        return attn_BHQK
    groups = call.query.shape[1] // call.value.shape[1]
    values_BHTD = call.value if groups == 1 else call.value.repeat_interleave(groups, dim=1)
    all_heads = len(heads) == values_BHTD.shape[1]
    values_BHTD = values_BHTD if all_heads else take_heads(values_BHTD, heads)
    if with_values:
        assert isinstance(given, LayerFactors), "PairedFactors.factors refuses maps"
        values_BHTD = given.repeated_v_BHTD().to(values_BHTD.dtype)
    attended_BHTD = copy_attention(given, values_BHTD)
    if all_heads and all_rows:
        return attended_BHTD
    outputs_BHTD = call.run().clone()
    _replace_heads(outputs_BHTD[:, :, :num_queries], heads, attended_BHTD)
    return outputs_BHTD


def attend_with_one_factor(call: AttentionCall, given: LayerFactors, heads: Sequence[int], what: What) -> Tensor:
    """The result of an attention call in which some heads use a given q, k or v, and their own of the other two.

    Args:
        call: the call, on any timm ViT; its own bias stays.
        given: factors of the heads `heads`, of the call's head dim.
        heads: indices, ascending, of the heads that use the given one.
        what: "q", "k" or "v": which one is given.

    Returns:
        Shape (batch, head, token, head dim); gradients reach what is not given.
    """
    own = LayerFactors(q_BHTD=call.query, k_BHTD=call.key, scale=call.scale, v_BHTD=call.value)
    # Each head of q gets its own k and v, so that those of single heads can be replaced.
    factors = {one: own.repeated(one) for one in ("q", "k", "v")}
    factors[what] = factors[what].clone()
    _replace_heads(factors[what], heads, given.repeated(what))
    return replace(call, query=factors["q"], key=factors["k"], value=factors["v"], enable_gqa=False).run()


def _replace_heads(tensor_BHXX: Tensor, heads: Sequence[int], given_BHXX: Tensor) -> None:
    """Write what is given for some heads over theirs, in place."""
    tensor_BHXX.index_copy_(1, head_index(tuple(heads), tensor_BHXX.device), given_BHXX.to(tensor_BHXX.dtype))
