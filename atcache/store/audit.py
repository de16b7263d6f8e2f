"""Finds what differs from a build's output in a cache's metadata, tables and files. Only reads; returns sentences."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import numpy as np

from atcache.errors import CorruptCacheError
from atcache.files.durable import is_partial
from atcache.files.location import Location, Url
from atcache.files.ranges import list_files, read_file
from atcache.files.writers import LOCK
from atcache.store.growth import GROWTH, read_growth
from atcache.store.layout import COMPRESSORS, ArraySpec, StoreLayout, Task
from atcache.store.metadata import (
    consolidated_copies,
    has_array,
    is_old_table,
    list_arrays,
    load_root,
    parse_json,
    seal_holds,
    split_root,
)
from atcache.store.records import COMMITS, RecordFile
from atcache.store.tables import SAMPLE_DTYPES, array_files, check_array, read_samples

_SHARD = re.compile(r"([a-z_]+/[a-z_]+)/c/([0-9]{1,9})/([0-9]{1,9})(?:/0)*")
_SAMPLE_COLUMNS = ("key", *SAMPLE_DTYPES)


def check_metadata(path: Location) -> list[str]:
    """What is wrong with the zarr.json files, which all else depends on.

    The root's attributes have a checksum, a finished cache's other files have a copy in the root's, and arrays must be
    as the layout says. If any of this fails, it is not certain what the tasks should be.

    Raises:
        CacheMissError, CacheMismatchError, CorruptCacheError: the root cannot be read at all.
    """
    root = load_root(path)
    ours, layout = split_root(path, root)
    file = path / "zarr.json"
    problems: list[str] = []
    if not seal_holds(ours):
        problems.append(f'{file} is damaged: the checksum of its "atcache" attributes does not match.')
    expected: dict[str, Any] = {"zarr_format": 3, "node_type": "group"}
    copies: dict[str, Any] | None = {}
    if ours.get("complete") is not None:
        expected["consolidated_metadata"] = {"kind": "inline", "must_understand": False}
        copies = consolidated_copies(root)
    problems += [f"{file}: {text}." for text in _differences(root, expected)]
    if copies is None:
        problems.append(f"{file} lacks the copies of the other zarr.json files that a finished cache has.")
        copies = {}
    specs = {spec.name: spec for spec in layout.arrays()}
    for name in sorted({*_group_names(layout), *specs, *copies}):
        problems += _check_node(path, name, specs.get(name), copies.get(name))
    return problems


def _group_names(layout: StoreLayout) -> list[str]:
    pixels = ["pixels"] if layout.pixels is not None else []
    return ["attention", "attention/state", COMMITS, layout.samples_group, "views", *pixels]


def _check_node(path: Location, name: str, spec: ArraySpec | None, copy: object) -> list[str]:
    file = path / f"{name}/zarr.json"
    try:
        found: Any = parse_json(read_file(file))
    except FileNotFoundError:
        return [f"{file} is missing" + (f", though {path}/zarr.json lists it." if copy is not None else ".")]
    except (OSError, ValueError) as error:
        return [f"{file} cannot be read ({error})."]
    found = cast("dict[str, Any]", found) if isinstance(found, dict) else {}
    # A growth may have been stopped, or given up, after it gave arrays their new shapes. Readers go by the root.
    if spec is not None and _is_enlarged(found.get("shape"), spec):
        found["shape"] = list(spec.shape)
    if copy is not None and found != copy:
        return [f'{file} is not the same as its copy in {path}/zarr.json, under "consolidated_metadata".']
    if spec is not None:
        return [f"{file}: {text} by the cache's layout." for text in _differences(found, _array_metadata(spec))]
    return []


def _is_enlarged(shape: Any, spec: ArraySpec) -> bool:  # noqa: ANN401 - any JSON value
    """Whether a shape is the array's, but for more views or samples: its first two axes."""
    sides: list[Any] = cast("list[Any]", shape) if isinstance(shape, list) else []
    if len(sides) != len(spec.shape) or not all(type(side) is int for side in sides):
        return False
    is_larger = any(side > wanted for side, wanted in zip(sides, spec.shape[:2], strict=False))
    return is_larger and sides[2:] == list(spec.shape[2:]) and sides[0] >= spec.shape[0] and sides[1] >= spec.shape[1]


