"""Weight files: read without running what is in them, fitted into a timm model, and named by their sha256."""

from __future__ import annotations

import argparse
import hashlib
import inspect
import logging
import pickle
import sys
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from atcache.attention.blocks import model_label
from atcache.errors import TeacherError

WRAPPERS = ("state_dict_ema", "model_ema", "teacher", "state_dict", "model")
"""Keys under which a checkpoint may hold its weights, the preferred first: averaged weights before the last ones."""
PREFIXES = ("_orig_mod.", "module.", "backbone.", "encoder.")
"""Prefixes that wrappers and training code add to a parameter's name."""
AFTER_BLOCKS = ("norm.", "fc_norm.", "attn_pool.", "head.", "head_dist.")
"""Parameters that run after the last block. No map depends on them, so a file may lack them."""
_HEADS = ("head.", "head_dist.")


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a safetensors or torch file by parameter name, on the CPU, without wrappers and prefixes.

    Torch files are read with `weights_only=True`, so nothing in them can run. Of several sets of weights in one file,
    the first of `WRAPPERS` is taken.

    Raises:
        TeacherError: the file is missing, of another format, or holds pickled objects.
    """
    path = Path(path)
    if not path.is_file():
        raise TeacherError(f"weights {path}: no such file.")
    # A safetensors file begins with the length of its header, 8 bytes; the header is JSON.
    with path.open("rb") as file:
        is_safetensors = file.read(9)[8:] == b"{"
    checkpoint: Any = _read_safetensors(path) if is_safetensors else _read_torch(path)
    weights = _tensors(_unwrapped(checkpoint))
    if not weights:
        raise TeacherError(f"weights {path}: no tensors found, neither at the top nor under {', '.join(WRAPPERS)}.")
    for prefix in PREFIXES:
        stripped = {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}
        others = {name: tensor for name, tensor in weights.items() if not name.startswith(prefix)}
        weights = {**others, **stripped}
    return weights


def load_weights(model: nn.Module, weights: Mapping[str, Tensor], *, keep_head: bool = True) -> None:
    """Put `weights` into `model`, in place, through timm's own conversion for its family.

    timm interpolates position and patch embeddings of another size. All that the maps depend on must be there. If
    anything else that matters was not used or is missing, a note in the log says what.

    Args:
        model: a timm model.
        weights: as from `read_weights`; not changed.
        keep_head: False leaves the model's classifier as it is, for a student. One of another shape is never loaded.

    Raises:
        TeacherError: a tensor before or in the blocks is missing or has another shape, or the weights have tensors in
            their blocks that the model lacks; the message names it. The model is then unchanged.
    """
    weights = _without_decoder(weights)
    fitted = _converted(model, weights)
    wanted = model.state_dict()
    for name in list(fitted):
        is_head = name.startswith(_HEADS)
        if is_head and (not keep_head or name not in wanted or fitted[name].shape != wanted[name].shape):
            del fitted[name]
    missing = [name for name in wanted if name not in fitted and not name.startswith(AFTER_BLOCKS)]
    if missing:
        raise TeacherError(
            f"{model_label(model)}: {len(missing)} of {len(wanted)} tensors are missing in the weights, the first "
            f"{_first(missing)}. The weights are of another model, or under names this model does not know."
        )
    known = {name: tensor for name, tensor in fitted.items() if name in wanted}
    misfits = [name for name, tensor in known.items() if tensor.shape != wanted[name].shape]
    if misfits:
        name = misfits[0]
        raise TeacherError(
            f"{model_label(model)}: {len(misfits)} tensors have another shape in the weights, the first {name}: "
            f"{tuple(known[name].shape)}, expected {tuple(wanted[name].shape)}. Choose the model these weights are of."
        )
    unused = [name for name in fitted if name not in wanted and _matters(name, fitted[name])]
    if unplaced := [name for name in unused if name.startswith("blocks.")]:
        raise TeacherError(
            f"{model_label(model)}: {len(unplaced)} tensors of the weights' blocks have no place in the model, the "
            f"first {_first(unplaced)}. The weights are of another model, such as one with more blocks."
        )
    _warn_of_another_patch_size(model, weights)
    model.load_state_dict(known, strict=False)
    # No map depends on what comes after the blocks, so it only matters to a student, whose head is fresh on purpose.
    without = _HEADS if not keep_head else AFTER_BLOCKS
    fresh = [name for name in wanted if name not in known]
    _note_what_was_left(model, *([name for name in names if not name.startswith(without)] for names in (unused, fresh)))


def weights_sha256(model: nn.Module, *, without: tuple[str, ...] = ()) -> str:
    """The sha256 over the model's state dict: names in sorted order, types, shapes and bytes; 64 hex digits.

    The same weights give the same digits, whatever file they came from and whatever device they are on.

    Args:
        model: any module.
        without: prefixes of names to leave out, such as `AFTER_BLOCKS`.
    """
    return tensors_sha256(model.state_dict(), without=without)


def tensors_sha256(tensors: Mapping[str, Tensor], *, without: tuple[str, ...] = ()) -> str:
    """What `weights_sha256` returns for a model with these tensors as its state dict."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        if name.startswith(without):
            continue
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        # As bytes, because numpy has no bfloat16. Flattened first, because a scalar has no axis to view as bytes.
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError, torch as safetensors_torch

    try:
        return safetensors_torch.load_file(path)
    except SafetensorError as error:
        raise TeacherError(f"weights {path}: damaged safetensors file ({error}). Download it again.") from error


