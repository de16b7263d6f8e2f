"""A run's folder belongs to one run, and one process at a time works in it.

What the run is stands in a record, a JSON file. A run that is typed again with other options is refused as soon as
something was saved that they would not have led to; before that it is begun anew.
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
from atcache.files.durable import encode_json, make_folder, only_writer, write_file
from atcache.teachers.devices import resolve_precision

from .checkpoint import CHECKPOINT_FILE
from .run_files import RUN_FILE, WEIGHTS_FILE

GIVEN_UP_FILE = "given-up.txt"
"""In the folder of a sweep's student whose loss was no number any more: why. Deleting the folder tries it anew."""

_SAVED = (WEIGHTS_FILE, CHECKPOINT_FILE, GIVEN_UP_FILE)
"""What a run is held to: without any of them, nothing of it is lost by another one."""
_FILES_OF_OTHERS = (*_SAVED, RUN_FILE, "config.json", "zarr.json")
"""What runs, pre-trained teachers, caches and anybody's weights leave in a folder, for a new run to overwrite."""

_WITHOUT_VALUES = {
    "data.validation": "its validation images or cache are others",
    "data.initial_weights_sha256": "it began with other --weights",
    "record.teacher": "its teacher is another",
    "record.pairing": "it is given other attention of its teacher",
    "source_fingerprint": "its images are others",
    "num_samples": "its images are others",
}
"""What is said where something below these keys differs: the values themselves would say nothing."""


@contextmanager
def run_folder(folder: Path) -> Generator[None]:
    """Make the folder of a run, and keep other processes from working in it, where its file system has locks.

    Raises:
        ConfigError: a file is in the way, there can be no folder there, or another process works in it.
    """
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder}: a file is in the way of the output folder. Give another --out.")
    try:
        make_folder(folder)
    except FileNotFoundError as error:  # its parent is there, but takes no folders, as /proc
        raise ConfigError(f"{folder}: no folder can be made there. Give another --out.") from error
    with only_writer(folder, where_possible=True):
        yield


def read_record(file: Path) -> dict[str, Any] | None:
    """What `keep_record` kept in `file`; None where no run was begun.

    Raises:
        CorruptCacheError: the record cannot be read.
    """
    if not file.exists():
        return None
    try:
        stored: Any = json.loads(file.read_text())
    except ValueError as error:
        raise CorruptCacheError(f"{file} is damaged ({error}). Delete {file.parent} to start anew.") from error
    if not isinstance(stored, dict):
        raise CorruptCacheError(f"{file} holds no record of a run. Delete {file.parent} to start anew.")
    return cast("dict[str, Any]", stored)


def keep_record(file: Path, record: Mapping[str, Any], *, may_change: Sequence[str] = ()) -> None:
    """Keep what a run is in `file`, or refuse to go on with another one.

    Args:
        file: in the run's folder, which exists.
        record: JSON values.
        may_change: dotted names of what may be another thing from now on.

    Raises:
        CacheMismatchError: the folder holds what a run with another record saved; the message names each difference.
        CorruptCacheError: the record in the folder cannot be read.
        ConfigError: the folder holds something else.
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


def settle_precision(asked: str, settings: object, device: torch.device) -> str:
    """What a run computes in, "fp32" or "bf16".

    Args:
        asked: "auto" is what the run was begun with, wherever that was; else what the device is fast at.
        settings: the run's, as recorded, a mapping; None for a new one.
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
    """A difference of two records, as a user would put it."""
    for prefix, words in _WITHOUT_VALUES.items():
        if _is_below(name, prefix):
            return words
    if name.startswith("data.views.") and name.endswith(".source"):
        return "its training images are others"
    if name.startswith(("record.", "data.views.")):
        return f"{name.removeprefix('record.').removeprefix('data.views.')} is {there!r} there and {here!r} here"
    return f"--{name.removeprefix('settings.').replace('_', '-')} is {there!r} there and {here!r} here"
