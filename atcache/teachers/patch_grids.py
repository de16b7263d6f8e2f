"""Position embeddings and relative position tables of another grid of patches, fitted to a model's own grid.

A table of 16 positions may be of 4 x 4 or of 2 x 8 patches. So grids are compared, not counts. Where a file does not
say its grid, weights are taken to be of a square one, as timm does, unless the model's own grid is as likely.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from atcache.attention.blocks import model_label
from atcache.errors import TeacherError

Grid = tuple[int, int]
"""Patches down and across."""
_TABLE = "relative_position_bias_table"


def model_grid(model: nn.Module) -> Grid | None:
    """The grid of patches a model was made for; None if it has none."""
    grid: Any = getattr(getattr(model, "patch_embed", None), "grid_size", None)
    return None if grid is None else (int(grid[0]), int(grid[1]))


def fit_positions(model: nn.Module, weights: Mapping[str, Tensor], grid: Grid | None) -> dict[str, Tensor]:
    """The weights, with position embeddings of the model's grid.

    Positions of class and register tokens are added or folded into the tokens if only one side has them; both give the
    same sums. Interpolation is `timm.layers.resample_abs_pos_embed`.

    Args:
        model: a timm model.
        weights: under names of the model's family.
        grid: the grid of the weights; None if it is not known.

    Raises:
        TeacherError: the weights may be of several grids, or of none.
    """
    from timm.layers.pos_embed import resample_abs_pos_embed

    fitted = dict(weights)
    name, ours = _name_of_positions(weights), model_grid(model)
    own: Any = getattr(model, "pos_embed", None)
    if name is None or ours is None or not isinstance(own, Tensor) or own.ndim != 3:
        return fitted
    is_flat = weights[name].ndim == 2  # CLIP's
    given_1NC = weights[name][None] if is_flat else weights[name]
    if given_1NC.ndim != 3 or given_1NC.shape[2] != own.shape[2]:
        return fitted  # of another width, which is said later with all names
    num_own_prefix = own.shape[1] - math.prod(ours)
    # DINOv2's registers come without positions, and timm folds the position of its class token itself.
    folds_later = "register_tokens" in weights and num_own_prefix == 0
    num_prefix = 1 if folds_later else _num_prefix(model, weights, given_1NC.shape[1], num_own_prefix, ours, grid)
    theirs = _grid_of(given_1NC.shape[1] - num_prefix, ours, grid, math.prod, f"{model_label(model)}: the weights'")
    if num_prefix != num_own_prefix and not folds_later:
        given_1NC = _with_prefix(model, fitted, given_1NC, num_prefix, num_own_prefix)
        num_prefix = num_own_prefix
    if theirs != ours:
        given_1NC = resample_abs_pos_embed(
            given_1NC, new_size=list(ours), old_size=list(theirs), num_prefix_tokens=num_prefix
        )
    fitted[name] = given_1NC[0] if is_flat else given_1NC
    return fitted


def fit_tables(model: nn.Module, weights: Mapping[str, Tensor], grid: Grid | None) -> dict[str, Tensor]:
    """The relative position tables among the weights that the model has too, for the model's windows.

    timm would take each table whose length is a square for one of a square window, also a table of the model's own
    2 x 14 patches. So these must not pass through its conversion.

    Args:
        model: a timm model.
        weights: under names of the model's family.
        grid: the grid of the weights; None if it is not known.

    Raises:
        TeacherError: the weights may be of several grids, or of none.
    """
    from timm.layers import pos_embed_rel

    resize: Any = cast("Any", pos_embed_rel).resize_rel_pos_bias_table
    modules: dict[str, Any] = dict(cast("Any", model).named_modules())
    fitted: dict[str, Tensor] = {}
    for name, table_PH in weights.items():
        place, _, last = name.rpartition(".")
        module: Any = modules.get(place)
        own: Any = getattr(module, _TABLE, None)
        if last != _TABLE or module is None or own is None or table_PH.ndim != 2 or table_PH.shape[1] != own.shape[1]:
            continue
        ours = (int(module.window_size[0]), int(module.window_size[1]))
        num_extra = own.shape[0] - _num_offsets(ours)
        owner = f"{model_label(model)}: the weights' {name}"
        theirs = _grid_of(table_PH.shape[0] - num_extra, ours, grid, _num_offsets, owner)
        source = {} if theirs[0] == theirs[1] else {"old_window_size": theirs}
        if theirs != ours:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # of torch, about a copy within timm's interpolation
                table_PH = resize(table_PH, new_window_size=ours, new_bias_shape=own.shape, **source)
        fitted[name] = table_PH
    return fitted


def refuse_registers(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Refuse weights that have register tokens if the model has none.

    Raises:
        TeacherError: names models that have them, if timm has some of the same name.
    """
    from timm.models import list_models

    name = next((name for name in ("reg_token", "register_tokens") if name in weights), None)
    if name is None or getattr(model, "reg_token", None) is not None:
        return
    label = model_label(model)
    close = [known for known in list_models("*_reg[0-9]*") if re.sub(r"_reg\d+", "", known) == label]
    raise TeacherError(
        f"{label}: the weights have {weights[name].shape[-2]} register tokens ({name}), the model has none. Choose the "
        f"model these weights are of{f': {close[0]}' if close else ', with registers (argument reg_tokens)'}."
    )


