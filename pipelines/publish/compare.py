"""Whether two caches are the same, or one is an earlier state of the other, in words if not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from atcache.cache.differences import name_differences
from atcache.store.layout import StoreLayout
from atcache.store.reader import CacheReader
from atcache.store.writer import RESERVED_ATTRIBUTES

_GROWS = ("num_samples", "part_stops", "num_views", "records_per_file")
"""Members of a layout that change when a cache grows; the last one when it gets very many tasks."""


def recorded(attributes: Mapping[str, Any], layout: StoreLayout) -> dict[str, Any]:
    """What a cache records about itself, with its layout but without totals."""
    kept = {name: value for name, value in attributes.items() if name not in RESERVED_ATTRIBUTES}
    return {**kept, "layout": layout.to_json()}


def have_same_arrays(first: CacheReader, second: CacheReader) -> bool:
    """Whether the codec's state and the teacher's bias are equal, bit for bit."""
    return _arrays(first) == _arrays(second)


def _arrays(reader: CacheReader) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    bias_LHQK = reader.bias_LHQK
    arrays: Mapping[str, np.ndarray] = reader.state if bias_LHQK is None else {**reader.state, "bias": bias_LHQK}
    return {name: (array.dtype.str, array.shape, array.tobytes()) for name, array in arrays.items()}


def why_not_earlier(there: CacheReader, here: CacheReader) -> list[str]:
    """Why the cache `there` is neither the cache `here` nor what that was before it grew; empty if it is."""
    places = f"in {there.path}", f"in {here.path}"
    differences = name_differences(_what_stays(there), _what_stays(here), places)
    if differences:
        return differences
    old, new = there.layout, here.layout
    if old.num_views > new.num_views or old.num_samples > new.num_samples:
        return [
            f"there are {old.num_real_samples} samples with {old.num_views} views {places[0]} and only "
            f"{new.num_real_samples} with {new.num_views} {places[1]}"
        ]
    if new.parts()[: len(old.parts())] != old.parts() or not _have_same_samples(there, here):
        return ["it has other samples"]
    is_fitted_alike = there.attributes.get("calibration") == here.attributes.get("calibration")
    return [] if is_fitted_alike and have_same_arrays(there, here) else ["its codec was fitted on other images"]


def _what_stays(reader: CacheReader) -> dict[str, Any]:
    """What a cache records about itself, without what changes when it grows, and what its makers measured or used."""
    about = recorded(reader.attributes, reader.layout)
    del about["calibration"], about["created_by"]
    layout = {name: value for name, value in about["layout"].items() if name not in _GROWS}
    views = {name: value for name, value in about["views"].items() if name != "num_views"}
    return {**about, "layout": layout, "views": views, "source": {}}


def _have_same_samples(there: CacheReader, here: CacheReader) -> bool:
    """Whether the first rows of `here` are those of `there`."""
    old, new, num_rows = there.samples, here.samples, there.layout.num_samples
    columns = ("keys_S", "tar_S", "offset_S", "nbytes_S", "label_S", "problem_S")
    are_same = all(np.array_equal(getattr(old, name), getattr(new, name)[:num_rows]) for name in columns)
    return are_same and [tar.name for tar in old.tars] == [tar.name for tar in new.tars[: len(old.tars)]]
