"""Layers of a whole cache as an array that decodes only what is sliced. The cache's dask and xarray arrays wrap it."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, TypeAlias, cast

import numpy as np

from atcache.store.layout import Status, StoreLayout

if TYPE_CHECKING:
    from torch import Tensor

    from atcache.attention.factors import LayerAttention
    from atcache.cache.record import CacheRecord
    from atcache.codecs.base import Coder
    from atcache.files.location import Location
    from atcache.store.reader import CacheReader

MAX_CHUNK_NBYTES = 64 * 2**20
"""Decoded bytes of one dask chunk: small enough that many fit in memory, large enough to be worth a dask task."""

Kind = Literal["maps", "q", "k", "v", "inputs"]
Axis: TypeAlias = int | range | np.ndarray
"""What is picked along an axis."""


class OpenCache(Protocol):
    """What layers are read and decoded with. It pickles as a path, so that other processes open their own files."""

    @property
    def path(self) -> Location: ...
    @property
    def reader(self) -> CacheReader: ...
    @property
    def record(self) -> CacheRecord: ...
    @property
    def coder(self) -> Coder: ...


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class LazyLayers:
    """Decoded float32 values of layers, axes (view, sample, layer, head, ...), of which an index takes a part.

    An index has an integer, a slice or a list for each axis, and lists pick along their own axis, as in `numpy.ix_`.
    Only the samples, layers, heads and rows of maps that it picks are decoded, and only the chunks that this takes
    are read. Views that are not stored are NaN. Pickles as the cache's path; threads may share it.
    """

    cache: OpenCache
    kind: Kind
    """"maps": attn_VSLHQK. "q", "k", "v": factors_VSLHTD. "inputs": inputs_VSLNTC, with N in the place of heads."""
    axes: tuple[Axis, ...]
    """What is picked along each of the six axes: views; rows of the sample table; positions among the stored layers;
    positions among the stored heads (for maps, among the heads of q; for inputs, in `INPUTS`); and the last two. The
    array does not have the axes along which one number is picked."""

    @property
    def shape(self) -> tuple[int, ...]:
        """As numpy's."""
        return tuple(len(axis) for axis in self.axes if not isinstance(axis, int))

    @property
    def dtype(self) -> np.dtype[Any]:
        """Always float32."""
        return np.dtype(np.float32)

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    @property
    def chunks(self) -> tuple[tuple[int, ...], ...]:
        """Chunks to compute with: they never cross a shard, and have the layers that are decoded together."""
        layout = self.cache.reader.layout
        views, samples, layers, *others = self.axes
        layer_nbytes = 4 * math.prod(_length(axis) for axis in others)
        num_layers = plan_layer_chunk(layout, len(self.cache.record.geometry.layers), layer_nbytes)
        nbytes_per_sample = layer_nbytes * min(num_layers, _length(layers))
        plans = [
            (1,) * _length(views),
            (1,) if isinstance(samples, int) else plan_sample_chunks(layout, nbytes_per_sample, rows=samples),
            _pieces(_length(layers), num_layers),
            *((_length(axis),) for axis in others),
        ]
        return tuple(plan or (0,) for plan, axis in zip(plans, self.axes, strict=True) if not isinstance(axis, int))

    def __dask_tokenize__(self) -> tuple[Any, ...]:
        axes = [str(axis) if isinstance(axis, range) else axis for axis in self.axes]
        # Another cache may come to the same place: its values must not be mistaken for those of this one.
        where = (str(self.cache.path.absolute()), self.cache.reader.name_of_values)
        return (type(self).__name__, *where, self.kind, axes)

    def pick(self, index: Any) -> LazyLayers:  # noqa: ANN401 - numpy's
        """The part that an index takes. Nothing is read.

        Raises:
            IndexError: a number is out of bounds, or there are more items than axes.
        """
        items = iter(_one_for_each_axis(index, self.ndim))
        axes = tuple(axis if isinstance(axis, int) else _pick(axis, next(items)) for axis in self.axes)
        return replace(self, axes=axes)

    def __getitem__(self, index: Any) -> np.ndarray:  # noqa: ANN401 - numpy's
        return self.pick(index).read()

    def read(self) -> np.ndarray:
        """All values."""
        views, samples, *picked = (np.atleast_1d(np.asarray(axis)) for axis in self.axes)
        decoded_VBLHRC = np.full((len(views), len(samples), *map(len, picked)), np.nan, np.float32)
        if decoded_VBLHRC.size:
            for view, decoded_BLHRC in zip(views, decoded_VBLHRC, strict=True):
                self._decode_into(decoded_BLHRC, int(view), samples, _Picked(*picked))
        # As in numpy, a number drops its axis.
        return decoded_VBLHRC[tuple(0 if isinstance(axis, int) else slice(None) for axis in self.axes)]

    def _decode_into(self, decoded_BLHRC: np.ndarray, view: int, samples_B: np.ndarray, picked: _Picked) -> None:
        """Put in what is stored of some samples of a view. R and C are the picked rows and columns."""
        import torch

        from atcache.cache.stacking import Stack

        reader, coder = self.cache.reader, self.cache.coder
        stored_B = reader.statuses(view, samples_B) == Status.STORED
        if not stored_B.any():
            return
        rows = coder.code_rows(picked.positions.tolist())
        if reader.is_remote and rows == slice(0, reader.layout.num_layers):
            # Several requests at a time, as each waits for the server. They bring all layers, so all must be wanted.
            reader.expect(view, np.unique(samples_B[stored_B]), pixels=False)
        stack = Stack(int(stored_B.sum()))
        for sample in samples_B[stored_B]:
            stack.add(reader.read_codes(view, int(sample), rows))
        codes_BLTC = stack.tensor
        assert codes_BLTC is not None, "some are stored"
        with torch.inference_mode():
            layers = coder.decode(codes_BLTC, rows.start)
            for place in np.argsort(picked.positions):  # ascending, since a layer may be predicted from the one below
                layer = layers.layer(int(picked.positions[place]))
                decoded_BLHRC[stored_B, place] = self._values(layer, picked).numpy()

    def _values(self, layer: LayerAttention, picked: _Picked) -> Tensor:
        from atcache.attention.factors import LayerFactors

        if self.kind == "maps":
            chosen = layer.select_heads(picked.heads.tolist())
            if not _is_whole(picked.rows, layer.shape_BHT[2]):
                chosen = chosen.select_queries(picked.rows.tolist())
            values = chosen.maps()
        else:
            assert isinstance(layer, LayerFactors), "Cache.factors refuses caches of maps"
            factors = {"q": layer.q_BHTD, "k": layer.k_BHTD, "v": layer.v_BHTD, "inputs": layer.inputs_BNTC}
            factor_BHTD = factors[self.kind]
            assert factor_BHTD is not None, "Cache gives v and inputs only where they are stored"
            values = factor_BHTD[:, picked.heads.tolist()].float()
            if not _is_whole(picked.rows, values.shape[2]):
                values = values[:, :, picked.rows.tolist()]
        return values if _is_whole(picked.columns, values.shape[3]) else values[..., picked.columns.tolist()]


