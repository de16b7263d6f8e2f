"""What codes take on disk: the compressor that suits them, and bytes a view and a layer, measured on real codes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from torch import Tensor

from atcache.codecs.base import Coder
from atcache.store.layout import COMPRESSORS, StoreLayout, plan_layers_per_chunk
from atcache.store.writer import encode_view

_PAYS_BELOW = 0.99
"""A compressor must make less than this share of what a faster one makes."""
_TRIED_VIEWS = 16
"""Views that all compressors are tried on; the chosen one compresses the others too."""


def plan_codes(
    codes_BLTC: np.ndarray,
    *,
    num_views: int = 1,
    num_samples: int = 1,
    parameter_names: tuple[str, ...] = ("none",),
    pixels: tuple[int, int] | None = None,
) -> tuple[StoreLayout, float]:
    """The layout of a cache, with chunks and compressor for these codes, and the bytes a view of them takes.

    Args:
        codes_BLTC: of one view or more.
        num_views: of the cache; this and what follows matters only to who wants the layout.
        num_samples: of the cache.
        parameter_names: of its views.
        pixels: (height, width) of its stored images; None for none.
    """
    _, num_layers, num_tokens, num_components = codes_BLTC.shape
    layer_nbytes = num_tokens * num_components * codes_BLTC.dtype.itemsize
    layout = StoreLayout(
        num_views=num_views,
        num_samples=num_samples,
        num_layers=num_layers,
        num_tokens=num_tokens,
        num_components=num_components,
        codes_dtype=str(codes_BLTC.dtype),
        samples_per_shard=1,
        layers_per_chunk=plan_layers_per_chunk(layer_nbytes, num_layers),
        parameter_names=parameter_names,
        pixels=pixels,
    )
    best, least = layout, float("inf")
    for name in COMPRESSORS:
        candidate = replace(layout, compressor=name)
        nbytes = _mean_nbytes(candidate, codes_BLTC[:_TRIED_VIEWS])
        if nbytes < _PAYS_BELOW * least:
            best, least = candidate, nbytes
    return best, least if len(codes_BLTC) <= _TRIED_VIEWS else _mean_nbytes(best, codes_BLTC)


def codes_nbytes(codes_BLTC: Tensor) -> float:
    """Bytes that a view of these codes takes in a cache."""
    return plan_codes(codes_BLTC.cpu().numpy())[1]


def layer_nbytes(coder: Coder, codes_BLTC: Tensor) -> list[float]:
    """Bytes a view takes for each kept layer.

    Where layers share their codes, the whole is split by the layers' parts in each component, components weighing as
    much as their entropy.
    """
    codes = codes_BLTC.cpu().numpy()
    shares_LC = coder.layer_shares_LC()
    if shares_LC is None:
        return [codes_nbytes(codes_BLTC[:, layer : layer + 1]) for layer in range(codes.shape[1])]
    entropy_C = np.array([_entropy(codes[..., component]) for component in range(codes.shape[3])])
    weight_L = shares_LC.cpu().numpy() @ entropy_C
    total = codes_nbytes(codes_BLTC)
    return (total * weight_L / max(1e-12, float(weight_L.sum()))).tolist()


def _mean_nbytes(layout: StoreLayout, codes_BLTC: np.ndarray) -> float:
    return float(np.mean([sum(map(len, encode_view(layout, codes_LTC))) for codes_LTC in codes_BLTC]))


def _entropy(numbers: np.ndarray) -> float:
    """Bits of one of these numbers, each value's frequency being its probability."""
    _, counts = np.unique(numbers, return_counts=True)
    share = counts / counts.sum()
    return float(-(share * np.log2(share)).sum())