@contextmanager
def positions_are_fitted(model: nn.Module, weights: Mapping[str, Tensor]) -> Generator[None]:
    """Meanwhile timm's conversions take position embeddings of as many tokens as the model's to be of its grid.

    They would otherwise guess the grid from the image size that timm records, which may be of other weights.
    """
    names = ("patch_embed.proj.weight", "visual.conv1.weight", "conv1.weight")
    patch = next((weights[name] for name in names if name in weights), None)
    ours = model_grid(model)
    if patch is None or ours is None or patch.ndim != 4:
        yield
        return
    before: Any = getattr(model, "pretrained_model_args", None)
    holder = cast("Any", model)
    holder.pretrained_model_args = {"img_size": (ours[0] * patch.shape[2], ours[1] * patch.shape[3])}
    try:
        yield
    finally:
        if before is None:
            del holder.pretrained_model_args
        else:
            holder.pretrained_model_args = before


def _name_of_positions(weights: Mapping[str, Tensor]) -> str | None:
    """The name of the position embeddings: timm's, or CLIP's (whose text has a `positional_embedding` too)."""
    names = ["pos_embed", "visual.positional_embedding"]
    if "conv1.weight" in weights:
        names.append("positional_embedding")
    return next((name for name in names if name in weights), None)


def _num_prefix(
    model: nn.Module,
    weights: Mapping[str, Tensor],
    num_positions: int,
    num_own_prefix: int,
    ours: Grid,
    known: Grid | None,
) -> int:
    """How many of the positions are those of class and register tokens: as in the model, if that leaves a grid.

    Raises:
        TeacherError: all positions together make a square, and without the prefix positions of the model they do not.
            That may be 15 x 15 patches without prefix, or 14 x 16 with a class token.
    """
    for num_prefix in dict.fromkeys([num_own_prefix, 0, 1, int(getattr(model, "num_prefix_tokens", 1))]):
        num_patches = num_positions - num_prefix
        grids = [known] if known else [ours, _square(num_patches, math.prod)]
        fitting = next((grid for grid in grids if grid and math.prod(grid) == num_patches), None)
        if not fitting:
            refuse_registers(model, weights)  # their positions may be others, or the class token has none
        if fitting and num_prefix == 0 < num_own_prefix and known is None:
            raise TeacherError(
                f"{model_label(model)}: the weights have {num_positions} positions. If they are of {fitting[0]} x "
                f"{fitting[1]} patches and none of a class or register token, add weights_grid={_text(fitting)} to the "
                "model's name; if some are, add the grid of the others."
            )
        if fitting:
            return num_prefix
    return num_own_prefix


def _with_prefix(
    model: nn.Module, weights: dict[str, Tensor], given_1NC: Tensor, num_given: int, num_own: int
) -> Tensor:
    """The position embeddings with as many prefix positions as the model has; `weights` is changed to match."""
    if num_given == 0:
        # Their class token had nothing added.
        return torch.cat([given_1NC.new_zeros(1, num_own, given_1NC.shape[2]), given_1NC], dim=1)
    tokens = {"cls_token": 1} | ({"reg_token": num_given - 1} if num_given > 1 else {})
    fit = all(name in weights and weights[name].shape[1] == number for name, number in tokens.items())
    if num_own > 0 or not fit or getattr(model, "cls_token", None) is None:
        raise TeacherError(
            f"{model_label(model)}: the weights have positions for {num_given} class and register tokens, expected "
            f"{num_own}. Choose the model these weights are of (class_token, reg_tokens, no_embed_class)."
        )
    first = 0
    for name, number in tokens.items():
        weights[name] = weights[name] + given_1NC[:, first : first + number]
        first += number
    return given_1NC[:, num_given:]


def _num_offsets(grid: Grid) -> int:
    """How many offsets two patches of a grid can have."""
    return (2 * grid[0] - 1) * (2 * grid[1] - 1)


def _square(number: int, size: Callable[[Grid], int]) -> Grid | None:
    """The square grid of which `size` is `number`; None if there is none."""
    root = math.isqrt(max(0, number))
    sides = {root, (root + 1) // 2}  # of positions, and of offsets
    return next(((side, side) for side in sides if side > 0 and size((side, side)) == number), None)


def _grid_of(number: int, ours: Grid, known: Grid | None, size: Callable[[Grid], int], owner: str) -> Grid:
    """The grid of a table of `number` entries, where a grid has `size` of them."""
    what = "positions" if size is math.prod else "offsets"
    if known is not None:
        if size(known) != number:
            raise TeacherError(
                f"{owner} {what} are {number}, and weights_grid={_text(known)} has {size(known)}. Give the grid of "
                "patches that these weights were trained with."
            )
        return known
    square = _square(number, size)
    if size(ours) == number and square not in (None, ours):
        raise TeacherError(
            f"{owner} {number} {what} may be those of {square[0]} x {square[1]} patches or of the model's "
            f"{ours[0]} x {ours[1]}, and the file does not say which. Add weights_grid={_text(square)} or "
            f"weights_grid={_text(ours)} to the model's name."
        )
    if size(ours) == number:
        return ours
    if square is None:
        raise TeacherError(
            f"{owner} {number} {what} are of no square grid of patches, and the model's is {ours[0]} x {ours[1]}. Add "
            "the grid that the weights were trained with to the model's name, such as weights_grid=(7,14)."
        )
    return square


def _text(grid: Grid | None) -> str:
    assert grid is not None
    return f"({grid[0]},{grid[1]})"
