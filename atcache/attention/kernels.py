"""Attention with given factors, and the parts of its backward passes. Token x token matrices exist for one slice only.

GPUs that can run the Triton kernels of `flash` do that. What follows is for all other devices. A slice is some samples
of the batch or, if one sample's map is too large, some of its query rows. A slice's matrices stay under a fixed size,
so memory grows with the number of tokens, not with its square.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from atcache.attention.factors import LayerAttention, LayerMaps
from atcache.attention.flash import availability

CPU_SLICE_NBYTES = 4 * 2**20
"""Bytes that one float32 (batch, head, query, key) matrix of a slice may take: small enough to stay in a processor's
cache. `benchmarks/kernels.py --sweep` compares sizes."""
GPU_SLICE_NBYTES = 256 * 2**20
"""The same for other devices, where few large kernels are faster than many small ones."""


def copy_attention(teacher: LayerAttention, value_BHTD: Tensor) -> Tensor:
    """softmax(scale * q k^T + bias) v with the teacher's q and k: gradients reach `value_BHTD` only.

    The backward pass of torch's own call would also compute the gradients of q and k, which nobody needs. This one
    keeps q and k, forms the map of each slice again and returns dV = A^T dO. If the teacher's maps are given instead,
    they are kept for the backward pass, in the dtype of `value_BHTD`.

    Args:
        teacher: one layer's factors or maps; moved to the dtype of `value_BHTD`.
        value_BHTD: the student's values, shape (batch, head, token, any head dim).

    Returns:
        Shape and dtype of `value_BHTD`.
    """
    if isinstance(teacher, LayerMaps):
        return teacher.attn_BHQK.to(value_BHTD.dtype) @ value_BHTD
    bias = None if teacher.bias is None else teacher.bias.to(value_BHTD.dtype)
    if availability.serves(teacher.q_BHTD, value_BHTD):
        from atcache.attention.flash.copying import copy

        q_BHTD, k_BHTD = teacher.q_BHTD.to(value_BHTD.dtype), teacher.k_BHTD.to(value_BHTD.dtype)
        return copy(q_BHTD, k_BHTD, value_BHTD, bias, teacher.scale)
    q_BHTD, k_BHTD = teacher.q_BHTD.to(value_BHTD.dtype), teacher.repeated_k_BHTD().to(value_BHTD.dtype)
    return _CopyAttention.apply(q_BHTD, k_BHTD, value_BHTD, bias, teacher.scale)  # pyright: ignore[reportReturnType]


def mixed_attention(attn_BHQK: Tensor, value_BHTD: Tensor, mix: nn.Module) -> Tensor:
    """Attention with given maps in a block that mixes its heads after the softmax (talking heads, arXiv 2003.02436).

    Args:
        attn_BHQK: probabilities.
        value_BHTD: values.
        mix: a map from heads to heads, along the last axis; `proj_w` of `timm.models.cait.TalkingHeadAttn`.

    Returns:
        Shape and dtype of `value_BHTD`; gradients reach values and `mix`.
    """
    mixed_BQKH = mix(attn_BHQK.to(value_BHTD.dtype).permute(0, 2, 3, 1))
    return mixed_BQKH.permute(0, 3, 1, 2) @ value_BHTD


class _CopyAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401 - torch's own signature
        q_BHTD: Tensor,
        k_BHTD: Tensor,
        value_BHTD: Tensor,
        bias: Tensor | None,
        scale: float,
    ) -> Tensor:
        ctx.save_for_backward(q_BHTD, k_BHTD, bias)
        ctx.scale = scale
        with torch.autocast(q_BHTD.device.type, enabled=False):
            if not _is_quicker_in_slices(q_BHTD, value_BHTD):
                return F.scaled_dot_product_attention(q_BHTD, k_BHTD, value_BHTD, attn_mask=bias, scale=scale)
            attended_BHTD = torch.empty_like(value_BHTD, memory_format=torch.contiguous_format)
            for samples, queries, attn_BHQK in _map_slices(q_BHTD, k_BHTD, bias, scale, value_BHTD.dtype):
                attended_BHTD[samples, :, queries] = attn_BHQK @ value_BHTD[samples]
            return attended_BHTD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[None, None, Tensor, None, None]:  # noqa: ANN401 # pyright: ignore[reportIncompatibleMethodOverride]
        q_BHTD, k_BHTD, bias = ctx.saved_tensors
        (upstream_BHTD,) = upstream
        gradient = SlicedGradient(upstream_BHTD)
        with torch.autocast(q_BHTD.device.type, enabled=False):
            for samples, queries, attn_BHQK in _map_slices(q_BHTD, k_BHTD, bias, ctx.scale, upstream_BHTD.dtype):
                gradient.add_to_keys(attn_BHQK.mT @ upstream_BHTD[samples, :, queries], samples, queries)
        return None, None, gradient.total_BHTD, None, None


def _is_quicker_in_slices(q_BHTD: Tensor, value_BHTD: Tensor) -> bool:
    """Whether slices beat the fused call: on CPUs in bf16, or if v's head dim differs, for which it has no kernel.

    Measured with `benchmarks/kernels.py --dtype bfloat16`, and `--value-dim 32`.
    """
    is_plain = value_BHTD.dtype == torch.float32 and value_BHTD.shape[-1] == q_BHTD.shape[-1]
    return q_BHTD.device.type == "cpu" and not is_plain


def _map_slices(
    q_BHTD: Tensor, k_BHTD: Tensor, bias: Tensor | None, scale: float, dtype: torch.dtype
) -> Iterator[tuple[slice, slice, Tensor]]:
    """The map slice by slice: samples, queries, and attn_BHQK in `dtype`, its softmax computed in float32."""
    for samples, queries in slices(q_BHTD):
        logits_BHQK = logits_slice(q_BHTD, k_BHTD, bias, scale, samples, queries)
        yield samples, queries, torch.softmax(logits_BHQK, dim=-1).to(dtype)


def slices(q_BHTD: Tensor, num_keys: int | None = None) -> Iterator[tuple[slice, slice]]:
    """The (samples, queries) slices whose float32 maps fit in the device's slice size, covering all rows once.

    The slices of one sample follow one another, in the order of its queries.

    Args:
        q_BHTD: queries.
        num_keys: the length of their rows; None for as many keys as queries.
    """
    num_samples, num_heads, num_queries, _ = q_BHTD.shape
    row_nbytes = 4 * num_heads * (num_keys or num_queries)
    slice_nbytes = CPU_SLICE_NBYTES if q_BHTD.device.type == "cpu" else GPU_SLICE_NBYTES
    num_rows = max(1, slice_nbytes // row_nbytes)
    samples_each, queries_each = max(1, num_rows // num_queries), min(num_rows, num_queries)
    for first_sample in range(0, num_samples, samples_each):
        for first_query in range(0, num_queries, queries_each):
            yield slice(first_sample, first_sample + samples_each), slice(first_query, first_query + queries_each)


class SlicedGradient:
    """A gradient of queries, keys or values, to which slices add: summed in float32 or wider, and rounded once.

    Args:
        like_BHTD: a tensor with the gradient's shape and dtype.
        kept_BHTD: a gradient to start from, or None.
        weight: multiplies `kept_BHTD`; a scalar tensor or a number.
        num_queries: the queries of a sample, which its slices share; None for as many as `like_BHTD` has tokens.
    """

    def __init__(
        self,
        like_BHTD: Tensor,
        kept_BHTD: Tensor | None = None,
        weight: Tensor | float = 1.0,
        num_queries: int | None = None,
    ) -> None:
        self.total_BHTD = torch.empty_like(like_BHTD, memory_format=torch.contiguous_format)
        """Complete once all slices are added."""
        self._kept_BHTD, self._weight = kept_BHTD, weight
        self._num_queries = num_queries or like_BHTD.shape[2]
        self._sum_BHTD: Tensor | None = None

    def add_to_queries(self, part_BHQD: Tensor, samples: slice, queries: slice) -> None:
        """Add to the queries of a slice. No other slice adds to them."""
        self.total_BHTD[samples, :, queries] = self._begin_with(part_BHQD, samples, queries)

    def add_to_keys(self, part_BHTD: Tensor, samples: slice, queries: slice) -> None:
        """Add what the queries of a slice give to all keys, or values, of its samples."""
        is_last = queries.stop >= self._num_queries
        if queries.start > 0:
            assert self._sum_BHTD is not None
            self._sum_BHTD += part_BHTD
        else:
            self._sum_BHTD = self._begin_with(part_BHTD, samples, slice(None))
            if not is_last:
                self._sum_BHTD = self._sum_BHTD.to(wide(part_BHTD.dtype))
        if is_last:
            self.total_BHTD[samples] = self._sum_BHTD

    def _begin_with(self, part_BHTD: Tensor, samples: slice, tokens: slice) -> Tensor:
        if self._kept_BHTD is None:
            return part_BHTD
        return part_BHTD + self._kept_BHTD[samples, :, tokens].to(wide(part_BHTD.dtype)) * self._weight


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype for sums and logits of tensors of this dtype: float32, or wider if `dtype` is."""
    return torch.promote_types(torch.float32, dtype)


