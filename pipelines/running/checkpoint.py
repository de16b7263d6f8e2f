"""Checkpoints: the state that a run needs to continue exactly. Files are replaced whole or not at all."""

from __future__ import annotations

import re
from collections.abc import Generator, Mapping
from contextlib import contextmanager
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


@contextmanager
def refuse_what_does_not_fit(path: Path) -> Generator[None]:
    """A context that gives the parts of the checkpoint at `path` to a model and its optimiser.

    Raises:
        CorruptCacheError: they do not fit, as those of a model from another version of timm.
    """
    try:
        yield
    except (KeyError, RuntimeError, ValueError) as error:  # what torch raises for another state
        reason = re.sub(r"\s+", " ", str(error))
        raise CorruptCacheError(
            f"{path} does not fit the model ({reason[:200].rstrip('. ')}). Another version of timm or torch may have "
            "made it: install that, or delete the file to start this run again."
        ) from error
