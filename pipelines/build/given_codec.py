"""A codec that comes from another cache with its fitted state, for `atcache build --codec-from`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
import torch

from atcache.attention.indices import parse_indices
from atcache.cache.coders import stored_coder
from atcache.cache.differences import name_differences
from atcache.cache.identity import CacheIdentity, Precision
from atcache.cache.record import CacheRecord
from atcache.codecs.base import Codec, State
from atcache.errors import CacheMismatchError
from atcache.files.location import Location
from atcache.store.reader import CacheReader
from atcache.teachers.devices import resolve_device, resolve_precision
from atcache.teachers.foreign.names import is_foreign
from atcache.teachers.names import parse_model_name

from ..running.run_teacher import recorded_name
from .config import BuildConfig


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class GivenCodec:
    """The codec of another cache. That one may be unfinished: its codec was fitted when it was begun."""

    path: Location
    """The other cache."""
    codec: Codec
    compressor: str
    """How that cache's codes are compressed. Caches with one codec can be merged if this is the same too."""
    _record: CacheRecord
    _arrays: Mapping[str, np.ndarray]

    @classmethod
    def read(cls, path: Location) -> Self:
        """The codec of the cache at `path`.

        Raises:
            AtcacheError: there is no cache, or its codec and state cannot be used; what `CacheReader` raises.
        """
        reader = CacheReader(path)
        record = CacheRecord.of(reader)
        codec = record.make_codec(path)
        stored_coder(reader, codec, record.geometry)  # so that damage is named now, with its file
        return cls(path=path, codec=codec, compressor=reader.layout.compressor, _record=record, _arrays=reader.state)

    @property
    def state(self) -> State:
        """The fitted arrays."""
        return {name: torch.from_numpy(array) for name, array in self._arrays.items()}

    def check_options(self, config: BuildConfig) -> None:
        """Refuse options that ask for other attention than the codec was fitted to. Loads no teacher.

        Raises:
            CacheMismatchError: names each difference, with both values.
        """
        identity, geometry = self._record.identity, self._record.geometry
        there: dict[str, Any] = {
            "teacher.name": identity.teacher,
            "teacher.precision": identity.precision,
            "store": identity.selection.store,
            "queries": geometry.queries,
        }
        here: dict[str, Any] = {
            "teacher.name": _full_name(config, identity.teacher),
            "teacher.precision": _precision(config),
            "store": config.store,
            "queries": config.queries,
        }
        if here["teacher.name"] == there["teacher.name"]:  # another teacher has other layers and heads to choose from
            there |= {"layers": list(geometry.layers), "heads": list(geometry.heads)}
            layers, heads = ("all" if typed is None else typed for typed in (config.layers, config.heads))
            here["layers"] = list(parse_indices(layers, self._record.depth, what="layer"))
            here["heads"] = list(parse_indices(heads, geometry.num_model_heads, what="head"))
        self._refuse(name_differences(there, here))

    def check_teacher(self, identity: CacheIdentity) -> None:
        """Refuse a teacher that the codec was not fitted to, now that it is loaded.

        Raises:
            CacheMismatchError: names each difference, with both values.
        """
        there, here = self._record.identity.to_json(), identity.to_json()
        self._refuse(name_differences({"teacher": there["teacher"]}, {"teacher": here["teacher"]}))

    def check_continues(self, existing: CacheReader) -> None:
        """Refuse to continue a cache that was begun with another codec, or with another fit of it.

        Raises:
            CacheMismatchError: names each difference.
        """
        stored = CacheRecord.of(existing).identity.codec
        places = (f"in {existing.path}", f"in {self.path}")
        differences = name_differences({"codec": stored}, {"codec": self._record.identity.codec}, places)
        if not differences:
            names = sorted({*existing.state, *self._arrays})
            others = [name for name in names if not _are_same(existing.state.get(name), self._arrays.get(name))]
            differences = [f"its fitted {', '.join(others)} differ"] if others else []
        if differences:
            raise CacheMismatchError(
                f"{existing.path} exists and was not begun with the codec of codec_from={self.path}: "
                f"{'; '.join(differences)}. Give another --out, or the options it was begun with."
            )

    def _refuse(self, differences: list[str]) -> None:
        if differences:
            raise CacheMismatchError(
                f"codec_from={self.path}: the codec of this cache was fitted to other attention: "
                f"{'; '.join(differences)}. Give a cache that agrees in these, or leave out --codec-from."
            )


def _full_name(config: BuildConfig, known: str) -> str:
    """The teacher's name in the form that caches record. `known` completes a name whose tag timm would choose."""
    if is_foreign(config.teacher) or is_foreign(known):
        return str(config.teacher)
    name = parse_model_name(recorded_name(config.teacher))
    if config.weights is not None:
        name = replace(name, weights_at=None)  # as load_teacher has it: the file is not what is published
    full = parse_model_name(known)
    tag_is_left_out = config.weights is None and "." not in name.timm_name
    if tag_is_left_out and (name.architecture, name.arguments) == (full.architecture, full.arguments):
        return known
    return str(name)


def _precision(config: BuildConfig) -> Precision:
    dtype = resolve_precision(config.precision, resolve_device(config.device))
    return "bfloat16" if dtype == torch.bfloat16 else "float32"


def _are_same(array: np.ndarray | None, other: np.ndarray | None) -> bool:
    """Whether both are there and equal, bit for bit."""
    if array is None or other is None:
        return False
    return (array.dtype, array.shape, array.tobytes()) == (other.dtype, other.shape, other.tobytes())
