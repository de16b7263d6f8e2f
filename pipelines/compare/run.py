"""How near the maps of two caches are to each other, for each layer and head, over some views that both have."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from atcache import stats
from atcache.cache.cache import Cache
from atcache.fields import JsonFields

from ..cluster.connect import mapper_of, open_for
from ..running.progress import Progress
from ..stats.looking import chosen_heads, chosen_layers, decode_maps
from ..stats.means import Means, as_table
from ..stats.report import view_table, write_report
from ..stats.tables import NamedTable, Report, Table
from .config import CompareConfig
from .pairs import Pairs, check_tokens, match_heads, pair_heads, pair_layers
from .same_views import SameView, find_same_views

KL_FLOOR = 1e-7
"""Probabilities below this count as this in KL: about what float32 resolves beside 1, and so what a codec may
round to 0, which would make KL infinite."""
_AT_ONCE = 4  # views that a worker of a cluster looks at before it answers


@dataclass(frozen=True, kw_only=True, slots=True)
class _Kind:
    """One number that says how near maps are."""

    title: str
    """What it is, with its unit; "{largest}" stands for the number of keys."""
    of: Callable[[Tensor, Tensor, int], Tensor]
    """From maps of A and B, attn_QK float64, and the number of largest keys: a number for each row."""


_KINDS: dict[str, _Kind] = {
    "kl_nats": _Kind(
        title="KL(A || B), nats",
        of=lambda ours_QK, theirs_QK, _: stats.kl_divergence(ours_QK, theirs_QK, floor=KL_FLOOR),
    ),
    "js_nats": _Kind(
        title="Jensen-Shannon divergence, nats",
        of=lambda ours_QK, theirs_QK, _: stats.js_divergence(ours_QK, theirs_QK),
    ),
    "total_variation": _Kind(
        title="total variation",
        of=lambda ours_QK, theirs_QK, _: stats.total_variation(ours_QK, theirs_QK),
    ),
    "cosine": _Kind(
        title="cosine similarity",
        of=lambda ours_QK, theirs_QK, _: stats.cosine_similarity(ours_QK, theirs_QK),
    ),
    "largest_overlap": _Kind(title="overlap of the {largest} largest keys", of=stats.largest_overlap),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class FarView(JsonFields):
    """A view where the maps are far apart: means over its rows, heads and layers."""

    sample_key: str
    view: int
    kl_nats: float
    js_nats: float


@dataclass(frozen=True, kw_only=True, slots=True)
class CompareSummary(JsonFields):
    """How near maps are: means over rows and views. `atcache.stats` defines each number."""

    a: str
    b: str
    num_views: int
    """Views that were compared."""
    num_queries: int
    """Rows of each map that were compared, the first ones."""
    layers: tuple[int, ...]
    """Layers of A."""
    layers_b: tuple[int, ...]
    """The layer of B that each was compared with."""
    heads: tuple[int, ...]
    """Heads of A."""
    heads_b: tuple[tuple[int, ...], ...]
    """For each layer, the head of B that each was compared with."""
    largest: int
    """How many keys count as the largest of a row."""
    mean: dict[str, float]
    """Each number by its name, averaged over layers and heads."""
    kl_nats: Table
    """KL(A || B)."""
    js_nats: Table
    """Jensen-Shannon divergence, at most ln 2."""
    total_variation: Table
    """Share of the attention that would have to move."""
    cosine: Table
    """Cosine similarity of rows."""
    largest_overlap: Table
    """Share of the largest keys that are the largest in both."""
    standard_errors: dict[str, Table] | None
    """Standard error of each mean, by its name, as if views were independent; None for a single view."""
    worst: tuple[FarView, ...]
    """The views with the largest KL, the worst first."""
    notes: tuple[str, ...]
    """What a reader of the numbers should know."""
    seconds: float

    def tables(self) -> tuple[NamedTable, ...]:
        """One table for each number."""
        errors = self.standard_errors
        return tuple(
            NamedTable(
                name=name,
                title=kind.title.format(largest=self.largest),
                mean=getattr(self, name),
                standard_error=None if errors is None else errors[name],
            )
            for name, kind in _KINDS.items()
        )


def compare(config: CompareConfig) -> CompareSummary:
    """Compare the maps of two caches.

    Raises:
        CacheMissError: there is no cache, or it does not store the layers and heads that are asked for.
        CacheMismatchError: the caches have no views in common, or their maps cannot be compared.
        CorruptCacheError: a view is damaged.
    """
    start_s = time.monotonic()
    a, b = (open_for(path, None, sends=config.scheduler is not None) for path in (config.a, config.b))
    pairs = _plan(a, b, config)
    views, notes = find_same_views(a, b, config.sample)
    notes = [*_notes(pairs, config), *notes]
    largest = min(config.largest, a.geometry.tokens.num_tokens)
    means, far = Means(), list[FarView]()
    with (
        mapper_of(config.scheduler, None, config.workers) as mapper,
        view_table(config.per_view, pairs.layers_a, pairs.heads_a, tuple(_KINDS)) as write_view,
    ):
        if config.match_heads:
            pairs = match_heads(pairs, views, mapper)
        with Progress("compare", total=len(views), unit="views") as progress:
            found = mapper.map(partial(_compare_view, largest=largest), pairs, views, at_once=_AT_ONCE)
            for same, of_view_KLH in zip(views, found, strict=True):
                means.add(of_view_KLH)
                key = a.reader.samples.sample_key(same.row_a)
                write_view(key, same.view, of_view_KLH)
                kl_nats, js_nats = of_view_KLH[:2].mean(axis=(1, 2)).tolist()
                far.append(FarView(sample_key=key, view=same.view, kl_nats=kl_nats, js_nats=js_nats))
                progress.advance(1)
    errors_KLH = means.standard_error_KLH
    tables: dict[str, Table] = dict(zip(_KINDS, map(as_table, means.mean_KLH), strict=True))
    summary = CompareSummary(
        a=str(a.path),
        b=str(b.path),
        num_views=len(views),
        num_queries=pairs.num_queries,
        layers=pairs.layers_a,
        layers_b=pairs.layers_b,
        heads=pairs.heads_a,
        heads_b=pairs.heads_b,
        largest=largest,
        mean=dict(zip(_KINDS, means.mean_KLH.mean(axis=(1, 2)).tolist(), strict=True)),
        **tables,
        standard_errors=None if errors_KLH is None else dict(zip(_KINDS, map(as_table, errors_KLH), strict=True)),
        worst=tuple(sorted(far, key=lambda view: -view.kl_nats)[: config.worst]),
        notes=tuple(notes),
        seconds=time.monotonic() - start_s,
    )
    for path in config.out:
        write_report(path, _report(summary), summary.to_json())
    return summary


def _plan(a: Cache, b: Cache, config: CompareConfig) -> Pairs:
    """What is compared with what, before heads are matched.

    Raises:
        CacheMismatchError: the maps cannot be compared.
    """
    check_tokens(a, b)
    layers_a, layers_b = pair_layers(a, b, chosen_layers(a, config.layers))
    heads = chosen_heads(a, config.heads)
    if not config.match_heads:
        heads = pair_heads(a, b, heads)
    return Pairs(
        a=a,
        b=b,
        layers_a=layers_a,
        layers_b=layers_b,
        heads_a=heads,
        heads_b=(heads,) * len(layers_a),
        num_queries=min(a.geometry.num_queries, b.geometry.num_queries),
    )


def _notes(pairs: Pairs, config: CompareConfig) -> list[str]:
    """What a reader of the numbers should know."""
    a, b = pairs.a, pairs.b
    notes: list[str] = []
    for what, wanted, compared in (
        ("layers", chosen_layers(a, config.layers), pairs.layers_a),
        ("heads", chosen_heads(a, config.heads), pairs.heads_a),
    ):
        if left_out := [str(number) for number in wanted if number not in compared]:
            notes.append(f"note: {what} {', '.join(left_out)} of A are left out, because B does not store theirs.")
    if pairs.layers_a != pairs.layers_b:
        paired = [f"{one} with {other}" for one, other in zip(pairs.layers_a, pairs.layers_b, strict=True)]
        notes.append(
            f"note: A's teacher has {a.record.depth} layers and B's has {b.record.depth}, so layers are paired by how "
            f"far up they are: {', '.join(paired)}."
        )
    names = [cache.record.identity.teacher for cache in (a, b)]
    if names[0] != names[1] and not config.match_heads:
        notes.append(
            f"note: the teachers are {names[0]} and {names[1]}. Heads of two models that were trained apart have "
            "nothing to do with each other by number: --match-heads compares each with the one that is most like it."
        )
    if a.geometry.num_queries != b.geometry.num_queries:
        notes.append(f"note: only {pairs.num_queries} rows of each map are compared, those that both caches have.")
    return notes


def _report(summary: CompareSummary) -> Report:
    layers_b = tuple((layer,) * len(summary.heads) for layer in summary.layers_b)
    return Report(
        headline=f"A = {summary.a}, B = {summary.b}: means over {summary.num_views} views",
        layers=summary.layers,
        heads=summary.heads,
        tables=summary.tables(),
        places={"layer_b": layers_b, "head_b": summary.heads_b},
    )


def _compare_view(pairs: Pairs, same: SameView, *, largest: int) -> np.ndarray:
    """Each number for each layer and head of a view, float64, axes (kind, layer, head)."""
    found_KLH = np.empty((len(_KINDS), len(pairs.layers_a), len(pairs.heads_a)))
    all_a = [pairs.heads_a] * len(pairs.layers_a)
    with torch.inference_mode():
        maps = zip(
            decode_maps(pairs.a, same.view, same.row_a, pairs.layers_a, all_a),
            decode_maps(pairs.b, same.view, same.row_b, pairs.layers_b, [*pairs.heads_b]),
            strict=True,
        )
        for row, both in enumerate(maps):
            # In float32, divergences as small as those of a good codec would be rounding noise.
            # One head after the other: the maps of large teachers in float64, and what is made of them, fill memory.
            for head, (ours_QK, theirs_QK) in enumerate(zip(*both, strict=True)):
                ours_QK, theirs_QK = (each[: pairs.num_queries].double() for each in (ours_QK, theirs_QK))
                for number, kind in enumerate(_KINDS.values()):
                    found_KLH[number, row, head] = float(kind.of(ours_QK, theirs_QK, largest).mean())
    return found_KLH
