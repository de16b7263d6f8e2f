"""The arrays written once, when a cache is created: the sample table, the codec's state, the teacher's bias.

They are written with zarr-python and read without it: reading then needs no event loop, which would cause trouble in
forked data loaders, and each chunk's size is checked before it is decompressed.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from atcache.errors import ConfigError, CorruptCacheError
from atcache.files.durable import encode_json
from atcache.files.location import Location, parse_location
from atcache.files.ranges import read_file
from atcache.store.chunks import ZSTD_LEVEL, DamagedChunkError, decompress_into
from atcache.store.layout import MAX_CHUNK_NBYTES, ZSTD
from atcache.store.metadata import list_arrays

if TYPE_CHECKING:
    from atcache.images.source import SampleIndex

ROWS_PER_CHUNK = 65_536
MAX_KEY_NBYTES = 4096
# Limits on what a damaged or hostile cache can make a reader allocate.
MAX_ARRAY_NBYTES = 2**34
MAX_STATE_NBYTES = 2**31
"""Limit for a codec's fitted arrays together. Codec transform's take a few hundred MB for a ViT-g."""

SAMPLE_DTYPES = {"tar": "int32", "offset": "int64", "nbytes": "int64", "label": "int64", "problem": "uint8"}
"""Columns of the sample table except `key`."""

_STATE_DTYPES = tuple(map(np.dtype, ("float32", "float16", "int32", "int8", "uint8")))
_STATE_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,63}")


@dataclass(frozen=True, kw_only=True, slots=True)
class _ArrayInfo:
    """The parts of an array's zarr.json that reading needs."""

    shape: tuple[int, ...]
    chunk_shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def nbytes(self) -> int:
        """Bytes of the whole array in memory."""
        return math.prod(self.shape) * self.dtype.itemsize

    def places(self) -> Iterator[tuple[int, ...]]:
        """Each chunk's place in the grid of chunks."""
        grid = [-(-side // step) for side, step in zip(self.shape, self.chunk_shape, strict=True)]
        return iter(np.ndindex(*grid))


def write_group(folder: Path, attributes: Mapping[str, Any] | None = None) -> None:
    """Make a folder a Zarr group; the folder is created if it does not exist."""
    folder.mkdir(parents=True, exist_ok=True)
    group = {"zarr_format": 3, "node_type": "group", "attributes": dict(attributes or {})}
    (folder / "zarr.json").write_bytes(encode_json(group))


def write_array(root: Path, name: str, values: np.ndarray, dimension_names: tuple[str, ...] | None) -> None:
    """Write a small array in chunks of whole rows, with the codecs [bytes, zstd, crc32c]."""
    import zarr
    from zarr.codecs import BytesCodec, Crc32cCodec, ZstdCodec

    row_nbytes = math.prod(values.shape[1:]) * values.itemsize
    # At most 64 MiB in a chunk, but at least one row.
    num_rows = max(1, min(ROWS_PER_CHUNK, 2**26 // max(1, row_nbytes), *values.shape[:1]))
    array = zarr.create_array(
        store=str(root),
        name=name,
        shape=values.shape,
        dtype=values.dtype.name,
        chunks=(num_rows, *values.shape[1:]) if values.ndim else (),
        serializer=BytesCodec(endian="little"),
        filters=None,
        compressors=[ZstdCodec(level=ZSTD_LEVEL, checksum=False), Crc32cCodec()],
        fill_value=0,
        dimension_names=dimension_names,
        config={"write_empty_chunks": True},  # readers take a missing file for damage, not for a chunk of zeros
    )
    array[...] = values


def read_array(root: Location, name: str) -> np.ndarray:
    """The whole of an array that `write_array` wrote.

    Raises:
        CorruptCacheError: a file is missing or damaged, or is not such an array.
    """
    folder = root / name
    return _read_values(folder, _read_info(folder))


def _read_values(folder: Location, info: _ArrayInfo) -> np.ndarray:
    values = np.empty(info.shape, info.dtype)
    for place in info.places():
        chunk = _read_chunk(folder, info, place)
        starts = [number * step for number, step in zip(place, info.chunk_shape, strict=True)]
        target = tuple(
            slice(start, min(start + step, side))
            for start, step, side in zip(starts, info.chunk_shape, info.shape, strict=True)
        )
        values[target] = chunk[tuple(slice(0, span.stop - span.start) for span in target)]
    return values


def check_array(root: Location, name: str) -> list[str]:
    """What is wrong with the files of an array of `write_array`, a sentence each; empty if all can be read."""
    folder, problems = root / name, list[str]()
    try:
        info = _read_info(folder)
    except CorruptCacheError as error:
        return [str(error)]
    for place in info.places():
        try:
            _read_chunk(folder, info, place)
        except CorruptCacheError as error:
            problems.append(str(error))
    return problems


def array_files(root: Location, name: str) -> set[str]:
    """Paths in the cache of the files that an array of `write_array` consists of; only its zarr.json is read.

    Raises:
        CorruptCacheError: its zarr.json cannot be used.
    """
    chunks = {"/".join([name, "c", *map(str, place)]) for place in _read_info(root / name).places()}
    return {f"{name}/zarr.json", *chunks}


def _read_chunk(folder: Location, info: _ArrayInfo, place: tuple[int, ...]) -> np.ndarray:
    """One whole chunk; rows beyond the end of the array are padding."""
    file = folder / "/".join(["c", *map(str, place)])
    chunk = np.empty(info.chunk_shape, info.dtype)
    try:
        decompress_into(read_file(file), ZSTD, chunk.reshape(-1).view(np.uint8))
    except (DamagedChunkError, OSError) as error:
        raise CorruptCacheError(
            f"{file} is damaged: {error}. It was written when the cache was created; restore it from a copy, or "
            "build the cache again."
        ) from error
    return chunk


def _read_info(folder: Location) -> _ArrayInfo:
    file = folder / "zarr.json"
    try:
        metadata = json.loads(read_file(file))
        info = _ArrayInfo(
            shape=tuple(int(side) for side in metadata["shape"]),
            chunk_shape=tuple(int(side) for side in metadata["chunk_grid"]["configuration"]["chunk_shape"]),
            dtype=np.dtype(str(metadata["data_type"])),
        )
        codecs = [codec["name"] for codec in metadata["codecs"]]
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise CorruptCacheError(f"{file} does not describe an array ({type(error).__name__}: {error}).") from error
    # Sizes are small before they are multiplied: Python integers do not overflow, but memory does.
    is_sane = (
        len(info.shape) == len(info.chunk_shape)
        and all(side >= 0 for side in info.shape)
        and all(side >= 1 for side in info.chunk_shape)
        and math.prod(info.chunk_shape) * info.dtype.itemsize <= MAX_CHUNK_NBYTES
        and info.nbytes <= MAX_ARRAY_NBYTES
        and info.dtype.kind in "iuf"
    )
    if not is_sane or codecs != ["bytes", "zstd", "crc32c"]:
        raise CorruptCacheError(
            f"{file} describes an array of shape {info.shape} in chunks of {info.chunk_shape}, type {info.dtype}, "
            f"codecs {codecs}; expected a small array with the codecs bytes, zstd, crc32c."
        )
    return info


def write_samples(root: Path, index: SampleIndex, group: str = "samples") -> None:
    """Write the sample table: one row for each sample, and tar names in the group's attributes.

    Args:
        root: the cache.
        index: the samples.
        group: the group it is in, see `StoreLayout.samples_group`.
    """
    names = [tar.name for tar in index.tars]
    problem = find_bad_tar_name(names)
    if problem is not None:
        raise ConfigError(f"tar name {problem!r} cannot be stored; expected plain, different file names.")
    key_nbytes = index.keys_S.dtype.itemsize
    if key_nbytes > MAX_KEY_NBYTES:
        raise ConfigError(f"a sample key has {key_nbytes} bytes, the limit is {MAX_KEY_NBYTES}. Use shorter keys.")
    attributes: dict[str, Any] = {
        "tars": names,
        "tar_nbytes": [int(nbytes) for nbytes in index.tar_nbytes],
        "folders": [str(tar.parent.absolute()) for tar in index.tars],
        "fingerprint": index.fingerprint,
    }
    if index.classes.names:
        attributes["classes"] = list(index.classes.names)
    write_group(root / group, attributes)
    keys_SN = np.ascontiguousarray(index.keys_S).view(np.uint8).reshape(len(index.keys_S), key_nbytes)
    write_array(root, f"{group}/key", keys_SN, ("sample", "key_byte"))
    for name, dtype in SAMPLE_DTYPES.items():
        column_S = np.asarray(getattr(index, f"{name}_S")).astype(dtype, casting="safe", copy=False)
        write_array(root, f"{group}/{name}", column_S, ("sample",))


def read_samples(root: Location, num_samples: int, group: str = "samples") -> SampleIndex:
    """The sample table in a group.

    Its tars have their paths of build time; `images.source.relocate` finds them elsewhere.
    """
    from atcache.images.class_names import ClassNames
    from atcache.images.source import SampleIndex

    file = root / group / "zarr.json"
    try:
        attributes = json.loads(read_file(file))["attributes"]
        names, folders = [[str(text) for text in attributes[name]] for name in ("tars", "folders")]
        tar_nbytes = tuple(int(nbytes) for nbytes in attributes["tar_nbytes"])
        classes = ClassNames(tuple(_texts(attributes.get("classes", []))), str(root))
        places = {folder: parse_location(folder) for folder in set(folders)}
        tars = tuple(places[folder] / name for folder, name in zip(folders, names, strict=True))
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise CorruptCacheError(f"{file} does not list the tars ({type(error).__name__}: {error}).") from error
    problem = find_bad_tar_name(names)
    if problem is not None or len(tar_nbytes) != len(names):
        raise CorruptCacheError(f"{file} lists the tar {problem!r}; expected plain, different file names with sizes.")
    keys_SN = read_array(root, f"{group}/key")
    columns = {name: read_array(root, f"{group}/{name}") for name in SAMPLE_DTYPES}
    for name, column_S in columns.items():
        if column_S.shape != (num_samples,) or column_S.dtype != SAMPLE_DTYPES[name]:
            raise CorruptCacheError(f"{root}/{group}/{name} has shape {column_S.shape}, expected ({num_samples},).")
    if keys_SN.ndim != 2 or keys_SN.dtype != np.uint8 or len(keys_SN) != num_samples or keys_SN.shape[1] < 1:
        raise CorruptCacheError(f"{root}/{group}/key has shape {keys_SN.shape}, expected ({num_samples}, key bytes).")
    tar_S = columns["tar"]
    if num_samples and (tar_S.min() < 0 or tar_S.max() >= len(tars)):
        raise CorruptCacheError(f"{root}/{group}/tar names tar {tar_S.max()}, the cache lists {len(tars)}.")
    return SampleIndex(
        tars=tars,
        tar_nbytes=tar_nbytes,
        tar_versions=(),
        classes=classes,
        keys_S=keys_SN.view(f"S{keys_SN.shape[1]}").reshape(num_samples),
        **{f"{name}_S": column for name, column in columns.items()},
    )


def _texts(values: Any) -> list[str]:  # noqa: ANN401 - any JSON value
    if not isinstance(values, list) or not all(isinstance(value, str) for value in cast("list[Any]", values)):
        raise TypeError("classes is not a list of names")
    return cast("list[str]", values)


def find_bad_tar_name(names: list[str]) -> str | None:
    """The first name that is not a plain file name (it could lead out of the tars' folder) or appears twice."""
    seen: set[str] = set()
    for name in names:
        if name in {"", ".", ".."} or name in seen or any(letter in name for letter in "/\\\0"):
            return name
        seen.add(name)
    return None


def write_state(root: Path, state: Mapping[str, np.ndarray], bias_LHQK: np.ndarray | None) -> None:
    """Write a codec's fitted state, and the teacher's bias if it has one."""
    write_group(root / "attention" / "state")
    for name, values in state.items():
        if not _STATE_NAME.fullmatch(name):
            raise ConfigError(f"codec state {name!r} cannot be stored; expected a name of letters, digits and _.")
        if values.dtype not in _STATE_DTYPES:
            expected = ", ".join(map(str, _STATE_DTYPES))
            raise ConfigError(f"codec state {name!r} is {values.dtype}; a cache holds {expected}.")
        write_array(root, f"attention/state/{name}", values, None)
    if bias_LHQK is not None:
        write_array(root, "attention/bias", bias_LHQK.astype(np.float32), ("layer", "head", "query", "key"))


def read_state(root: Location) -> dict[str, np.ndarray]:
    """A codec's fitted state by name.

    Raises:
        CorruptCacheError: a file is missing or damaged, or the arrays are larger than any codec needs for a ViT.
    """
    group = root / "attention/state"
    infos = {name: _read_info(group / name) for name in list_arrays(root, "attention/state")}
    nbytes = sum(info.nbytes for info in infos.values())
    if nbytes > MAX_STATE_NBYTES:
        raise CorruptCacheError(
            f"{group} describes {len(infos)} arrays of {nbytes / 1e9:.3g} GB in all; expected at most "
            f"{MAX_STATE_NBYTES / 1e9:.3g} GB. Restore it from a copy."
        )
    return {name: _read_values(group / name, info) for name, info in infos.items()}
