"""Chosen samples of a cache, as a small cache of their own: the same codes, in one shard a view, and stored views."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from atcache.cache.cache import Cache
from atcache.errors import AtcacheError, CacheMissError, ConfigError
from atcache.files.location import Url
from atcache.store.layout import Status, StoreLayout
from atcache.store.parts import count_samples, take_rows
from atcache.store.writer import (
    RESERVED_ATTRIBUTES,
    TaskWriter,
    create_cache,
    encode_pixels,
    encode_view,
    finish_cache,
)
from atcache.views.rendering import stored_mix

_PARTNER = "mix_partner"
MAX_SAMPLES = 10_000


def choose_rows(cache: Cache, samples: str | None, default: int) -> list[int]:
    """The rows that are meant, ascending, with those that their views are mixed with.

    Args:
        cache: the cache.
        samples: rows, ranges of rows and sample_keys between commas; None for the first ones.
        default: how many then.

    Raises:
        ConfigError: a row is none, or there are too many.
        CacheMissError: a key is no sample's, or a view of a sample is not built yet.
    """
    if samples is None:
        rows = _first_rows(cache, default)
    else:
        rows = [row for text in samples.split(",") for row in _read_rows(cache, text.strip())]
    chosen = sorted(_with_partners(cache, rows))
    if len(chosen) > MAX_SAMPLES:
        raise ConfigError(f"samples={samples!r}: {len(chosen)} samples, expected at most {MAX_SAMPLES}. Choose fewer.")
    return chosen


def rows_of_keys(cache: Cache, keys: Sequence[str]) -> list[int]:
    """The rows of those samples that a cache has too, ascending, with those that their views are mixed with."""
    rows: list[int] = []
    for key in keys:
        try:
            row = cache.find_sample(key)
            _check_built(cache, row)
        except CacheMissError:
            continue
        rows.append(row)
    return sorted(_with_partners(cache, rows))


def _first_rows(cache: Cache, count: int) -> list[int]:
    rows: list[int] = []
    for row in range(cache.reader.layout.num_samples):
        statuses = [cache.reader.status(view, row) for view in range(cache.reader.layout.num_views)]
        if Status.STORED in statuses and Status.PENDING not in statuses:
            rows.append(row)
        if len(rows) == count:
            break
    if not rows:
        raise CacheMissError(f"{cache.path} stores no sample yet, so there is nothing to export. Build it first.")
    return rows


def _read_rows(cache: Cache, text: str) -> list[int]:
    match = re.fullmatch(r"([0-9]{1,10})(?:-([0-9]{1,10}))?", text)
    if match is None:
        rows = [cache.find_sample(text)]
    else:
        first, last = int(match[1]), int(match[2] or match[1])
        num_samples = cache.reader.layout.num_samples
        if not first <= last < num_samples:
            raise ConfigError(f"samples={text!r}: {cache.path} has samples 0 to {num_samples - 1}.")
        rows = list(range(first, last + 1))
    for row in rows:
        _check_built(cache, row)
    return rows


def _check_built(cache: Cache, row: int) -> None:
    for view in range(cache.reader.layout.num_views):
        status = cache.reader.status(view, row)
        if status in (Status.PENDING, Status.NO_SAMPLE):
            what = "is not built yet" if status == Status.PENDING else "does not exist: no sample has this row"
            raise CacheMissError(f"view {view} of sample {row} in {cache.path} {what}. Choose other samples.")


def _with_partners(cache: Cache, rows: Sequence[int]) -> set[int]:
    """The rows, and those that a view of them shows a part of; of these the same."""
    found: set[int] = set()
    wanted = list(rows)
    while wanted:
        row = wanted.pop()
        if row not in found:
            found.add(row)
            wanted += [row + partner for partner in _partners(cache, row).values() if partner]
    return found


def _partners(cache: Cache, row: int) -> dict[int, int]:
    """How many rows away the partner is, for each stored view; empty if views are never mixed."""
    if cache.policy.mixing is None:
        return {}
    reader = cache.reader
    views = [view for view in range(reader.layout.num_views) if reader.status(view, row) == Status.STORED]
    return {view: stored_mix(cache.policy, reader.parameters(view, row)).partner for view in views}


def why_no_views(cache: Cache, rows: Sequence[int]) -> str | None:
    """Why the pixels of the chosen views cannot be had; None if they can."""
    for view in range(cache.reader.layout.num_views):
        for row in rows:
            if cache.reader.status(view, row) == Status.STORED:
                try:
                    cache.image(row, view)
                except AtcacheError as error:
                    return str(error)
                break
    return None


def write_chosen(path: Path, cache: Cache, rows: Sequence[int], *, has_views: bool) -> None:
    """Write a complete cache of these samples. Its rows are numbered anew, in their order.

    Args:
        path: the folder to create.
        cache: where they are now.
        rows: as `choose_rows` gives them.
        has_views: whether the views' pixels are stored, also where they are replayed now.

    Raises:
        AtcacheError: a sample is damaged, or its view cannot be replayed.
    """
    reader = cache.reader
    pixels = (cache.policy.image_height, cache.policy.image_width) if has_views else None
    layout = replace(
        reader.layout,
        num_samples=len(rows),
        samples_per_shard=len(rows),
        part_stops=(),
        records_per_file=1,
        pixels=pixels,
    )
    index = take_rows(reader.samples, np.array(rows))
    # Whoever gets the export needs no paths of this machine.
    index = replace(index, tars=tuple(tar if isinstance(tar, Url) else Path("/", tar.name) for tar in index.tars))
    kept: Mapping[str, Any] = {name: it for name, it in reader.attributes.items() if name not in RESERVED_ATTRIBUTES}
    source = {**kept["source"], "fingerprint": index.fingerprint, "num_samples": count_samples(index)}
    views = {**kept["views"], "pixels": "replay" if pixels is None else "store"}
    attributes = {**kept, "source": source, "views": views}
    create_cache(path, layout, attributes, index, reader.state, reader.bias_LHQK)
    for task in layout.tasks():
        writer = TaskWriter(path, layout, task)
        try:
            for new_row, row in enumerate(rows):
                writer.add(new_row, **_moved_view(cache, layout, task.view, row, rows))
            writer.commit()
        finally:
            writer.abort()
    finish_cache(path)


def _moved_view(cache: Cache, layout: StoreLayout, view: int, row: int, rows: Sequence[int]) -> dict[str, Any]:
    """What `TaskWriter.add` gets of a view."""
    reader = cache.reader
    status = reader.status(view, row)
    moved: dict[str, Any] = {"status": status, "parameters_P": reader.parameters(view, row)}
    if status != Status.STORED:
        return moved
    if partner := _partners(cache, row).get(view, 0):
        moved["parameters_P"][layout.parameter_names.index(_PARTNER)] = rows.index(row + partner) - rows.index(row)
    moved["pixel_hash"] = reader.pixel_hash(view, row)
    moved["chunks"] = encode_view(layout, reader.read_codes(view, row))
    if layout.pixels is not None:
        moved["pixels_chunk"] = encode_pixels(layout, cache.image(row, view))
    return moved
