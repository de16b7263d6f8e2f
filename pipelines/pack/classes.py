"""The names of the classes. The position of a name is the label."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path

from atcache.errors import SourceError
from atcache.images.class_names import CLASSES_FILE

_SYNSET = re.compile(r"n\d{8}(\s.*)?")
_MAX_NBYTES = 2**26


@dataclass(frozen=True)
class Classes:
    """Names in the order of their labels, and the file that they are from, if they are from one.

    Several classes may have one name, as ImageNet's two cranes do; then only numbers tell them apart.

    Raises:
        SourceError: a name cannot be a line of classes.txt.
    """

    names: tuple[str, ...]
    file: Path | None = None

    def __post_init__(self) -> None:
        for label, name in enumerate(self.names):
            if not _is_line(name):
                raise SourceError(
                    f"class {label} is called {name!r}, which cannot be a line of {CLASSES_FILE}; expected some text "
                    "without line breaks. Rename it in the data."
                )

    def label_of(self, name: str, where: str) -> int:
        """The label of a class.

        Args:
            name: the class.
            where: what is of this class, for the message.

        Raises:
            SourceError: there is no such class, or there are several of this name.
        """
        labels = self._labels.get(name)
        if labels is None:
            nearest = get_close_matches(name, self.names, n=1)
            hint = f"; the nearest is {nearest[0]!r}" if nearest else ""
            raise SourceError(
                f"{where} is of class {name!r}, which is not among the {len(self.names)} classes of "
                f"{self.file or 'the data'}{hint}. Rename it, leave it out, or give another --classes."
            )
        if len(labels) > 1:
            raise SourceError(
                f"{where} is of class {name!r}, and {self.file or 'the data'} names the class {name!r} {len(labels)} "
                f"times, as {' and '.join(map(str, labels))}, so its label is not known. Give a --classes in which "
                "each class has a name of its own, or labels that are numbers."
            )
        return labels[0]

    @cached_property
    def _labels(self) -> dict[str, list[int]]:
        labels: dict[str, list[int]] = {}
        for label, name in enumerate(self.names):
            labels.setdefault(name, []).append(label)
        return labels

    def text(self) -> bytes:
        """What classes.txt holds."""
        return b"".join(os.fsencode(name) + b"\n" for name in self.names)


def in_order(names: Iterable[str]) -> Classes:
    """Classes in the order that their labels have if no list says otherwise.

    If all are numbers, that is the order of the numbers: 0, 1, 2, 10. Otherwise it is the order of the texts, which is
    that of torchvision's ImageFolder.

    Raises:
        SourceError: a name cannot be a line of classes.txt.
    """
    found = set(names)
    if all(name.isascii() and name.isdecimal() for name in found):
        return Classes(tuple(sorted(found, key=lambda name: (int(name), name))))
    return Classes(tuple(sorted(found)))


def read_classes(path: Path) -> Classes:
    """The classes that a file lists, one a line; or the file classes.txt in a folder of tars.

    Of ImageNet's list of synsets, with lines such as "n01440764 tench, Tinca tinca", the first word is the name.

    Raises:
        SourceError: there is no such file, it is not text, or it names an empty class.
    """
    file = path / CLASSES_FILE if path.is_dir() else path
    try:
        if file.stat().st_size > _MAX_NBYTES:
            raise SourceError(f"{file} has {file.stat().st_size} bytes, too many for names of classes.")
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise SourceError(
            f"{file} cannot be read: {error.strerror}. Give a file of class names, one a line, or a folder of tars "
            "with such a classes.txt."
        ) from error
    except UnicodeDecodeError as error:
        raise SourceError(f"{file} is not UTF-8 text. Give a file of class names, one a line.") from error
    names = [line.strip() for line in lines]
    if names and all(map(_SYNSET.fullmatch, names)):
        names = [name.split()[0] for name in names]
    if not names or not all(names):
        raise SourceError(f"{file}: line {names.index('') + 1 if names else 1} is empty, expected the name of a class.")
    return Classes(tuple(names), file)


def _is_line(name: str) -> bool:
    """Whether classes.txt can hold a name, so that every reader finds it there."""
    try:
        os.fsencode(name)
    except UnicodeEncodeError:  # half a character, which JSON can hold
        return False
    return name.splitlines() == [name]
