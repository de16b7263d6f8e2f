"""The names of classes: `classes.txt` beside the tars, one name a line. The first line names class 0."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from atcache.errors import CacheMismatchError, SourceError
from atcache.files.location import Location
from atcache.files.ranges import open_file
from atcache.files.remote.fetcher import DeniedError

CLASSES_FILE = "classes.txt"
_MAX_NBYTES = 2**24
MAX_CLASSES = 2**20


class ClassNames(NamedTuple):
    """The names of classes 0, 1, 2, ..., and where they were found."""

    names: tuple[str, ...] = ()
    """Empty if they are not known."""
    where: str = ""
    """A file, cache or run, for messages."""

    def name(self, label: int) -> str:
        """The name of a class; empty if it has none, or if the label is -1."""
        return self.names[label] if 0 <= label < len(self.names) else ""


UNNAMED = ClassNames()
"""No names are known."""


def find_class_names(tars: Iterable[Location]) -> ClassNames:
    """The names in the `classes.txt` beside tars; empty if there is none.

    Raises:
        CacheMismatchError: the tars lie in several folders, whose files differ.
        SourceError: a file is too large.
    """
    folders = dict.fromkeys(tar.parent for tar in tars)
    found = [ClassNames(read_class_names(folder / CLASSES_FILE), str(folder / CLASSES_FILE)) for folder in folders]
    return same_classes(found)


def read_class_names(file: Location) -> tuple[str, ...]:
    """The names in a file, one a line; empty if there is no such file. Bytes that are not UTF-8 are shown as \\xNN.

    Raises:
        SourceError: the file is too large.
        RemoteError: its server fails, so that nobody knows whether there is such a file.
    """
    try:
        opened = open_file(file)
        if opened.nbytes > _MAX_NBYTES:
            raise SourceError(f"{file} has {opened.nbytes} bytes; expected at most {_MAX_NBYTES}, one name a line.")
        data = opened.pread(opened.nbytes, 0)
    except (OSError, DeniedError):  # some servers refuse a file that does not exist; the tars themselves were readable
        return ()
    # Not `splitlines`, which also splits at characters that a name may contain.
    names = data.removeprefix(b"\xef\xbb\xbf").decode(errors="backslashreplace").rstrip("\r\n").split("\n")
    if len(names) > MAX_CLASSES:
        raise SourceError(
            f"{file} has {len(names)} lines; expected at most {MAX_CLASSES}, the name of a class on each."
        )
    return tuple(name.rstrip("\r") for name in names) if any(names) else ()


def same_classes(lists: Sequence[ClassNames]) -> ClassNames:
    """The longest of several lists that agree. A list may be empty, and may end before another does.

    Raises:
        CacheMismatchError: a class has another name in another list, so that labels would mean different classes.
    """
    known = [found for found in lists if found.names]
    if not known:
        return UNNAMED
    longest = max(known, key=lambda found: len(found.names))
    for other in known:
        for label, (ours, theirs) in enumerate(zip(longest.names, other.names, strict=False)):
            if ours != theirs:
                raise CacheMismatchError(
                    f"class {label} is {ours!r} in {longest.where} and {theirs!r} in {other.where}, so one label would "
                    "mean two classes. Pack both sets of images with the same list: `atcache pack --classes`."
                )
    return longest
