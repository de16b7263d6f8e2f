"""Where patches are in the image: maps as images, and distances."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from atcache.attention.tokens import TokenLayout
from atcache.errors import AttentionShapeError
from atcache.statistics.arrays import Array, at_least, check_keys, constant, query_numbers, tiny


def patch_grid(attn_QK: Array, tokens: TokenLayout) -> Array:
    """Each query's attention to the patches, as an image: what the class token looks at, for example.

    Args:
        attn_QK: probabilities, shape (..., query, key), all keys of `tokens`.
        tokens: prefix count and patch grid.

    Returns:
        Shape (..., query, grid height, grid width). The sum of a grid is 1 less `prefix_mass`.

    >>> patch_grid(np.array([[0.4, 0.1, 0.2, 0.3]]), TokenLayout(num_prefix_tokens=1, grid_height=1, grid_width=3))
    array([[[0.1, 0.2, 0.3]]])
    """
    check_keys(attn_QK, tokens)
    patches_QK = attn_QK[..., tokens.num_prefix_tokens :]
    return patches_QK.reshape(*patches_QK.shape[:-1], tokens.grid_height, tokens.grid_width)


def mean_attention_distance(
    attn_QK: Array,
    tokens: TokenLayout,
    queries: Sequence[int] | None = None,
) -> Array:
    """Mean distance in the image between a patch and the patches it attends to, weighted by attention.

    As in Dosovitskiy et al. 2021 (arXiv 2010.11929), appendix D.7, but in patches instead of pixels, and averaged over
    the query patches. Prefix tokens have no position in the image. They are left out, both as queries and as keys, and
    each row is normalised over the patches that remain.

    Args:
        attn_QK: probabilities, shape (..., query, key), all keys of `tokens`.
        tokens: prefix count and patch grid.
        queries: the tokens whose rows `attn_QK` has; None for all.

    Returns:
        Mean distance between patch centres, shape (...), in [0, diagonal of the grid]. Multiply by the patch size for
        pixels. A patch that attends only to prefix tokens counts as 0.

    >>> mean_attention_distance(np.full((3, 3), 1 / 3), TokenLayout(num_prefix_tokens=0, grid_height=1, grid_width=3))
    np.float64(0.8888888888888888)
    """
    check_keys(attn_QK, tokens)
    query_Q = query_numbers(attn_QK, queries, tokens.num_tokens)
    is_patch_Q = query_Q >= tokens.num_prefix_tokens
    if not is_patch_Q.any():
        raise AttentionShapeError(
            f"these maps have the rows of tokens {query_Q.tolist()}, none of them a patch: prefix tokens have no place "
            "in the image, so there is no distance. `patch_grid` shows where they look."
        )
    patches_QK = attn_QK[..., np.flatnonzero(is_patch_Q), tokens.num_prefix_tokens :]
    distance_QK = patch_distances(tokens)[query_Q[is_patch_Q] - tokens.num_prefix_tokens]
    # A row may have no attention left on patches; tiny keeps it from being 0 / 0.
    mass_Q = at_least(patches_QK.sum(axis=-1), tiny(attn_QK))
    return ((patches_QK * constant(distance_QK, attn_QK)).sum(axis=-1) / mass_Q).mean(axis=-1)


def patch_distances(tokens: TokenLayout) -> np.ndarray:
    """Euclidean distances between the centres of all pairs of patches, float64 (patch, patch), in patches.

    >>> patch_distances(TokenLayout(num_prefix_tokens=0, grid_height=1, grid_width=3))
    array([[0., 1., 2.],
           [1., 0., 1.],
           [2., 1., 0.]])
    """
    rows_P, columns_P = np.divmod(np.arange(tokens.num_patches), tokens.grid_width)
    return np.hypot(rows_P[:, None] - rows_P, columns_P[:, None] - columns_P)
