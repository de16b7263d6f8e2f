"""Weights of timm models: fitted into a model, whatever file they come from, and named by their sha256."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from atcache.attention.blocks import model_label
from atcache.errors import TeacherError
from atcache.teachers.patch_grids import model_grid, refuse_registers
from atcache.teachers.weight_files import Weights
from atcache.teachers.weight_sets import AFTER_BLOCKS, choose_set, describe_set

_HEADS = ("head.", "head_dist.")
# Beginnings and endings of names of tensors that change the maps of a model that has them. What else a file holds may
# be heads, projectors and text towers.
_CHANGES_MAPS = ("blocks.", "patch_embed.", "pos_embed", "norm_pre.", "rel_pos_bias.")
_TOKENS = ("cls_token", "dist_token", "reg_token", "register_tokens", "storage_tokens")


def weights_of(model: nn.Module) -> Weights:
    """A model's own weights, with its grid of patches; not copied."""
    return Weights(model.state_dict(), grid=model_grid(model))


def load_weights(model: nn.Module, weights: Mapping[str, Tensor], *, keep_head: bool = True) -> None:
    """Put `weights` into `model`, in place, through timm's own conversion for its family.

    The prefix of their names is found by matching names and shapes against the model; of several sets the averaged one
    is taken (see `weight_sets`). Position and patch embeddings of another size are interpolated. All that the maps
    depend on must be there. Notes in the log say which set was taken, and what of it was not used or is missing.

    Args:
        model: a timm model.
        weights: all tensors of a file, as from `read_weights`, or a state dict; not changed.
        keep_head: False leaves the model's classifier as it is, for a student. One of another shape is never loaded.

    Raises:
        TeacherError: a tensor before or in the blocks is missing or has another shape, or the weights have such
            tensors that the model lacks; the message names it and says what the file holds. Or their grid of
            patches is not known. The model is then unchanged.
    """
    label = model_label(model)
    best = choose_set(model, weights, weights.grid if isinstance(weights, Weights) else None)
    if best.problem is not None:
        raise TeacherError(
            f"{label}: timm cannot convert these weights ({best.problem}). Choose the model these weights are of. "
            f"{describe_set(model, weights, best)}"
        )
    fitted = dict(best.fitted)
    wanted = model.state_dict()
    for name in list(fitted):
        is_head = name.startswith(_HEADS)
        if is_head and (not keep_head or name not in wanted or fitted[name].shape != wanted[name].shape):
            del fitted[name]
    missing = [name for name in wanted if name not in fitted and not name.startswith(AFTER_BLOCKS)]
    if missing:
        raise TeacherError(
            f"{label}: {len(missing)} of {len(wanted)} tensors are missing in the weights, the first "
            f"{_first(missing)}. The weights are of another model, or under names this model does not know. "
            f"{describe_set(model, weights, best)}"
        )
    known = {name: tensor for name, tensor in fitted.items() if name in wanted}
    misfits = [name for name, tensor in known.items() if tensor.shape != wanted[name].shape]
    if misfits:
        name = misfits[0]
        raise TeacherError(
            f"{label}: {len(misfits)} tensors have another shape in the weights, the first {name}: "
            f"{tuple(known[name].shape)}, expected {tuple(wanted[name].shape)}. Choose the model these weights are of. "
            f"{describe_set(model, weights, best)}"
        )
    unused = [name for name in fitted if name not in wanted and _matters(name, fitted[name])]
    if unplaced := [name for name in unused if name.startswith(_CHANGES_MAPS) or name.endswith(_TOKENS)]:
        refuse_registers(model, fitted)
        raise TeacherError(
            f"{label}: {len(unplaced)} tensors of the weights, which maps depend on, have no place in the model, the "
            f"first {_first(unplaced)}. The weights are of another model, such as one with more blocks or tokens. "
            f"{describe_set(model, weights, best)}"
        )
    _warn_of_another_patch_size(model, best.given)
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
        logging.getLogger(__name__).warning("NOTE: %s: %s.", model_label(model), "; ".join(parts))


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
