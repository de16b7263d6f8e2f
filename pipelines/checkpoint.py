"""Checkpoints: what a run needs to go on exactly, replaced whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch

from atcache.errors import CacheMismatchError, ConfigError, CorruptCacheError
from atcache.store.durable import encode_json, replaced_whole, write_file

from .differences import name_differences

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


def check_same_run(file: Path, record: Mapping[str, Any]) -> None:
    """Keep what a run is in `file`, or refuse to go on with another one.

    Raises:
        CacheMismatchError: the folder holds a run with another record; the message names each difference.
        CorruptCacheError: the record in the folder cannot be read.
        ConfigError: a file is where the folder should be.
    """
    folder = file.parent
    if file.exists():
        try:
            stored: Any = json.loads(file.read_text())
        except ValueError as error:
            raise CorruptCacheError(f"{file} is damaged ({error}). Delete {folder} to start anew.") from error
        if not isinstance(stored, dict):
            raise CorruptCacheError(f"{file} holds no record of a run. Delete {folder} to start anew.")
        stored = cast("dict[str, Any]", stored)
        if differences := name_differences(stored, json.loads(encode_json(record))):
            raise CacheMismatchError(
                f"{folder} holds another run: {'; '.join(differences)}. Give another --out, or the same options."
            )
        return
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder}: a file is in the way of the output folder. Give another --out.")
    folder.mkdir(parents=True, exist_ok=True)
    write_file(file, encode_json(record))
