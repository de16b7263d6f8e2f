"""The zarr.json of a cache: what it says about itself, and whether this version can read it."""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Mapping
from operator import ne
from pathlib import Path
from typing import Any, cast

from atcache.errors import CacheMismatchError, CacheMissError, ConfigError, CorruptCacheError
from atcache.files.durable import encode_json
from atcache.files.location import Location, Url, parse_location
from atcache.files.ranges import file_exists, list_files, read_file
from atcache.store.layout import FORMAT, StoreLayout

SEAL = "crc32"
"""The member that holds the checksum: zlib's crc32 of the other members as `encode_json` writes them."""


def seal(values: Mapping[str, Any]) -> dict[str, Any]:
    """`values` with their checksum added; an earlier checksum is replaced.

    >>> seal({"format": 1})
    {'format': 1, 'crc32': 1584290907}
    """
    others = {name: value for name, value in values.items() if name != SEAL}
    return {**others, SEAL: zlib.crc32(encode_json(others))}


def seal_holds(values: Mapping[str, Any]) -> bool:
    """Whether the checksum in `values` matches them; also True if there is no checksum, as in older caches."""
    if SEAL not in values:
        # A name that differs by one letter was the checksum's, and is damaged itself.
        return not any(len(name) == len(SEAL) and sum(map(ne, name, SEAL)) == 1 for name in values)
    try:
        return seal(values)[SEAL] == values[SEAL]
    except (ValueError, RecursionError):  # NaN: JSON does not allow it, but Python reads it; or nested too deeply
        return False


def refuse_damaged_root(path: Location, attributes: Mapping[str, Any], advice: str) -> None:
    """Refuse to copy a cache whose zarr.json does not match its checksum: the copy would get one of its own.

    Args:
        path: the cache.
        attributes: its `attributes["atcache"]`.
        advice: what to do, as a sentence.

    Raises:
        CorruptCacheError: it does not match.
    """
    if not seal_holds(attributes):
        raise CorruptCacheError(f"{path}/zarr.json is damaged: its checksum does not match. {advice}")


def parse_json(data: bytes) -> Any:  # noqa: ANN401 - any JSON value
    """The value of a JSON text, as `json.loads` has it; ValueError is all that it raises, also for hostile texts."""
    try:
        return json.loads(data)
    except RecursionError as error:  # 100,000 brackets
        raise ValueError("lists or objects are nested too deeply") from error


ATTRIBUTES = "atcache"
"""The key in the root group's attributes under which all of atcache's attributes are."""
RUN_FILE = "run.json"
"""A file that the folder of an `atcache train` has, and no cache."""


def read_root(path: Location | str) -> tuple[dict[str, Any], StoreLayout]:
    """A cache's `attributes["atcache"]` and its layout.

    Raises:
        CacheMissError: there is no cache.
        CorruptCacheError: its metadata cannot be understood.
        CacheMismatchError: it has another format number.
    """
    path = parse_location(path)
    return split_root(path, load_root(path))


def load_root(path: Location) -> dict[str, Any]:
    """The cache's own zarr.json as it is; see `read_root` for the errors."""
    file = path / "zarr.json"
    try:
        root: Any = parse_json(read_file(file))
    except (FileNotFoundError, NotADirectoryError) as error:
        if isinstance(path, Path) and (path / RUN_FILE).exists():
            raise CacheMissError(
                f"{path} is not a cache: it is the folder of a run. `atcache maps {path} --out NAME.zarr` makes a "
                "cache of its attention."
            ) from error
        raise CacheMissError(f"{path} is not a cache: {file} does not exist. Make one with `atcache build`.") from error
    except (OSError, ValueError) as error:
        raise CorruptCacheError(f"{file} cannot be read ({error}). Restore it from a copy.") from error
    if not isinstance(root, dict):
        raise CorruptCacheError(f"{file} is not a Zarr group. Restore it from a copy.")
    return cast("dict[str, Any]", root)


