"""Which of a file's tensors are the weights of a model: the prefix of their names, found by matching names and shapes.

A file may hold several sets (teacher and student, averaged and last weights, optimizers) under prefixes that wrappers
stacked in any order. Each prefix is tried: the names behind it go through timm's conversion for the model's family. The
set with the most names and shapes of the model is chosen. Of several that fit as well, averaged weights and teachers
come first, then what says nothing of the kind, then students; then the longest prefix; then the alphabet.
"""

from __future__ import annotations

import inspect
import logging
import re
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from atcache.attention.blocks import model_label
from atcache.errors import TeacherError
from atcache.teachers.patch_grids import Grid, fit_positions, fit_tables, positions_are_fitted

AFTER_BLOCKS = ("norm.", "fc_norm.", "attn_pool.", "head.", "head_dist.")
"""Parameters that run after the last block. No map depends on them, so a file may lack them."""
# What torch's compiler, FSDP and activation checkpoints insert into names, at any place.
_INSERTED = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module"}
_FLATTENED = ("_flat_param", ".flat_param")
_AVERAGED = {"ema", "teacher", "target", "momentum", "averaged", "average", "avg", "swa", "slow"}
_LAST = {"student", "online", "predictor"}
# DINOv2 trains with blocks in chunks: blocks.CHUNK.NUMBER, where numbers run through.
_CHUNKED = re.compile(r"(^|\.)blocks\.\d+\.(\d+)\.")


@dataclass(frozen=True, kw_only=True, slots=True)
class FittedSet:
    """One set of a file's tensors, as a model would take them."""

    prefix: str
    """What was taken off the names, with its dot; empty if nothing."""
    given: dict[str, Tensor]
    """The tensors under the names behind the prefix."""
    fitted: dict[str, Tensor]
    """The tensors under the model's own names, resized to it; empty if timm cannot convert them."""
    num_fitting: int
    """How many tensors of the model, of those that maps depend on, have their name and shape here."""
    num_named: int
    """How many have their name here, in whatever shape."""
    problem: str | None
    """What timm said if it could not convert them."""


def choose_set(model: nn.Module, weights: Mapping[str, Tensor], grid: Grid | None = None) -> FittedSet:
    """The set of weights in a file that fits the model best; a note in the log if there was a choice.

    Args:
        model: a timm model.
        weights: all tensors of a file, as from `read_weights`.
        grid: the grid of patches of the weights; None if it is not known.

    Raises:
        TeacherError: position embeddings may be of several grids, or two tensors get one name.
    """
    wanted = model.state_dict()
    named = _plain_names(model, weights)
    sets = [_fit(model, wanted, named, prefix, grid) for prefix in _prefixes(named, len(before_end(wanted)))]
    # With no name in common, the names as they stand (the first) are the ones to show.
    best = min(sets, key=_order) if any(one.num_named for one in sets) else sets[0]
    _note_choice(model, best, [one for one in sets if one.num_fitting == best.num_fitting > 0])
    return best


def before_end(names: Iterable[str]) -> list[str]:
    """The names of what maps depend on."""
    return [name for name in names if not name.startswith(AFTER_BLOCKS)]


def describe_set(model: nn.Module, weights: Mapping[str, Tensor], best: FittedSet) -> str:
    """What a file holds and how near it comes to the model, for messages."""
    if any(name.endswith(_FLATTENED) for name in weights):
        return (
            "The file is of FSDP, which has flattened its tensors into one. Save the full state dict instead "
            "(StateDictType.FULL_STATE_DICT)."
        )
    wanted = model.state_dict()
    top = Counter(name.partition(".")[0] for name in weights)
    more = f" and {len(top) - 8} more" if len(top) > 8 else ""
    behind = f'behind "{best.prefix}"' if best.prefix else "as the names stand"
    return (
        f"The file holds {len(weights)} tensors, the first {_shapes(weights)}; at its top level "
        f"{', '.join(f'{name} ({number})' for name, number in list(top.items())[:8])}{more}. "
        f"Expected: {_shapes({name: wanted[name] for name in before_end(wanted)})}. "
        f"Nearest: {behind}, {best.num_fitting} of {len(before_end(wanted))} names and shapes agree."
    )


def _shapes(tensors: Mapping[str, Tensor], limit: int = 3) -> str:
    return ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in list(tensors.items())[:limit])


