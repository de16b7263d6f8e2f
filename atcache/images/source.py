"""The samples of a dataset: WebDataset tars, indexed once from their headers and then read in place."""

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

from atcache.choices import Labels
from atcache.errors import BadImageError, SourceError
from atcache.files.location import Location, Url
from atcache.files.ranges import RangeFile, expect_together, open_file, promise
from atcache.files.sizes import size_text
from atcache.images.class_names import UNNAMED, ClassNames, find_class_names
from atcache.images.decode import EncodedImage
from atcache.images.labels import LabelRule
from atcache.images.tar_samples import Problem, index_tar
from atcache.images.tars import expand_tars

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_IMAGE_NBYTES = 2**28
"""The largest file of an image: a tar may be sparse, so that a member of any size takes no space on disk."""
_MAX_OPEN_TARS = 64  # for each `Source`; the usual limit of a process is 1024 open files
_NUM_REQUESTS = 16
_COLUMN_DTYPES = {"tar": "int32", "offset": "int64", "nbytes": "int64", "label": "int64", "problem": "uint8"}


@dataclass(frozen=True, eq=False)
class SampleIndex:
    """Where every sample is: one row for each sample, in the order of the tars."""

    tars: tuple[Location, ...]
    """The tars, local or remote. No two have the same basename."""
    tar_nbytes: tuple[int, ...]
    """The tars' sizes when they were indexed."""
    keys_S: np.ndarray[Any, Any]
    """WebDataset's `__key__` as UTF-8 bytes, dtype S<n>."""
    tar_S: np.ndarray[Any, Any]
    """Position in `tars`, int32."""
    offset_S: np.ndarray[Any, Any]
    """Where the image's bytes begin in the tar, int64."""
    nbytes_S: np.ndarray[Any, Any]
    """Number of the image's bytes, int64; 0 if there is no complete image."""
    label_S: np.ndarray[Any, Any]
    """Class, int64; -1 for samples without a label."""
    problem_S: np.ndarray[Any, Any]
    """A `Problem`, uint8."""
    tar_versions: tuple[str, ...] = ()
    """Versions of the tars when they were indexed, see `RangeFile.version`; empty if they are not known."""
    classes: ClassNames = UNNAMED
    """Names of the classes. The fingerprint leaves them out: a cache without names is the same cache."""

    @property
    def num_samples(self) -> int:
        """The number of rows, with and without problems."""
        return len(self.keys_S)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256, in hex, of the tars' names and sizes and of all rows. It does not depend on the tars' folders."""
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
            digest.update(np.ascontiguousarray(column, dtype=dtype).view(np.uint8).data)
        return digest.hexdigest()

    def sample_key(self, sample: int) -> str:
        """The sample's name, "TAR_BASENAME/KEY". It does not depend on the tars' folders."""
        return f"{self.tars[int(self.tar_S[sample])].name}/{self.keys_S[sample].decode()}"

    def sample_keys(self, rows: np.ndarray | slice = slice(None)) -> np.ndarray:
        """`sample_key` of some rows, or of all: numpy text, 4 bytes a letter."""
        tar_names = np.array([(tar.name + "/").encode() for tar in self.tars])
        return _decode_texts(np.char.add(tar_names[self.tar_S[rows]], self.keys_S[rows]))

    def class_names(self, rows: np.ndarray | slice = slice(None)) -> np.ndarray:
        """The name of the class of some rows, or of all: numpy text, empty where it is not known."""
        names_C, label_S = np.array([*self.classes.names, ""]), self.label_S[rows]
        return names_C[np.where(label_S < len(names_C), label_S, -1)]

    def select(self, rows: np.ndarray) -> SampleIndex:
        """The index of these rows only, ascending, and of the tars that they are in."""
        numbers, tar_S = np.unique(self.tar_S[rows], return_inverse=True)
        tars: list[int] = numbers.tolist()
        columns = ("keys_S", "offset_S", "nbytes_S", "label_S", "problem_S")
        return replace(
            self,
            tars=tuple(self.tars[tar] for tar in tars),
            tar_nbytes=tuple(self.tar_nbytes[tar] for tar in tars),
            tar_versions=tuple(self.tar_versions[tar] for tar in tars) if self.tar_versions else (),
            tar_S=tar_S.astype(self.tar_S.dtype),
            **{name: getattr(self, name)[rows] for name in columns},
        )


def _decode_texts(bytes_S: np.ndarray) -> np.ndarray:
    """UTF-8 texts, dtype S, as numpy text."""
    octets_SN = np.ascontiguousarray(bytes_S).view(np.uint8).reshape(len(bytes_S), bytes_S.dtype.itemsize)
    if (octets_SN < 128).all():  # numpy would decode millions of texts one by one
        return octets_SN.astype(np.uint32).view(f"U{octets_SN.shape[1]}").reshape(len(bytes_S))
    return np.char.decode(bytes_S, "utf-8")


def index_source(
    data: str | Path | Sequence[str | Path],
    *,
    labels: Labels = "required",
    label_key: str | None = None,
    on_bad: Literal["raise", "skip"] = "raise",
) -> SampleIndex:
    """The index of all samples in the tars that `data` names, from one pass over the tars' headers.

    Keys follow WebDataset: a key is a member's name up to the first dot of its basename. Members of one tar with the
    same key are one sample, also if others lie between them. Apart from headers, only labels are read, and
    `classes.txt` beside the tars.

    Args:
        data: see `expand_tars`.
        labels: "optional" accepts samples without a label, and gives them the label -1. "none" reads no labels: all
            are -1.
        label_key: where the label is in a sample's `.json`, such as "class_id" or "meta.class_id"; None for `.cls`.
        on_bad: "skip" keeps the row of a bad sample and records its `Problem` instead of raising. The last sample of a
            truncated tar is recorded as TRUNCATED even if its image is complete, so that the loss is noticed.

    Raises:
        SourceError: a sample is bad; the message names tar and key. With "skip" too: a tar has no samples, or a key
            that is not UTF-8 or is longer than 512 bytes; all samples lack a label that is required; or a label is
            beyond the names in `classes.txt`.
        CacheMismatchError: tars lie beside different `classes.txt`.
        ConfigError: `label_key` is given, and labels are not read.
    """
    rule = LabelRule(mode=labels, key=label_key)
    tars = expand_tars(data)
    tar_nbytes: list[int] = []
    tar_versions: list[str] = []
    # One array for each tar: lists of a million Python numbers would take twice the memory.
    columns: dict[str, list[np.ndarray[Any, Any]]] = {name: [] for name in ("key", *_COLUMN_DTYPES)}
    for number, path in enumerate(tars):
        part = index_tar(path, rule, raise_bad=on_bad == "raise")
        tar_nbytes.append(part.tar_nbytes)
        tar_versions.append(part.tar_version)
        columns["key"].append(np.array(part.keys, dtype="S"))
        values = {"offset": part.offsets, "nbytes": part.nbytes, "label": part.labels, "problem": part.problems}
        values["tar"] = [number] * len(part.keys)
        for name, dtype in _COLUMN_DTYPES.items():
            columns[name].append(np.array(values[name], dtype=dtype))
    whole = {name: np.concatenate(arrays) for name, arrays in columns.items()}
    keys_S = whole.pop("key")
    index = SampleIndex(
        tars=tars,
        tar_nbytes=tuple(tar_nbytes),
        keys_S=keys_S,
        tar_versions=tuple(tar_versions),
        classes=UNNAMED if labels == "none" else find_class_names(tars),
        **{f"{name}_S": column for name, column in whole.items()},
    )
    _check_labels(index, rule)
    return index


def _check_labels(index: SampleIndex, rule: LabelRule) -> None:
    """Refuse labels that are all missing, or that are beyond the names of classes."""
    largest = int(index.label_S.max())
    if rule.mode == "required" and largest < 0 and (index.problem_S == Problem.NO_LABEL).any():
        folder = index.tars[0].parent
        raise SourceError(
            f"{folder}: none of the {index.num_samples} samples has a label ({rule.place}). {rule.advice}"
        )
    num_names = len(index.classes.names)
    if num_names and largest >= num_names:
        raise SourceError(
            f"{index.sample_key(int(index.label_S.argmax()))} has the label {largest}, but {index.classes.where} names "
            f"{num_names} classes, from 0. Correct the one that is wrong; `atcache build --labels none` reads neither."
        )


def relocate(index: SampleIndex, data: str | Path | Sequence[str | Path]) -> SampleIndex:
    """The same index for tars that were moved to `data`, which may contain other tars too.

    Raises:
        SourceError: tars are missing or have another size; the message names them.
    """
    found = {path.name: path for path in expand_tars(data)}
    with ThreadPoolExecutor(_NUM_REQUESTS) as pool:  # several at once, because servers are slow to answer
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
            f"indexed: {', '.join(wrong[:10])}{more}. Name the same tars."
        )
    versions = tuple(stamp.version for stamp in stamps if stamp is not None)
    return replace(index, tars=tuple(found[path.name] for path in index.tars), tar_versions=versions)


class _Stamp(NamedTuple):
    """Size and version of a file, which show whether it has changed."""

    nbytes: int
    version: str


def _stamp(path: Location | None) -> _Stamp | None:
    """The stamp of a file; None if there is no such file."""
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
        raise SourceError(
            f"{path} cannot be opened: {error.strerror}. If the tars were moved, give their place with --data."
        ) from error
    if file.nbytes != expected_nbytes:
        raise SourceError(
            f"{path} has changed: it has {file.nbytes} bytes, but had {expected_nbytes} when it was indexed. Restore "
            "it, or index again."
        )
    if expected_version and file.version != expected_version:
        raise SourceError(f"{path} has changed on the server since it was indexed. Start again.")
    return file


class Source:
    """Reads the samples of an index in any order, each with one `pread`.

    Threads may share one object. A pickled or forked copy opens its own files. At most 64 local tars are open at once.
    """

    def __init__(self, index: SampleIndex) -> None:
        self.index = index
        self._planned_T: np.ndarray | None = None
        self._reset()

    def _reset(self) -> None:
        self._pid = os.getpid()
        # A remote file holds no descriptor, and opening it again would ask the server.
        is_all_remote = all(isinstance(tar, Url) for tar in self.index.tars)
        self._open = lru_cache(None if is_all_remote else _MAX_OPEN_TARS)(partial(_open_tar, self.index))

    def __getstate__(self) -> dict[str, Any]:
        return {"index": self.index}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.index = state["index"]
        self._planned_T = None
        self._reset()

    def where(self, sample: int) -> str:
        """The sample's tar and key, for messages."""
        tar = self.index.tars[int(self.index.tar_S[sample])]
        return f"{tar}: key {self.index.keys_S[sample].decode(errors='replace')!r}"

    def read_bytes(self, sample: int) -> bytes:
        """The image's bytes as they are in the tar.

        Raises:
            BadImageError: the sample has no complete image.
            SourceError: the tar is missing or has changed since it was indexed.
        """
        index = self.index
        tar, offset, nbytes = int(index.tar_S[sample]), int(index.offset_S[sample]), int(index.nbytes_S[sample])
        if nbytes <= 0:
            problem = Problem(int(index.problem_S[sample])).name
            raise BadImageError(f"{self.where(sample)} has no image to read ({problem}).")
        if offset < 0 or offset + nbytes > index.tar_nbytes[tar]:
            raise SourceError(f"{self.where(sample)}: the index points outside the tar. Index again.")
        if nbytes > MAX_IMAGE_NBYTES:
            raise BadImageError(
                f"{self.where(sample)}: the image has {size_text(nbytes)}, expected at most "
                f"{size_text(MAX_IMAGE_NBYTES)}. Make it smaller, or take it out of the tar."
            )
        data = self._tar(tar).pread(nbytes, offset)
        if len(data) != nbytes:
            raise SourceError(
                f"{self.where(sample)}: only {len(data)} of {nbytes} bytes could be read. Has the tar changed?"
            )
        return data

    @cached_property
    def is_remote(self) -> bool:
        """Whether any tar is on a server."""
        return any(isinstance(tar, Url) for tar in self.index.tars)

    def plan(self, sample_S: np.ndarray) -> None:
        """Say which samples an epoch will read; remote tars that are read nearly whole then come in large requests."""
        if self.is_remote:
            index = self.index
            nbytes_T = np.bincount(index.tar_S[sample_S], index.nbytes_S[sample_S].clip(0), len(index.tars))
            self._planned_T = nbytes_T.astype(np.int64)
            promise(self, "tars", sum(index.tar_nbytes[tar] for tar in np.flatnonzero(nbytes_T).tolist()))

    def expect(self, sample_S: np.ndarray) -> None:
        """Start to fetch these samples (positions in the index) if their tars are remote, without waiting for them."""
        if not self.is_remote:
            return
        index = self.index
        sample_S = sample_S[index.nbytes_S[sample_S] > 0]
        tars = self._open_together(index.tar_S[sample_S])
        ranges = zip(index.tar_S[sample_S], index.nbytes_S[sample_S], index.offset_S[sample_S], strict=True)
        expect_together([(tars[int(tar)], int(nbytes), int(offset)) for tar, nbytes, offset in ranges])

    def _open_together(self, tar_S: np.ndarray) -> dict[int, RangeFile]:
        """These tars. Those of servers are opened several at a time, as each waits for an answer."""
        tars = np.unique(tar_S).tolist()
        with ThreadPoolExecutor(_NUM_REQUESTS) as pool:
            files = dict(zip(tars, pool.map(self._tar, tars), strict=True))
        if self._planned_T is not None:
            for tar, file in files.items():
                file.will_read(int(self._planned_T[tar]))
        return files

    def read_image(self, sample: int) -> Image:
        """The image, decoded to RGB; see `EncodedImage.decode`.

        Raises:
            BadImageError: it cannot be decoded; the message names tar and key.
            SourceError: the tar is missing or has changed since it was indexed.
        """
        return self.read_encoded(sample).decode()

    def read_encoded(self, sample: int) -> EncodedImage:
        """The image before it is decoded.

        Raises:
            BadImageError: it has an unknown format, or is too large or damaged; the message names tar and key.
            SourceError: the tar is missing or has changed since it was indexed.
        """
        return EncodedImage(self.read_bytes(sample), where=self.where(sample))

    def _tar(self, tar: int) -> RangeFile:
        if self._pid != os.getpid():
            self._reset()
        return self._open(tar)
