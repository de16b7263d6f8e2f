"""The coder of a cache: its codec, bound to the state that the cache stores."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from atcache.errors import CodecError, CorruptCacheError
from atcache.store.reader import CacheReader

if TYPE_CHECKING:
    from atcache.attention.geometry import FactorGeometry
    from atcache.codecs.base import Codec, Coder


def stored_coder(reader: CacheReader, codec: Codec, geometry: FactorGeometry, device: str = "cpu") -> Coder:
    """The codec bound to the state and the bias that a cache holds.

    Args:
        reader: the cache.
        codec: the cache's codec.
        geometry: the cache's geometry.
        device: where the coder runs.

    Raises:
        CorruptCacheError: the codec cannot use the state or the bias, or its codes are not those of the cache's layout.
    """
    import torch

    bias_LHQK = _read_bias(reader, geometry)
    try:
        coder = codec.coder(
            geometry,
            {name: torch.from_numpy(values) for name, values in reader.state.items()},
            bias_LHQK=None if bias_LHQK is None else torch.from_numpy(bias_LHQK),
            device=device,
        )
    except CodecError as error:
        raise CorruptCacheError(f"{reader.path}/attention/state: {error} Restore it from a copy.") from error
    layout = reader.layout
    pairs = {
        "rows of codes": (coder.num_code_rows, layout.num_layers),
        "tokens of codes": (coder.num_code_tokens, layout.num_tokens),
        "codes of a token": (coder.num_components, layout.num_components),
        "type of codes": (str(coder.codes_dtype).removeprefix("torch."), layout.codes_dtype),
    }
    differences = [
        f"{name}: {found!r}, but its layout says {expected!r}"
        for name, (found, expected) in pairs.items()
        if found != expected
    ]
    if differences:
        raise CorruptCacheError(
            f"{reader.path}/zarr.json: by its codec and geometry, {'; '.join(differences)}. Restore it from a copy, or "
            "build the cache again."
        )
    return coder


def _read_bias(reader: CacheReader, geometry: FactorGeometry) -> np.ndarray | None:
    """The teacher's bias, of the shape and type that it must have; else nothing of it is read."""
    if reader.bias_kind is None:
        return None
    shape, dtype = reader.bias_kind
    num_layers, num_heads, num_tokens = len(geometry.layers), len(geometry.heads), geometry.tokens.num_tokens
    expected = [(num_layers, heads, geometry.num_queries, num_tokens) for heads in (num_heads, 1)]
    if shape not in expected or dtype != "float32":
        raise CorruptCacheError(
            f"{reader.path}/attention/bias has shape {shape} and type {dtype}, expected {expected[0]} or {expected[1]} "
            "and float32, as the cache's geometry says. Restore it from a copy."
        )
    bias_LHQK = reader.bias_LHQK
    if bias_LHQK is not None and np.isnan(bias_LHQK).any():
        raise CorruptCacheError(
            f"{reader.path}/attention/bias holds a NaN, expected numbers, or -inf for masked keys. Restore it from a "
            "copy."
        )
    return bias_LHQK
