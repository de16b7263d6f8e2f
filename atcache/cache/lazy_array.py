"""Layers of a cache as a dask array, of which an index picks before a task is made."""

from __future__ import annotations

from typing import Any, cast

import dask.array as da
import numpy as np
from dask.array.core import Array

from atcache.cache.lazy_layers import LazyLayers


class LazyArray(Array):
    """A dask array that reads and decodes only what is picked of it, in however many steps.

    dask itself hands on only some indexes to what an array is made from, and cuts the rest from whole chunks. Whatever
    is computed with this array is a plain dask array.
    """

    _layers: LazyLayers
    _name_of_layers: str

    def __new__(cls, layers: LazyLayers) -> LazyArray:
        """The layers in chunks that never cross a shard."""
        meta = np.empty((0,) * layers.ndim, np.float32)
        # Lists can be long, and would be sent with each task.
        inline = not any(isinstance(axis, np.ndarray) for axis in layers.axes[:2])
        plain = cast("Any", da).from_array(layers, chunks=layers.chunks, inline_array=inline, meta=meta)
        array = cast("LazyArray", super().__new__(cls, plain.dask, plain.name, plain.chunks, meta=meta))
        array._layers, array._name_of_layers = layers, plain.name
        return array

    def __reduce__(self) -> Any:  # noqa: ANN401 - pickle's
        return (LazyArray, (self._layers,)) if self._is_as_made else cast("Any", super()).__reduce__()

    def __getitem__(self, index: Any) -> Any:  # noqa: ANN401 - numpy's
        if self._is_as_made and _is_plain(index):
            return LazyArray(self._layers.pick(index))
        return cast("Any", super()).__getitem__(index)

    @property
    def _is_as_made(self) -> bool:
        """False once values were put in, as by `array[0] = 1`: dask then gives the same object another graph."""
        return cast("Any", self).name == self._name_of_layers


def _is_plain(index: Any) -> bool:  # noqa: ANN401 - numpy's
    """Whether an index has numbers and slices only, and at most one list; dask refuses several."""
    items = [*cast("tuple[Any, ...]", index)] if isinstance(index, tuple) else [index]
    lists = [np.asarray(cast("Any", item)) for item in items if isinstance(item, list | np.ndarray)]
    others = [item for item in items if not isinstance(item, list | np.ndarray)]
    return (
        len(lists) <= 1
        and all(numbers.ndim == 1 and numbers.dtype.kind in "iub" for numbers in lists)
        and all(item is Ellipsis or isinstance(item, slice | int | np.integer) for item in others)
        and not any(isinstance(item, bool) for item in others)
    )