def logits_slice(
    q_BHTD: Tensor, k_BHTD: Tensor, bias: Tensor | None, scale: float, samples: slice, queries: slice
) -> Tensor:
    """scale * q k^T + bias of one slice, in float32 or wider: a new tensor, which the caller may overwrite.

    With bf16 factors the product is formed in bf16, so it is rounded to 8 bits before it is widened. Maps formed under
    autocast are rounded in the same way. Widening the factors first would give exact products, but it is slower: it
    could not use the bf16 units of processors and GPUs. fp16 ends at 65504, which q k^T may pass where the logits do
    not, so there the scale comes first.
    """
    q_BHQD, k_BHKD = q_BHTD[samples, :, queries], k_BHTD[samples]
    if q_BHQD.dtype == torch.float16:
        logits_BHQK = ((q_BHQD * scale) @ k_BHKD.mT).float()
    else:
        logits_BHQK = q_BHQD @ k_BHKD.mT
        logits_BHQK = logits_BHQK.to(wide(logits_BHQK.dtype)).mul_(scale)
    if bias is not None:
        logits_BHQK += bias_slice(bias, samples, queries)
    return logits_BHQK


def bias_slice(bias: Tensor, samples: slice, queries: slice) -> Tensor:
    """The part of a bias, or of its gradient, for one slice: a view. An axis of size 1 applies to all slices."""
    return bias[samples if bias.shape[0] > 1 else slice(None), :, queries if bias.shape[2] > 1 else slice(None)]
