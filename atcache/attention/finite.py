"""Whether a teacher's attention is finite; if not, in which layer and for which image it first is not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from atcache.attention.factors import LayerAttention, LayerFactors, LayerMaps
from atcache.errors import TeacherError


@dataclass(frozen=True, kw_only=True, slots=True)
class NotFinite:
    """Where a batch first holds NaN or infinity."""

    where: str
    """Such as "from layer 7 on (q)"."""
    views: tuple[int, ...]
    """Positions in the batch of all views that have it there."""
    num_views: int
    precision: str
    """What the model computes in, such as bfloat16."""


class NotFiniteError(TeacherError):
    """The teacher computes NaN or infinity.

    Args:
        found: where.
        name_of: what the user calls the view at a position of the batch; None numbers them.
    """

    def __init__(self, found: NotFinite, name_of: Callable[[int], str] | None = None) -> None:
        self.found = found
        first = name_of(found.views[0]) if name_of else f"image {found.views[0] + 1} of the {found.num_views}"
        advice = (
            "Check its weights and this image."
            if found.precision == "float32"
            else "Give --precision fp32; if that does not help, check its weights and this image."
        )
        super().__init__(
            f"the teacher's output is not finite: {found.where}, for {len(found.views)} of "
            f"{found.num_views} images, the first is {first}; it was computed in {found.precision}. {advice}"
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return _made_again, (str(self), self.found)


def _made_again(message: str, found: NotFinite) -> NotFiniteError:
    """The error in another process, which has no `name_of`."""
    error = NotFiniteError(found)
    error.args = (message,)
    return error


def find_not_finite(numbers: Sequence[int], layers: Sequence[LayerAttention]) -> NotFinite | None:
    """Where the attention of some layers first is NaN or infinite; None if it is nowhere.

    Args:
        numbers: the layers' numbers in the model, in ascending order.
        layers: the captured attention of each. A bias may be minus infinity, where it masks a key.
    """
    for number, layer in zip(numbers, layers, strict=True):
        for name, tensor, is_bad in _parts(layer):
            if not bool(is_bad.any()):
                continue
            is_bad_B = is_bad.flatten(1).any(dim=1).expand(layer.shape_BHT[0])
            return NotFinite(
                where=f"from layer {number} on ({name})",
                views=positions(is_bad_B),
                num_views=len(is_bad_B),
                precision=precision_of(tensor),
            )
    return None


def positions(is_bad_B: Tensor) -> tuple[int, ...]:
    """Where a vector of bools is true."""
    return tuple(cast("list[int]", is_bad_B.nonzero().flatten().tolist()))


def _parts(layer: LayerAttention) -> list[tuple[str, Tensor, Tensor]]:
    """Each tensor of a layer: its name, itself, and where it is bad."""
    if isinstance(layer, LayerMaps):
        return [("maps", layer.attn_BHQK, ~layer.attn_BHQK.isfinite())]
    assert isinstance(layer, LayerFactors)
    factors = (
        ("q", layer.q_BHTD),
        ("k", layer.k_BHTD),
        ("v", layer.v_BHTD),
        ("what attention and MLP get", layer.inputs_BNTC),
    )
    parts = [(name, tensor, ~tensor.isfinite()) for name, tensor in factors if tensor is not None]
    return parts if layer.bias is None else [*parts, ("bias", layer.bias, layer.bias.isnan())]


def precision_of(tensor: Tensor) -> str:
    """What a model that gives this tensor computes in. Under autocast, some tensors are float32 all the same."""
    kind = tensor.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else tensor.dtype
    return str(dtype).removeprefix("torch.")
