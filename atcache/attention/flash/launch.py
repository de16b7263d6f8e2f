"""Starts a kernel with tiles that fit the device."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from triton.runtime.errors import OutOfResources

_WIDE = 64
LEAST_TILE = 16
"""The smallest side of a tile that a GPU's matrix units take."""


@dataclass(frozen=True, slots=True)
class Tiling:
    """How a kernel is cut and compiled."""

    m: int
    """Queries of a tile: a power of two."""
    n: int
    """Keys of a tile: a power of two."""
    warps: int
    """Groups of 32 threads that share a program."""
    stages: int
    """Tiles that are loaded ahead."""

    @property
    def options(self) -> dict[str, int | bool]:
        """What Triton's compiler is told. Products and sums are fused, as it does where nothing is said."""
        return {"num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": True}

    def within(self, num_tokens: int) -> Tiling:
        """The same with tiles that are no longer than the sequence needs."""
        most = max(LEAST_TILE, triton.next_power_of_2(num_tokens))
        return Tiling(min(self.m, most), min(self.n, most), self.warps, self.stages)


def suitable(tilings: Sequence[Tiling], num_tokens: int, dtype: torch.dtype, *widths: int) -> list[Tiling]:
    """The tilings to try, the largest first, without those that would not fit in a thread's registers.

    Vectors wider than 64 leave out the first, and float32, which has no matrix units, the first two: they would spill
    kilobytes of each thread (`benchmarks/kernel_resources.py --dtype float32`).
    """
    num_left_out = 2 if dtype == torch.float32 else 1 if max(widths) > _WIDE else 0
    chosen = tilings[min(num_left_out, len(tilings) - 1) :]
    return list(dict.fromkeys(tiling.within(num_tokens) for tiling in chosen))


def block(width: int) -> int:
    """The side of a tile that holds vectors of this width."""
    return max(LEAST_TILE, triton.next_power_of_2(width))


def dims(head_dim: int, value_dim: int, given_dim: int | None = None) -> dict[str, int]:
    """The compile-time constants of a kernel that say how wide its vectors are."""
    widths = {"HEAD_DIM": head_dim, "BLOCK_D": block(head_dim), "VALUE_DIM": value_dim, "BLOCK_V": block(value_dim)}
    return widths if given_dim is None else {**widths, "GIVEN_DIM": given_dim, "BLOCK_G": block(given_dim)}


def empty_by_token(batch: int, heads: int, tokens: int, head_dim: int, like: Tensor) -> Tensor:
    """An empty (batch, head, token, head dim) tensor whose memory holds token after token.

    A token's heads lie side by side, so the projection after attention needs no copy of it.
    """
    return like.new_empty(batch, tokens, heads, head_dim).transpose(1, 2)


def strided(tensor: Tensor | None, dummy: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """What a kernel takes for a tensor (batch, head, token, head dim): itself, and the strides of the first three.

    A missing tensor has a dummy in its place, which is not read. Only vectors whose components do not lie side by side
    are copied, so parts of a projection's output are read where they are.
    """
    if tensor is None:
        return dummy, (0, 0, 0)
    if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
        tensor = tensor.contiguous()
    return tensor, tensor.stride()[:3]


def strided_bias(bias: Tensor | None, dummy: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """What a kernel takes for a bias: itself, and its four strides; 0 along an axis of size 1, which applies to all."""
    if bias is None:
        return dummy, (0, 0, 0, 0)
    return bias, tuple(0 if size == 1 else stride for size, stride in zip(bias.shape, bias.stride(), strict=True))


_chosen: dict[tuple[Any, ...], int] = {}
"""Which tiling fits, by kernel, compile-time constants, dtype and device."""


def launch(
    kernel: Any,  # noqa: ANN401 - Triton's kernels have no type of their own
    tilings: Sequence[Tiling],
    num_programs: Callable[[Tiling], int],
    arguments: Sequence[Any],
    constants: Mapping[str, int | bool],
) -> None:
    """Run a kernel with the first of some tilings for which the device has room, and remember which one that was.

    Args:
        kernel: takes `arguments` in order, and M, N and `constants` by name.
        tilings: the best first; each later one needs less shared memory.
        num_programs: of the grid, which has one axis: a GPU allows 2^31 along the first, and 65,535 along others.
        arguments: tensors, strides and numbers; the first is a tensor on the device where the kernel runs.
        constants: known when the kernel is compiled.

    Raises:
        OutOfResources: not even the last tiling fits.
    """
    first: Tensor = arguments[0]
    key = (kernel.fn.__name__, tuple(tilings), *constants.items(), first.dtype, first.device)
    place = torch.cuda.device(first.device) if first.is_cuda else contextlib.nullcontext()
    with place:
        while True:
            tiling = tilings[_chosen.setdefault(key, 0)]
            if not (programs := num_programs(tiling)):
                return
            sides = {name: side for name, side in (("M", tiling.m), ("N", tiling.n)) if name in kernel.arg_names}
            try:
                kernel[(programs,)](*arguments, **constants, **sides, **tiling.options)
            except OutOfResources:
                if _chosen[key] + 1 == len(tilings):
                    raise
                _chosen[key] += 1
            else:
                return
