"""What a figure shows, read from a cache: the stored view, the clean image, and maps of some layers and heads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from atcache.cache.cache import Cache
from atcache.errors import BadImageError, CacheMismatchError, CacheMissError, RemoteError, SourceError
from atcache.pictures import default_query, query_maps, query_tokens
from atcache.views.placement import Placement

from ..stats.looking import check_numbers
from .config import ShowConfig

_MOST_PIXELS = 1024  # of the longer side of the clean image: more are not seen in a figure


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Shown:
    """What a figure shows."""

    maps_LHhw: np.ndarray
    """For each layer and head what the queries attend to, float32 (layer, head, grid height, grid width)."""
    prefix_mass_LH: np.ndarray
    """Share of the queries' attention that goes to prefix tokens."""
    layers: tuple[int, ...]
    heads: tuple[str, ...]
    """The heads' names: numbers, or "mean" or "max" alone."""
    queries: tuple[str, ...]
    patches: tuple[tuple[int, int], ...]
    """Row and column of each query that is a patch; empty if all tokens are."""
    sample_key: str
    label: str
    """The class, as text; empty if it has none."""
    view: int
    teacher: str
    view_height: int
    view_width: int
    image_HWC: np.ndarray | None
    """The stored view; None if it cannot be had."""
    clean_HWC: np.ndarray | None
    """The source image, perhaps smaller; None if it cannot be had."""
    placement: Placement | None
    """Where the source image is in the view; None with `clean_HWC`."""
    notes: tuple[str, ...]
    """What the reader of the figure must know."""


def read_shown(cache: Cache, config: ShowConfig) -> Shown:
    """Read what the options ask for.

    Raises:
        CacheMissError: there is no such sample, view, layer or head in the cache.
        ConfigError: there is no such query.
        CorruptCacheError: what is stored is damaged.
        SourceError: the images are not where `data` says.
    """
    row = _row(cache, config.sample)
    layers = _layers(cache, config.layer)
    given = (config.query,) if isinstance(config.query, str) else config.query
    geometry = cache.geometry
    names = given or (default_query(geometry.tokens),)
    tokens = query_tokens(names, geometry.tokens, geometry.num_queries)  # refused before anything long
    heads, positions = _heads(cache, config.head)
    maps_LHhw, mass_LH = _maps(cache, row, config.view, layers, positions, names)
    if config.head in ("mean", "max"):
        reduce = np.mean if config.head == "mean" else np.max
        maps_LHhw, mass_LH = reduce(maps_LHhw, axis=1, keepdims=True), reduce(mass_LH, axis=1, keepdims=True)
    image_HWC, clean_HWC, placement, notes = _images(cache, row, config.view, is_told=config.data is not None)
    prefix, width = geometry.tokens.num_prefix_tokens, geometry.tokens.grid_width
    label = int(cache.reader.labels_S[row])
    name = cache.reader.samples.classes.name(label)
    return Shown(
        maps_LHhw=maps_LHhw,
        prefix_mass_LH=mass_LH,
        layers=layers,
        heads=heads,
        queries=names,
        patches=() if "all" in names else tuple(divmod(token - prefix, width) for token in tokens if token >= prefix),
        sample_key=cache.reader.samples.sample_key(row),
        label="" if label < 0 else f"class {label}" + (f" ({name})" if name else ""),
        view=config.view,
        teacher=cache.record.teacher_record.name,
        view_height=cache.policy.image_height,
        view_width=cache.policy.image_width,
        image_HWC=image_HWC,
        clean_HWC=clean_HWC,
        placement=placement,
        notes=tuple(notes),
    )


def _row(cache: Cache, sample: str) -> int:
    if not sample.isdecimal():
        return cache.find_sample(sample)
    num_samples = cache.reader.layout.num_samples
    # Python refuses to read a number of thousands of digits.
    if len(sample) > 18 or int(sample) >= num_samples:
        raise CacheMissError(f"sample {sample} is not in {cache.path}: expected a row from 0 to {num_samples - 1}.")
    return int(sample)


def _layers(cache: Cache, layer: str | None) -> tuple[int, ...]:
    stored = cache.geometry.layers
    if layer == "all":
        return stored
    chosen = stored[-1] if layer is None else int(layer)
    if chosen not in stored:
        raise CacheMissError(
            f"layer {chosen} of the teacher is not stored in {cache.path}, only layers "
            f"{', '.join(map(str, stored))} are."
        )
    return (chosen,)


def _heads(cache: Cache, head: str) -> tuple[tuple[str, ...], list[int]]:
    """The names of what is shown of each layer, and the positions of the heads that are read for it."""
    stored = cache.geometry.heads
    if head in ("all", "mean", "max"):
        return tuple(map(str, stored)) if head == "all" else (head,), list(range(len(stored)))
    if int(head) not in stored:
        raise CacheMissError(
            f"head {head} of the teacher is not stored in {cache.path}, only heads {', '.join(map(str, stored))} are."
        )
    return (head,), [stored.index(int(head))]


def _maps(
    cache: Cache, row: int, view: int, layers: Sequence[int], heads: list[int], names: Sequence[str]
) -> tuple[np.ndarray, np.ndarray]:
    """Maps over patches, and mass on prefix tokens, of one view. Whole maps are held of one layer at a time."""
    tokens, maps, mass = cache.geometry.tokens, list[np.ndarray](), list[np.ndarray]()
    codes_BLTC = torch.from_numpy(cache.reader.read_codes(view, row)[None])
    with torch.inference_mode():
        decoded = cache.coder.decode(codes_BLTC)
        for layer in layers:
            attention = decoded.layer(cache.geometry.layers.index(layer)).select_heads(heads)
            attn_HQK = attention.maps()[0].float()
            check_numbers(cache, view, row, layer, attn_HQK)
            maps.append(query_maps(attn_HQK.numpy(), tokens, names))
            mass.append(1 - maps[-1].sum(axis=(-2, -1)))
    return np.stack(maps), np.stack(mass)


def _images(
    cache: Cache, row: int, view: int, *, is_told: bool
) -> tuple[np.ndarray | None, np.ndarray | None, Placement | None, list[str]]:
    """The stored view, the clean image and its placement, as far as they can be had, and notes about what cannot.

    Args:
        is_told: whether the user said where the images are: then it is an error that they are not there.
    """
    notes: list[str] = []
    image_HWC = clean_HWC = placement = None
    try:
        image_HWC = cache.image(row, view)
    except (BadImageError, CacheMismatchError, RemoteError, SourceError) as error:
        if is_told:
            raise
        notes.append(f"Without the view: {error}")
    try:
        encoded = cache.source.read_encoded(row)
        placement = Placement.of(cache.policy, cache.reader.parameters(view, row), encoded.height, encoded.width)
        clean = encoded.decode()
        clean.thumbnail((_MOST_PIXELS, _MOST_PIXELS))
        clean_HWC = np.asarray(clean)
    except (BadImageError, RemoteError, SourceError) as error:
        if is_told:
            raise
        if image_HWC is not None:
            notes.append(f"Without the clean image: {error}")
    if placement is not None and placement.hidden:
        notes.append("What was erased from the view, or pasted into it from another sample, is not carried back.")
    if placement is not None and placement.share < 1:
        notes.append(f"Mixup: {placement.share:.0%} of each pixel of the view is this sample, the rest is another one.")
    return image_HWC, clean_HWC, placement, notes