def _array_metadata(spec: ArraySpec) -> dict[str, Any]:
    """What an array's zarr.json must say; compressors' levels, which readers need not know, are left out."""
    little = {"name": "bytes", "configuration": {"endian": "little"}}
    crc32c = {"name": "crc32c"}
    how, num_axes = COMPRESSORS[spec.compressor], len(spec.shape)
    blosc = {"cname": "zstd", "shuffle": how.shuffle, "typesize": np.dtype(spec.dtype).itemsize}
    plain = {"name": "gzip" if how.is_deflated else "zstd"}
    compressor = plain if how.shuffle is None else {"name": "blosc", "configuration": blosc}
    order = [*range(num_axes - 2), num_axes - 1, num_axes - 2]
    transpose = [{"name": "transpose", "configuration": {"order": order}}] if how.is_transposed else []
    # One byte has no byte order, so zarr-python writes `bytes` without `endian`.
    bytes_codec = {"name": "bytes"} if np.dtype(spec.dtype).itemsize == 1 else little
    sharding = {
        "chunk_shape": list(spec.chunk_shape),
        "codecs": [*transpose, bytes_codec, compressor, crc32c],
        "index_codecs": [little, crc32c],
        "index_location": "end",
    }
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": list(spec.shape),
        "data_type": spec.dtype,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(spec.shard_shape)}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
        "fill_value": 0,
        "dimension_names": list(spec.dimension_names),
    }


def _differences(found: object, expected: object, where: str = "") -> Iterator[str]:
    """Where `found` is not `expected`; members that are not expected do not count."""
    if isinstance(expected, dict) and isinstance(found, dict):
        for name, value in cast("dict[str, Any]", expected).items():
            yield from _differences(
                cast("dict[str, Any]", found).get(name), value, f"{where}.{name}" if where else name
            )
    elif isinstance(expected, list) and isinstance(found, list):
        members, wanted = cast("list[Any]", found), cast("list[Any]", expected)
        if len(members) != len(wanted):
            yield f"{where} has {len(members)} members, expected {len(wanted)}"
        else:
            for number, (one, other) in enumerate(zip(members, wanted, strict=True)):
                yield from _differences(one, other, f"{where}[{number}]")
    elif found != expected:
        yield f"{where} is {found!r}, expected {expected!r}"


def check_tables(path: Location, attributes: Mapping[str, Any], layout: StoreLayout) -> list[str]:
    """What is wrong with the sample table, the codec's state and the teacher's bias: what no task writes."""
    problems = [problem for name in _sample_arrays(layout) for problem in check_array(path, name)]
    if not problems:
        problems += _check_fingerprint(path, attributes, layout)
    return problems + [problem for name in _extra_arrays(path) for problem in check_array(path, name)]


def _check_fingerprint(path: Location, attributes: Mapping[str, Any], layout: StoreLayout) -> list[str]:
    try:
        index = read_samples(path, layout.num_samples, layout.samples_group)
    except CorruptCacheError as error:
        return [str(error)]
    source: Any = attributes.get("source")
    file = path / layout.samples_group / "zarr.json"
    table: Any = parse_json(read_file(file))["attributes"]
    recorded: dict[Location, Any] = {file: table.get("fingerprint")}
    if isinstance(source, dict):  # a cache that `create_cache` made without a build may have none
        recorded[path / "zarr.json"] = cast("dict[str, Any]", source).get("fingerprint")
    return [
        f"the sample table in {path}/{layout.samples_group} has the fingerprint {index.fingerprint[:12]}..., "
        f"{place} says {str(fingerprint)[:12]}...."
        for place, fingerprint in recorded.items()
        if fingerprint != index.fingerprint
    ]


