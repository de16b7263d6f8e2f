"""The views that two caches have in common, proven to be the same before any map is decoded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from atcache.cache.cache import Cache
from atcache.cache.differences import name_differences
from atcache.errors import CacheMismatchError
from atcache.store.layout import Status

from ..stats.looking import spread


@dataclass(frozen=True, kw_only=True, slots=True)
class SameView:
    """One view that both caches store."""

    view: int
    row_a: int
    """Row of its sample in the first cache."""
    row_b: int


def find_same_views(a: Cache, b: Cache, most: int) -> tuple[list[SameView], list[str]]:
    """Views of the same number of samples with the same sample_key, at most so many, spread evenly; and notes.

    Raises:
        CacheMismatchError: the caches have no views in common, or the images of one are not the same in both.
    """
    keys_a, keys_b = (_stored_keys(cache) for cache in (a, b))
    _, rows_a, rows_b = np.intersect1d(keys_a.keys_N, keys_b.keys_N, assume_unique=True, return_indices=True)
    if not len(rows_a):
        raise CacheMismatchError(
            f"{a.path} and {b.path} have no samples in common: {_first_key(keys_a)} and {_first_key(keys_b)}, for "
            "example. Maps can only be compared for the same images, known by tar and key."
        )
    order = np.argsort(keys_a.rows_N[rows_a])
    rows_a, rows_b = keys_a.rows_N[rows_a[order]], keys_b.rows_N[rows_b[order]]
    num_views = min(a.reader.layout.num_views, b.reader.layout.num_views)
    is_stored_VN = (a.reader.status_VS[:num_views, rows_a] == Status.STORED) & (
        b.reader.status_VS[:num_views, rows_b] == Status.STORED
    )
    chosen = spread(np.flatnonzero(is_stored_VN), most)
    if not len(chosen):
        raise CacheMismatchError(
            f"{a.path} and {b.path} have {len(rows_a)} samples in common, but both store the same view of none of them."
        )
    places = [divmod(number, len(rows_a)) for number in chosen.tolist()]
    views = [SameView(view=view, row_a=int(rows_a[at]), row_b=int(rows_b[at])) for view, at in places]
    num_other = sum(not _is_same_image(a, b, view) for view in views)
    if not num_other:
        return views, []
    cause = (
        "both caches name the same versions of image libraries, so the images may have been changed."
        if a.record.created_by.views == b.record.created_by.views
        else "the caches were made with different versions of image libraries."
    )
    return views, [
        f"note: {num_other} of {len(views)} views have the same parameters but not quite the same pixels: {cause}"
    ]


@dataclass(frozen=True, slots=True)
class _Keys:
    keys_N: np.ndarray
    """sample_keys, each once."""
    rows_N: np.ndarray


def _stored_keys(cache: Cache) -> _Keys:
    """The samples of which a cache stores any view. No two have the same key: later ones are not stored."""
    rows_N = np.flatnonzero((cache.reader.status_VS == Status.STORED).any(axis=0))
    index = cache.reader.samples
    tar_names = np.array([(tar.name + "/").encode() for tar in index.tars])
    return _Keys(np.char.add(tar_names[index.tar_S[rows_N]], index.keys_S[rows_N]), rows_N)


def _first_key(keys: _Keys) -> str:
    return repr(keys.keys_N[0].decode()) if len(keys.keys_N) else "no stored sample"


def _is_same_image(a: Cache, b: Cache, same: SameView) -> bool:
    """Whether a view has the same pixels in both caches, byte for byte.

    Raises:
        CacheMismatchError: it was drawn in another way, or from another image.
    """
    if a.reader.pixel_hash(same.view, same.row_a) == b.reader.pixel_hash(same.view, same.row_b):
        return True
    where = f"view {same.view} of sample {a.reader.samples.sample_key(same.row_a)!r}"
    advice = "Maps can only be compared for the same images: build both caches with the same policy, seed and size."
    given = [_parameters(cache, same.view, row) for cache, row in ((a, same.row_a), (b, same.row_b))]
    policies = [cache.policy.to_json() for cache in (a, b)]
    for what, (ours, theirs) in (("parameters", given), ("policies", policies)):
        if differences := name_differences(ours, theirs, ("in A", "in B")):
            raise CacheMismatchError(
                f"{where} is not the same in both caches: of the {what}, {differences[0]}. {advice}"
            )
    if given[0].get("mix_partner"):
        # The same numbers may name another partner: rows are counted in each cache for itself.
        raise CacheMismatchError(f"{where} is mixed with another sample in A than in B. {advice}")
    sizes = [int(cache.reader.samples.nbytes_S[row]) for cache, row in ((a, same.row_a), (b, same.row_b))]
    if sizes[0] != sizes[1]:
        raise CacheMismatchError(
            f"sample {a.reader.samples.sample_key(same.row_a)!r} is another image file in B: it has {sizes[0]} bytes "
            f"in A and {sizes[1]} in B. {advice}"
        )
    return False


def _parameters(cache: Cache, view: int, row: int) -> dict[str, Any]:
    """The numbers that a view was drawn with; those of an unmixed view say nothing of mixing."""
    names = cache.reader.layout.parameter_names
    given = dict(zip(names, cache.reader.parameters(view, row).tolist(), strict=True))
    is_mixed = bool(given.get("mix_partner"))
    return {name: value for name, value in given.items() if is_mixed or not name.startswith("mix_")}
