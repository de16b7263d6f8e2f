"""HeadProjection: the recipe that makes one layer's q and k out of the input of its attention, without the model.

q and k are linear in that input x (mostly the output of the block's first norm), up to a norm of each head and a
rotation. So a cache can hold x, or codes of it, instead of q and k. `projection_search` finds the recipe of a layer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from atcache.attention.geometry import FactorGeometry
from atcache.errors import CodecError


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class HeadNorm:
    """A norm over the components of each head: a layer norm if it has a bias, else an RMS norm."""

    weight_D: Tensor
    """Multiplies the normalised components; float32, shape (head dim)."""
    bias_D: Tensor | None
    """Added to them, same shape; None for an RMS norm."""
    eps: float
    """Added to the variance or to the mean square."""

    def __call__(self, heads: Tensor) -> Tensor:
        """The normalised heads: float32, shape (..., head dim), like `heads`."""
        if self.bias_D is None:
            return F.rms_norm(heads, self.weight_D.shape, self.weight_D, self.eps)
        return F.layer_norm(heads, self.weight_D.shape, self.weight_D, self.bias_D, self.eps)

    def scaled(self, factor: float) -> HeadNorm:
        """This norm, with `factor` times its output."""
        bias_D = None if self.bias_D is None else self.bias_D * factor
        return HeadNorm(weight_D=self.weight_D * factor, bias_D=bias_D, eps=self.eps)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class HeadRotation:
    """A rotary position embedding: each pair of a head's components is rotated by an angle that the token gives."""

    cos_HTP: Tensor
    """Cosines of the angles: float32, shape (1 or kv head, token, head dim / 2). With an axis of 1, all heads of q and
    k share their angles. Else each head of k has its own, and so have the heads of q that use it."""
    sin_HTP: Tensor
    """Sines of the same angles, same shape."""
    is_adjacent: bool
    """Whether pair i is components 2i and 2i + 1. If not, it is components i and i + head dim / 2."""

    def __call__(self, heads_BTHD: Tensor) -> Tensor:
        """The rotated heads of q or k: float32, shape (batch, token, head, head dim), like `heads_BTHD`."""
        groups = heads_BTHD.shape[2] // self.cos_HTP.shape[0] if self.cos_HTP.shape[0] > 1 else 1
        cos_THP, sin_THP = (
            (each if groups == 1 else each.repeat_interleave(groups, dim=0)).transpose(0, 1)
            for each in (self.cos_HTP, self.sin_HTP)
        )
        first_BTHP, second_BTHP = split_pairs(heads_BTHD, is_adjacent=self.is_adjacent)
        rotated = (first_BTHP * cos_THP - second_BTHP * sin_THP, first_BTHP * sin_THP + second_BTHP * cos_THP)
        return torch.stack(rotated, dim=-1).flatten(-2) if self.is_adjacent else torch.cat(rotated, dim=-1)