def _sample_arrays(layout: StoreLayout) -> list[str]:
    return [f"{layout.samples_group}/{name}" for name in _SAMPLE_COLUMNS]


def _extra_arrays(path: Location) -> list[str]:
    """Names of the arrays of the codec's state, and of the bias, that the cache has."""
    state = [f"attention/state/{name}" for name in list_arrays(path, "attention/state")]
    return ["attention/bias", *state] if has_array(path, "attention/bias") else state


def find_strays(path: Location, layout: StoreLayout, committed: set[str]) -> list[str]:
    """Files that are not part of the cache, and shards of uncommitted tasks, a sentence each. They do no harm.

    Args:
        path: the cache.
        layout: its layout.
        committed: names of the tasks that have a commit record.
    """
    known = known_files(path, layout)
    growth = read_growth(path) if isinstance(path, Path) else None
    if growth is not None:
        known.add(GROWTH)
    strays = [] if growth is not None else _note_enlarged(path, layout)
    uncommitted: set[str] = set()
    if isinstance(path, Url) and not path.can_list:
        return [
            f"{path} is on a web server, which cannot list files: this check did not look for files that do not belong."
        ]
    for relative in list_files(path):
        folder, _, name = relative.rpartition("/")
        if relative in known or relative == LOCK or (folder == COMMITS and RecordFile.parse(name) is not None):
            continue
        if is_old_table(relative, layout):  # of before the cache grew, for readers that were open then
            continue
        task = _task_of_shard(relative, layout) or (growth and _task_of_shard(relative, growth[1]))
        if task is not None:
            uncommitted |= {task.name} - committed
        elif is_partial(name):
            strays.append(f"{path / relative} was left by a writer that was stopped; the next build removes it.")
        else:
            strays.append(f"{path / relative} is not part of the cache.")
    if uncommitted:
        strays.append(
            f"{path} has shards of tasks without a commit record, the first is {min(uncommitted)} ({len(uncommitted)} "
            "in all); the next build writes them again."
        )
    return strays


def _note_enlarged(path: Location, layout: StoreLayout) -> list[str]:
    """A sentence if arrays have the shapes of a growth that was given up at its last step."""
    if not isinstance(path, Path):  # growths are in folders only
        return []
    for spec in layout.arrays():
        try:
            found: Any = parse_json(read_file(path / f"{spec.name}/zarr.json"))
        except (OSError, ValueError):
            continue  # `check_metadata` reports it
        if isinstance(found, dict) and _is_enlarged(cast("dict[str, Any]", found).get("shape"), spec):
            return [
                f"{path / spec.name}/zarr.json has the shape of a growth that was given up. That does no harm: the "
                "cache is read by its own zarr.json, and the next growth gives it the right shape."
            ]
    return []


def known_files(path: Location, layout: StoreLayout) -> set[str]:
    """The files of a cache except shards and commit records, by their paths in it."""
    known = {"zarr.json", *(f"{name}/zarr.json" for name in _group_names(layout))}
    known |= {f"{spec.name}/zarr.json" for spec in layout.arrays()}
    for name in [*_sample_arrays(layout), *_extra_arrays(path)]:
        try:
            known |= array_files(path, name)
        except CorruptCacheError:
            known.add(f"{name}/zarr.json")  # `check_tables` reports that it is damaged
    return known


def _task_of_shard(relative: str, layout: StoreLayout) -> Task | None:
    """The task whose shard is at a path in the cache; None for other files."""
    match = _SHARD.fullmatch(relative)
    if match and int(match[2]) < layout.num_views and int(match[3]) < layout.num_blocks:
        task = layout.task(int(match[2]), int(match[3]))
        spec = _specs_by_name(layout).get(match[1])
        return task if spec is not None and spec.shard_file(task) == relative else None
    return None


@lru_cache(maxsize=2)
def _specs_by_name(layout: StoreLayout) -> dict[str, ArraySpec]:
    return {spec.name: spec for spec in layout.arrays()}
