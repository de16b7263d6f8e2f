"""The samples of one tar. By WebDataset's rule, consecutive members whose names agree up to a dot are one sample."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from enum import IntEnum

from atcache.errors import SourceError
from atcache.files.location import Location
from atcache.files.ranges import open_file
from atcache.images.decode import IMAGE_EXTENSIONS
from atcache.images.tar_headers import DamagedTarError, TarMember, read_members

LABEL_EXTENSIONS = (".cls",)

_MAX_KEY_NBYTES = 512
_MAX_LABEL_NBYTES = 64
_MAX_LABEL = 2**31 - 1  # what fits in an int32
_LABEL = re.compile(rb"\s*([0-9]{1,10})\s*")


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
    offset: int = 0
    nbytes: int = 0
    label: int = -1
    problem: Problem = Problem.NONE
    reason: str = ""
    extensions: list[bytes] = field(default_factory=list[bytes])

    def blame(self, problem: Problem, reason: str) -> None:
        """Record a problem, unless an earlier one was recorded."""
        if not self.problem:
            self.problem, self.reason = problem, reason

    def add(self, extension: bytes, member: TarMember) -> None:
        """Add one member. Only the content of labels is looked at."""
        self.extensions.append(extension)
        suffix = "." + extension.decode(errors="replace")
        if suffix in LABEL_EXTENSIONS:
            self._add_label(member)
        elif suffix in IMAGE_EXTENSIONS:
            if self.nbytes:
                self.blame(Problem.DUPLICATE_KEY, "has two images; keep one")
            elif member.nbytes == 0:
                self.blame(Problem.NO_IMAGE, "has an image of 0 bytes")
            else:
                self.offset, self.nbytes = member.offset, member.nbytes

    def _add_label(self, member: TarMember) -> None:
        match = _LABEL.fullmatch(member.head) if member.nbytes <= _MAX_LABEL_NBYTES else None
        if match is None or int(match[1]) > _MAX_LABEL:
            shown = member.head[:_MAX_LABEL_NBYTES].decode(errors="replace")
            self.blame(Problem.NO_LABEL, f"has the label {shown!r}; expected an integer of at least 0, as text")
        else:
            self.label = int(match[1])

    def finish(self, *, labels_required: bool) -> None:
        """Check that the sample has an image and, if it must, a label."""
        if not self.nbytes:
            found = ", ".join(sorted({extension.decode(errors="replace") for extension in self.extensions}))
            self.blame(
                Problem.NO_IMAGE,
                f"has no image: its extensions are {found or 'none'}, expected one of {', '.join(IMAGE_EXTENSIONS)} "
                "(the extension begins at the first dot of the file name, so a key cannot contain dots)",
            )
        elif labels_required and self.label < 0:
            self.blame(Problem.NO_LABEL, "has no label (.cls). Add it, or run without labels")


class _TarIndexer:
    """Groups one tar's members into samples and collects their rows."""

    def __init__(self, path: Location, *, labels_required: bool, raise_bad: bool) -> None:
        try:
            self._file = open_file(path)
        except FileNotFoundError as error:
            raise SourceError(f"{path} does not exist. Check the pattern.") from error
        self.rows = TarRows(self._file.nbytes, self._file.version)
        self._path, self._labels_required, self._raise_bad = path, labels_required, raise_bad
        self._seen: set[bytes] = set()
        self._sample: _Sample | None = None

    def run(self) -> TarRows:
        """Read the tar and return its rows."""
        try:
            for member in read_members(self._path, self._file):
                key, extension = _split_name(member.name)
                if key:
                    self._sample_of(key).add(extension, member)
        except DamagedTarError as error:
            self._take_damage(error)
        self._finish()
        if not self.rows.keys:
            raise SourceError(f"{self._path} holds no samples (no member has a name like KEY.jpg). Leave it out.")
        return self.rows

    def _sample_of(self, key: bytes) -> _Sample:
        """The current sample if it has this key, or else a new one: only consecutive members belong together."""
        if self._sample is not None and key == self._sample.key:
            return self._sample
        self._finish()
        _check_key(self._path, key)
        self._sample = _Sample(key)
        if key in self._seen:
            self._sample.blame(
                Problem.DUPLICATE_KEY,
                "occurs twice: the members of a sample must follow one another. Make the tar again, sorted by name",
            )
        self._seen.add(key)
        return self._sample

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

    def _finish(self) -> None:
        """Add the row of the current sample, if there is one."""
        sample, self._sample = self._sample, None
        if sample is None:
            return
        sample.finish(labels_required=self._labels_required)
        if sample.problem and self._raise_bad:
            raise SourceError(f"{self._path}: key {sample.key.decode()!r} {sample.reason}.")
        rows = self.rows
        rows.keys.append(sample.key)
        rows.offsets.append(sample.offset)
        rows.nbytes.append(sample.nbytes)
        rows.labels.append(sample.label)
        rows.problems.append(sample.problem)


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


def index_tar(path: Location, *, labels_required: bool, raise_bad: bool) -> TarRows:
    """The rows of one tar; see `atcache.images.source.index_source`."""
    return _TarIndexer(path, labels_required=labels_required, raise_bad=raise_bad).run()
