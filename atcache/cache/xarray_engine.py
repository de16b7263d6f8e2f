"""The xarray engine: `xr.open_dataset("in1k.zarr")` gives a cache's maps, with named axes and coordinates.

xarray imports this module whenever it opens a file, of any kind and for anybody, and asks it whether it knows the file.
So importing it and answering must be fast.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, cast

from xarray.backends import BackendEntrypoint

from atcache.errors import AtcacheError
from atcache.files.location import looks_like_url, parse_location
from atcache.files.ranges import read_file
from atcache.store.metadata import parse_json

if TYPE_CHECKING:
    import xarray as xr


_ASKED_URL = ".zarr"
"""Servers are asked only about addresses that end so: any other may be a file of any kind, on a slow server."""


class AtcacheBackend(BackendEntrypoint):
    """Opens caches. xarray asks engines in the order of their names, so this one comes before that of Zarr."""

    description = "Open caches of a ViT teacher's attention (atcache)"
    open_dataset_parameters = ("filename_or_obj", "drop_variables", "group")

    def open_dataset(
        self,
        filename_or_obj: Any,  # noqa: ANN401 - xarray's
        *,
        drop_variables: str | Iterable[str] | None = None,
        group: str | None = None,
    ) -> xr.Dataset:
        """The maps of a cache as `attention`, with their coordinates.

        Args:
            filename_or_obj: the cache's folder or URL, or maps of an open cache.
            drop_variables: names to leave out.
            group: a group of the cache, such as "views", which is opened as a group of any Zarr store.

        Raises:
            CacheMissError: there is no cache.
            CorruptCacheError: what the cache records about itself cannot be read.
        """
        dropped = [drop_variables] if isinstance(drop_variables, str) else list(drop_variables or ())
        if group is not None:
            from xarray.backends import ZarrBackendEntrypoint

            return ZarrBackendEntrypoint().open_dataset(filename_or_obj, group=group, drop_variables=dropped)
        from atcache.cache.labelled import label_maps
        from atcache.cache.lazy_layers import LazyLayers, lazy_maps

        if isinstance(filename_or_obj, LazyLayers):
            maps = filename_or_obj
        else:
            from atcache import open as open_cache

            maps = lazy_maps(cast("Any", open_cache(filename_or_obj)))
        return label_maps(maps).drop_vars(dropped, errors="ignore")

    def guess_can_open(self, filename_or_obj: Any) -> bool:  # noqa: ANN401 - xarray's
        """Whether this is a cache. Reads one small file, and says no to all that it cannot read."""
        if not isinstance(filename_or_obj, str | os.PathLike):
            return False
        place: Any = os.fspath(cast("str | os.PathLike[Any]", filename_or_obj))
        if not isinstance(place, str) or (looks_like_url(place) and not place.rstrip("/").endswith(_ASKED_URL)):
            return False
        try:
            root = read_file(parse_location(place) / "zarr.json")
            # Most stores of others are told apart before anything is parsed: theirs may have megabytes of metadata.
            return b'"atcache"' in root and isinstance(parse_json(root)["attributes"]["atcache"], dict)
        except (AtcacheError, OSError, ValueError, TypeError, LookupError):
            return False
