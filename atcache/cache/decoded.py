"""What a cache gives, decoded: `View`, all of one view, and `Factors`, one layer of all views."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from atcache.cache.shown import view_html

if TYPE_CHECKING:
    import dask.array as da

    from atcache.attention.geometry import FactorGeometry


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class View:
    """One view of one sample, decoded: what `Cache.view` returns.

    Example:
        view = cache.view(sample=3)
        print(view.sample_key, view.label)
        view.maps_LHQK[-1].mean(axis=0)  # the last layer's map, mean over heads: (query, key)
    """

    sample: int
    """Row of the sample table."""
    sample_key: str
    """Tar name and WebDataset key."""
    view: int
    label: int
    """Its class; -1 if it has none."""
    class_name: str
    """The name of its class; empty if it is not known."""
    partner: int | None
    """Row of the sample that is mixed in; None if the view is not mixed."""
    share: float
    """Share of the sample's own image, and so of its label; the partner has the rest. 1 if the view is not mixed."""
    status: int
    """A `Status`; always STORED here."""
    image: np.ndarray
    """The pixels teacher and student see, uint8 (height, width, 3)."""
    maps_LHQK: np.ndarray
    """Decoded maps of the stored layers and heads, float32; rows along key sum to 1. They have the rows that
    `Cache.queries` names."""
    inputs_LNTC: np.ndarray | None = None
    """What attention (N = 0) and MLP (N = 1) of each stored layer got, float32; None if that is not stored."""
    geometry: FactorGeometry | None = None
    """The layers, heads and tokens of the maps."""

    _repr_html_ = view_html


class Factors(NamedTuple):
    """q and k of one layer, and v if it is stored, as lazy arrays: maps are softmax(scale * q k^T + bias)."""

    q_VSHTD: da.Array
    k_VSHTD: da.Array
    scale: float
    bias_HQK: np.ndarray | None
    v_VSHTD: da.Array | None = None
    """None if the cache does not store v."""