class _Picked(NamedTuple):
    """What is picked along the axes behind samples."""

    positions: np.ndarray
    heads: np.ndarray
    rows: np.ndarray
    columns: np.ndarray


def lazy_maps(cache: OpenCache, position: int | None = None, heads: tuple[int, ...] | None = None) -> LazyLayers:
    """The maps of one stored layer or of all, of these heads or of all, by position."""
    geometry, layout = cache.record.geometry, cache.reader.layout
    return LazyLayers(
        cache=cache,
        kind="maps",
        axes=(
            range(layout.num_views),
            range(layout.num_samples),
            range(len(geometry.layers)) if position is None else position,
            range(len(geometry.heads)) if heads is None else np.array(heads, np.intp),
            range(geometry.num_queries),
            range(geometry.tokens.num_tokens),
        ),
    )


def _pick(axis: range | np.ndarray, item: Any) -> Axis:  # noqa: ANN401 - numpy's
    """What one item of an index picks of what was picked before."""
    if isinstance(item, slice):
        return axis[item]  # of a range this costs nothing: a chunk's work must not grow with the dataset
    numbers = pick_numbers(item, len(axis))
    picked = axis.start + axis.step * numbers if isinstance(axis, range) else axis[numbers]
    return picked if picked.ndim else int(picked)


