"""Where images come from: WebDataset tars, indexed once from their headers, then read in place by `pread`."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from atcache.errors import BadImageError, SourceError
from atcache.files.location import Location, Url
from atcache.files.ranges import RangeFile, open_file
from atcache.images.decode import decode_image
from atcache.images.tar_samples import Problem, index_tar
from atcache.images.tars import expand_tars

if TYPE_CHECKING:
    from PIL.Image import Image

_MAX_OPEN_TARS = 64
_NUM_REQUESTS = 16
_COLUMN_DTYPES = {"tar": "int32", "offset": "int64", "nbytes": "int64", "label": "int64", "problem": "uint8"}


@dataclass(frozen=True, eq=False)
class SampleIndex:
    """Where every sample lies: one row a sample, in tar order."""

    tars: tuple[Location, ...]
    """The tars, local or remote, each with a basename of its own."""
    tar_nbytes: tuple[int, ...]
    """Their sizes when they were indexed."""
    keys_S: np.ndarray[Any, Any]
    """WebDataset's `__key__` as UTF-8 bytes, dtype S<n>."""
    tar_S: np.ndarray[Any, Any]
    """Position in `tars`, int32."""
    offset_S: np.ndarray[Any, Any]
    """Where the image's bytes begin in the tar, int64."""
    nbytes_S: np.ndarray[Any, Any]
    """Size of the image's bytes, int64; 0 where there is no whole image."""
    label_S: np.ndarray[Any, Any]
    """Class, int64; -1 where there is none."""
    problem_S: np.ndarray[Any, Any]
    """A `Problem`, uint8."""
    tar_versions: tuple[str, ...] = ()
    """What servers called the tars' content when they were indexed, see `RangeFile.version`; empty for not known."""

    @property
    def num_samples(self) -> int:
        """Rows, with and without problems."""
        return len(self.keys_S)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256, in hex, over the tars' names and sizes and all rows; the folders do not count."""
        names = [path.name for path in self.tars]
        digest = hashlib.sha256(json.dumps([names, list(self.tar_nbytes)]).encode())
        for column, dtype in (
            (self.keys_S, self.keys_S.dtype),
            (self.tar_S, np.dtype("<i4")),
            (self.offset_S, np.dtype("<i8")),
            (self.nbytes_S, np.dtype("<i8")),
            (self.label_S, np.dtype("<i8")),
            (self.problem_S, np.dtype("u1")),
        ):
            digest.update(f"{dtype.str} {len(column)}\n".encode())
            digest.update(np.ascontiguousarray(column, dtype=dtype).tobytes())
        return digest.hexdigest()

    def sample_key(self, sample: int) -> str:
        """The sample's name wherever its tars lie: "TAR_BASENAME/KEY"."""
        return f"{self.tars[int(self.tar_S[sample])].name}/{self.keys_S[sample].decode()}"


def index_source(
    data: str | Path | Sequence[str | Path],
    *,
    labels: Literal["required", "optional"] = "required",
    on_bad: Literal["raise", "skip"] = "raise",
) -> SampleIndex:
    """The index of all samples of the tars `data` names, from one pass over their headers.

    Keys follow WebDataset: a member's name is cut at the first dot of its basename, and consecutive members with the
    same key are one sample. Only the bodies of labels are read.

    Args:
        data: see `expand_tars`.
        labels: "optional" takes a sample without label as it is, with label -1.
        on_bad: "skip" keeps a bad sample's row and records its `Problem` instead of raising. A truncated tar's last
            sample is recorded as TRUNCATED even where its image is whole, so that the loss is seen.

    Raises:
        SourceError: naming tar and key, for the first bad sample; in both modes for a tar with no sample at all, or
            with keys that are not UTF-8 or longer than 512 bytes.
    """
    tars = expand_tars(data)
    tar_nbytes: list[int] = []
    tar_versions: list[str] = []
    # Arrays tar by tar: lists of a million Python numbers would take twice the memory.
    columns: dict[str, list[np.ndarray[Any, Any]]] = {name: [] for name in ("key", *_COLUMN_DTYPES)}
    for number, path in enumerate(tars):
        part = index_tar(path, labels_required=labels == "required", raise_bad=on_bad == "raise")
        tar_nbytes.append(part.tar_nbytes)
        tar_versions.append(part.tar_version)
        columns["key"].append(np.array(part.keys, dtype="S"))
        values = {"offset": part.offsets, "nbytes": part.nbytes, "label": part.labels, "problem": part.problems}
        values["tar"] = [number] * len(part.keys)
        for name, dtype in _COLUMN_DTYPES.items():
            columns[name].append(np.array(values[name], dtype=dtype))
    whole = {name: np.concatenate(arrays) for name, arrays in columns.items()}
    keys_S = whole.pop("key")
    fields = {f"{name}_S": column for name, column in whole.items()}
    return SampleIndex(
        tars=tars, tar_nbytes=tuple(tar_nbytes), keys_S=keys_S, tar_versions=tuple(tar_versions), **fields
    )