def _read_torch(path: Path) -> Any:  # noqa: ANN401 - whatever the file holds
    try:
        # Training scripts keep their argparse.Namespace beside the weights; setting its attributes runs nothing.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        detail = str(error)
        if "GLOBAL" in detail:
            raise TeacherError(
                f"weights {path}: the file holds pickled Python objects beside tensors, which could run code when "
                "read; it was not read. If you trust it, save its state dict alone (as safetensors, or with "
                "torch.save(model.state_dict(), ...))."
            ) from error
        raise TeacherError(f"weights {path}: neither a safetensors nor a torch file.") from error
    except (RuntimeError, EOFError, zipfile.BadZipFile, ValueError, KeyError) as error:
        raise TeacherError(f"weights {path}: neither a safetensors nor a torch file, or damaged.") from error


def _unwrapped(checkpoint: object) -> dict[str, Any]:
    if not isinstance(checkpoint, dict):
        return {}
    entries = cast("dict[str, Any]", checkpoint)
    for wrapper in WRAPPERS:
        if isinstance(entries.get(wrapper), dict) and (inner := _unwrapped(entries[wrapper])):
            return inner
    return entries


def _tensors(entries: Mapping[str, Any]) -> dict[str, Tensor]:
    return {name: value for name, value in entries.items() if isinstance(value, Tensor)}


def _without_decoder(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights without MAE's decoder."""
    decoder = [name for name in weights if name.startswith("decoder")]
    if decoder:
        # The mask token is part of the decoder. timm would take a file that has one for a file of DINOv2.
        decoder.append("mask_token")
    return {name: tensor for name, tensor in weights.items() if name not in decoder}


def _converted(model: nn.Module, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights under the model's own names, resized to it."""
    convert = _timm_filter(model)
    if convert is None:
        return weights
    options: dict[str, Any] = {}
    if "adapt_layer_scale" in inspect.signature(convert).parameters:
        options["adapt_layer_scale"] = True
    try:
        return dict(convert(weights, model, **options))
    except Exception as error:  # timm's conversions raise anything on files they were not written for
        raise TeacherError(
            f"{model_label(model)}: timm cannot convert these weights ({type(error).__name__}: {error}). "
            "Choose the model these weights are of."
        ) from error


def _timm_filter(model: nn.Module) -> Any:  # noqa: ANN401 - timm's functions are untyped
    from timm.models import is_model, model_entrypoint

    name = model_label(model)
    module = model_entrypoint(name).__module__ if is_model(name) else type(model).__module__
    return getattr(sys.modules[module], "checkpoint_filter_fn", None)


def _matters(name: str, tensor: Tensor) -> bool:
    """Whether a tensor changes what a model does; not tables that models compute, nor biases that shift logit rows."""
    without_effect = ("relative_position_index", "k_bias", "rope.", "mask_token")
    return tensor.is_floating_point() and not any(part in name for part in without_effect)


def _note_what_was_left(model: nn.Module, unused: list[str], fresh: list[str]) -> None:
    parts: list[str] = []
    if unused:
        parts.append(
            f"{len(unused)} tensors of the weights are not in the model and not used, the first {_first(unused)}"
        )
    if fresh:
        parts.append(
            f"{len(fresh)} tensors of the model are not in the weights and stay at their initial values, the first "
            f"{_first(fresh)}"
        )
    if parts:
        logging.getLogger(__name__).info("NOTE: %s: %s.", model_label(model), "; ".join(parts))


def _warn_of_another_patch_size(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Warn if timm resized the patch embedding: few models still work after that without training."""
    name = "patch_embed.proj.weight"
    given, wanted = weights.get(name), model.state_dict().get(name)
    if given is None or wanted is None or not given.ndim == wanted.ndim == 4:
        return
    if given.shape[2:] != wanted.shape[2:]:
        theirs, ours = (" x ".join(map(str, tensor.shape[2:])) for tensor in (given, wanted))
        logging.getLogger(__name__).warning(
            "WARNING: the weights are for patches of %s pixels, %s takes %s. They were resized; unless the model was "
            "trained for several sizes, give patch_size=%d.",
            theirs,
            model_label(model),
            ours,
            given.shape[-1],
        )


def _first(names: Iterable[str], limit: int = 3) -> str:
    return ", ".join(list(names)[:limit])
