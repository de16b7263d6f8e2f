"""A part of a dataset: the samples that a file lists by their keys."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from atcache.errors import ConfigError
from atcache.images.source import SampleIndex
from atcache.images.tar_samples import Problem


def select_keys(index: SampleIndex, file: Path) -> SampleIndex:
    """The samples that a file lists, in the index's own order.

    Args:
        index: the samples to choose from.
        file: one sample a line: its sample_key "TAR_NAME/KEY", or its key alone if only one tar has it.

    Raises:
        ConfigError: the file cannot be read, is empty, or lists a key that the index has not, or has in several tars.
    """
    keys = _read_keys(file)
    found = _rows_by_key(index, keys)
    # A key may begin or end with a space. Where there is no such key, the space is the file's.
    stripped = _rows_by_key(index, [key.strip() for key, rows in found.items() if not rows])
    found = {key: rows or stripped[key.strip()] for key, rows in found.items()}
    if unknown := [key for key, rows in found.items() if not rows]:
        raise ConfigError(
            f"{file}: the data lack {len(unknown)} of its {len(keys)} keys, the first is {unknown[0]!r}. "
            f"Expected one sample a line, such as {index.sample_key(0)} or {index.keys_S[0].decode()}."
        )
    return index.select(np.unique([_only_row(index, key, rows, file) for key, rows in found.items()]))


def _rows_by_key(index: SampleIndex, keys: Sequence[str]) -> dict[str, list[int]]:
    bare = {key.encode() for key in keys} | {key.partition("/")[2].encode() for key in keys}
    # Only rows that may be meant become Python texts: there may be many millions of others.
    found: dict[str, list[int]] = {key: [] for key in keys}
    for row in np.flatnonzero(np.isin(index.keys_S, np.array(sorted(bare)))).tolist() if bare else ():
        for name in (index.sample_key(row), index.keys_S[row].decode()):
            if name in found:
                found[name].append(row)
    return found


def _read_keys(file: Path) -> list[str]:
    """The different lines of a file that are not blank."""
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"keys={file} cannot be read ({error}). Expected a text file, one sample key a line."
        ) from error
    keys = list(dict.fromkeys(line.removesuffix("\r") for line in lines if line.strip()))
    if not keys:
        raise ConfigError(f"keys={file} is empty. Expected one sample key a line.")
    return keys


def _only_row(index: SampleIndex, key: str, rows: list[int], file: Path) -> int:
    """The row that a key means. A second sample of the same name in one tar is recorded as a problem, not meant."""
    good = [row for row in rows if index.problem_S[row] == Problem.NONE] or rows[:1]
    if len(good) > 1:
        raise ConfigError(
            f"{file}: {len(good)} samples have the key {key!r}, such as {index.sample_key(good[0])} and "
            f"{index.sample_key(good[1])}. Write which of them is meant, in this form."
        )
    return good[0]
