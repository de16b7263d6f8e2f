"""The arrays written once, when a cache is created: the sample table, the codec's state, the teacher's bias.

They are written with zarr-python and read without it: reading then needs no event loop, which would cause trouble in
forked data loaders, and each chunk's size is checked before it is decompressed.
"""

from __future__ import annotations

import math
import re
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from atcache.errors import ConfigError, CorruptCacheError
from atcache.files.durable import encode_json
from atcache.files.location import Location, parse_location
from atcache.files.ranges import read_file
from atcache.files.sizes import size_text
from atcache.store.chunks import ZSTD_LEVEL, DamagedChunkError, decompress_into
from atcache.store.layout import MAX_CHUNK_NBYTES, ZSTD, max_encoded_nbytes
from atcache.store.metadata import list_arrays, parse_json

if TYPE_CHECKING:
    from atcache.images.source import SampleIndex

ROWS_PER_CHUNK = 65_536
MAX_KEY_NBYTES = 4096
# Limits on what a damaged or hostile cache can make a reader allocate.
MAX_ARRAY_NBYTES = 2**34
MAX_NUM_CHUNKS = 2**20
"""Limit for one array: the largest sample table has 2^15 chunks in a column."""
_MAX_NUM_AXES = 16
_MOST_PROBLEMS = 3
"""So many chunks of one array are reported: if the disk that held them is gone, there may be thousands."""
MAX_STATE_NBYTES = 2**31
"""Limit for a codec's fitted arrays together. Codec transform's take a few hundred MB for a ViT-g."""

SAMPLE_DTYPES = {"tar": "int32", "offset": "int64", "nbytes": "int64", "label": "int64", "problem": "uint8"}
"""Columns of the sample table except `key`."""

