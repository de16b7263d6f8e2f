"""Checkpoints: what a run needs to go on exactly, replaced whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch

from atcache.errors import CacheMismatchError, ConfigError, CorruptCacheError
from atcache.precision import resolve_precision
from atcache.store.durable import encode_json, replaced_whole, write_file

from .differences import name_differences
from .runs import RUN_FILE, WEIGHTS_FILE

CHECKPOINT_FILE = "checkpoint.pt"


def save_checkpoint(path: Path, contents: Mapping[str, Any]) -> None:
    """Replace the checkpoint at `path`; after a failure the old one is still there.

    Args:
        path: the file.
        contents: tensors, numbers, text, and lists and dicts of them. Random states are not needed: each step seeds
            its own numbers.
    """
    with replaced_whole(path) as temp:
        torch.save(dict(contents), temp)


def load_checkpoint(path: Path, device: torch.device) -> dict[str, Any]:
    """The checkpoint at `path`, its tensors on `device`.

    Raises:
        CorruptCacheError: it cannot be read, or holds more than data.
    """
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # torch raises many kinds for damaged files
        reason = str(error).partition("\n")[0].rstrip(".")
        raise CorruptCacheError(f"{path} cannot be read ({reason}). Delete it to start this run anew.") from error


def read_record(file: Path) -> dict[str, Any] | None:
    """What `check_same_run` kept in `file`; None where no run was begun.

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


_FILES_OF_OTHERS = (WEIGHTS_FILE, CHECKPOINT_FILE, RUN_FILE, "config.json", "zarr.json")
"""What runs, pre-trained teachers, caches and anybody's weights leave in a folder, for a new run to overwrite."""


def check_same_run(file: Path, record: Mapping[str, Any]) -> None:
    """Keep what a run is in `file`, or refuse to go on with another one.

    Raises:
        CacheMismatchError: the folder holds a run with another record; the message names each difference.
        CorruptCacheError: the record in the folder cannot be read.
        ConfigError: a file is where the folder should be, or the folder holds something else.
    """
    folder, stored = file.parent, read_record(file)
    if stored is not None:
        asked = json.loads(encode_json(record))
        is_settled = not _settle(stored, asked)
        if differences := name_differences(stored, asked):
            raise CacheMismatchError(
                f"{folder} holds another run: {'; '.join(differences)}. Give another --out, or the same options."
            )
        if not is_settled:
            write_file(file, encode_json(record))
        return
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder}: a file is in the way of the output folder. Give another --out.")
    if taken := next((name for name in _FILES_OF_OTHERS if (folder / name).exists()), None):
        raise ConfigError(f"{folder} holds something else: there is {taken}, but no {file.name}. Give another --out.")
    folder.mkdir(parents=True, exist_ok=True)
    write_file(file, encode_json(record))


def _settle(stored: dict[str, Any], asked: Mapping[str, Any]) -> bool:
    """Take what is asked for where runs of the first versions say "auto", which could be anything; whether they do."""
    settings, wanted = (record.get("settings", record) for record in (stored, asked))
    if not isinstance(settings, dict) or settings.get("precision") != "auto":
        return False
    settings["precision"] = wanted.get("precision")
    return True
