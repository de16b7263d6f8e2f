"""A cache's codec, bound to its stored state."""

from __future__ import annotations

from typing import TYPE_CHECKING

from atcache.errors import CodecError, CorruptCacheError
from atcache.store.reader import CacheReader

if TYPE_CHECKING:
    from atcache.attention.geometry import FactorGeometry
    from atcache.codecs.base import Codec, Coder


def stored_coder(reader: CacheReader, codec: Codec, geometry: FactorGeometry, device: str = "cpu") -> Coder:
    """The codec bound to the state and the bias that a cache holds.

    Args:
        reader: the cache.
        codec: the cache's.
        geometry: the cache's.
        device: where the coder runs.

    Raises:
        CorruptCacheError: the state cannot be read.
    """
    import torch

    if geometry.tokens.num_tokens != reader.layout.num_tokens:
        raise CorruptCacheError(
            f"{reader.path}/zarr.json: its geometry has {geometry.tokens.num_tokens} tokens, its layout "
            f"{reader.layout.num_tokens}. Restore it from a copy."
        )
    bias_LHQK = reader.bias_LHQK
    try:
        return codec.coder(
            geometry,
            {name: torch.from_numpy(values) for name, values in reader.state.items()},
            bias_LHQK=None if bias_LHQK is None else torch.from_numpy(bias_LHQK),
            device=device,
        )
    except CodecError as error:
        raise CorruptCacheError(f"{reader.path}/attention/state: {error} Restore it from a copy.") from error
