"""atcache: run the teacher once, keep its attention, train students from the cache.

`import atcache` is cheap: torch, timm and zarr are imported by the modules that need them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from atcache.cache.cache import Cache
    from atcache.files.location import Location

__version__ = "0.1.0"
__all__ = ["__version__", "open"]


def open(path: str | Location, *, data: str | Path | Sequence[str | Path] | None = None) -> Cache:
    """The cache at `path`, opened for reading: metadata only, whatever its size. See `atcache.Cache`.

    Args:
        path: its folder, or the URL of one.
        data: where its tars lie now, if they were moved since the build and images are to be replayed from them.
    """
    from atcache.cache.cache import Cache

    return Cache(path, data=data)