_STATE_DTYPES = tuple(map(np.dtype, ("float32", "float16", "int32", "int8", "uint8")))
_DTYPES = {dtype.name: dtype for dtype in (*_STATE_DTYPES, np.dtype("int64"))}
"""What a zarr.json may name. numpy would take other texts for types too, and fail at some with any kind of error."""
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

    @property
    def chunk_nbytes(self) -> int:
        """Bytes of a chunk in memory."""
        return math.prod(self.chunk_shape) * self.dtype.itemsize

    @property
    def num_chunks(self) -> int:
        """Chunks, each of whole rows; a single number is one chunk."""
        return -(-self.shape[0] // self.chunk_shape[0]) if self.shape else 1

    def chunk_file(self, number: int) -> str:
        """Path of a chunk in the array's folder."""
        return "/".join(["c", *([str(number)] if self.shape else []), *["0"] * len(self.shape[1:])])


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


def describe_array(root: Location, name: str) -> tuple[tuple[int, ...], str]:
    """Shape and type of an array of `write_array`; only its zarr.json is read.

    Raises:
        CorruptCacheError: its zarr.json cannot be used.
    """
    info = _read_info(root / name)
    return info.shape, info.dtype.name


def _read_values(folder: Location, info: _ArrayInfo) -> np.ndarray:
    if not info.shape:
        return _read_chunk(folder, info, 0)
    values, step = np.empty(info.shape, info.dtype), info.chunk_shape[0]
    for number in range(info.num_chunks):
        rows = values[number * step : (number + 1) * step]
        rows[...] = _read_chunk(folder, info, number)[: len(rows)]
    return values


def check_array(root: Location, name: str) -> list[str]:
    """What is wrong with the files of an array of `write_array`, a sentence each; empty if all can be read."""
    folder, problems = root / name, list[str]()
    try:
        info = _read_info(folder)
    except CorruptCacheError as error:
        return [str(error)]
    for number in range(info.num_chunks):
        try:
            _read_chunk(folder, info, number)
        except CorruptCacheError as error:
            problems.append(str(error))
        if len(problems) == _MOST_PROBLEMS:
            left = info.num_chunks - number - 1
            return [*problems, f"{folder}: {left} more of its chunks were not looked at."] if left else problems
    return problems


def array_files(root: Location, name: str) -> set[str]:
    """Paths in the cache of the files that an array of `write_array` consists of; only its zarr.json is read.

    Raises:
        CorruptCacheError: its zarr.json cannot be used.
    """
    info = _read_info(root / name)
    return {f"{name}/zarr.json", *(f"{name}/{info.chunk_file(number)}" for number in range(info.num_chunks))}


def _read_chunk(folder: Location, info: _ArrayInfo, number: int) -> np.ndarray:
    """One whole chunk; rows beyond the end of the array are padding."""
    file = folder / info.chunk_file(number)
    chunk = np.empty(info.chunk_shape, info.dtype)
    try:
        packed = read_file(file, max_encoded_nbytes(info.chunk_nbytes))
        decompress_into(packed, ZSTD, chunk.reshape(-1).view(np.uint8))
    except (DamagedChunkError, OSError) as error:
        raise CorruptCacheError(
            f"{file} is damaged: {error}. It was written when the cache was created; restore it from a copy, or "
            "build the cache again."
        ) from error
    return chunk


def _read_info(folder: Location) -> _ArrayInfo:
    file = folder / "zarr.json"
    try:
        metadata = parse_json(read_file(file))
        info = _ArrayInfo(
            shape=_sides(metadata["shape"]),
            chunk_shape=_sides(metadata["chunk_grid"]["configuration"]["chunk_shape"]),
            dtype=_DTYPES[metadata["data_type"]],
        )
        codecs = [codec["name"] for codec in metadata["codecs"]]
    except FileNotFoundError as error:
        raise CorruptCacheError(
            f"{file} is missing, without which the cache cannot be read. Restore it from a copy, or build the cache "
            "again."
        ) from error
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise CorruptCacheError(f"{file} does not describe an array ({type(error).__name__}: {error}).") from error
    # Python integers do not overflow, but memory does. As chunks are whole rows, they are counted along one axis.
    is_sane = (
        len(info.shape) == len(info.chunk_shape)
        and info.chunk_shape[1:] == info.shape[1:]
        and info.chunk_nbytes <= MAX_CHUNK_NBYTES
        and info.nbytes <= MAX_ARRAY_NBYTES
        and info.num_chunks <= MAX_NUM_CHUNKS
    )
    if not is_sane or codecs != ["bytes", "zstd", "crc32c"]:
        raise CorruptCacheError(
            f"{file} describes an array of shape {info.shape} in chunks of {info.chunk_shape}, type {info.dtype}, "
            f"codecs {reprlib.repr(codecs)}; expected a small array in at most {MAX_NUM_CHUNKS} chunks of whole rows, "
            "with the codecs bytes, zstd, crc32c. Restore it from a copy."
        )
    return info


def _sides(values: Any) -> tuple[int, ...]:  # noqa: ANN401 - any JSON value
    sides: list[Any] = cast("list[Any]", values) if isinstance(values, list) else [None]
    if len(sides) > _MAX_NUM_AXES or not all(type(side) is int and side > 0 for side in sides):
        raise ValueError(f"{reprlib.repr(cast('object', values))} is no list of whole numbers above 0")
    return tuple(sides)


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

    Raises:
        CorruptCacheError: it is damaged, or holds what no build writes.
    """
    from atcache.images.class_names import ClassNames
    from atcache.images.source import SampleIndex

    file = root / group / "zarr.json"
    try:
        attributes = parse_json(read_file(file))["attributes"]
        names, folders = [[str(text) for text in attributes[name]] for name in ("tars", "folders")]
        tar_nbytes = _sizes(attributes["tar_nbytes"])
        classes = ClassNames(tuple(_texts(attributes.get("classes", []))), str(root))
        places = {folder: parse_location(folder) for folder in set(folders)}
        tars = tuple(places[folder] / name for folder, name in zip(folders, names, strict=True))
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise CorruptCacheError(f"{file} does not list the tars ({type(error).__name__}: {error}).") from error
    problem = find_bad_tar_name(names)
    if problem is not None or len(tar_nbytes) != len(names):
        raise CorruptCacheError(f"{file} lists the tar {problem!r}; expected plain, different file names with sizes.")
    keys_SN = _read_column(root, f"{group}/key", num_samples, "uint8", num_axes=2)
    columns = {name: _read_column(root, f"{group}/{name}", num_samples, dtype) for name, dtype in SAMPLE_DTYPES.items()}
    _check_samples(root / group, keys_SN, columns, len(tars))
    return SampleIndex(
        tars=tars,
        tar_nbytes=tar_nbytes,
        tar_versions=(),
        classes=classes,
        keys_S=keys_SN.view(f"S{keys_SN.shape[1]}").reshape(num_samples),
        **{f"{name}_S": column for name, column in columns.items()},
    )


def _read_column(root: Location, name: str, num_samples: int, dtype: str, num_axes: int = 1) -> np.ndarray:
    """A column of the sample table, of the shape and type that it must have; else nothing of it is read."""
    folder = root / name
    info = _read_info(folder)
    is_right = info.shape[:1] == (num_samples,) and len(info.shape) == num_axes and info.dtype == dtype
    if not is_right or any(side > MAX_KEY_NBYTES for side in info.shape[1:]):
        expected = ", ".join([str(num_samples), f"1 to {MAX_KEY_NBYTES}"][:num_axes])
        raise CorruptCacheError(
            f"{folder} has shape {info.shape} and type {info.dtype}, expected ({expected}) and {dtype}, as the cache's "
            "layout says. Restore it from a copy."
        )
    return _read_values(folder, info)


def _check_samples(table: Location, keys_SN: np.ndarray, columns: Mapping[str, np.ndarray], num_tars: int) -> None:
    """Refuse values that no build writes: all who read the table rely on them."""
    from atcache.images.tar_samples import Problem

    known = [int(problem) for problem in Problem]
    label_S, tar_S, problem_S = columns["label"], columns["tar"], columns["problem"]
    wrong = {
        "tar": ((tar_S < 0) | (tar_S >= num_tars), f"0 to {num_tars - 1}: the cache lists {num_tars} tars"),
        "label": (label_S < -1, "a class, or -1 for none"),
        "problem": (~np.isin(problem_S, known), f"one of {', '.join(map(str, known))}"),
    }
    for name, (is_wrong_S, expected) in wrong.items():
        if is_wrong_S.any():
            row = int(is_wrong_S.argmax())
            raise CorruptCacheError(
                f"{table}/{name} holds {columns[name][row]} for sample {row}, expected {expected}. Restore it from a "
                "copy."
            )
    if (row := _find_bad_key(keys_SN)) is not None:
        raise CorruptCacheError(
            f"{table}/key holds {keys_SN[row].tobytes()[:40]!r} for sample {row}, expected text in UTF-8. Restore it "
            "from a copy."
        )


def _find_bad_key(keys_SN: np.ndarray) -> int | None:
    """The first key that is not UTF-8; None if all are."""
    if keys_SN.max() < 128:  # ASCII, as most are: then none of millions is decoded
        return None
    ended_SN = np.pad(keys_SN, ((0, 0), (0, 1)))  # a letter must not reach from one key into the next
    try:
        ended_SN.tobytes().decode()
    except UnicodeDecodeError as error:
        return error.start // ended_SN.shape[1]
    return None


def _sizes(values: Any) -> tuple[int, ...]:  # noqa: ANN401 - any JSON value
    sizes: list[Any] = cast("list[Any]", values) if isinstance(values, list) else [None]
    if not all(type(nbytes) is int and 0 <= nbytes < 2**63 for nbytes in sizes):
        raise ValueError("tar_nbytes is not a list of sizes")
    return tuple(sizes)


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
    for name, info in infos.items():
        if info.dtype not in _STATE_DTYPES:
            expected = ", ".join(map(str, _STATE_DTYPES))
            raise CorruptCacheError(
                f"{group / name} is {info.dtype}; a cache holds {expected}. Restore it from a copy."
            )
    nbytes = sum(info.nbytes for info in infos.values())
    if nbytes > MAX_STATE_NBYTES:
        raise CorruptCacheError(
            f"{group} describes {len(infos)} arrays of {size_text(nbytes)} in all; expected at most "
            f"{size_text(MAX_STATE_NBYTES)}. Restore it from a copy."
        )
    return {name: _read_values(group / name, info) for name, info in infos.items()}
