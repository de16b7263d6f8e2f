"""The samples of one tar: members whose names agree up to the first dot are one sample, wherever they lie."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum
from functools import lru_cache

from atcache.errors import SourceError
from atcache.files.location import Location
from atcache.files.ranges import open_file
from atcache.images.decode import IMAGE_EXTENSIONS
from atcache.images.labels import BadLabelError, LabelRule
from atcache.images.tar_headers import DamagedTarError, TarMember, read_members

_MAX_KEY_NBYTES = 512


class Problem(IntEnum):
    """Why a sample cannot be used. The numbers are stored in caches; 1 means "stored" there."""

    NONE = 0
    NO_IMAGE = 2
    NO_LABEL = 3
    DUPLICATE_KEY = 4
    TRUNCATED = 5
    UNDECODABLE = 6
    NO_SAMPLE = 255
    """A row between two parts of a cache, which no sample has; never found in a tar."""


@dataclass(slots=True)
class TarRows:
    """One tar's part of a `SampleIndex`: its columns, in the order of the samples."""

    tar_nbytes: int
    tar_version: str
    """See `RangeFile.version`."""
    keys: list[bytes] = field(default_factory=list[bytes])
    offsets: list[int] = field(default_factory=list[int])
    nbytes: list[int] = field(default_factory=list[int])
    labels: list[int] = field(default_factory=list[int])
    problems: list[int] = field(default_factory=list[int])


@dataclass(slots=True)
class _Sample:
    """The members with one key, as far as they were read."""

    key: bytes
    row: int
    offset: int = 0
    nbytes: int = 0
    label: int = -1
    problem: Problem = Problem.NONE
    reason: str = ""
    image_parts: int = 0
    """Parts of the image's extension, as in `a.jpg.jpg`; 0 without an image. A plain image wins over others."""
    has_label: bool = False
    """Whether the file for its label was there, even if that holds none."""
    comes_again: bool = False
    """Whether members of other samples lie between the members read first and the one read last."""
    is_scattered: bool = False
    """Whether it has its image or its label from members that came again."""
    lacks_label: bool = False
    """Whether its only problem is that it has no label."""
    extensions: set[str] = field(default_factory=set[str])

    def blame(self, problem: Problem, reason: str) -> None:
        """Record a problem, unless an earlier one was recorded."""
        if not self.problem:
            self.problem, self.reason = problem, reason

    def add_image(self, member: TarMember, num_parts: int) -> None:
        """Take a member as the image, unless there is one with a shorter extension."""
        if self.nbytes and num_parts == self.image_parts:
            self.blame(Problem.DUPLICATE_KEY, "has two images; keep one")
        elif member.nbytes == 0:
            self.blame(Problem.NO_IMAGE, "has an image of 0 bytes")
        elif not self.nbytes or num_parts < self.image_parts:
            self.offset, self.nbytes, self.image_parts = member.offset, member.nbytes, num_parts

    def finish(self, rule: LabelRule) -> None:
        """Check that the sample has an image and, if it must, a label."""
        if not self.nbytes:
            self.blame(
                Problem.NO_IMAGE,
                f"has no image: its extensions are {', '.join(sorted(self.extensions)) or 'none'}, expected one of "
                f"{', '.join(IMAGE_EXTENSIONS)} (the extension begins at the first dot of the file name, so a key "
                "cannot contain dots)",
            )
        elif rule.mode == "required" and self.label < 0:
            self.lacks_label = not self.problem
            self.blame(Problem.NO_LABEL, f"has no label ({rule.place})")

    def is_whole(self, rule: LabelRule) -> bool:
        """Whether nothing that may come could change it, except for another sample of the same key."""
        has_all = self.image_parts == 1 and (rule.extension is None or self.label >= 0)
        return has_all and not self.problem and not self.is_scattered


