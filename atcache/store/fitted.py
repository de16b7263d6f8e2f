"""What a cache takes over before the first task: the codec's fitted state, and the teacher's bias.

Codes mean other maps with those of another cache, so the root has a checksum of each.
"""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np

from atcache.errors import ConfigError, CorruptCacheError
from atcache.files.location import Location
from atcache.files.sizes import size_text
from atcache.store.metadata import has_array, list_arrays
from atcache.store.tables import STATE_DTYPES, describe_array, read_array, write_array, write_group

FITTED = "fitted"
"""The member of the root's attributes that has the checksums. Caches of the first versions lack it."""
STATE, BIAS = "attention/state", "attention/bias"
MAX_STATE_NBYTES = 2**31
"""Limit for a codec's fitted arrays together. Codec transform's take a few hundred MB for a ViT-g."""
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,63}")


def write_fitted(root: Path, state: Mapping[str, np.ndarray], bias_LHQK: np.ndarray | None) -> None:
    """Write a codec's fitted state, and the teacher's bias if it has one.

    Raises:
        ConfigError: an array of the state has a name or a dtype that a cache does not hold.
    """
    write_group(root / STATE)
    for name, values in state.items():
        if not _NAME.fullmatch(name):
            raise ConfigError(f"codec state {name!r} cannot be stored; expected a name of letters, digits and _.")
        if values.dtype not in STATE_DTYPES:
            raise ConfigError(f"codec state {name!r} is {values.dtype}; a cache holds {_listed_dtypes()}.")
        write_array(root, f"{STATE}/{name}", values, None)
    if bias_LHQK is not None:
        write_array(root, BIAS, bias_LHQK.astype(np.float32), ("layer", "head", "query", "key"))


def checksums_of(state: Mapping[str, np.ndarray], bias_LHQK: np.ndarray | None) -> dict[str, int | None]:
    """The member `FITTED` of the root's attributes: a crc32 of the state, and of the bias if there is one."""
    bias = None if bias_LHQK is None else _crc32({"bias": bias_LHQK.astype(np.float32)})
    return {"state_crc32": _crc32(state), "bias_crc32": bias}


def read_state(root: Location, attributes: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """A codec's fitted state by name.

    Args:
        root: the cache.
        attributes: its attributes, with the checksum.

    Raises:
        CorruptCacheError: a file is missing or damaged, the arrays are larger than any codec needs for a ViT, or they
            are not those that the cache was made with.
    """
    nbytes, names = 0, list_arrays(root, STATE)
    for name in names:
        shape, dtype = describe_array(root, f"{STATE}/{name}")
        if np.dtype(dtype) not in STATE_DTYPES:
            raise CorruptCacheError(
                f"{root / STATE / name} is {dtype}; a cache holds {_listed_dtypes()}. Restore it from a copy."
            )
        nbytes += math.prod(shape) * np.dtype(dtype).itemsize
    if nbytes > MAX_STATE_NBYTES:
        raise CorruptCacheError(
            f"{root / STATE} describes {len(names)} arrays of {size_text(nbytes)} in all; expected at most "
            f"{size_text(MAX_STATE_NBYTES)}. Restore it from a copy."
        )
    state = {name: read_array(root, f"{STATE}/{name}") for name in names}
    _refuse_others(root, STATE, _recorded(attributes, "state_crc32"), _crc32(state))
    return state


def read_bias(root: Location, attributes: Mapping[str, Any]) -> np.ndarray | None:
    """The teacher's bias for the stored layers and heads, shape LHQK, float32; None if it has none.

    Args:
        root: the cache.
        attributes: its attributes, with the checksum.

    Raises:
        CorruptCacheError: a file is missing or damaged, or it is not the bias that the cache was made with.
    """
    bias_LHQK = read_array(root, BIAS) if has_array(root, BIAS) else None
    found = None if bias_LHQK is None else _crc32({"bias": bias_LHQK})
    _refuse_others(root, BIAS, _recorded(attributes, "bias_crc32"), found)
    return bias_LHQK


_UNKNOWN = object()


def _recorded(attributes: Mapping[str, Any], name: str) -> object:
    """The checksum that the root has; `_UNKNOWN` in caches of the first versions."""
    if FITTED not in attributes:
        return _UNKNOWN
    fitted: Any = attributes[FITTED]
    return cast("dict[str, Any]", fitted).get(name) if isinstance(fitted, dict) else fitted


def _refuse_others(root: Location, name: str, recorded: object, found: int | None) -> None:
    if recorded is not _UNKNOWN and recorded != found:
        raise CorruptCacheError(
            f"{root / name} is not what this cache was made with: its checksum is {found}, {root}/zarr.json says "
            f"{recorded}. Restore it from a copy of this cache; that of another one gives wrong maps."
        )


def _crc32(arrays: Mapping[str, np.ndarray]) -> int:
    """zlib's crc32 of the arrays in the order of their names: name, dtype, shape and little-endian bytes of each."""
    crc32 = 0
    for name in sorted(arrays):
        values = np.ascontiguousarray(arrays[name], arrays[name].dtype.newbyteorder("<"))
        about = f"{name} {arrays[name].dtype.name} {','.join(map(str, arrays[name].shape))}\n"
        crc32 = zlib.crc32(values.reshape(-1).view(np.uint8), zlib.crc32(about.encode(), crc32))
    return crc32


def _listed_dtypes() -> str:
    return ", ".join(map(str, STATE_DTYPES))
