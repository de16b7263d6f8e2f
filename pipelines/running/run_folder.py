"""A run's folder belongs to one run, and one process at a time works in it.

A record, which is a JSON file, says what the run is. Other options, which would make another run, are refused once the
first run has saved something; before that, the new run replaces it.
"""

from __future__ import annotations

import json
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch

from atcache.cache.differences import find_differences
from atcache.errors import CacheMismatchError, ConfigError, CorruptCacheError
from atcache.files.durable import encode_json, make_folder, write_file
from atcache.files.writers import only_writer
from atcache.teachers.devices import resolve_precision

from .checkpoint import CHECKPOINT_FILE
from .run_files import RUN_FILE, WEIGHTS_FILE

GIVEN_UP_FILE = "given-up.txt"
"""Says why a sweep gave up a student: its loss became NaN or infinite. Delete the student's folder to try it again."""

_SAVED = (WEIGHTS_FILE, CHECKPOINT_FILE, GIVEN_UP_FILE)
"""What a run saves. Once any of them exists, another run in the folder is refused, because it would be lost."""
_FILES_OF_OTHERS = (*_SAVED, RUN_FILE, "config.json", "zarr.json")
"""Files of runs, pre-trained teachers, caches or downloaded weights, which a new run must not overwrite."""

_WITHOUT_VALUES = {
    "data.validation": "its validation images or cache are different",
    "data.initial_weights_sha256": "it began with different --weights",
    "record.teacher": "its teacher is different",
    "record.classes": "its classes have different names",
    "record.pairing": "it is given different attention of its teacher",
    "source_fingerprint": "its images are different",
    "num_samples": "its images are different",
}
"""The words for a difference below these keys, whose values (such as hashes) would tell a person nothing."""


@contextmanager
def run_folder(folder: Path) -> Generator[None]:
    """Make the folder of a run, and keep other processes from working in it, if its file system has locks.

    Raises:
        ConfigError: a file is in the way, no folder can be made there, or another process works in it.
    """
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder}: a file is in the way of the output folder. Give another --out.")
    try:
        make_folder(folder)
    except FileNotFoundError as error:  # the parent exists but takes no folders, such as /proc
        raise ConfigError(f"{folder}: no folder can be made there. Give another --out.") from error
    with only_writer(folder, where_possible=True):
        yield


def read_record(file: Path) -> dict[str, Any] | None:
    """The record that `keep_record` wrote to `file`; None if no run was begun.

    Raises:
        CorruptCacheError: the record cannot be read.
    """
    if not file.exists():
        return None
    try:
        stored: Any = json.loads(file.read_text())
    except ValueError as error:
        raise CorruptCacheError(f"{file} is damaged ({error}). Delete {file.parent} to start again.") from error
    if not isinstance(stored, dict):
        raise CorruptCacheError(f"{file} holds no record of a run. Delete {file.parent} to start again.")
    return cast("dict[str, Any]", stored)


def keep_record(file: Path, record: Mapping[str, Any], *, may_change: Sequence[str] = ()) -> None:
    """Write the record of a run to `file`, or refuse if the folder belongs to another run.

    Args:
        file: in the run's folder, which exists.
        record: JSON values.
        may_change: dotted names of values that may differ from the record in the folder.

    Raises:
        CacheMismatchError: a run with another record has saved something there; the message names each difference.
        CorruptCacheError: the record in the folder cannot be read.
        ConfigError: the folder holds something other than a run.
    """
    folder, stored, asked = file.parent, read_record(file), json.loads(encode_json(record))
    if stored is None:
        if taken := _first_of(_FILES_OF_OTHERS, folder):
            raise ConfigError(
                f"{folder} holds something else: there is {taken}, but no {file.name}. Give another --out."
            )
    elif stored == asked:
        return
    elif _first_of(_SAVED, folder):
        differences = {
            name: values
            for name, values in find_differences(stored, asked).items()
            if not any(_is_below(name, other) for other in may_change)
        }
        if differences:
            listed = "; ".join(dict.fromkeys(_in_words(name, *values) for name, values in differences.items()))
            raise CacheMismatchError(f"{folder} holds another run: {listed}. Give another --out, or the same options.")
    write_file(file, encode_json(record))


def read_saved_record(file: Path) -> dict[str, Any] | None:
    """The record in `file` of a run that has saved something: only such a run is continued, see `keep_record`.

    Raises:
        CorruptCacheError: the record cannot be read.
    """
    return read_record(file) if _first_of(_SAVED, file.parent) else None


def settle_precision(asked: str, settings: object, device: torch.device) -> str:
    """The precision that a run computes in, "fp32" or "bf16".

    Args:
        asked: "auto" keeps what the run was begun with, on any machine; a new run gets what its device is fast at.
        settings: the recorded settings of the run, a mapping; None for a new run.
        device: where it runs now.

    Raises:
        ConfigError: there is no such precision.
    """
    begun_with = cast("dict[str, Any]", settings).get("precision") if isinstance(settings, dict) else None
    if asked == "auto" and begun_with in ("fp32", "bf16"):
        return begun_with
    return "bf16" if resolve_precision(asked, device) == torch.bfloat16 else "fp32"


def _first_of(names: Sequence[str], folder: Path) -> str | None:
    return next((name for name in names if (folder / name).exists()), None)


def _is_below(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(f"{prefix}.")


def _in_words(name: str, there: object, here: object) -> str:
    """A difference between two records, in the words of a user."""
    for prefix, words in _WITHOUT_VALUES.items():
        if _is_below(name, prefix):
            return words
    if name.startswith("data.views.") and name.endswith(".source"):
        return "its training images are different"
    if name.startswith(("record.", "data.views.")):
        return f"{name.removeprefix('record.').removeprefix('data.views.')} is {there!r} there and {here!r} here"
    return f"--{name.removeprefix('settings.').replace('_', '-')} is {there!r} there and {here!r} here"
