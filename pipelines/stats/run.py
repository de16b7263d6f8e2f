"""Statistics of the maps of some views, averaged for each layer and head."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import torch

from atcache.cache.cache import Cache
from atcache.errors import CacheMissError
from atcache.fields import JsonFields
from atcache.store.layout import Status

from ..cluster.connect import mapper_of, open_for
from ..running.progress import Progress
from .config import StatsConfig
from .kinds import KINDS, LayerMaps, kinds_for
from .looking import chosen_heads, chosen_layers, decode_maps, spread
from .means import Means, as_table
from .report import view_table, write_report
from .tables import NamedTable, Report, Table

_AT_ONCE = 4  # views that a worker of a cluster looks at before it answers


@dataclass(frozen=True, kw_only=True, slots=True)
class StatsSummary(JsonFields):
    """What heads attend to, averaged over the queries and over views. `atcache.stats` defines each statistic."""

    path: str
    num_views: int
    """Views that were looked at."""
    layers: tuple[int, ...]
    heads: tuple[int, ...]
    largest: int
    """How many keys count as the largest of a row."""
    entropy_bits: Table
    """Entropy of a query's attention: 0 if it goes to one token, log2 of the number of tokens if to all alike."""
    prefix_mass: Table
    """Share of the attention that goes to prefix tokens."""
    cls_mass: Table | None = None
    """Share that goes to the first of several prefix tokens; None if there are not several."""
    register_mass: Table | None = None
    """Share that goes to the other prefix tokens, likewise."""
    self_mass: Table
    """Share that a token keeps to itself."""
    largest_mass: Table
    """Share that goes to the largest keys of each row."""
    sink_mass: Table | None = None
    """Share that goes to sink tokens; None if single rows are stored."""
    num_sinks: Table | None = None
    """Number of sink tokens, likewise."""
    mean_distance: Table | None = None
    """Mean distance between a patch and those it attends to, in patches; None if the rows of patches are not stored."""
    head_divergence_bits: Table | None = None
    """Divergence of a head from the mean of those looked at; None for a single head."""
    effective_rank: Table | None = None
    """Effective rank of the map; None if it was not asked for, or makes no sense."""
    head_cka: Table | None = None
    """Mean CKA with the layer's other heads, likewise."""
    head_js_bits: Table | None = None
    """Mean Jensen-Shannon divergence from the layer's other heads, likewise."""
    standard_errors: dict[str, Table] | None
    """Standard error of each mean, by its name, as if views were independent; None for a single view."""
    seconds: float

    def tables(self) -> tuple[NamedTable, ...]:
        """The statistics that there are."""
        return tuple(
            NamedTable(
                name=name,
                title=kind.title.format(largest=self.largest),
                mean=table,
                standard_error=None if self.standard_errors is None else self.standard_errors[name],
            )
            for name, kind in KINDS.items()
            if (table := getattr(self, name)) is not None
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Look:
    """What is looked at in each view; workers get it."""

    cache: Cache
    layers: tuple[int, ...]
    heads: tuple[int, ...]
    largest: int
    names: tuple[str, ...]


def stats(config: StatsConfig) -> StatsSummary:
    """Look at the maps of some views.

    Raises:
        CacheMissError: there is no cache, it stores no view, or not the layers and heads that are asked for.
        CorruptCacheError: a view is damaged.
    """
    start_s = time.monotonic()
    cache = open_for(config.cache, None, sends=config.scheduler is not None)
    layers, heads = chosen_layers(cache, config.layers), chosen_heads(cache, config.heads)
    look = _Look(
        cache=cache,
        layers=layers,
        heads=heads,
        largest=min(config.largest, cache.geometry.tokens.num_tokens),
        names=kinds_for(cache.geometry, len(heads), with_slow=config.all),
    )
    is_stored_VS = cache.reader.status_VS == Status.STORED
    chosen = spread(np.flatnonzero(is_stored_VS), config.sample)
    if not len(chosen):
        raise CacheMissError(f"{cache.path} stores no view yet, so there are no maps to look at. Build it first.")
    places = [divmod(number, is_stored_VS.shape[1]) for number in chosen.tolist()]
    means = Means()
    with (
        mapper_of(config.scheduler, None, config.workers) as mapper,
        view_table(config.per_view, layers, heads, look.names) as write_view,
        Progress("stats", total=len(places), unit="views") as progress,
    ):
        found = mapper.map(_stats_of_view, look, places, at_once=_AT_ONCE)
        for (view, sample), of_view_KLH in zip(places, found, strict=True):
            means.add(of_view_KLH)
            if config.per_view is not None:
                write_view(cache.reader.samples.sample_key(sample), view, of_view_KLH)
            progress.advance(1)
    errors_KLH = means.standard_error_KLH
    tables: dict[str, Table] = dict(zip(look.names, map(as_table, means.mean_KLH), strict=True))
    summary = StatsSummary(
        path=str(cache.path),
        num_views=len(places),
        layers=layers,
        heads=heads,
        largest=look.largest,
        **tables,
        standard_errors=None if errors_KLH is None else dict(zip(look.names, map(as_table, errors_KLH), strict=True)),
        seconds=time.monotonic() - start_s,
    )
    for path in config.out:
        write_report(path, _report(summary), summary.to_json())
    return summary


def _report(summary: StatsSummary) -> Report:
    headline = f"{summary.path}: means over {summary.num_views} views"
    return Report(headline=headline, layers=summary.layers, heads=summary.heads, tables=summary.tables())


def _stats_of_view(look: _Look, place: tuple[int, int]) -> np.ndarray:
    """The statistics of each layer and head of a view, float64, axes (kind, layer, head)."""
    view, sample = place
    found_KLH = np.empty((len(look.names), len(look.layers), len(look.heads)))
    with torch.inference_mode():
        maps = decode_maps(look.cache, view, sample, look.layers, [look.heads] * len(look.layers))
        for row, attn_HQK in enumerate(maps):
            of_layer = LayerMaps(
                attn_HQK=attn_HQK,
                tokens=look.cache.geometry.tokens,
                queries=look.cache.queries,
                largest=look.largest,
            )
            for number, name in enumerate(look.names):
                found_KLH[number, row] = KINDS[name].of(of_layer).numpy()
    return found_KLH