def _plain_names(model: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights without what is inserted within names, and with blocks numbered as in the model."""
    has_chunks = any(_CHUNKED.search(name) for name in model.state_dict())
    named: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        plain = ".".join(part for part in name.split(".") if part not in _INSERTED)
        if not has_chunks:
            plain = _CHUNKED.sub(r"\1blocks.\2.", plain)
        if plain in named:
            raise TeacherError(
                f"{model_label(model)}: two tensors of the weights are {plain} without what wrappers add to names, "
                f"one of them {name}. Save the state dict of the unwrapped model."
            )
        named[plain] = tensor
    return named


def _prefixes(names: Iterable[str], num_wanted: int) -> list[str]:
    """The prefixes under which enough tensors lie to be most of a model; always the empty one."""
    under: Counter[str] = Counter()
    for name in names:
        parts = name.split(".")
        under.update(".".join(parts[:end]) + "." for end in range(1, len(parts)))
    return ["", *(prefix for prefix, number in under.items() if 2 * number >= num_wanted)]


def _fit(
    model: nn.Module, wanted: Mapping[str, Tensor], named: Mapping[str, Tensor], prefix: str, grid: Grid | None
) -> FittedSet:
    behind = {name.removeprefix(prefix): tensor for name, tensor in named.items() if name.startswith(prefix)}
    given = _without_decoder(behind)
    fitted: dict[str, Tensor] = {}
    problem = None
    try:
        fitted = _converted(model, given, grid)
    except TeacherError:
        raise
    except Exception as error:  # timm's conversions raise anything on files they were not written for
        problem = f"{type(error).__name__}: {error}"
    found = [name for name in before_end(wanted) if name in fitted]
    return FittedSet(
        prefix=prefix,
        given=given,
        fitted=fitted,
        num_fitting=sum(fitted[name].shape == wanted[name].shape for name in found),
        num_named=len(found),
        problem=problem,
    )


def _converted(model: nn.Module, given: dict[str, Tensor], grid: Grid | None) -> dict[str, Tensor]:
    """The weights under the model's own names, resized to it."""
    tables = fit_tables(model, given, grid)
    rest = fit_positions(model, {name: tensor for name, tensor in given.items() if name not in tables}, grid)
    convert = _timm_filter(model)
    if convert is None:
        return {**rest, **tables}
    options: dict[str, Any] = {}
    if "adapt_layer_scale" in inspect.signature(convert).parameters:
        options["adapt_layer_scale"] = True
    # One conversion prints; stdout is for what a command returns.
    with positions_are_fitted(model, rest), redirect_stdout(sys.stderr):
        return {**convert(dict(rest), model, **options), **tables}


def _timm_filter(model: nn.Module) -> Any:  # noqa: ANN401 - timm's functions are untyped
    from timm.models import is_model, model_entrypoint

    name = model_label(model)
    module = model_entrypoint(name).__module__ if is_model(name) else type(model).__module__
    return getattr(sys.modules[module], "checkpoint_filter_fn", None)


def _without_decoder(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights without MAE's decoder."""
    decoder = [name for name in weights if name.startswith("decoder")]
    if decoder:
        # The mask token is part of the decoder. timm would take a file that has one for a file of DINOv2.
        decoder.append("mask_token")
    return {name: tensor for name, tensor in weights.items() if name not in decoder}


def _order(one: FittedSet) -> tuple[int, int, int, int, str]:
    return -one.num_fitting, -one.num_named, _rank(one.prefix), -one.prefix.count("."), one.prefix


def _rank(prefix: str) -> int:
    words = {word for part in prefix.lower().split(".") for word in part.split("_")}
    return 0 if words & _AVERAGED else 2 if words & _LAST else 1


def _note_choice(model: nn.Module, best: FittedSet, as_good: list[FittedSet]) -> None:
    # A prefix of the same tensors is no other set: timm takes some prefixes off by itself.
    others = [
        one.prefix for one in as_good if not (best.prefix.startswith(one.prefix) or one.prefix.startswith(best.prefix))
    ]
    parts: list[str] = []
    if best.prefix and best.num_fitting:
        parts.append(f'the weights are those behind "{best.prefix}" in the file\'s names')
    if others:
        parts.append(
            f"{' and '.join(repr(other) for other in others[:3])} would fit as well (averaged weights and teachers "
            "are taken before others); to have another set, save it alone"
        )
    if parts:
        # A prefix is taken off in most files. A choice among several sets should be seen, from Python too.
        level = logging.WARNING if others else logging.INFO
        logging.getLogger(__name__).log(level, "NOTE: %s: %s.", model_label(model), "; ".join(parts))
