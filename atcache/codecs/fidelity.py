"""How far decoded maps are from the teacher's."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from atcache.attention.factors import LayerAttention

_MAP_NUMEL = 2**24
"""Elements of maps held at a time: 128 MiB in float64, for each of a few copies."""


def row_kl(teacher: LayerAttention, decoded: LayerAttention, dtype: torch.dtype = torch.float64) -> Tensor:
    """KL(A || decoded A) of every row, in nats: kl_BHQ float32, at least 0 up to rounding.

    Computed from logarithms, so that small divergences are not rounding noise. Holds one (batch, head, query, key)
    matrix at a time: call it with few views.

    Args:
        teacher: the factors or maps as captured.
        decoded: the factors or maps as a coder returns them, same batch, heads and tokens.
        dtype: what it is computed in. In float32 divergences below about 1e-5 are noise.
    """
    log_attn_BHQK, log_decoded_BHQK = (attention.log_maps(dtype) for attention in (teacher, decoded))
    attn_BHQK = log_attn_BHQK.exp()
    # Where the teacher's probability is 0 (a masked key) the term is 0, not 0 * inf.
    terms_BHQK = torch.where(attn_BHQK > 0, attn_BHQK * (log_attn_BHQK - log_decoded_BHQK), 0.0)
    return terms_BHQK.sum(dim=-1).float()


def mean_row_kl(
    teacher: LayerAttention, decoded: Callable[[slice], LayerAttention], dtype: torch.dtype = torch.float64
) -> float:
    """Mean KL(A || decoded A) over all rows of a layer's views, in nats; computed for a few views at a time.

    Args:
        teacher: as for `row_kl`, any number of views.
        decoded: returns the decoded factors or maps of a slice of these views.
        dtype: as for `row_kl`.
    """
    num_views = teacher.shape_BHT[0]
    total = 0.0
    for few in slices_of_views(teacher, _MAP_NUMEL):
        kl_BHQ = row_kl(teacher.select(few), decoded(few), dtype)
        total += float(kl_BHQ.mean()) * len(kl_BHQ)
    return max(total / num_views, 0.0)  # in this order NaN stays NaN


def relative_error(teacher: Tensor, decoded: Tensor) -> float:
    """|decoded - teacher| / |teacher| over all values: for what the row KL says nothing of.

    Args:
        teacher: v, or the inputs of attention and MLP, as captured.
        decoded: the same as a coder returns them.
    """
    exact = teacher.double()
    squared_error, squared_norm = (decoded.double() - exact).square().sum(), exact.square().sum()
    return float((squared_error / squared_norm.clamp_min(1e-300)).sqrt())


def slices_of_views(layer: LayerAttention, map_numel: int) -> Iterator[slice]:
    """Slices of a layer's views: the maps of each have at most `map_numel` elements, unless it is a single view."""
    num_views, num_heads, num_queries = layer.shape_BHT
    step = max(1, map_numel // (num_heads * num_queries * layer.num_keys))
    return (slice(start, start + step) for start in range(0, num_views, step))
