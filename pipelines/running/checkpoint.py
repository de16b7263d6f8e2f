"""Checkpoints: the state that a run needs to continue exactly. Files are replaced whole or not at all."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from atcache.errors import CorruptCacheError
from atcache.files.durable import replaced_whole

CHECKPOINT_FILE = "checkpoint.pt"


def save_checkpoint(path: Path, contents: Mapping[str, Any]) -> None:
    """Replace the checkpoint at `path`; after a failure the old one is still there.

    Args:
        path: the file.
        contents: tensors, numbers, text, and lists and dicts of them. The states of random generators are not needed,
            because each step seeds its own.
    """
    # Given a path, torch opens the file itself, and its error would not say that the disk is full.
    with replaced_whole(path) as temp, temp.open("wb") as file:
        torch.save(dict(contents), file)


def load_checkpoint(path: Path, device: torch.device) -> dict[str, Any]:
    """The checkpoint at `path`, its tensors on `device`.

    Raises:
        CorruptCacheError: it cannot be read, or holds objects that are not plain data.
    """
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # torch raises many kinds for damaged files
        reason = str(error).partition("\n")[0].rstrip(".")
        raise CorruptCacheError(f"{path} cannot be read ({reason}). Delete it to start this run again.") from error
