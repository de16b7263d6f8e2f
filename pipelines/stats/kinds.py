"""The statistics that `atcache stats` knows, and how each is computed for one layer of one view."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from atcache import stats
from atcache.attention.geometry import FactorGeometry
from atcache.attention.tokens import TokenLayout


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class LayerMaps:
    """What a statistic is computed from: the maps of one layer of one view."""

    attn_HQK: Tensor
    tokens: TokenLayout
    queries: tuple[int, ...]
    """The tokens whose rows the maps have."""
    largest: int
    """How many keys count as the largest."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Kind:
    """One statistic."""

    title: str
    """What it is, with its unit; "{largest}" stands for the number of keys."""
    of: Callable[[LayerMaps], Tensor]
    """One number for each head."""


def _mean_of_others(likeness_HH: Tensor) -> Tensor:
    """The mean of each row without the diagonal: a head's likeness to the others."""
    return (likeness_HH.sum(dim=-1) - likeness_HH.diagonal(dim1=-2, dim2=-1)) / (likeness_HH.shape[-1] - 1)


KINDS: dict[str, Kind] = {
    "entropy_bits": Kind(
        title="entropy, bits",
        of=lambda maps: stats.attention_entropy(maps.attn_HQK).mean(dim=-1),
    ),
    "prefix_mass": Kind(
        title="share of attention on prefix tokens",
        of=lambda maps: stats.prefix_mass(maps.attn_HQK, maps.tokens).mean(dim=-1),
    ),
    "cls_mass": Kind(
        title="share on the first prefix token, the class token if there is one",
        of=lambda maps: stats.cls_mass(maps.attn_HQK, maps.tokens).mean(dim=-1),
    ),
    "register_mass": Kind(
        title="share on the other prefix tokens, the registers",
        of=lambda maps: stats.register_mass(maps.attn_HQK, maps.tokens).mean(dim=-1),
    ),
    "self_mass": Kind(
        title="share that a token keeps to itself",
        of=lambda maps: stats.self_mass(maps.attn_HQK, maps.queries).mean(dim=-1),
    ),
    "largest_mass": Kind(
        title="share on the {largest} largest keys of each row",
        of=lambda maps: stats.largest_mass(maps.attn_HQK, maps.largest).mean(dim=-1),
    ),
    "sink_mass": Kind(
        title="share on sink tokens, which get over 0.3 of all attention each",
        of=lambda maps: stats.sink_tokens(maps.attn_HQK).mass,
    ),
    "num_sinks": Kind(
        title="number of sink tokens",
        of=lambda maps: stats.sink_tokens(maps.attn_HQK).is_sink_K.sum(dim=-1),
    ),
    "mean_distance": Kind(
        title="mean distance, patches",
        of=lambda maps: stats.mean_attention_distance(maps.attn_HQK, maps.tokens, maps.queries),
    ),
    "head_divergence_bits": Kind(
        title="divergence from the mean of the layer's heads, bits",
        of=lambda maps: stats.head_divergence(maps.attn_HQK),
    ),
    "effective_rank": Kind(
        title="effective rank",
        of=lambda maps: stats.effective_rank(maps.attn_HQK.double()),
    ),
    "head_cka": Kind(
        title="CKA with the layer's other heads, mean",
        of=lambda maps: _mean_of_others(stats.head_cka(maps.attn_HQK)),
    ),
    "head_js_bits": Kind(
        title="Jensen-Shannon divergence from the layer's other heads, mean, bits",
        of=lambda maps: _mean_of_others(stats.head_jensen_shannon(maps.attn_HQK)),
    ),
}


def kinds_for(geometry: FactorGeometry, num_heads: int, *, with_slow: bool) -> tuple[str, ...]:
    """The names of the statistics that make sense for a cache.

    Args:
        geometry: its tokens, and the rows that are stored.
        num_heads: heads that are looked at.
        with_slow: whether those that take long are wanted, too.
    """
    tokens, num_queries = geometry.tokens, geometry.num_queries
    makes_sense = {
        "cls_mass": tokens.num_prefix_tokens > 1,  # with a single one, prefix_mass says it
        "register_mass": tokens.num_prefix_tokens > 1,
        "sink_mass": geometry.keeps_all_queries,  # what a few queries look at is no sink
        "num_sinks": geometry.keeps_all_queries,
        "mean_distance": num_queries > tokens.num_prefix_tokens,
        "head_divergence_bits": num_heads > 1,
        "effective_rank": with_slow and num_queries > 1,
        "head_cka": with_slow and num_heads > 1 and num_queries > 1,
        "head_js_bits": with_slow and num_heads > 1,
    }
    return tuple(name for name in KINDS if makes_sense.get(name, True))
