"""Labels from a CSV file with the columns path and label."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator
from pathlib import Path

from atcache.errors import SourceError
from atcache.images.labels import MAX_LABEL

from .classes import Classes, in_order

_COLUMNS = ("path", "label")
_NUMBER = re.compile(r"[+-]?[0-9]{1,18}(\.[0-9]*)?", re.ASCII)


def read_labels(file: Path, root: Path, classes: Classes | None) -> tuple[dict[Path, int], Classes | None]:
    """The label of each image that a CSV file lists, by path, and the classes.

    Labels are all numbers (5, or 5.0 as some tables write it), or all names of classes. With a list of classes, what is
    among its names is a name. Without one, the names that occur are the classes, and numbers stay as they are.

    Args:
        file: with a header; other columns than path and label are left alone.
        root: the folder that paths are relative to, and in which all images lie.
        classes: the list of classes; None if there is none.

    Raises:
        SourceError: the file is no such CSV, names an image twice or one outside `root`, or has an unusable label.
    """
    text_of: dict[Path, tuple[int, str]] = {}
    for line, path_text, label in _rows(file):
        path = Path(path_text)
        path = path.relative_to(root) if path.is_absolute() and path.is_relative_to(root) else path
        if path.is_absolute() or ".." in path.parts or not path.parts:
            raise SourceError(f"{file}, line {line}: {path_text!r} is not in {root}. Give paths relative to --data.")
        if path in text_of:
            raise SourceError(f"{file}, line {line}: {path_text!r} is listed a second time. Give each image one label.")
        text_of[path] = (line, label)
    if not text_of:
        raise SourceError(f"{file} lists no images below its header.")
    known_names: frozenset[str] = frozenset() if classes is None else frozenset(classes.names)
    if not all(label in known_names for _, label in text_of.values()):
        numbers = {label: _number(label, file, line) for line, label in text_of.values() if _NUMBER.fullmatch(label)}
        names = {label for _, label in text_of.values()} - numbers.keys()
        if numbers and names:
            line, label = next((line, label) for line, label in text_of.values() if label in names)
            raise SourceError(
                f"{file}, line {line}: the label {label!r} is a name, and others, such as {next(iter(numbers))!r}, are "
                "numbers. Give all labels as numbers, or all as names of classes."
            )
        if numbers:
            for line, label in text_of.values():
                if classes is not None and numbers[label] >= len(classes.names):
                    raise SourceError(
                        f"{file}, line {line}: there is no label {label}: {classes.file} names {len(classes.names)} "
                        "classes, so the last is that number minus 1."
                    )
            return {path: numbers[label] for path, (_, label) in text_of.items()}, classes
    known = classes or in_order(label for _, label in text_of.values())
    return {
        path: known.label_of(label, f"{file}, line {line}: {path}") for path, (line, label) in text_of.items()
    }, known


def _number(label: str, file: Path, line: int) -> int:
    whole, _, fraction = label.partition(".")
    if not 0 <= int(whole) <= MAX_LABEL or fraction.strip("0"):
        raise SourceError(
            f"{file}, line {line}: the label {label} is no class; expected a whole number from 0 to {MAX_LABEL}. Leave "
            "out the lines of images without a label."
        )
    return int(whole)


def _rows(file: Path) -> Iterator[tuple[int, str, str]]:
    """Line number, path and label of each row."""
    try:
        with file.open(encoding="utf-8-sig", newline="") as text:
            reader = csv.DictReader(text)
            header = [name.strip() for name in reader.fieldnames or ()]
            if not set(_COLUMNS) <= set(header):
                raise SourceError(
                    f"{file} has the columns {', '.join(header) or '(none)'} in its first line, expected path and "
                    "label, separated by commas."
                )
            reader.fieldnames = header
            for row in reader:
                path, label = (str(row.get(name) or "").strip() for name in _COLUMNS)
                if not path or not label:
                    raise SourceError(f"{file}, line {reader.line_num}: the path or the label is missing.")
                yield reader.line_num, path, label
    except OSError as error:
        raise SourceError(f"{file} cannot be read: {error.strerror}.") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise SourceError(f"{file} is not CSV text in UTF-8 ({error}).") from error
