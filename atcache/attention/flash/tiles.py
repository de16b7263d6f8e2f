"""What all kernels do with one tile. In a tile's name, M counts its rows and N its columns."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.runtime.interpreter import InterpretedFunction

LOG2_E = tl.constexpr(1.4426950408889634)
"""Kernels take powers of two, which is what GPUs have an instruction for."""
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def load_rows(pointer, row_M, stride, num_rows, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """The vectors of some tokens, (M, BLOCK): zeros beyond the last token and beyond WIDTH."""
    column_D = tl.arange(0, BLOCK)
    is_there_MD = row_M[:, None] < num_rows
    if WIDTH < BLOCK:
        is_there_MD = is_there_MD & (column_D[None, :] < WIDTH)
    return tl.load(pointer + row_M[:, None] * stride + column_D[None, :], mask=is_there_MD, other=0.0)


@triton.jit
def store_rows(pointer, tile_MD, row_M, stride, num_rows, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Store the vectors of some tokens, in the dtype of `pointer`."""
    column_D = tl.arange(0, BLOCK)
    is_there_MD = row_M[:, None] < num_rows
    if WIDTH < BLOCK:
        is_there_MD = is_there_MD & (column_D[None, :] < WIDTH)
    place_MD = pointer + row_M[:, None] * stride + column_D[None, :]
    tl.store(place_MD, tile_MD.to(pointer.dtype.element_ty), mask=is_there_MD)


_IS_INTERPRETED = tl.constexpr(isinstance(load_rows, InterpretedFunction))


@triton.jit
def dot(left_MK, right_KN):
    """left right in float32, (M, N). float32 is not rounded to TF32."""
    if _IS_INTERPRETED:  # Triton's interpreter multiplies the bits of bfloat16 as if they were integers.
        return tl.dot(left_MK.to(tl.float32), right_KN.to(tl.float32), input_precision="ieee")
    return tl.dot(left_MK, right_KN, input_precision="ieee")


@triton.jit
def logits(
    left_MD,
    right_ND,
    scale,
    bias_pointer,
    row_M,
    bias_row_stride,
    column_N,
    bias_column_stride,
    num_tokens,
    HAS_BIAS: tl.constexpr,
):
    """log2(e) * (scale * left right^T + bias), float32, (M, N). Left may be queries and right keys, or the reverse."""
    logits_MN = dot(left_MD, tl.trans(right_ND)) * (scale * LOG2_E)
    if HAS_BIAS:
        is_there_MN = (row_M < num_tokens)[:, None] & (column_N < num_tokens)[None, :]
        place_MN = bias_pointer + row_M[:, None] * bias_row_stride + column_N[None, :] * bias_column_stride
        logits_MN += tl.load(place_MN, mask=is_there_MN, other=0.0).to(tl.float32) * LOG2_E
    return logits_MN


@triton.jit
def finite_or_zero(maximum_M):
    """The largest logits of some rows, or 0 where all keys so far are masked: -inf - -inf would be NaN."""
    return tl.where(maximum_M == float("-inf"), 0.0, maximum_M)
