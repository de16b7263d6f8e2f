"""A list of the classes to score on, for sets that have only some of the classes of the training."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from atcache.errors import ConfigError
from atcache.images.class_names import ClassNames

_MAX_NBYTES = 2**24
_MOST_DIGITS = 18
"""Of the number of a class; Python refuses to read numbers of thousands of digits."""


def read_kept_classes(file: Path, classes: ClassNames, num_classes: int) -> np.ndarray:
    """The numbers of the classes in a text file that has one name or number a line, rising.

    A line that is the name of a class means it, even if it is a number too. Empty lines and those that begin with #
    do not count.

    Args:
        file: the file.
        classes: the names, as far as they are known.
        num_classes: how many classes the students have, from 0.

    Raises:
        ConfigError: the file cannot be read, names nothing, names a class twice, or names one that does not exist
            or is one of several of its name.
    """
    try:
        if file.stat().st_size > _MAX_NBYTES:
            raise ConfigError(
                f"{file} has {file.stat().st_size} bytes; expected at most {_MAX_NBYTES}: a class a line."
            )
        # Not `splitlines`, which also splits at characters that a name may contain.
        lines = file.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} cannot be read ({error}). Give a text file with one class a line.") from error
    labels: dict[str, list[int]] = {}
    for label, name in enumerate(classes.names[:num_classes]):
        labels.setdefault(name.strip(), []).append(label)
    lines_by_label: dict[int, int] = {}
    for number, line in enumerate((line.strip() for line in lines), 1):
        if not line or line.startswith("#"):
            continue
        named = labels.get(line, [])
        if len(named) > 1:
            raise ConfigError(
                f"{file}, line {number}: {line!r} is the name of the classes {', '.join(map(str, named))}. "
                "Write the numbers of those that are meant."
            )
        label = named[0] if named else _number(line)
        if label is None or label >= num_classes:
            raise ConfigError(
                f"{file}, line {number}: there is no class {line!r}. Expected a number below {num_classes}"
                + (f", or a name from {classes.where}." if labels else "; the classes of these runs have no names.")
            )
        if label in lines_by_label:
            raise ConfigError(
                f"{file}, line {number}: class {line!r} stands in line {lines_by_label[label]} already. Name each once."
            )
        lines_by_label[label] = number
    if not lines_by_label:
        raise ConfigError(f"{file} names no class. Write one name or number a line.")
    return np.array(sorted(lines_by_label), np.int64)


def _number(line: str) -> int | None:
    return int(line) if line.isascii() and line.isdecimal() and len(line) <= _MOST_DIGITS else None
