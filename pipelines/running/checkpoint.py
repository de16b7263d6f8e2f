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


def load_checkpoint(path: Path) -> dict[str, Any]:
    """The checkpoint at `path`, its tensors in the host's memory; what loads their state copies them to its device.

    Raises:
        CorruptCacheError: its bytes are damaged, or hold objects that are not plain data.
        OSError: the file cannot be read, whatever its bytes are.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, MemoryError):  # the file may be whole, and must not be called damaged
        raise
    except Exception as error:  # torch raises many kinds for damaged files
        reason = str(error).partition("\n")[0].rstrip(".")
        raise CorruptCacheError(f"{path} cannot be read ({reason}). Delete it to start this run again.") from error
