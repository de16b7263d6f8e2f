"""`Cache`, which `atcache.open` returns: lazy dask arrays of maps and factors, single views, and a description."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast, final

import numpy as np

from atcache.cache.coders import stored_coder
from atcache.cache.decoded import Factors, View
from atcache.cache.lazy_layers import Kind, LazyLayers, OpenCache, lazy_maps
from atcache.cache.record import CacheRecord
from atcache.cache.shown import cache_html
from atcache.errors import CacheMissError
from atcache.files.location import Location
from atcache.store.growth import describe_growth
from atcache.store.layout import FORMAT, Status, describe_status
from atcache.store.manifest import read_commits, summarise_quality
from atcache.store.reader import CacheReader

if TYPE_CHECKING:
    import dask.array as da
    import xarray as xr
    from torch import Tensor

    from atcache.attention.factors import LayerAttention
    from atcache.attention.geometry import FactorGeometry
    from atcache.codecs.base import Codec, Coder
    from atcache.images.source import Source
    from atcache.views.policy import ViewPolicy


@final
class Cache:
    """A cache, open for reading. Opening reads one small file; everything else is read when it is needed.

    Layers and heads have the teacher's own indices. A cache that is still being built can be read: what is missing is
    NaN in arrays, and raises `CacheMissError` in single views. Threads may share a cache; pickled copies open their
    own files.

    Example:
        cache = atcache.open("in1k.zarr")
        cache.geometry.layers, cache.geometry.heads  # those that are stored, by the teacher's indices
        cache.samples.label.values  # one for each sample
    """

    def __init__(self, path: Location | str, *, data: str | Path | Sequence[str | Path] | None = None) -> None:
        """Open a cache.

        Args:
            path: its folder or URL.
            data: where its tars are now, if they were moved since the build. Only needed to replay images from them.

        Raises:
            CacheMissError, CacheMismatchError: as in `CacheReader`.
            CorruptCacheError: what the cache records about itself cannot be used; the message names the member.
        """
        self._hold(CacheReader(path), data)

    def _hold(self, reader: CacheReader, data: str | Path | Sequence[str | Path] | None) -> None:
        self.reader, self._data = reader, data
        self.record = CacheRecord.of(reader)
        """What the cache records about itself."""

    def __getstate__(self) -> tuple[Any, ...]:
        return self.reader, self._data  # so that a copy of a cache that has grown meanwhile is as it was

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self._hold(*state)

    def __repr__(self) -> str:
        layout = self.reader.layout
        return (
            f"<Cache {self.path}: {layout.num_real_samples} samples, {layout.num_views} views, "
            f"{len(self.geometry.layers)} layers>"
        )

    _repr_html_ = cache_html

    @property
    def path(self) -> Location:
        """The cache's folder or URL."""
        return self.reader.path

    @property
    def data(self) -> str | Path | Sequence[str | Path] | None:
        """The `data` that it was opened with: where its tars are now. None if they were not moved."""
        return self._data

    @property
    def attributes(self) -> dict[str, Any]:
        """atcache's own attributes in the cache's zarr.json, unchanged; `docs/format.md` lists them."""
        return self.reader.attributes

    @property
    def geometry(self) -> FactorGeometry:
        """Layers, heads and shapes of the factors."""
        return self.record.geometry

    @property
    def queries(self) -> tuple[int, ...]:
        """The tokens whose rows of the maps are stored, ascending: all, or the first ones (built with --queries)."""
        return tuple(range(self.geometry.num_queries))

    @cached_property
    def codec(self) -> Codec:
        """The codec that turned factors into integers."""
        return self.record.make_codec(self.path)

    @property
    def state(self) -> dict[str, np.ndarray]:
        """The codec's fitted arrays."""
        return self.reader.state

    @cached_property
    def coder(self) -> Coder:
        """The codec bound to this cache's geometry, state and bias, on the CPU."""
        return stored_coder(self.reader, self.codec, self.geometry)

    @property
    def policy(self) -> ViewPolicy:
        """How the views were drawn."""
        return self.record.policy

    @cached_property
    def source(self) -> Source:
        """The tars, for replaying images."""
        from atcache.images.source import Source, relocate

        index = self.reader.samples
        return Source(index if self._data is None else relocate(index, self._data))

    @cached_property
    def samples(self) -> xr.Dataset:
        """One row per sample: sample_key, label, class_name, tar (an index into attribute `tars`), status of each view.

        class_name is empty where the name is not known: if there was no `classes.txt` beside the tars. A cache that has
        grown or was merged may have rows between its parts that no sample has: their status is 255.
        """
        import xarray as xr

        index = self.reader.samples
        columns = {
            "sample_key": ("sample", index.sample_keys()),
            "label": ("sample", index.label_S),
            "class_name": ("sample", index.class_names()),
            "tar": ("sample", index.tar_S),
            "status": (("view", "sample"), self.reader.status_VS),
        }
        meanings = {int(status): describe_status(status) for status in Status}
        return xr.Dataset(columns, attrs={"tars": [str(tar) for tar in index.tars], "status": str(meanings)})

    def factors(self, layer: int, view: int | None = None) -> Factors:
        """q and k of one layer, and v if it is stored, as the codec decodes them: lazy arrays.

        A codec may keep fewer components than the teacher has, in another basis: then only q k^T is the teacher's.

        Args:
            layer: block index of the teacher.
            view: read only this view; the view axis stays, with length 1. None for all.

        Raises:
            CacheMissError: the codec stores maps, not q and k.

        Example:
            q_VSHTD, k_VSHTD, scale, bias_HQK, v_VSHTD = cache.factors(layer=0)
            logits_HQK = scale * (q_VSHTD[0, 0] @ k_VSHTD[0, 0].swapaxes(-1, -2))
        """
        from atcache.attention.factors import LayerMaps

        position = self._layer_position(layer)
        first = 0 if view is None else self._check_view(view)
        views = range(first, self.reader.layout.num_views if view is None else first + 1)
        example = self._example(position)
        if isinstance(example, LayerMaps):
            raise CacheMissError(
                f"{self.path} holds maps (codec {self.codec.name}), so it has no q and k. Use maps() for its maps."
            )
        bias_HQK = None if example.bias is None else example.bias[0].numpy()

        def lazy(kind: Kind, decoded_BHTD: Tensor) -> da.Array:
            _, num_heads, *tail = decoded_BHTD.shape
            return self._lazy_factor(kind, views, position, range(num_heads), *tail)

        v_VSHTD = None if example.v_BHTD is None else lazy("v", example.v_BHTD)
        return Factors(lazy("q", example.q_BHTD), lazy("k", example.k_BHTD), example.scale, bias_HQK, v_VSHTD)

    def maps(self, layer: int, heads: Sequence[int] | None = None) -> da.Array:
        """The maps of one layer, lazy: attn_VSHQK float32, NaN for views that are not stored. Q is `queries`.

        A dask chunk is a shard or an equal part of one, at most about 64 MiB. Indexing, also in several steps, reads
        and decodes only the samples, heads and rows that are picked.

        Args:
            layer: block index of the teacher.
            heads: head indices of the teacher, in the order wanted; None for all that are stored.

        Example:
            attn_SHQK = cache.maps(layer=0, heads=[1])[0, :8].compute()  # of 8 samples, in view 0
        """
        from atcache.cache.lazy_array import LazyArray

        return cast("da.Array", LazyArray(self._lazy_maps(layer, heads)))

    def inputs(self, layer: int, of: Literal["attention", "mlp"]) -> da.Array:
        """What attention or MLP of one layer got, after its norm: lazy x_VSTC float32, if built with --store x.

        Args:
            layer: block index of the teacher.
            of: which of the two.
        """
        from atcache.attention.factors import INPUTS

        if of not in INPUTS:
            raise CacheMissError(f"inputs of {of!r} are never stored: expected one of {', '.join(INPUTS)}.")
        position, width = self._layer_position(layer), self.geometry.input_width
        if not width:
            raise CacheMissError(f"{self.path} holds no inputs of attention and MLP. Build it with --store x.")
        views, num_tokens = range(self.reader.layout.num_views), self.geometry.tokens.num_tokens
        return self._lazy_factor("inputs", views, position, INPUTS.index(of), num_tokens, width)

    def to_xarray(self, layer: int | None = None, heads: Sequence[int] | None = None) -> xr.DataArray:
        """The maps with named axes and coordinates: (view, sample, layer, head, query, key), lazy as `maps`.

        Without a layer it is the `attention` of `xr.open_dataset(path, engine="atcache", chunks={})`. `sample` is an
        index of keys. The other coordinates are label, class_name, status and the view's box and flip, and the kind,
        row and column of the tokens along query and key.

        Args:
            layer: block index of the teacher: only this layer, without an axis. None for all that are stored.
            heads: head indices of the teacher, in the order wanted; None for all that are stored.

        Example:
            attn = cache.to_xarray()
            key = cache.view(sample=3).sample_key
            attn.sel(sample=key, layer=0, query=0).isel(view=0)  # (head, key)
            attn = cache.to_xarray(layer=0).isel(view=0)
            mean_of_class_3 = attn[(attn.label == 3).values].mean("sample").compute()
        """
        import xarray as xr

        from atcache.cache.lazy_array import LazyArray
        from atcache.cache.xarray_engine import AtcacheBackend

        maps = self._lazy_maps(layer, heads)
        labelled = xr.open_dataset(cast("Any", maps), engine=AtcacheBackend)["attention"]
        # Only the maps become a dask array: one computes with coordinates at once.
        labelled = labelled.copy(deep=False, data=LazyArray(maps))
        return labelled if layer is None else labelled.rename(f"attention_layer_{layer}")

    def view(self, sample: int | str, view: int = 0) -> View:
        """One view of one sample: image, and maps of all stored layers.

        Args:
            sample: its row, or its sample_key.
            view: which of its views.

        Raises:
            CacheMissError: the sample or view is unknown or not stored; the message says why.
            CacheMismatchError: the image replayed from the tars is not the one the teacher saw.
            SourceError: the tars are not where they were; open the cache with `data=`.

        Example:
            view = cache.view(sample=3)
            view.image.shape, view.maps_LHQK.shape  # (height, width, 3), (layer, head, query, key)
        """
        import torch

        from atcache.views.rendering import stored_mix

        row = self.find_sample(sample) if isinstance(sample, str) else sample
        reader = self.reader
        codes_BLTC = torch.from_numpy(reader.read_codes(view, row)[None])
        with torch.inference_mode():
            decoded = self.coder.decode(codes_BLTC)
            layers = [decoded.layer(position) for position in range(len(self.geometry.layers))]
            maps = [layer.maps()[0] for layer in layers]
            inputs = [x[0] for layer in layers if (x := getattr(layer, "inputs_BNTC", None)) is not None]
        mix = stored_mix(self.policy, reader.parameters(view, row))
        label = int(reader.labels_S[row])
        return View(
            sample=row,
            sample_key=reader.samples.sample_key(row),
            view=view,
            label=label,
            class_name=reader.samples.classes.name(label),
            partner=row + mix.partner if mix.partner else None,
            share=mix.share,
            status=reader.status(view, row),
            image=self.image(row, view),
            maps_LHQK=torch.stack(maps).numpy(),
            inputs_LNTC=torch.stack(inputs).numpy() if inputs else None,
            geometry=self.geometry,
        )

    def image(self, sample: int, view: int = 0) -> np.ndarray:
        """The pixels of one view of one sample, uint8 (height, width, 3): stored, or replayed and checked by hash."""
        reader = self.reader
        if reader.layout.pixels is not None:
            return reader.read_pixels(view, sample)
        from atcache.views.rendering import replay_view

        parameters_of, versions = partial(reader.parameters, view), self.record.created_by.views
        return replay_view(self.source, self.policy, sample, parameters_of, reader.pixel_hash(view, sample), versions)

    def find_sample(self, sample_key: str) -> int:
        """The row of a sample_key, "TAR_NAME/KEY".

        Raises:
            CacheMissError: no sample has this key.

        Example:
            key = cache.view(sample=3).sample_key
            cache.find_sample(key)  # 3
        """
        index = self.reader.samples
        tar_name, _, key = sample_key.partition("/")
        tar = next((number for number, tar in enumerate(index.tars) if tar.name == tar_name), -1)
        rows = np.flatnonzero((index.tar_S == tar) & (index.keys_S == key.encode(errors="surrogatepass")))
        if not len(rows):
            raise CacheMissError(
                f"no sample has the key {sample_key!r} in {self.path}; the first is {index.sample_key(0)!r}."
            )
        # A sample whose key came before keeps its row, which is marked as a problem. The good row is meant.
        return int(min(rows, key=lambda row: (int(index.problem_S[row]) != 0, int(row))))

    def describe(self) -> dict[str, Any]:
        """What `atcache info` shows, as a JSON object: contents, sizes, and what is missing.

        Sizes are those of the shards. `codes_nbytes_per_view` counts codes only, `nbytes_per_view` everything: also
        pixels, parameters, hash and status.

        Example:
            cache.describe()["nbytes_per_view"]
        """
        reader, layout, geometry = self.reader, self.reader.layout, self.record.geometry
        about, totals = self.record.to_json(), self._totals()
        num_stored = max(1, totals["num_stored"])
        map_nbytes = geometry.map_nbytes
        code_nbytes = totals["codes_nbytes"] / num_stored
        return {
            "path": str(self.path),
            "format": FORMAT,
            **{name: about[name] for name in ("teacher", "source", "views", "codec", "created_by")},
            "layers": list(geometry.layers),
            "heads": list(geometry.heads),
            "stores_v": geometry.v_head_dim > 0,
            "stores_x": geometry.input_width > 0,
            "num_tokens": geometry.tokens.num_tokens,
            "num_queries": geometry.num_queries,
            "num_samples": layout.num_real_samples,
            "num_views": layout.num_views,
            "num_tasks": layout.num_tasks,
            **totals,
            "codes_nbytes_per_view": round(code_nbytes),
            "nbytes_per_view": round(totals["nbytes"] / num_stored),
            "map_nbytes_per_view": map_nbytes,
            "times_smaller_than_float16_maps": map_nbytes / code_nbytes if code_nbytes else None,
            "is_complete": reader.is_complete,
            "growth": describe_growth(self.path, reader.committed_tasks()) if isinstance(self.path, Path) else None,
        }

    def _totals(self) -> dict[str, Any]:
        """Sums over the committed tasks: recorded in a complete cache, else added up here."""
        names = ("num_stored", "num_bad", "nbytes", "codes_nbytes")
        if self.record.complete is not None and self.reader.is_complete:
            complete = self.record.complete.to_json()
            sums = {name: complete[name] for name in names}
            return {**sums, "num_tasks_done": complete["num_tasks"], "quality": complete["quality"]}
        commits = [commit for commit in read_commits(self.path).values() if self.reader.layout.has_task(commit.task)]
        sums = {name: sum(getattr(commit, name) for commit in commits) for name in names}
        return {**sums, "num_tasks_done": len(commits), "quality": summarise_quality(commits)}

    def _layer_position(self, layer: int) -> int:
        if layer not in self.geometry.layers:
            stored = ", ".join(map(str, self.geometry.layers))
            raise CacheMissError(
                f"layer {layer} of the teacher is not stored in {self.path}, only layers {stored} are."
            )
        return self.geometry.layers.index(layer)

    def _lazy_maps(self, layer: int | None, heads: Sequence[int] | None) -> LazyLayers:
        position = None if layer is None else self._layer_position(layer)
        return lazy_maps(cast("OpenCache", self), position, self._head_positions(heads))

    def _head_positions(self, heads: Sequence[int] | None) -> tuple[int, ...]:
        stored = self.geometry.heads
        missing = [head for head in (() if heads is None else heads) if head not in stored]
        if missing:
            raise CacheMissError(
                f"head {missing[0]} of the teacher is not stored in {self.path}, only heads "
                f"{', '.join(map(str, stored))} are."
            )
        return tuple(range(len(stored)) if heads is None else (stored.index(head) for head in heads))

    def _check_view(self, view: int) -> int:
        if not 0 <= view < self.reader.layout.num_views:
            raise CacheMissError(f"view {view} is not in {self.path}: it has {self.reader.layout.num_views} views.")
        return view

    def _lazy_factor(
        self, kind: Kind, views: range, position: int, heads: int | range, num_tokens: int, width: int
    ) -> da.Array:
        from atcache.cache.lazy_array import LazyArray

        axes = (views, range(self.reader.layout.num_samples), position, heads, range(num_tokens), range(width))
        return cast("da.Array", LazyArray(LazyLayers(cache=cast("OpenCache", self), kind=kind, axes=axes)))

    def _example(self, position: int) -> LayerAttention:
        """This layer's attention decoded from zeros, which shows its kind, shapes and scale."""
        import torch

        layout = self.reader.layout
        shape = (1, layout.num_layers, layout.num_tokens, layout.num_components)
        return self.coder.decode(torch.from_numpy(np.zeros(shape, layout.codes_dtype))).layer(position)
