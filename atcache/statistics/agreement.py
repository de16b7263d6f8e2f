"""How near two sets of maps are to each other, row by row: two teachers, two codecs, a teacher and its student."""

from __future__ import annotations

from typing import Any

import numpy as np

from atcache.errors import AttentionShapeError
from atcache.statistics.arrays import (
    Array,
    at_least,
    check_axes,
    check_k,
    greatest,
    in_one_dtype,
    largest,
    namespace_of,
    tiny,
)


def kl_divergence(attn_QK: Array, other_QK: Array, *, base: float = np.e, floor: float = 0.0) -> Array:
    """Kullback-Leibler divergence of each row: KL(P || Q) = sum_k P_k log(P_k / Q_k). Not symmetric.

    What is lost by taking Q, `other_QK`, for P: Kullback and Leibler 1951, "On information and sufficiency" (Annals of
    Mathematical Statistics 22). atcache's codecs are fitted to it, in nats.

    Args:
        attn_QK: P, probabilities, shape (..., query, key).
        other_QK: Q, in the same shape.
        base: e gives nats, 2 gives bits.
        floor: in the logarithm, probabilities below this count as this. Where Q is 0 and P is not, KL is infinite by
            definition; a codec that rounds small probabilities to 0 then hides all other differences.

    Returns:
        Shape (..., query), at least 0 up to rounding. In float32, values below about 1e-6 are rounding.

    >>> kl_divergence(np.array([[1.0, 0.0]]), np.array([[0.5, 0.5]]), base=2)
    array([1.])
    """
    xp, attn_QK, other_QK = _comparable(attn_QK, other_QK)
    least = max(floor, tiny(attn_QK))  # of both, so that maps which are alike have exactly 0
    logarithm = xp.log(at_least(attn_QK, least)) - xp.log(at_least(other_QK, least))
    kl_Q = (attn_QK * logarithm).sum(axis=-1) / float(np.log(base))
    if floor > 0:
        return kl_Q
    # The smallest float stands for 0 above, so that 0 log 0 is 0; where P is not 0 it must be infinite.
    return xp.where(((other_QK == 0) & (attn_QK > 0)).any(axis=-1), np.inf, kl_Q)


def js_divergence(attn_QK: Array, other_QK: Array, *, base: float = np.e) -> Array:
    """Jensen-Shannon divergence of each row: the mean of KL(P || M) and KL(Q || M), M = (P + Q) / 2. Symmetric.

    Lin 1991, "Divergence measures based on the Shannon entropy" (IEEE Transactions on Information Theory 37). It is
    finite also where a probability is 0. Jain and Wallace 2019 (arXiv 1902.10186) compare attention with it.

    Args:
        attn_QK: P, probabilities, shape (..., query, key).
        other_QK: Q, in the same shape.
        base: e gives nats, 2 gives bits.

    Returns:
        Shape (..., query), in [0, log_base(2)] up to rounding.

    >>> js_divergence(np.array([[1.0, 0.0]]), np.array([[0.0, 1.0]]), base=2)
    array([1.])
    """
    xp, attn_QK, other_QK = _comparable(attn_QK, other_QK)
    least = tiny(attn_QK)
    log_middle_QK = xp.log(at_least((attn_QK + other_QK) / 2, least))
    terms_QK = attn_QK * (xp.log(at_least(attn_QK, least)) - log_middle_QK)
    terms_QK = terms_QK + other_QK * (xp.log(at_least(other_QK, least)) - log_middle_QK)
    return terms_QK.sum(axis=-1) / (2 * float(np.log(base)))


