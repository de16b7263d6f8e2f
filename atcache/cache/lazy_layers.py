"""One layer of a whole cache as an array that decodes only what is sliced. The cache's dask arrays are made of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol, cast

import numpy as np

from atcache.store.layout import Status, StoreLayout

if TYPE_CHECKING:
    import dask.array as da

    from atcache.attention.factors import LayerAttention
    from atcache.codecs.base import Coder
    from atcache.files.location import Location
    from atcache.store.reader import CacheReader

MAX_CHUNK_NBYTES = 64 * 2**20
"""Decoded bytes of one dask chunk: small enough that many fit in memory, large enough to be worth a dask task."""

Kind = Literal["maps", "q", "k", "v", "inputs"]


class OpenCache(Protocol):
    """What a layer is read and decoded with. It pickles as a path, so that other processes open their own files."""

    @property
    def path(self) -> Location: ...
    @property
    def reader(self) -> CacheReader: ...
    @property
    def coder(self) -> Coder: ...


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class LazyLayer:
    """Decoded float32 values of one layer, axes (view, sample, head, ...), with numpy's slicing.

    Slicing reads and decodes only the samples it picks; views that are not stored are NaN. Pickles as the cache's path;
    threads may share it.
    """

    cache: OpenCache
    position: int
    """Index into the stored layers."""
    kind: Kind
    """"maps": attn_VSHQK. "q", "k", "v": factors_VSHTD. "inputs": inputs_VSNTC, with N in the place of heads."""
    heads: tuple[int, ...]
    """Positions among the stored heads; for maps, among the heads of q; for inputs, in `INPUTS`."""
    shape: tuple[int, ...]
    views: tuple[int, ...]
    """The views along the first axis."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """Always float32."""
        return np.dtype(np.float32)

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    def __dask_tokenize__(self) -> tuple[Any, ...]:
        return (type(self).__name__, str(self.cache.path.absolute()), self.position, self.kind, self.heads, self.views)

    def __getitem__(self, index: Any) -> np.ndarray:  # noqa: ANN401 - numpy's
        items = _one_for_each_axis(index, self.ndim)
        views, samples, heads = (
            np.asarray(np.asarray(self.views)[items[0]]),
            _numbers(items[1], self.shape[1]),
            np.asarray(np.asarray(self.heads)[items[2]]),
        )
        decoded = np.stack(
            [self._decode(int(view), np.atleast_1d(samples), np.atleast_1d(heads)) for view in np.atleast_1d(views)]
        )
        # As in numpy, an integer drops its axis. The axes after heads were decoded whole and are cut here.
        drops = tuple(0 if part.ndim == 0 else slice(None) for part in (views, samples, heads))
        return decoded[(..., *items[3:])][drops]

    def _decode(self, view: int, samples_B: np.ndarray, heads_H: np.ndarray) -> np.ndarray:
        """Decoded values of some samples of a view, axes (sample, head, ...)."""
        import torch

        from atcache.cache.stacking import Stack

        reader, coder = self.cache.reader, self.cache.coder
        decoded = np.full((len(samples_B), len(heads_H), *self.shape[3:]), np.nan, np.float32)
        stored_B = np.array([reader.status(view, int(sample)) == Status.STORED for sample in samples_B], bool)
        if not stored_B.any():
            return decoded
        rows = coder.code_rows([self.position])
        stack = Stack(int(stored_B.sum()))
        for sample in samples_B[stored_B]:
            stack.add(reader.read_codes(view, int(sample), rows))
        codes_BLTC = stack.tensor
        assert codes_BLTC is not None, "some are stored"
        with torch.inference_mode():
            factors = coder.decode(codes_BLTC, rows.start).layer(self.position)
            decoded[stored_B] = self._values(factors, heads_H).numpy()
        return decoded

    def _values(self, layer: LayerAttention, heads_H: np.ndarray) -> Any:  # noqa: ANN401 - a tensor; torch is imported late
        from atcache.attention.factors import LayerFactors

        heads: list[int] = heads_H.tolist()
        if self.kind == "maps":
            return layer.select_heads(heads).maps()
        assert isinstance(layer, LayerFactors), "Cache.factors refuses caches of maps"
        factor_BHTD = {"q": layer.q_BHTD, "k": layer.k_BHTD, "v": layer.v_BHTD, "inputs": layer.inputs_BNTC}[self.kind]
        assert factor_BHTD is not None, "Cache gives v and inputs only where they are stored"
        return factor_BHTD[:, heads].float()


def _numbers(item: Any, length: int) -> np.ndarray:  # noqa: ANN401 - numpy's
    """The numbers below `length` that one item of an index picks.

    Slices, which dask uses, cost only what they pick: a chunk's work must not grow with the dataset.
    """
    if isinstance(item, slice):
        return np.arange(*cast("slice[Any, Any, Any]", item).indices(length))
    return np.asarray(np.arange(length)[item])


def _one_for_each_axis(index: Any, num_axes: int) -> tuple[Any, ...]:  # noqa: ANN401 - numpy's
    """A numpy index with one item for each axis: `...` and missing items become whole slices."""
    items: list[Any] = [*cast("tuple[Any, ...]", index)] if isinstance(index, tuple) else [index]
    place = next((number for number, item in enumerate(items) if item is Ellipsis), len(items))
    whole = [slice(None)] * (num_axes - len(items) + (place < len(items)))
    return (*items[:place], *whole, *items[place + 1 :])


def as_dask(layer: LazyLayer) -> da.Array:
    """The layer as a dask array whose chunks never cross a shard."""
    import dask.array as da

    chunks: Any = (
        (1,) * layer.shape[0],
        plan_sample_chunks(layer.cache.reader.layout, int(np.prod(layer.shape[2:])) * 4),
        *((side,) for side in layer.shape[2:]),
    )
    meta = np.empty((0,) * layer.ndim, np.float32)
    return cast("Any", da).from_array(layer, chunks=chunks, inline_array=True, fancy=False, meta=meta)


def plan_sample_chunks(
    layout: StoreLayout, nbytes_per_sample: int, target_nbytes: int = MAX_CHUNK_NBYTES
) -> tuple[int, ...]:
    """Samples in each dask chunk: whole shards, or equal parts of them that stay within `target_nbytes`."""
    most = max(1, target_nbytes // max(1, nbytes_per_sample))
    num_parts = -(-layout.samples_per_shard // most)
    size = -(-layout.samples_per_shard // num_parts)
    chunks: list[int] = []
    for start in range(0, layout.num_samples, layout.samples_per_shard):
        # All rows, also those between two parts, which no task has.
        remaining = min(layout.samples_per_shard, layout.num_samples - start)
        while remaining:
            chunks.append(min(size, remaining))
            remaining -= chunks[-1]
    return tuple(chunks)
