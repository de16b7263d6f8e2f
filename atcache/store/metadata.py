"""The zarr.json of a cache: what it says about itself, and whether this version can read it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from atcache.errors import CacheMismatchError, CacheMissError, ConfigError, CorruptCacheError
from atcache.store.layout import FORMAT, StoreLayout

ATTRIBUTES = "atcache"
"""The key of the root group's attributes that holds everything of ours."""


def read_root(path: Path | str) -> tuple[dict[str, Any], StoreLayout]:
    """A cache's `attributes["atcache"]` and its layout.

    Raises:
        CacheMissError: there is no cache.
        CorruptCacheError: its metadata cannot be understood.
        CacheMismatchError: it has another format number.
    """
    return split_root(Path(path), load_root(Path(path)))


def load_root(path: Path) -> dict[str, Any]:
    """The cache's own zarr.json as it is; see `read_root` for the errors."""
    file = path / "zarr.json"
    try:
        root: Any = json.loads(file.read_bytes())
    except (FileNotFoundError, NotADirectoryError) as error:
        raise CacheMissError(f"{path} is no cache: {file} does not exist. Make one with `atcache build`.") from error
    except (OSError, ValueError) as error:
        raise CorruptCacheError(f"{file} cannot be read ({error}). Restore it from a copy.") from error
    if not isinstance(root, dict):
        raise CorruptCacheError(f"{file} is no Zarr group. Restore it from a copy.")
    return cast("dict[str, Any]", root)


def split_root(path: Path, root: Mapping[str, Any]) -> tuple[dict[str, Any], StoreLayout]:
    """What `read_root` returns, from what `load_root` returned."""
    attributes: Any = root.get("attributes")
    ours: Any = cast("dict[str, Any]", attributes).get(ATTRIBUTES) if isinstance(attributes, dict) else None
    if not isinstance(ours, dict):
        raise CorruptCacheError(f'{path} is no atcache cache: its attributes have no "{ATTRIBUTES}" object.')
    ours = cast("dict[str, Any]", ours)
    if ours.get("format") != FORMAT:
        raise CacheMismatchError(
            f"{path} has format {ours.get('format')!r}, this version of atcache reads format {FORMAT}; use the version "
            "that wrote it, or build it anew."
        )
    try:
        return ours, StoreLayout.from_json(ours["layout"])
    except (KeyError, TypeError, ConfigError) as error:
        raise CorruptCacheError(f"the layout in {path}/zarr.json cannot be used: {error}") from error


def collect_metadata(folder: Path, prefix: str = "") -> dict[str, Any]:
    """Metadata of all nodes below a group, by path. Does not look into arrays, which may have 100,000 folders."""
    nodes: dict[str, Any] = {}
    for file in sorted(folder.glob("*/zarr.json")):
        name = f"{prefix}{file.parent.name}"
        nodes[name] = json.loads(file.read_bytes())
        if nodes[name]["node_type"] == "group":
            nodes.update(collect_metadata(file.parent, f"{name}/"))
    return nodes
