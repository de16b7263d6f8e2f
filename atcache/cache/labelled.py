"""A cache's maps with named axes and coordinates, as xarray shows them. Most is read only when it is used."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import xarray as xr
from xarray.backends import BackendArray
from xarray.core import indexing

from atcache.attention.geometry import FactorGeometry
from atcache.attention.tokens import token_kinds
from atcache.cache.lazy_layers import LazyLayers, pick_numbers
from atcache.images.source import SampleIndex
from atcache.images.tar_samples import Problem
from atcache.store.layout import Status, describe_status
from atcache.store.reader import CacheReader
from atcache.views.policy import PARAMETER_NAMES

VIEW_BOX = PARAMETER_NAMES[: PARAMETER_NAMES.index("flip") + 1]
"""The parameters that say which part of the image a view shows: a box, resized, then a window of that, then a flip."""


_MAX_NUMBER_LETTERS = 12
_ReadOfView = Callable[[CacheReader, int, np.ndarray], np.ndarray]
"""Reads something of some samples of a view."""


def label_maps(maps: LazyLayers) -> xr.Dataset:
    """`attention` and its coordinates. xarray makes the indexes of the axes when it opens a dataset.

    Reads the sample table, but no texts: keys and names of classes are put together for the rows that are asked for.

    Args:
        maps: of all layers, or of one, which is then a coordinate without an axis.
    """
    reader, record = maps.cache.reader, maps.cache.record
    geometry, teacher, layout = record.geometry, record.identity.teacher, reader.layout
    views, _, position, heads, _, _ = maps.axes
    has_layers = not isinstance(position, int)
    axes = ("view", "sample", *(["layer"] if has_layers else []), "head", "query", "key")
    statuses = {"flag_values": [int(status) for status in Status], "flag_meanings": _flag_meanings()}
    coords: dict[str, Any] = {
        "view": ("view", np.atleast_1d(views)),
        "layer": ("layer", list(geometry.layers)) if has_layers else geometry.layers[position],
        "head": ("head", np.asarray(geometry.heads)[np.atleast_1d(heads)]),
        **_of_samples(reader),
        "status": _of_views(maps, "uint8", CacheReader.statuses, statuses),
        **{
            name: _of_views(maps, "float32", partial(_read_parameter, layout.parameter_names.index(name)))
            for name in VIEW_BOX
            if name in layout.parameter_names
        },
        **_of_tokens("query", geometry, teacher),
        **_of_tokens("key", geometry, teacher),
    }
    attention = xr.Variable(
        axes,
        indexing.LazilyIndexedArray(_Maps(maps)),
        attrs={"long_name": "each query's attention over the keys, as a probability", "units": "1"},
        encoding={"preferred_chunks": dict(zip(axes, maps.chunks, strict=True))},
    )
    attrs = {"teacher": teacher, "codec": str(record.identity.codec["name"])}
    return xr.Dataset({"attention": attention}, xr.Coordinates(coords, indexes={}), attrs)


class _Maps(BackendArray):
    """The maps, which xarray slices before it reads."""

    def __init__(self, maps: LazyLayers) -> None:
        self.maps, self.shape, self.dtype = maps, maps.shape, maps.dtype

    def __getitem__(self, key: indexing.ExplicitIndexer) -> Any:  # noqa: ANN401 - xarray's
        support = indexing.IndexingSupport.OUTER
        return indexing.explicit_indexing_adapter(key, self.shape, support, self.maps.__getitem__)


class _Column(BackendArray):
    """A coordinate of which only what is asked for is read."""

    def __init__(self, shape: tuple[int, ...], dtype: str, read: Callable[..., np.ndarray]) -> None:
        """The coordinate.

        Args:
            shape: its shape.
            dtype: a text's width must be known before it is read.
            read: takes the numbers that are picked along each axis, as arrays, and gives their values.
        """
        self.shape, self.dtype, self.read = shape, np.dtype(dtype), read

    def __getitem__(self, key: indexing.ExplicitIndexer) -> Any:  # noqa: ANN401 - xarray's
        support = indexing.IndexingSupport.OUTER
        return indexing.explicit_indexing_adapter(key, self.shape, support, self._pick)

    def _pick(self, index: tuple[Any, ...]) -> np.ndarray:
        numbers = [pick_numbers(item, side) for item, side in zip(index, self.shape, strict=True)]
        values = self.read(*map(np.atleast_1d, numbers)).astype(self.dtype, copy=False)
        return np.asarray(values[tuple(slice(None) if picked.ndim else 0 for picked in numbers)])


def _of_samples(reader: CacheReader) -> dict[str, xr.Variable]:
    index = reader.samples
    longest = max(len(tar.name) for tar in index.tars) + 1 + index.keys_S.dtype.itemsize
    key, name = f"U{max(longest, _MAX_NUMBER_LETTERS)}", f"U{max(map(len, ('', *index.classes.names))) or 1}"

    def lazy(dtype: str, read: Callable[[SampleIndex, np.ndarray], np.ndarray]) -> xr.Variable:
        column = _Column((index.num_samples,), dtype, partial(_read_texts, reader, read))
        return xr.Variable("sample", indexing.LazilyIndexedArray(column))

    return {
        "sample": lazy(key, sample_labels),
        "sample_key": lazy(key, SampleIndex.sample_keys),
        "label": xr.Variable("sample", index.label_S),
        "class_name": lazy(name, SampleIndex.class_names),
    }


def _read_texts(
    reader: CacheReader, read: Callable[[SampleIndex, np.ndarray], np.ndarray], rows_S: np.ndarray
) -> np.ndarray:
    return read(reader.samples, rows_S)  # the reader, not its table, is what is pickled


def sample_labels(index: SampleIndex, rows_S: np.ndarray) -> np.ndarray:
    """The label of each row in the index of the axis `sample`: its sample_key, so that all are different.

    A row without a sample, and one whose key another row has, is labelled by its number, such as "#96".
    """
    keys_S = index.sample_keys(rows_S)
    problem_S = index.problem_S[rows_S]
    has_none_S = (problem_S == Problem.NO_SAMPLE) | (problem_S == Problem.DUPLICATE_KEY)
    if not has_none_S.any():
        return keys_S
    numbers = np.array([f"#{row}" for row in rows_S[has_none_S]])
    keys_S = keys_S.astype(np.promote_types(keys_S.dtype, numbers.dtype))
    keys_S[has_none_S] = numbers
    return keys_S


def _of_views(maps: LazyLayers, dtype: str, read: _ReadOfView, attrs: Mapping[str, Any] | None = None) -> xr.Variable:
    column = _Column(maps.shape[:2], dtype, partial(_read_views, maps, read))
    # As the maps. Along samples it stays whole: for a million of them, the maps have too many chunks.
    encoding = {"preferred_chunks": {"view": 1}}
    return xr.Variable(("view", "sample"), indexing.LazilyIndexedArray(column), attrs, encoding)


def _read_views(maps: LazyLayers, read: _ReadOfView, views: np.ndarray, samples: np.ndarray) -> np.ndarray:
    values = [read(maps.cache.reader, int(view), samples) for view in views]
    return np.stack(values) if values else np.empty((0, len(samples)))


def _read_parameter(number: int, reader: CacheReader, view: int, rows_S: np.ndarray) -> np.ndarray:
    return reader.parameters_of(view, rows_S)[:, number]


def _of_tokens(axis: str, geometry: FactorGeometry, teacher: str) -> dict[str, xr.Variable]:
    """Coordinates of the tokens along one axis: number, kind, and row and column of patches, -1 for other tokens."""
    tokens = geometry.tokens
    number = geometry.num_queries if axis == "query" else tokens.num_tokens
    patches_T = np.arange(tokens.num_tokens) - tokens.num_prefix_tokens
    row_T, column_T = (np.where(patches_T < 0, -1, part) for part in np.divmod(patches_T, tokens.grid_width))
    values = {
        axis: np.arange(tokens.num_tokens),
        f"{axis}_token_kind": np.array(token_kinds(tokens, teacher)),
        f"{axis}_patch_row": row_T,
        f"{axis}_patch_column": column_T,
    }
    return {name: xr.Variable(axis, values_T[:number]) for name, values_T in values.items()}


def _flag_meanings() -> str:
    """The names of statuses as the CF conventions write them."""
    return " ".join(describe_status(status).replace(" ", "_") for status in Status)