def split_pairs(heads: Tensor, *, is_adjacent: bool) -> tuple[Tensor, Tensor]:
    """The first and the second component of each pair: shape (..., head dim / 2), views of `heads`."""
    first, second = (heads[..., 0::2], heads[..., 1::2]) if is_adjacent else heads.chunk(2, dim=-1)
    return first, second


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class HeadProjection:
    """How the kept heads of q and k of one layer are made out of its input x_BTC: product, norm, rotation."""

    weight_NC: Tensor
    """float32. Rows are the components of the heads of q, head by head, then those of the heads of k. Columns are the
    width of x. A factor that the model puts on q or k is included."""
    bias_N: Tensor
    """Added to the product, float32; zeros if the model adds nothing."""
    num_heads: int
    """Kept heads of q."""
    num_kv_heads: int
    """Kept heads of k: `num_heads`, or fewer in grouped-query attention."""
    q_norm: HeadNorm | None = None
    """Applied to each head of q."""
    k_norm: HeadNorm | None = None
    """Applied to each head of k."""
    rotation: HeadRotation | None = None
    """Applied last, to q and k."""

    @property
    def head_dim(self) -> int:
        """Components of a head."""
        return self.weight_NC.shape[0] // (self.num_heads + self.num_kv_heads)

    def __call__(self, x_BTC: Tensor) -> tuple[Tensor, Tensor]:
        """(q_BHTD, k_BHTD), of the type of the weights, in the memory order (batch, token, head, head dim).

        Args:
            x_BTC: the layer's input, shape (batch, token, width), any float dtype, on this projection's device.
                Under autocast the product is formed in autocast's dtype, all else in float32.
        """
        dtype = self.weight_NC.dtype
        values_BTN = F.linear(x_BTC.to(dtype), self.weight_NC, self.bias_N)
        if not (self.q_norm is None and self.k_norm is None and self.rotation is None):
            values_BTN = values_BTN.float()
        heads_BTHD = values_BTN.reshape(*values_BTN.shape[:2], -1, self.head_dim)
        q_BTHD, k_BTHD = heads_BTHD[:, :, : self.num_heads], heads_BTHD[:, :, self.num_heads :]
        if self.q_norm is not None:
            q_BTHD = self.q_norm(q_BTHD)
        if self.k_norm is not None:
            k_BTHD = self.k_norm(k_BTHD)
        if self.rotation is not None:
            q_BTHD, k_BTHD = self.rotation(q_BTHD), self.rotation(k_BTHD)
        return q_BTHD.to(dtype).transpose(1, 2), k_BTHD.to(dtype).transpose(1, 2)

    def to(self, device: torch.device | str) -> HeadProjection:
        """This projection on another device."""
        # Numbers (..._1) are read here, which would wait for a GPU.
        state = {name: each if name.endswith("_1") else each.to(device) for name, each in self.to_state().items()}
        return _of_state(state, self.num_heads, self.num_kv_heads)

    def select_heads(self, heads: Sequence[int]) -> HeadProjection:
        """The projection to some heads of q, by position, and to the heads of k that capture keeps with them."""
        if len(heads) == self.num_heads:
            kv_heads = list(range(self.num_kv_heads))
        else:
            kv_heads = [head // (self.num_heads // self.num_kv_heads) for head in heads]
        index = torch.tensor([*heads, *(self.num_heads + head for head in kv_heads)], device=self.weight_NC.device)
        rotation = self.rotation
        if rotation is not None and rotation.cos_HTP.shape[0] > 1:
            rotation = dataclasses.replace(
                rotation, cos_HTP=rotation.cos_HTP[kv_heads], sin_HTP=rotation.sin_HTP[kv_heads]
            )
        return dataclasses.replace(
            self,
            weight_NC=self.weight_NC.view(-1, self.head_dim, self.weight_NC.shape[1])[index].flatten(0, 1),
            bias_N=self.bias_N.view(-1, self.head_dim)[index].flatten(),
            num_heads=len(heads),
            num_kv_heads=len(kv_heads),
            rotation=rotation,
        )

    def to_state(self) -> dict[str, Tensor]:
        """The projection as float32 tensors by name. A norm or rotation that is absent has none."""
        state = {"weight_NC": self.weight_NC, "bias_N": self.bias_N}
        for name, norm in (("q_norm", self.q_norm), ("k_norm", self.k_norm)):
            if norm is not None:
                state[f"{name}.weight_D"] = norm.weight_D
                state[f"{name}.eps_1"] = torch.tensor([norm.eps])
                if norm.bias_D is not None:
                    state[f"{name}.bias_D"] = norm.bias_D
        if self.rotation is not None:
            state["rotation.cos_HTP"] = self.rotation.cos_HTP
            state["rotation.sin_HTP"] = self.rotation.sin_HTP
            state["rotation.is_adjacent_1"] = torch.tensor([float(self.rotation.is_adjacent)])
        return state

    @staticmethod
    def from_state(state: Mapping[str, Tensor], geometry: FactorGeometry) -> HeadProjection:
        """The projection that `to_state` gave, for factors of this geometry. The data may come from anywhere.

        Raises:
            CodecError: a tensor is missing, unknown, not finite, out of range, or not of the dtype or shape that the
                geometry demands.
        """
        _check_state(state, geometry)
        return _of_state(state, len(geometry.heads), geometry.num_kv_heads)


class InputRecipe(NamedTuple):
    """How each layer's q and k follow from its input, as `check_capture` finds it."""

    projections: tuple[HeadProjection, ...]
    input_calls: tuple[int, ...]
    """Which linear call of each layer's block takes that input."""


def _of_state(state: Mapping[str, Tensor], num_heads: int, num_kv_heads: int) -> HeadProjection:
    def norm(name: str) -> HeadNorm | None:
        if f"{name}.weight_D" not in state:
            return None
        return HeadNorm(
            weight_D=state[f"{name}.weight_D"], bias_D=state.get(f"{name}.bias_D"), eps=float(state[f"{name}.eps_1"])
        )

    rotation = None
    if "rotation.cos_HTP" in state:
        rotation = HeadRotation(
            cos_HTP=state["rotation.cos_HTP"],
            sin_HTP=state["rotation.sin_HTP"],
            is_adjacent=bool(state["rotation.is_adjacent_1"]),
        )
    return HeadProjection(
        weight_NC=state["weight_NC"],
        bias_N=state["bias_N"],
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        q_norm=norm("q_norm"),
        k_norm=norm("k_norm"),
        rotation=rotation,
    )


# Tensors that come together: all of them or none.
_TOGETHER = (
    ("weight_NC", "bias_N"),
    ("q_norm.weight_D", "q_norm.eps_1"),
    ("k_norm.weight_D", "k_norm.eps_1"),
    ("rotation.cos_HTP", "rotation.sin_HTP", "rotation.is_adjacent_1"),
)
# A bias makes an RMS norm a layer norm.
_OPTIONAL = {"q_norm.bias_D": "q_norm.weight_D", "k_norm.bias_D": "k_norm.weight_D"}


def _check_state(state: Mapping[str, Tensor], geometry: FactorGeometry) -> None:
    if unknown := sorted(set(state) - {name for names in _TOGETHER for name in names} - set(_OPTIONAL)):
        raise CodecError(f"projection: {unknown[0]!r} is unknown to this version of atcache.")
    needed = {"weight_NC", *(_OPTIONAL[name] for name in _OPTIONAL if name in state), *state}
    for names in _TOGETHER:
        if missing := [name for name in names if name not in state and needed.intersection(names)]:
            raise CodecError(f"projection: {missing[0]} is missing.")
    if geometry.head_dim == 0:
        raise CodecError("projection: these factors are maps, which no projection makes.")
    if geometry.head_dim % 2 and "rotation.cos_HTP" in state:
        raise CodecError(f"projection: heads of {geometry.head_dim} components have no pairs to rotate.")
    for name, tensor in state.items():
        _check_tensor(name, tensor, _expected_shape(name, state, geometry))


def _expected_shape(name: str, state: Mapping[str, Tensor], geometry: FactorGeometry) -> tuple[int, ...]:
    head_dim = geometry.head_dim
    num_rows = (len(geometry.heads) + geometry.num_kv_heads) * head_dim
    if name == "weight_NC":
        return (num_rows, max(1, state[name].shape[-1] if state[name].ndim else 1))  # x may have any width
    if name.endswith("_HTP"):
        num_angles = 1 if state["rotation.cos_HTP"].shape[:1] == (1,) else geometry.num_kv_heads
        return (num_angles, geometry.tokens.num_tokens, head_dim // 2)
    return {"bias_N": (num_rows,)}.get(name, (1,) if name.endswith("_1") else (head_dim,))


# What a finite value must be, where not every one will do, and the test for it.
_RANGES: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {
    "eps_1": ("above 0 and at most 1", lambda values: (values > 0) & (values <= 1)),
    "is_adjacent_1": ("0 or 1", lambda values: (values == 0) | (values == 1)),
    "cos_HTP": ("from -1 to 1", lambda values: values.abs() <= 1),
    "sin_HTP": ("from -1 to 1", lambda values: values.abs() <= 1),
}


def _check_tensor(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tensor.dtype != torch.float32 or tuple(tensor.shape) != shape:
        raise CodecError(
            f"projection: {name} is {tensor.dtype} of shape {tuple(tensor.shape)}, expected torch.float32 of {shape}."
        )
    if not bool(torch.isfinite(tensor).all()):
        raise CodecError(f"projection: {name} has a value that is not finite.")
    expected, is_right = _RANGES.get(name.rpartition(".")[2], ("", torch.isfinite))
    if not bool(is_right(tensor).all()):
        raise CodecError(f"projection: {name} has a value that is not {expected}.")
