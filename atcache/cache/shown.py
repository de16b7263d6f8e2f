"""How a cache and its views show themselves in a notebook: in words, with a thumbnail and a small wall of maps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from atcache.errors import AtcacheError
from atcache.notebook import facts_html, picture_html
from atcache.store.layout import Status

if TYPE_CHECKING:
    from atcache.attention.geometry import FactorGeometry
    from atcache.cache.record import CacheRecord
    from atcache.files.location import Location
    from atcache.store.reader import CacheReader
    from atcache.views.policy import ViewPolicy

_MOST_SHOWN = 12  # layers, and heads
_MOST_VALUES = 2**29  # of all of a view's maps: a notebook must not wait long for its picture, nor fill the memory
_SIDE = 44  # pixels of a map, about


class ShownView(Protocol):
    """What is shown of a `View`."""

    sample: int
    sample_key: str
    view: int
    label: int
    class_name: str
    partner: int | None
    share: float
    image: np.ndarray
    maps_LHQK: np.ndarray
    geometry: FactorGeometry | None


class ShownCache(Protocol):
    """What is shown of a `Cache`."""

    record: CacheRecord

    @property
    def path(self) -> Location: ...
    @property
    def reader(self) -> CacheReader: ...
    @property
    def geometry(self) -> FactorGeometry: ...
    @property
    def policy(self) -> ViewPolicy: ...
    def image(self, sample: int, view: int = 0) -> np.ndarray: ...
    def view(self, sample: int | str, view: int = 0) -> ShownView: ...


def cache_html(cache: ShownCache) -> str:
    """What a cache is, and the first view that it stores. Caches on servers show no view, which would be fetched."""
    layout, geometry, record = cache.reader.layout, cache.geometry, cache.record
    tokens = geometry.tokens
    facts = {
        "cache": cache.path,
        "teacher": record.teacher_record.name,
        "samples": f"{layout.num_real_samples} x {layout.num_views} views ({_policy_text(cache.policy)})",
        "maps": f"{len(geometry.layers)} layers x {len(geometry.heads)} heads x {geometry.num_queries} x "
        f"{tokens.num_tokens} ({tokens.num_prefix_tokens} prefix tokens, {tokens.grid_height} x {tokens.grid_width} "
        "patches)",
        "codec": record.identity.codec.get("name", ""),
    }
    if not isinstance(cache.path, Path):
        return facts_html("atcache cache", facts)
    try:
        stored_S = np.flatnonzero(cache.reader.status_VS[0] == Status.STORED)
        if not len(stored_S):
            return facts_html("atcache cache", {**facts, "stored": "no view yet"})
        row = int(stored_S[0])
        caption = f"row {row}, view 0"
        if geometry.map_nbytes // 2 > _MOST_VALUES:
            pictures = _pictures(cache.image(row), None, geometry, caption)
        else:
            view = cache.view(row)
            pictures = _pictures(view.image, view.maps_LHQK, geometry, caption)
    except _EXPECTED as error:
        return facts_html("atcache cache", {**facts, "no picture": _reason(error)})
    return facts_html("atcache cache", facts, pictures)


def _policy_text(policy: ViewPolicy) -> str:
    return policy.name if policy.corrupt is None else f"{policy.name}, {policy.corrupt}"


def view_html(view: ShownView) -> str:
    """What a view is, its image, and a small wall of its maps."""
    class_name = f" ({view.class_name})" if view.class_name else ""
    facts = {
        "sample": f"{view.sample_key} (row {view.sample})",
        "view": view.view,
        "class": "" if view.label < 0 else f"{view.label}{class_name}",
        "mixed": "" if view.partner is None else f"{view.share:.0%} of it, the rest is row {view.partner}",
        "maps": " x ".join(map(str, view.maps_LHQK.shape)) + " (layer, head, query, key)",
    }
    if view.geometry is None:
        return facts_html("atcache view", facts)
    try:
        pictures = _pictures(view.image, view.maps_LHQK, view.geometry, "the view")
    except _EXPECTED as error:
        return facts_html("atcache view", {**facts, "no picture": _reason(error)})
    return facts_html("atcache view", facts, pictures)


_EXPECTED = (AtcacheError, ImportError, OSError)
"""What may keep a picture from being made: images that are not there, damage, a library that is missing."""


def _reason(error: Exception) -> str:
    return str(error) or type(error).__name__


def _pictures(
    image_HWC: np.ndarray, maps_LHQK: np.ndarray | None, geometry: FactorGeometry, caption: str
) -> Sequence[str]:
    from PIL import Image

    from atcache.pictures import colours, default_query, query_maps, top_of_scale, wall

    thumbnail = Image.fromarray(image_HWC)
    thumbnail.thumbnail((160, 160))
    pictures = [picture_html(np.asarray(thumbnail), caption)]
    if maps_LHQK is None:
        return pictures
    query = default_query(geometry.tokens)
    layers, heads = (_spread(len(indices)) for indices in (geometry.layers, geometry.heads))
    maps_LHhw = query_maps(maps_LHQK[layers][:, heads], geometry.tokens, [query])
    top = top_of_scale(maps_LHhw, 0.995)
    walled = colours(wall(maps_LHhw.swapaxes(0, 1)), top)
    told_layers = ", ".join(str(geometry.layers[position]) for position in layers)
    told_heads = ", ".join(str(geometry.heads[position]) for position in heads)
    caption = f"query {query}; layers {told_layers} across, heads {told_heads} down; colours from 0 to {top:.3g}"
    enlarge = max(1, _SIDE // max(geometry.tokens.grid_height, geometry.tokens.grid_width))
    return [*pictures, picture_html(walled, caption, enlarge=enlarge)]


def _spread(number: int) -> list[int]:
    """At most `_MOST_SHOWN` of so many positions, evenly, with the first and the last."""
    return sorted({*np.linspace(0, number - 1, min(number, _MOST_SHOWN)).round().astype(int).tolist()})