def relocate(index: SampleIndex, data: str | Path | Sequence[str | Path]) -> SampleIndex:
    """The same index for tars that were moved: `data` must hold each tar by name and size; others are ignored.

    Raises:
        SourceError: naming the tars that are missing or of another size.
    """
    found = {path.name: path for path in expand_tars(data)}
    with ThreadPoolExecutor(_NUM_REQUESTS) as pool:  # servers take their time
        stamps = list(pool.map(_stamp, [found.get(path.name) for path in index.tars]))
    wrong: list[str] = []
    for path, nbytes, stamp in zip(index.tars, index.tar_nbytes, stamps, strict=True):
        if stamp is None:
            wrong.append(f"{path.name} is missing")
        elif stamp.nbytes != nbytes:
            wrong.append(f"{path.name} has {stamp.nbytes} bytes instead of {nbytes}")
    if wrong:
        more = f", and {len(wrong) - 10} more" if len(wrong) > 10 else ""
        raise SourceError(
            f"{data if isinstance(data, (str, Path)) else ', '.join(map(str, data))} does not hold the tars that were "
            f"indexed: {', '.join(wrong[:10])}{more}. Point to the same tars."
        )
    versions = tuple(stamp.version for stamp in stamps if stamp is not None)
    return replace(index, tars=tuple(found[path.name] for path in index.tars), tar_versions=versions)


class _Stamp(NamedTuple):
    """What tells whether a file is still the same."""

    nbytes: int
    version: str


def _stamp(path: Location | None) -> _Stamp | None:
    """None where there is no such file."""
    try:
        file = None if path is None else open_file(path)
    except FileNotFoundError:
        return None
    return None if file is None else _Stamp(file.nbytes, file.version)


def _open_tar(index: SampleIndex, tar: int) -> RangeFile:
    path, expected_nbytes = index.tars[tar], index.tar_nbytes[tar]
    expected_version = index.tar_versions[tar] if index.tar_versions else ""
    try:
        file = open_file(path)
    except OSError as error:
        raise SourceError(f"{path} cannot be opened: {error.strerror}. Were the tars moved?") from error
    if file.nbytes != expected_nbytes:
        raise SourceError(
            f"{path} has changed: {file.nbytes} bytes, {expected_nbytes} when it was indexed. Restore it or index "
            "again."
        )
    if expected_version and file.version != expected_version:
        raise SourceError(f"{path} has changed on the server since it was indexed. Start again.")
    return file


class Source:
    """Reads the samples of an index, in any order, one `pread` each.

    Threads may share one; pickling or forking gives the copy descriptors of its own. At most 64 tars are open at once.
    """

    def __init__(self, index: SampleIndex) -> None:
        self.index = index
        self._reset()

    def _reset(self) -> None:
        self._pid = os.getpid()
        self._open = lru_cache(_MAX_OPEN_TARS)(partial(_open_tar, self.index))

    def __getstate__(self) -> dict[str, Any]:
        return {"index": self.index}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.index = state["index"]
        self._reset()

    def where(self, sample: int) -> str:
        """The sample's tar and key, for messages."""
        tar = self.index.tars[int(self.index.tar_S[sample])]
        return f"{tar}: key {self.index.keys_S[sample].decode(errors='replace')!r}"

    def read_bytes(self, sample: int) -> bytes:
        """The image's bytes as they lie in the tar.

        Raises:
            BadImageError: the sample has no whole image.
            SourceError: the tar is gone or has another size than when it was indexed.
        """
        index = self.index
        tar, offset, nbytes = int(index.tar_S[sample]), int(index.offset_S[sample]), int(index.nbytes_S[sample])
        if nbytes <= 0:
            problem = Problem(int(index.problem_S[sample])).name
            raise BadImageError(f"{self.where(sample)} has no image to read ({problem}).")
        if offset < 0 or offset + nbytes > index.tar_nbytes[tar]:
            raise SourceError(f"{self.where(sample)}: the index points outside the tar. Index again.")
        data = self._tar(tar).pread(nbytes, offset)
        if len(data) != nbytes:
            raise SourceError(
                f"{self.where(sample)}: {len(data)} of {nbytes} bytes could be read. Has the tar changed?"
            )
        return data

    @cached_property
    def is_remote(self) -> bool:
        """Whether reading asks a server."""
        return any(isinstance(tar, Url) for tar in self.index.tars)

    def expect(self, sample_S: np.ndarray) -> None:
        """Have these samples fetched ahead of their use, where their tars are remote; does not wait for them."""
        index = self.index
        if self.is_remote:
            for sample in sample_S[index.nbytes_S[sample_S] > 0].tolist():
                self._tar(int(index.tar_S[sample])).expect(int(index.nbytes_S[sample]), int(index.offset_S[sample]))

    def read_image(self, sample: int) -> Image:
        """The image, decoded to RGB; see `decode_image`.

        Raises:
            BadImageError: naming tar and key, if it cannot be decoded.
        """
        return decode_image(self.read_bytes(sample), where=self.where(sample))

    def _tar(self, tar: int) -> RangeFile:
        if self._pid != os.getpid():
            self._reset()
        return self._open(tar)
