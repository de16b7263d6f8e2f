"""Attention followed through all layers."""

from __future__ import annotations

from typing import Literal

import numpy as np

from atcache.errors import AttentionShapeError
from atcache.statistics.arrays import Array, at_least, check_axes, constant, greatest, tiny


def attention_rollout(attn_LHQK: Array, *, heads: Literal["mean", "max"] = "mean") -> Array:
    """How much of each input token is in each output token, if attention were all that mixes them.

    R = M_L ... M_2 M_1 with M = 0.5 A + 0.5 I, A the mean over heads, and the half of I for the residual connection:
    Abnar and Zuidema 2020 (arXiv 2005.00928), section 3. It knows nothing of values and MLPs.

    Args:
        attn_LHQK: probabilities, shape (..., layer, head, query, key): the teacher's layers from the first on, with the
            rows of all tokens.
        heads: "max" takes the largest over heads and normalises its rows, which shows what a single head looks at.
            The paper takes "mean".

    Returns:
        Shape (..., query, key). Rows sum to 1.

    Raises:
        AttentionShapeError: the maps have the rows of some tokens only.

    >>> attention_rollout(np.full((2, 1, 2, 2), 0.5))
    array([[0.625, 0.375],
           [0.375, 0.625]])
    """
    check_axes(attn_LHQK, "layer, head, query, key")
    if attn_LHQK.shape[-1] != attn_LHQK.shape[-2]:
        raise AttentionShapeError(
            f"maps of shape {tuple(attn_LHQK.shape)}: rollout follows every token through the layers, so it needs the "
            f"rows of all {attn_LHQK.shape[-1]} tokens, not of {attn_LHQK.shape[-2]}. Build a cache with --queries all."
        )
    if heads == "mean":
        attn_LQK = attn_LHQK.mean(axis=-3)
    elif heads == "max":
        attn_LQK = greatest(attn_LHQK, axis=-3)
        attn_LQK = attn_LQK / at_least(attn_LQK.sum(axis=-1), tiny(attn_LQK))[..., None]
    else:
        raise AttentionShapeError(f"heads={heads!r}: expected mean or max.")
    mixing_LQK = 0.5 * attn_LQK + 0.5 * constant(np.eye(attn_LHQK.shape[-1]), attn_LHQK)
    rollout_QK = mixing_LQK[..., 0, :, :]
    for layer in range(1, attn_LHQK.shape[-4]):
        rollout_QK = mixing_LQK[..., layer, :, :] @ rollout_QK
    return rollout_QK