def total_variation(attn_QK: Array, other_QK: Array) -> Array:
    """Total variation of each row: 1/2 sum_k |P_k - Q_k|, the share of the attention that would have to move.

    Levin and Peres, "Markov chains and mixing times" (2nd edition, 2017), proposition 4.2.

    Args:
        attn_QK: P, probabilities, shape (..., query, key).
        other_QK: Q, in the same shape.

    Returns:
        Shape (..., query), in [0, 1].

    >>> total_variation(np.array([[0.75, 0.25]]), np.array([[0.5, 0.5]]))
    array([0.25])
    """
    xp, attn_QK, other_QK = _comparable(attn_QK, other_QK)
    return xp.abs(attn_QK - other_QK).sum(axis=-1) / 2


def cosine_similarity(attn_QK: Array, other_QK: Array) -> Array:
    """Cosine of the angle between each two rows: sum_k P_k Q_k / (|P| |Q|). Large probabilities decide.

    The similarity of vectors in information retrieval: Salton, Wong and Yang 1975, "A vector space model for automatic
    indexing" (Communications of the ACM 18).

    Args:
        attn_QK: P, probabilities, shape (..., query, key).
        other_QK: Q, in the same shape.

    Returns:
        Shape (..., query), in [0, 1]; 0 if a row is all zeros.

    >>> cosine_similarity(np.array([[0.5, 0.5, 0.0]]), np.array([[0.5, 0.0, 0.5]])).round(6)
    array([0.5])
    """
    _, attn_QK, other_QK = _comparable(attn_QK, other_QK)
    norms_Q = ((attn_QK**2).sum(axis=-1) * (other_QK**2).sum(axis=-1)) ** 0.5
    return (attn_QK * other_QK).sum(axis=-1) / at_least(norms_Q, tiny(attn_QK))


def largest_overlap(attn_QK: Array, other_QK: Array, k: int) -> Array:
    """Share of the k largest keys of each row that are also among the k largest of the other.

    The overlap at depth k of two rankings: Webber, Moffat and Zobel 2010, "A similarity measure for indefinite
    rankings" (ACM Transactions on Information Systems 28). Chance alone gives k / num_keys.

    Args:
        attn_QK: P, probabilities, shape (..., query, key).
        other_QK: Q, in the same shape.
        k: number of keys. Of keys that are alike, the first ones count as larger.

    Returns:
        Shape (..., query), in [0, 1].

    >>> largest_overlap(np.array([[0.4, 0.3, 0.2, 0.1]]), np.array([[0.4, 0.1, 0.2, 0.3]]), k=2)
    array([0.5])
    """
    _, attn_QK, other_QK = _comparable(attn_QK, other_QK)
    check_k(k, attn_QK)
    is_large_QK, of_other_QK = _is_largest(attn_QK, k), _is_largest(other_QK, k)
    # Comparisons with NaN are false; the sums keep rows that are not stored NaN.
    return (is_large_QK & of_other_QK).sum(axis=-1) / (k + 0 * (attn_QK.sum(axis=-1) + other_QK.sum(axis=-1)))


def _is_largest(attn_QK: Array, k: int) -> Array:
    """Which keys are the k largest of their row; of keys that are alike, the first ones."""
    least_Q1 = -greatest(-largest(attn_QK, k), axis=-1)[..., None]
    is_above_QK, is_level_QK = attn_QK > least_Q1, attn_QK == least_Q1
    num_left_Q1 = k - is_above_QK.sum(axis=-1)[..., None]
    return is_above_QK | (is_level_QK & (is_level_QK.cumsum(axis=-1) <= num_left_Q1))


def _comparable(attn_QK: Array, other_QK: Array) -> tuple[Any, Array, Array]:
    """The namespace of both, and both in one dtype: what is the smallest number of one would be 0 in another.

    Raises:
        AttentionShapeError: their shapes differ, or they are of two kinds.
    """
    if tuple(attn_QK.shape) != tuple(other_QK.shape):
        raise AttentionShapeError(
            f"maps of shape {tuple(attn_QK.shape)} and {tuple(other_QK.shape)}: expected the same shape, so that each "
            "row has one to compare with."
        )
    check_axes(attn_QK, "query, key")
    return namespace_of(attn_QK, other_QK), *in_one_dtype(attn_QK, other_QK)