class _TarIndexer:
    """Groups one tar's members into samples and collects their rows.

    Most tars have the members of a sample together. Samples that are whole are kept as rows only, which take less
    memory; those that lack something wait for the tar's end.
    """

    def __init__(self, path: Location, rule: LabelRule, *, raise_bad: bool) -> None:
        try:
            self._file = open_file(path)
        except FileNotFoundError as error:
            raise SourceError(f"{path} does not exist. Check the pattern.") from error
        self.rows = TarRows(self._file.nbytes, self._file.version)
        self._path, self._rule, self._raise_bad = path, rule, raise_bad
        self._row_of: dict[bytes, int] = {}
        self._waiting: dict[int, _Sample] = {}
        self._sample: _Sample | None = None

    def run(self) -> TarRows:
        """Read the tar and return its rows."""
        try:
            for member in read_members(self._path, self._file):
                key, extension = _split_name(member.name)
                if key:
                    self._add(key, extension.decode(errors="replace"), member)
        except DamagedTarError as error:
            self._take_damage(error)
        self._set_aside()
        if not self.rows.keys:
            raise SourceError(f"{self._path} holds no samples (no member has a name like KEY.jpg). Leave it out.")
        for _, sample in sorted(self._waiting.items()):
            self._finish(sample)
        return self.rows

    def _add(self, key: bytes, extension: str, member: TarMember) -> None:
        """Add one member to its sample. Only the content of labels is looked at."""
        sample = self._sample_of(key)
        sample.extensions.add(extension)
        kind, num_parts = _kind(extension)
        is_label, is_image = kind == self._rule.extension, f".{kind}" in IMAGE_EXTENSIONS
        if not is_label and not is_image:
            return
        if sample.comes_again:
            if sample.has_label if is_label else sample.nbytes:
                sample = self._begin_again(sample)
            else:
                sample.is_scattered = True
        if is_label:
            self._add_label(sample, member)
        else:
            sample.add_image(member, num_parts)

    def _add_label(self, sample: _Sample, member: TarMember) -> None:
        try:
            if member.nbytes > self._rule.max_nbytes:
                raise self._rule.refuse_large(member.head, member.nbytes)
            is_short = member.nbytes <= len(member.head)
            label = self._rule.parse(member.head if is_short else self._file.pread(member.nbytes, member.offset))
            if label is not None and sample.label not in (-1, label):
                raise BadLabelError("has two labels; keep one")
        except BadLabelError as error:
            sample.blame(Problem.NO_LABEL, str(error))
        else:
            sample.label = sample.label if label is None else label
        sample.has_label = True

    def _sample_of(self, key: bytes) -> _Sample:
        """The sample with this key: the current one, one that was begun before, or a new one."""
        if self._sample is not None and key == self._sample.key:
            return self._sample
        self._set_aside()
        row = self._row_of.get(key)
        if row is None:
            _check_key(self._path, key)
            return self._begin(key)
        rows = self.rows
        self._sample = self._waiting.pop(row, None) or _Sample(
            key, row, rows.offsets[row], rows.nbytes[row], rows.labels[row], image_parts=1, has_label=True
        )
        self._sample.comes_again = True
        return self._sample

    def _begin(self, key: bytes) -> _Sample:
        """A new sample, with a row of its own."""
        rows = self.rows
        self._sample = _Sample(key, len(rows.keys))
        self._row_of.setdefault(key, self._sample.row)
        rows.keys.append(key)
        for column, nothing in ((rows.offsets, 0), (rows.nbytes, 0), (rows.labels, -1), (rows.problems, 0)):
            column.append(nothing)
        return self._sample

    def _begin_again(self, earlier: _Sample) -> _Sample:
        """A new sample with the key of an earlier one: which members belong together is not certain."""
        reason = "occurs twice: its image or its label comes again later in the tar. Give each sample its own key"
        if earlier.is_scattered:
            earlier.blame(Problem.DUPLICATE_KEY, reason)
        self._set_aside()
        sample = self._begin(earlier.key)
        sample.blame(Problem.DUPLICATE_KEY, reason)
        return sample

    def _take_damage(self, error: DamagedTarError) -> None:
        """Raise, or record that the last sample may have lost members."""
        key = b"" if error.name is None else _split_name(error.name)[0]
        if key and len(key) <= _MAX_KEY_NBYTES and _is_utf8(key):
            self._sample_of(key)
        last = self._sample
        if last is None:
            raise error
        if self._raise_bad:
            raise SourceError(f"{error} Its last key is {last.key.decode()!r}.") from error
        last.problem = Problem.TRUNCATED

    def _set_aside(self) -> None:
        """Keep the current sample: as its row only if it is whole."""
        sample, self._sample = self._sample, None
        if sample is not None and sample.is_whole(self._rule):
            self._write(sample)
        elif sample is not None:
            self._waiting[sample.row] = sample

    def _finish(self, sample: _Sample) -> None:
        sample.finish(self._rule)
        if sample.problem and self._raise_bad:
            what = f"key {sample.key.decode()!r} {sample.reason}"
            if sample.lacks_label and len(self.rows.keys) > 1 and not self._has_labels():
                what = f"none of its {len(self.rows.keys)} samples has a label ({self._rule.place})"
            advice = f" {self._rule.advice}" if sample.lacks_label else ""
            raise SourceError(f"{self._path}: {what}.{advice}")
        self._write(sample)

    def _has_labels(self) -> bool:
        waiting = (sample.label for sample in self._waiting.values())
        return any(label >= 0 for label in (*self.rows.labels, *waiting))

    def _write(self, sample: _Sample) -> None:
        rows, row = self.rows, sample.row
        rows.offsets[row], rows.nbytes[row] = sample.offset, sample.nbytes
        rows.labels[row], rows.problems[row] = sample.label, sample.problem


@lru_cache(maxsize=1024)  # a tar has few extensions and many members
def _kind(extension: str) -> tuple[str, int]:
    """What a file is by its extension, and the extension's number of parts: ("jpg", 2) for "jpg.jpg".

    Extensions of images before the last part say nothing. Any other does: `seg.png` is no image but a mask of one.

    >>> _kind("jpg"), _kind("jpg.cls"), _kind("seg.png")
    (('jpg', 1), ('cls', 2), ('', 2))
    """
    *before, last = extension.split(".")
    return (last if all(f".{part}" in IMAGE_EXTENSIONS for part in before) else ""), 1 + len(before)


def _split_name(name: bytes) -> tuple[bytes, bytes]:
    """WebDataset's key and the lower-cased extension. The key is empty for hidden files and names WebDataset skips."""
    folder, slash, base = name.rpartition(b"/")
    stem, _, extension = base.partition(b".")
    if not stem or not extension:
        return b"", b""
    return folder + slash + stem, extension.lower()


def _is_utf8(key: bytes) -> bool:
    try:
        key.decode()
    except UnicodeDecodeError:
        return False
    return True


def _check_key(path: Location, key: bytes) -> None:
    if len(key) > _MAX_KEY_NBYTES:
        raise SourceError(
            f"{path}: a key has {len(key)} bytes ({key[:40]!r}...), expected at most {_MAX_KEY_NBYTES}. Rename the "
            "member."
        )
    if not _is_utf8(key):
        raise SourceError(f"{path}: key {key!r} is not UTF-8. Rename the member.")


def index_tar(path: Location, rule: LabelRule, *, raise_bad: bool) -> TarRows:
    """The rows of one tar; see `atcache.images.source.index_source`."""
    return _TarIndexer(path, rule, raise_bad=raise_bad).run()
