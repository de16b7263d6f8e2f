"""Statistics of each row of a map: how spread one query's attention is, and how much of it goes to some keys."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from atcache.attention.tokens import TokenLayout
from atcache.statistics.arrays import (
    Array,
    at_least,
    check_axes,
    check_k,
    check_keys,
    constant,
    largest,
    namespace_of,
    query_numbers,
    tiny,
)


def attention_entropy(attn_QK: Array, *, base: float = 2.0) -> Array:
    """Shannon entropy of each query's attention over keys: H = -sum_k A_qk log A_qk.

    Low entropy means that a query looks at few tokens. As in Clark et al. 2019 (arXiv 1906.04341), section 3.3.

    Args:
        attn_QK: probabilities, shape (..., query, key), float. Rows along key must sum to 1; this function does not
            normalise them.
        base: 2 gives bits, e gives nats.

    Returns:
        Entropy, shape (..., query), in [0, log_base(num_keys)].

    >>> attention_entropy(np.full((1, 1, 4), 0.25))
    array([[2.]])
    """
    # p * log(p) tends to 0 as p does. The smallest positive float instead of 0 gives 0 * log(tiny) = 0, and not NaN.
    logarithm = namespace_of(attn_QK).log2(at_least(attn_QK, tiny(attn_QK)))
    return -(attn_QK * logarithm).sum(axis=-1) / math.log2(base)


def prefix_mass(attn_QK: Array, tokens: TokenLayout) -> Array:
    """Share of each query's attention that goes to prefix tokens (CLS, registers).

    Args:
        attn_QK: probabilities, shape (..., query, key), all keys of `tokens`.
        tokens: which keys are prefix tokens.

    Returns:
        Mass, shape (..., query), in [0, 1]; 0 if there are no prefix tokens.

    >>> prefix_mass(np.full((4, 4), 0.25), TokenLayout(num_prefix_tokens=1, grid_height=1, grid_width=3))
    array([0.25, 0.25, 0.25, 0.25])
    """
    check_keys(attn_QK, tokens)
    return attn_QK[..., : tokens.num_prefix_tokens].sum(axis=-1)


def cls_mass(attn_QK: Array, tokens: TokenLayout) -> Array:
    """Share of each query's attention that goes to the first prefix token: the class token, if the model has one.

    A layout does not say whether its prefix tokens begin with a class token. In almost all models they do; a few have
    registers only. In text models much attention goes to such a token where a head finds nothing to do (Clark et al.
    2019, arXiv 1906.04341).

    Args:
        attn_QK: probabilities, shape (..., query, key), all keys of `tokens`.
        tokens: which keys are prefix tokens.

    Returns:
        Mass, shape (..., query), in [0, 1]; 0 if there are no prefix tokens.

    >>> cls_mass(np.array([[0.5, 0.2, 0.3]]), TokenLayout(num_prefix_tokens=2, grid_height=1, grid_width=1))
    array([0.5])
    """
    check_keys(attn_QK, tokens)
    return attn_QK[..., : min(1, tokens.num_prefix_tokens)].sum(axis=-1)


def register_mass(attn_QK: Array, tokens: TokenLayout) -> Array:
    """Share of each query's attention that goes to the prefix tokens after the first: the registers.

    Registers are there to take attention that would otherwise go to patches without content: Darcet et al. 2023 (arXiv
    2309.16588). `prefix_mass` is the sum of this and `cls_mass`.

    Args:
        attn_QK: probabilities, shape (..., query, key), all keys of `tokens`.
        tokens: which keys are prefix tokens.

    Returns:
        Mass, shape (..., query), in [0, 1]; 0 if there is at most one prefix token.

    >>> register_mass(np.array([[0.5, 0.2, 0.3]]), TokenLayout(num_prefix_tokens=2, grid_height=1, grid_width=1))
    array([0.2])
    """
    check_keys(attn_QK, tokens)
    return attn_QK[..., min(1, tokens.num_prefix_tokens) : tokens.num_prefix_tokens].sum(axis=-1)


def self_mass(attn_QK: Array, queries: Sequence[int] | None = None) -> Array:
    """Share of its attention that each token keeps to itself, A_qq: the diagonal of the map.

    Heads with a strong diagonal are one of the patterns in Kovaleva et al. 2019 (arXiv 1908.08593), section 4.1.

    Args:
        attn_QK: probabilities, shape (..., query, key).
        queries: the tokens whose rows `attn_QK` has; None for all.

    Returns:
        Mass, shape (..., query), in [0, 1].

    >>> self_mass(np.array([[0.75, 0.25], [0.5, 0.5]]))
    array([0.75, 0.5 ])
    """
    check_axes(attn_QK, "query, key")
    num_keys: int = attn_QK.shape[-1]
    query_Q = query_numbers(attn_QK, queries, num_keys)
    is_own_QK = constant(query_Q[:, None] == np.arange(num_keys), attn_QK)
    # A choice, not a product with 0 and 1: NaN rows stay NaN all the same, because a row is stored whole or not at all.
    return namespace_of(attn_QK).where(is_own_QK, attn_QK, 0.0).sum(axis=-1)


def largest_mass(attn_QK: Array, k: int) -> Array:
    """Share of each query's attention that goes to the k keys that get most of it.

    If it is near 1, a row may be cut to its k largest keys, as in Gupta et al. 2021 (arXiv 2106.06899).

    Args:
        attn_QK: probabilities, shape (..., query, key).
        k: number of keys.

    Returns:
        Mass, shape (..., query), in [k / num_keys, 1].

    >>> largest_mass(np.array([[0.5, 0.125, 0.25, 0.125]]), k=2)
    array([0.75])
    """
    check_axes(attn_QK, "query, key")
    check_k(k, attn_QK)
    return largest(attn_QK, k).sum(axis=-1)