def split_root(path: Location, root: Mapping[str, Any]) -> tuple[dict[str, Any], StoreLayout]:
    """What `read_root` returns, from what `load_root` returned."""
    attributes: Any = root.get("attributes")
    ours: Any = cast("dict[str, Any]", attributes).get(ATTRIBUTES) if isinstance(attributes, dict) else None
    if not isinstance(ours, dict):
        raise CorruptCacheError(f'{path} is not an atcache cache: its attributes have no "{ATTRIBUTES}" object.')
    ours = cast("dict[str, Any]", ours)
    if ours.get("format") != FORMAT:
        raise CacheMismatchError(
            f"{path} has format {ours.get('format')!r}, this version of atcache reads format {FORMAT}; use the version "
            "that wrote it, or build it again."
        )
    try:
        return ours, StoreLayout.from_json(ours["layout"])
    except (KeyError, TypeError, ConfigError) as error:
        raise CorruptCacheError(f"the layout in {path}/zarr.json cannot be used: {error}") from error


def consolidated_copies(root: Mapping[str, Any]) -> dict[str, Any] | None:
    """The copies of all nodes' metadata that the root of a finished cache has, by name; None if it has none."""
    consolidated: Any = root.get("consolidated_metadata")
    copies: Any = cast("dict[str, Any]", consolidated).get("metadata") if isinstance(consolidated, dict) else None
    return cast("dict[str, Any]", copies) if isinstance(copies, dict) else None


def has_array(path: Location, name: str) -> bool:
    """Whether a cache has an array; see `list_arrays`."""
    copies = consolidated_copies(load_root(path))
    return file_exists(path / f"{name}/zarr.json") if copies is None else name in copies


def list_arrays(path: Location, group: str) -> list[str]:
    """Names of the arrays in a group of a cache, in order.

    A finished cache's root lists them, so that one that was lost in a copy is missed: maps that are decoded without it
    would be wrong. In an unfinished cache they are those that are there.
    """
    if (copies := consolidated_copies(load_root(path))) is not None:
        files = [f"{name.removeprefix(f'{group}/')}/zarr.json" for name in copies if name.startswith(f"{group}/")]
    else:
        files = list_files(path / group)
    return sorted(
        name.removesuffix("/zarr.json") for name in files if name.count("/") == 1 and name.endswith("/zarr.json")
    )


_TABLE = re.compile(r"samples(-[0-9]+)?")


def is_old_table(name: str, layout: StoreLayout) -> bool:
    """Whether a node belongs to a sample table of what the cache was before it grew, or to one of a growth begun."""
    group = name.split("/")[0]
    return group != layout.samples_group and _TABLE.fullmatch(group) is not None


def collect_metadata(folder: Path, prefix: str = "") -> dict[str, Any]:
    """Metadata of all nodes below a group, by path. Does not look into arrays, which may have 100,000 folders."""
    nodes: dict[str, Any] = {}
    for file in sorted(folder.glob("*/zarr.json")):
        name = f"{prefix}{file.parent.name}"
        nodes[name] = parse_json(file.read_bytes())
        if nodes[name]["node_type"] == "group":
            nodes.update(collect_metadata(file.parent, f"{name}/"))
    return nodes


def read_metadata(root: Url, layout: StoreLayout) -> dict[str, Any]:
    """The same of a cache on an object store, by the names that it has. Folders of shards are not listed."""
    groups = ["attention", "commits", "views", *(["pixels"] if layout.pixels else [])]
    names = [*groups, *(spec.name for spec in layout.arrays())]
    for folder in (layout.samples_group, "attention/state", "attention/bias"):
        files = [f"{folder}/{name}" for name in list_files(root / folder)]
        names += [name.removesuffix("/zarr.json") for name in files if name.endswith("/zarr.json")]
    return {name: parse_json(read_file(root / f"{name}/zarr.json")) for name in names}