def pick_numbers(item: Any, length: int) -> np.ndarray:  # noqa: ANN401 - numpy's
    """The numbers below `length` that one item of an index picks; without an axis for an integer.

    Raises:
        IndexError: a number is out of bounds, or there is not a bool for each number.
    """
    if isinstance(item, slice):
        return np.arange(*cast("slice[Any, Any, Any]", item).indices(length))
    numbers = np.asarray(item)
    if numbers.dtype == bool:
        if numbers.shape != (length,):
            raise IndexError(f"bools of shape {numbers.shape} pick along an axis of {length}: expected one for each")
        numbers = np.flatnonzero(numbers)
    if ((numbers < -length) | (numbers >= length)).any():
        raise IndexError(f"index {item} is out of bounds for an axis of {length}")
    return np.where(numbers < 0, numbers + length, numbers).astype(np.intp)


def _length(axis: Axis) -> int:
    return 1 if isinstance(axis, int) else len(axis)


def _is_whole(numbers: np.ndarray, length: int) -> bool:
    return len(numbers) == length and bool((numbers == np.arange(length)).all())


def _one_for_each_axis(index: Any, num_axes: int) -> tuple[Any, ...]:  # noqa: ANN401 - numpy's
    """A numpy index with one item for each axis: `...` and missing items become whole slices."""
    items: list[Any] = [*cast("tuple[Any, ...]", index)] if isinstance(index, tuple) else [index]
    num_dots = sum(item is Ellipsis for item in items)
    if num_dots > 1 or len(items) - num_dots > num_axes:
        raise IndexError(f"index {index} does not fit an array of {num_axes} axes: expected one item for each at most")
    place = next((number for number, item in enumerate(items) if item is Ellipsis), len(items))
    whole = [slice(None)] * (num_axes - len(items) + (place < len(items)))
    return (*items[:place], *whole, *items[place + 1 :])


def plan_layer_chunk(
    layout: StoreLayout, num_layers: int, layer_nbytes: int, target_nbytes: int = MAX_CHUNK_NBYTES
) -> int:
    """Layers in each dask chunk: those that one chunk of codes has, if a sample of them is within `target_nbytes`."""
    # Layers that are packed together are predicted from one another: apart, each would decode all below it again.
    together = layout.layers_per_chunk if layout.num_layers == num_layers else num_layers
    return max(1, min(together, target_nbytes // max(1, layer_nbytes)))


def plan_sample_chunks(
    layout: StoreLayout,
    nbytes_per_sample: int,
    target_nbytes: int = MAX_CHUNK_NBYTES,
    rows: range | np.ndarray | None = None,
) -> tuple[int, ...]:
    """Samples in each dask chunk: whole shards, or equal parts of them that stay within `target_nbytes`.

    Args:
        layout: the cache's.
        nbytes_per_sample: what one sample takes, decoded.
        target_nbytes: the most that a chunk of several samples takes.
        rows: the samples; None for all rows, also those between two parts, which no task has. If they are no range
            without gaps, a chunk may have samples of several shards.
    """
    most = max(1, target_nbytes // max(1, nbytes_per_sample))
    num_parts = -(-layout.samples_per_shard // most)
    size = -(-layout.samples_per_shard // num_parts)
    rows = range(layout.num_samples) if rows is None else rows
    if not isinstance(rows, range) or rows.step != 1:
        return _pieces(len(rows), size)
    chunks: list[int] = []
    start = rows.start
    while start < rows.stop:
        stop = min(rows.stop, (start // layout.samples_per_shard + 1) * layout.samples_per_shard)
        chunks += _pieces(stop - start, size)
        start = stop
    return tuple(chunks)


def _pieces(length: int, size: int) -> tuple[int, ...]:
    """`length` in pieces of `size`; the last may be smaller."""
    return tuple(min(size, length - start) for start in range(0, length, size))
