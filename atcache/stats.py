"""Statistics of maps: what a head attends to, in a few numbers.

All functions accept numpy arrays, and dask arrays (lazily). The last two axes are (query, key); any axes may come
before them. Views that are not stored are NaN, and give NaN. Maps may have the rows of some tokens only.

Example:
    cache = atcache.open("in1k.zarr")
    attn_SHQK = cache.maps(layer=0)[0, :100]  # lazy
    entropy_bits_H = atcache.stats.attention_entropy(attn_SHQK).mean(axis=(0, 2)).compute()
    mass_H = atcache.stats.prefix_mass(attn_SHQK, cache.geometry.tokens).mean(axis=(0, 2)).compute()
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from atcache.attention.tokens import TokenLayout
from atcache.errors import AttentionShapeError


def attention_entropy(attn_QK: Any, *, base: float = 2.0) -> Any:  # noqa: ANN401 - numpy or dask array
    """Shannon entropy of each query's attention over keys.

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
    logarithm = np.log2(np.maximum(attn_QK, np.finfo(attn_QK.dtype).tiny))
    return -(attn_QK * logarithm).sum(axis=-1) / math.log2(base)


def prefix_mass(attn_QK: Any, tokens: TokenLayout) -> Any:  # noqa: ANN401 - numpy or dask array
    """Share of each query's attention that goes to prefix tokens (CLS, registers).

    Args:
        attn_QK: probabilities, shape (..., query, key), all keys of `tokens`.
        tokens: which keys are prefix tokens.

    Returns:
        Mass, shape (..., query), in [0, 1]; 0 if there are no prefix tokens.

    >>> prefix_mass(np.full((4, 4), 0.25), TokenLayout(num_prefix_tokens=1, grid_height=1, grid_width=3))
    array([0.25, 0.25, 0.25, 0.25])
    """
    _check_keys(attn_QK, tokens)
    return attn_QK[..., : tokens.num_prefix_tokens].sum(axis=-1)


def patch_grid(attn_QK: Any, tokens: TokenLayout) -> Any:  # noqa: ANN401 - numpy or dask array
    """Each query's attention to the patches, as an image: what the class token looks at, for example.

    Args:
        attn_QK: probabilities, shape (..., query, key), all keys of `tokens`.
        tokens: prefix count and patch grid.

    Returns:
        Shape (..., query, grid height, grid width). The sum of a grid is 1 less `prefix_mass`.

    >>> patch_grid(np.array([[0.4, 0.1, 0.2, 0.3]]), TokenLayout(num_prefix_tokens=1, grid_height=1, grid_width=3))
    array([[[0.1, 0.2, 0.3]]])
    """
    _check_keys(attn_QK, tokens)
    patches_QK = attn_QK[..., tokens.num_prefix_tokens :]
    return patches_QK.reshape(*patches_QK.shape[:-1], tokens.grid_height, tokens.grid_width)


def mean_attention_distance(
    attn_QK: Any,  # noqa: ANN401 - numpy or dask array
    tokens: TokenLayout,
    queries: Sequence[int] | None = None,
) -> Any:  # noqa: ANN401 - numpy or dask array
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
    _check_keys(attn_QK, tokens)
    query_Q = np.arange(tokens.num_tokens) if queries is None else np.asarray(queries, dtype=int)
    if attn_QK.shape[-2] != len(query_Q):
        raise AttentionShapeError(
            f"maps of shape {tuple(attn_QK.shape)}: expected {len(query_Q)} rows, one for each token whose rows they "
            "have. Say with `queries` which ones these are."
        )
    is_patch_Q = (query_Q >= tokens.num_prefix_tokens) & (query_Q < tokens.num_tokens)
    if not is_patch_Q.any():
        raise AttentionShapeError(
            f"these maps have the rows of tokens {query_Q.tolist()}, none of them a patch: prefix tokens have no place "
            "in the image, so there is no distance. `patch_grid` shows where they look."
        )
    patches_QK = attn_QK[..., is_patch_Q, tokens.num_prefix_tokens :]
    distance_QK = patch_distances(tokens)[query_Q[is_patch_Q] - tokens.num_prefix_tokens].astype(attn_QK.dtype)
    # A row may have no attention left on patches; tiny keeps it from being 0 / 0.
    mass_Q = np.maximum(patches_QK.sum(axis=-1), np.finfo(attn_QK.dtype).tiny)
    return ((patches_QK * distance_QK).sum(axis=-1) / mass_Q).mean(axis=-1)


def patch_distances(tokens: TokenLayout) -> np.ndarray:
    """Euclidean distances between the centres of all pairs of patches, float64 (patch, patch), in patches.

    >>> patch_distances(TokenLayout(num_prefix_tokens=0, grid_height=1, grid_width=3))
    array([[0., 1., 2.],
           [1., 0., 1.],
           [2., 1., 0.]])
    """
    rows_P, columns_P = np.divmod(np.arange(tokens.num_patches), tokens.grid_width)
    return np.hypot(rows_P[:, None] - rows_P, columns_P[:, None] - columns_P)


def _check_keys(attn_QK: Any, tokens: TokenLayout) -> None:  # noqa: ANN401 - numpy or dask array
    if attn_QK.ndim < 2 or attn_QK.shape[-1] != tokens.num_tokens:
        raise AttentionShapeError(
            f"maps of shape {tuple(attn_QK.shape)}: expected (..., query, {tokens.num_tokens}) for "
            f"{tokens.num_prefix_tokens} prefix tokens and {tokens.grid_height} x {tokens.grid_width} patches."
        )
