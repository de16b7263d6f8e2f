"""From the options of `atcache show` to a picture in a file."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

from atcache.cache.cache import Cache
from atcache.fields import JsonFields
from atcache.files.durable import check_can_write, make_folder, replaced_whole

from .config import ShowConfig
from .reading import read_shown


@dataclass(frozen=True, kw_only=True, slots=True)
class ShowSummary(JsonFields):
    """What was drawn."""

    out: str
    sample_key: str
    view: int
    layers: tuple[int, ...]
    heads: tuple[str, ...]
    """Numbers of heads, or "mean" or "max" alone."""
    queries: tuple[str, ...]
    top_of_scale: float
    """The value at the end of the colours; with one scale for each map, of all of them together."""
    largest: float
    """The largest value that was drawn."""
    notes: tuple[str, ...]
    """What could not be shown, and why."""


def show(config: ShowConfig) -> ShowSummary:
    """Draw the maps of one view.

    Raises:
        CacheMissError: there is no such sample, view or layer in the cache.
        ConfigError: there is no such query.
    """
    check_can_write(config.out.parent)
    shown = read_shown(Cache(config.cache, data=config.data), config)
    import matplotlib

    from .figure import draw_figure

    kind = config.out.suffix.lower().removeprefix(".")
    # Nothing in the file says when it was made, so that the same command makes the same file.
    metadata = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}.get(kind)
    settings: dict[Any, Any] = {"svg.fonttype": "none", "svg.hashsalt": "atcache", "pdf.fonttype": 42}
    make_folder(config.out.parent)
    with matplotlib.rc_context(settings), warnings.catch_warnings(), replaced_whole(config.out) as partial:
        warnings.filterwarnings("ignore", message="Glyph")  # a class name in a script that the font lacks
        figure, top = draw_figure(shown, config.scale, config.clip)
        figure.savefig(partial, format=kind, dpi=130, metadata=metadata)
    return ShowSummary(
        out=str(config.out),
        sample_key=shown.sample_key,
        view=shown.view,
        layers=shown.layers,
        heads=shown.heads,
        queries=shown.queries,
        top_of_scale=top,
        largest=float(shown.maps_LHhw.max()),
        notes=shown.notes,
    )
