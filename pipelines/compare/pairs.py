"""Which layer and head of one cache is compared with which of the other."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

from atcache.cache.cache import Cache
from atcache.errors import CacheMismatchError
from atcache.stats import js_divergence

from ..cluster.mapping import Mapper
from ..running.progress import Progress
from ..stats.looking import decode_maps, spread
from .same_views import SameView

_MOST_VIEWS = 16
"""Views that heads are matched on: the likest head is found long before means are exact."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Pairs:
    """Two caches, and what of them is compared; workers get it."""

    a: Cache
    b: Cache
    layers_a: tuple[int, ...]
    """By the first teacher's indices."""
    layers_b: tuple[int, ...]
    """For each of them a layer of the second."""
    heads_a: tuple[int, ...]
    """The same ones in all layers."""
    heads_b: tuple[tuple[int, ...], ...]
    """For each layer and each of these heads a head of the second."""
    num_queries: int
    """Rows of the maps that are compared: the first ones, which both caches have."""


def pair_layers(a: Cache, b: Cache, layers: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """For layers of A those of B: of the same number or, if the teachers have different depths, as far up.

    Returns:
        The layers of A that have one, and theirs.

    Raises:
        CacheMismatchError: B stores none of them.
    """
    depth_a, depth_b = a.record.depth, b.record.depth
    of_b = [round(layer * (depth_b - 1) / max(1, depth_a - 1)) for layer in layers]
    found = [pair for pair in zip(layers, of_b, strict=True) if pair[1] in b.geometry.layers]
    if not found:
        raise CacheMismatchError(
            f"layers {_listed(layers)} of A stand for layers {_listed(tuple(of_b))} of B, none of which is stored: "
            f"{b.path} has layers {_listed(b.geometry.layers)}."
        )
    return tuple(layer for layer, _ in found), tuple(layer for _, layer in found)


def pair_heads(a: Cache, b: Cache, heads: tuple[int, ...]) -> tuple[int, ...]:
    """The heads of A that B has too, by number.

    Raises:
        CacheMismatchError: the teachers have different numbers of heads, or B stores none of these.
    """
    num_a, num_b = a.geometry.num_model_heads, b.geometry.num_model_heads
    if num_a != num_b:
        raise CacheMismatchError(
            f"layers have {num_a} heads in A and {num_b} in B, so heads of the same number have nothing to do with "
            "each other. Give --match-heads to compare each head of A with the one of B that is most like it."
        )
    common = tuple(head for head in heads if head in b.geometry.heads)
    if not common:
        raise CacheMismatchError(
            f"heads {_listed(heads)} of A are not stored in {b.path}, which has heads {_listed(b.geometry.heads)}. "
            "Give --match-heads to compare each with the one that is most like it."
        )
    return common


def check_tokens(a: Cache, b: Cache) -> None:
    """Refuse caches whose maps have other rows and columns.

    Raises:
        CacheMismatchError: the token layouts differ.
    """
    tokens_a, tokens_b = a.geometry.tokens, b.geometry.tokens
    if tokens_a != tokens_b:
        prefixes = [f"{tokens.num_prefix_tokens} prefix tokens and " for tokens in (tokens_a, tokens_b)]
        grids = [f"{tokens.grid_height} x {tokens.grid_width} patches" for tokens in (tokens_a, tokens_b)]
        raise CacheMismatchError(
            f"{a.path} has maps of {prefixes[0]}{grids[0]}, and {b.path} of {prefixes[1]}{grids[1]}: a row of one "
            "cannot be compared with a row of the other. Both teachers must cut images of the same size into the same "
            "patches and have as many prefix tokens."
        )


def match_heads(pairs: Pairs, views: list[SameView], mapper: Mapper) -> Pairs:
    """The pairs with, for each layer and head of A, the head of B of which the mean Jensen-Shannon divergence is least.

    Several heads may get the same one. Looks at a few of the views.
    """
    few = [views[int(number)] for number in spread(np.arange(len(views)), _MOST_VIEWS)]
    total_LAB = np.zeros((len(pairs.layers_a), len(pairs.heads_a), len(pairs.b.geometry.heads)))
    with Progress("matching heads", total=len(few), unit="views") as progress:
        for of_view_LAB in mapper.map(_head_distances, pairs, few):
            total_LAB += of_view_LAB
            progress.advance(1)
    heads_b = np.array(pairs.b.geometry.heads)[total_LAB.argmin(axis=-1)]
    return replace(pairs, heads_b=tuple(tuple(int(head) for head in row) for row in heads_b))


def _head_distances(pairs: Pairs, same: SameView) -> np.ndarray:
    """Mean Jensen-Shannon divergence of each head of A from each of B, axes (layer, head of A, head of B)."""
    all_b = [pairs.b.geometry.heads] * len(pairs.layers_b)
    rows = slice(0, pairs.num_queries)
    distances: list[np.ndarray] = []
    with torch.inference_mode():
        for ours_HQK, theirs_HQK in zip(
            decode_maps(pairs.a, same.view, same.row_a, pairs.layers_a, [pairs.heads_a] * len(pairs.layers_a)),
            decode_maps(pairs.b, same.view, same.row_b, pairs.layers_b, all_b),
            strict=True,
        ):
            theirs_HQK = theirs_HQK[:, rows]
            # One head at a time: all pairs at once would hold as many maps as there are pairs.
            found = [js_divergence(head_QK[rows].expand_as(theirs_HQK), theirs_HQK) for head_QK in ours_HQK]
            distances.append(torch.stack(found).mean(dim=-1).numpy())
    return np.stack(distances).astype(np.float64)


def _listed(numbers: tuple[int, ...]) -> str:
    return ", ".join(map(str, numbers))
