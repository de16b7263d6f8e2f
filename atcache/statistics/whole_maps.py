"""Statistics of a whole map: tokens that everything looks at, and how many patterns its rows are made of."""

from __future__ import annotations

from typing import NamedTuple

from atcache.statistics.arrays import Array, at_least, check_axes, namespace_of, singular_values, tiny
from atcache.statistics.rows import attention_entropy


class SinkTokens(NamedTuple):
    """What `sink_tokens` returns."""

    is_sink_K: Array
    """Which keys are sinks, bool (..., key)."""
    received_K: Array
    """Mean share of a query's attention that each key receives, (..., key); sums to 1 over keys."""
    mass: Array
    """Share of all attention that goes to sinks, shape (...)."""


def sink_tokens(attn_QK: Array, *, threshold: float = 0.3) -> SinkTokens:
    """Tokens that receive far more attention than others, whatever the query.

    A key k is a sink if (1 / num_queries) sum_q A_qk > threshold: the importance score of Gu et al. 2024 (arXiv
    2410.10781), section 3, over all queries, since in a ViT every query sees every key. 0.3 is their threshold. So at
    most three keys of a map are sinks; several that share the attention may fall below, and need a lower threshold.

    Args:
        attn_QK: probabilities, shape (..., query, key). If these are the rows of some tokens only, the mean is over
            these.
        threshold: a key that receives more than this share is a sink.

    Returns:
        `is_sink_K`, `received_K` and `mass`. For maps that are NaN nothing is a sink, and the rest is NaN.

    >>> import numpy as np
    >>> found = sink_tokens(np.array([[0.5, 0.5, 0.0], [0.5, 0.0, 0.5]]))
    >>> found.is_sink_K, found.mass
    (array([ True, False, False]), np.float64(0.5))
    """
    check_axes(attn_QK, "query, key")
    received_K = attn_QK.mean(axis=-2)
    # In this direction NaN, which is never less or equal, stays.
    mass = namespace_of(attn_QK).where(received_K <= threshold, 0.0, received_K).sum(axis=-1)
    return SinkTokens(received_K > threshold, received_K, mass)


def effective_rank(attn_QK: Array) -> Array:
    """How many patterns the rows of a map are made of: exp(H(p)), p_i = s_i / sum_j s_j, s the singular values.

    From Roy and Vetterli 2007, "The effective rank: a measure of effective dimensionality" (EUSIPCO). It is 1 if all
    queries look at the same tokens, and the number of tokens if each looks at one of its own. Takes far longer than
    other statistics: a decomposition for each map.

    Args:
        attn_QK: probabilities, shape (..., query, key).

    Returns:
        Shape (...), in [1, the smaller of the numbers of queries and keys]; 0 for a map of zeros.

    >>> import numpy as np
    >>> effective_rank(np.eye(4)).round(6), effective_rank(np.full((4, 4), 0.25)).round(6)
    (np.float64(4.0), np.float64(1.0))
    """
    check_axes(attn_QK, "query, key")
    values_R = singular_values(attn_QK)
    total = values_R.sum(axis=-1)
    share_R = values_R / at_least(total, tiny(attn_QK))[..., None]
    return 2 ** attention_entropy(share_R) * (total > 0)
