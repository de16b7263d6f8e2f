"""Checkpoints: what a run needs to go on exactly, replaced whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from atcache.errors import CacheMismatchError, CorruptCacheError
from atcache.store.durable import disk_errors_explained, fsync_path, partial_path


def save_checkpoint(path: Path, contents: Mapping[str, Any]) -> None:
    """Replace the checkpoint at `path`; after a failure the old one is still there.

    Args:
        path: the file.
        contents: tensors, numbers, text, and lists and dicts of them; torch's and the device's random states are added.
    """
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    temp = partial_path(path)
    with disk_errors_explained(path):
        try:
            torch.save({**contents, "random_states": states}, temp)
            fsync_path(temp)
            temp.replace(path)
            fsync_path(path.parent)
        except BaseException:
            temp.unlink(missing_ok=True)
            raise


def load_checkpoint(path: Path, device: torch.device) -> dict[str, Any]:
    """The checkpoint at `path`, its tensors on `device`; random states are set as they were.

    Raises:
        CorruptCacheError: it cannot be read.
    """
    try:
        contents: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
        states = contents.pop("random_states")
    except Exception as error:  # torch raises many kinds for damaged files
        raise CorruptCacheError(f"{path} cannot be read ({error}). Delete it to start this run anew.") from error
    torch.set_rng_state(states["cpu"].cpu())
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"].cpu())
    return contents


def check_same_run(file: Path, settings: Mapping[str, Any]) -> None:
    """Keep a run's settings in `file`, or refuse to go on with other ones.

    Raises:
        CacheMismatchError: the folder holds a run with other settings; the message names each difference.
    """
    if file.exists():
        stored: dict[str, Any] = json.loads(file.read_text())
        differences = [
            f"{name} is {stored.get(name)!r} there and {settings.get(name)!r} here"
            for name in sorted({*stored, *settings})
            if stored.get(name) != settings.get(name)
        ]
        if differences:
            raise CacheMismatchError(
                f"{file.parent} holds another run: {'; '.join(differences)}. Give another --out, or the same options."
            )
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    temp = partial_path(file)
    temp.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")
    temp.replace(file)
