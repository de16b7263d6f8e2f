"""How many bytes codes take on disk, a view and a layer, and which compressor suits them; measured on real codes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from torch import Tensor

from atcache.codecs.base import Coder
from atcache.store.layout import COMPRESSORS, StoreLayout
from atcache.store.shard_size import plan_layers_per_chunk
from atcache.store.writer import encode_view

_PAYS_BELOW = 0.99
"""A slower compressor is taken only if it makes less than this share of the bytes that a faster one makes."""
_TRIED_VIEWS = 16
"""Views that all compressors are tried on. The chosen one then compresses all views."""


def plan_codes(
    codes_BLTC: np.ndarray,
    *,
    num_views: int = 1,
    num_samples: int = 1,
    parameter_names: tuple[str, ...] = ("none",),
    pixels: tuple[int, int] | None = None,
    compressor: str | None = None,
) -> tuple[StoreLayout, float]:
    """The layout of a cache, with chunks and compressor for these codes, and the bytes a view of them takes.

    Args:
        codes_BLTC: codes of one view or more.
        num_views: views of each sample. This and the following arguments change only the layout, not the bytes.
        num_samples: samples of the cache.
        parameter_names: names of the views' parameters.
        pixels: (height, width) of stored images; None if none are stored.
        compressor: the one to use; None to choose.
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
    # gzip is for bytes that are packed for it. On plain integers it saves a per cent and reads several times as slowly.
    names = [name for name in COMPRESSORS if num_tokens == 1 or not COMPRESSORS[name].is_deflated]
    for name in names if compressor is None else [compressor]:
        candidate = replace(layout, compressor=name)
        nbytes = _mean_nbytes(candidate, codes_BLTC[:_TRIED_VIEWS])
        if nbytes < _PAYS_BELOW * least:
            best, least = candidate, nbytes
    return best, least if len(codes_BLTC) <= _TRIED_VIEWS else _mean_nbytes(best, codes_BLTC)


def codes_nbytes(codes_BLTC: Tensor) -> float:
    """Bytes that a view of these codes takes in a cache."""
    return plan_codes(codes_BLTC.cpu().numpy())[1]


def layer_nbytes(coder: Coder, codes_BLTC: Tensor) -> list[float]:
    """Bytes that a view takes for each kept layer.

    If layers share their rows, each gets the share of the bytes that the coder says it causes.
    """
    share_L = coder.layer_shares_L(codes_BLTC)
    if share_L is None:
        return [codes_nbytes(codes_BLTC[:, layer : layer + 1]) for layer in range(codes_BLTC.shape[1])]
    total = codes_nbytes(codes_BLTC)
    return [total * float(share) for share in share_L]


def _mean_nbytes(layout: StoreLayout, codes_BLTC: np.ndarray) -> float:
    return float(np.mean([sum(map(len, encode_view(layout, codes_LTC))) for codes_LTC in codes_BLTC]))
