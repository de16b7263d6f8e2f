"""Choose the views, layers and heads of a cache, and decode their maps."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from atcache.attention.indices import parse_indices
from atcache.cache.cache import Cache
from atcache.errors import CacheMissError, CorruptCacheError


def spread(numbers_N: np.ndarray, most: int) -> np.ndarray:
    """At most so many of the numbers, spread evenly, the same ones every time."""
    count = min(len(numbers_N), most)
    return numbers_N[(2 * np.arange(count) + 1) * len(numbers_N) // (2 * max(1, count))]


def chosen_layers(cache: Cache, layers: str | None) -> tuple[int, ...]:
    """The layers that an option names, by the teacher's indices; all that are stored for None.

    Raises:
        ConfigError: the text is no list of layers, or the teacher has no such layer.
        CacheMissError: a layer is not stored.
    """
    return _chosen(cache, layers, cache.geometry.layers, cache.record.depth, "layer")


def chosen_heads(cache: Cache, heads: str | None) -> tuple[int, ...]:
    """The heads that an option names, as `chosen_layers`."""
    return _chosen(cache, heads, cache.geometry.heads, cache.geometry.num_model_heads, "head")


def _chosen(cache: Cache, text: str | None, stored: tuple[int, ...], limit: int, what: str) -> tuple[int, ...]:
    if text is None or text.strip() == "all":
        return stored
    chosen = parse_indices(text, limit, what)
    if missing := sorted(set(chosen) - set(stored)):
        raise CacheMissError(
            f"{what} {missing[0]} is not stored in {cache.path}, which has {what}s {', '.join(map(str, stored))}."
        )
    return chosen


def decode_maps(
    cache: Cache, view: int, sample: int, layers: tuple[int, ...], heads: list[tuple[int, ...]]
) -> Iterator[Tensor]:
    """The maps of some layers of a view, one layer after the other: attn_HQK float32.

    Args:
        cache: the cache.
        view: which view of the sample.
        sample: its row.
        layers: the teacher's indices, all stored.
        heads: for each of these layers its heads, by the teacher's indices, all stored.

    Raises:
        CorruptCacheError: what is stored is damaged, or decodes to no numbers.
    """
    geometry = cache.geometry
    positions = [geometry.layers.index(layer) for layer in layers]
    rows = cache.coder.code_rows(positions)
    codes_BLTC = torch.from_numpy(cache.reader.read_codes(view, sample, rows)[None])
    decoded = cache.coder.decode(codes_BLTC, rows.start)
    for number, position, chosen in zip(layers, positions, heads, strict=True):
        layer, positions_H = decoded.layer(position), [geometry.heads.index(head) for head in chosen]
        is_whole = positions_H == list(range(len(geometry.heads)))
        attn_HQK = (layer if is_whole else layer.select_heads(positions_H)).maps()[0]
        check_numbers(cache, view, sample, number, attn_HQK)
        yield attn_HQK


def check_numbers(cache: Cache, view: int, sample: int, layer: int, attn_HQK: Tensor) -> None:
    """Refuse maps with NaN or infinity: one view would make every mean NaN, and a picture blank, without a reason.

    Raises:
        CorruptCacheError: there are some.
    """
    if not torch.isfinite(attn_HQK.sum()):
        raise CorruptCacheError(
            f"{cache.path}: the maps of layer {layer} in view {view} of sample "
            f"{cache.reader.samples.sample_key(sample)!r} hold NaN or infinity, expected probabilities. Run "
            "`atcache verify`: it says whether they are damaged. If not, the teacher's attention was so."
        )
