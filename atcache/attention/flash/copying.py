"""Copying attention: softmax(scale * q k^T + bias) v with given q and k, whose only gradient is that of v.

It is an operation of torch with a derivative, so `torch.compile` keeps a model that uses it in one graph.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from atcache.attention.flash import backward, forward
from atcache.attention.flash.launch import Tiling, dims, empty_by_token, launch, strided, strided_bias, suitable

# The first is for the shared memory of an H100, the last for the smallest GPUs.
ATTEND = (Tiling(128, 64, 4, 3), Tiling(64, 64, 4, 2), Tiling(32, 32, 4, 1), Tiling(16, 16, 4, 1))
VALUE_GRADIENT = (Tiling(64, 128, 8, 3), Tiling(64, 64, 4, 2), Tiling(32, 32, 4, 1), Tiling(16, 16, 4, 1))


def copy(q_BHTD: Tensor, k_BHTD: Tensor, value_BHTD: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """softmax(scale * q k^T + bias) v; gradients reach v only.

    Args:
        q_BHTD: queries, constants.
        k_BHTD: keys, constants; may have fewer heads than q.
        value_BHTD: values, of any head dim; may have fewer heads than q.
        bias: added to the logits, shape (1 or batch, 1 or head, 1 or query, 1 or key); or None.
        scale: multiplies q k^T.

    Returns:
        Shape (batch, head, token, head dim of v), v's dtype.
    """
    return torch.ops.atcache.attend(q_BHTD, k_BHTD, value_BHTD, bias, scale)[0]


@torch.library.custom_op(
    "atcache::attend",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor? bias, float scale) -> (Tensor, Tensor)",
)
def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """The output, and the log-sum-exp of the logits, float32 (batch, head, query), in nats."""
    out, lse = _empty_results(q, k, v, bias, scale)
    if _stock_call_serves(q, k, v, bias):
        stock_out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, False, scale=scale)
        return stock_out if stock_out.stride() == out.stride() else out.copy_(stock_out), lse
    attend_in_tiles(q, k, v, bias, scale, out, lse)
    return out, lse


def attend_in_tiles(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float, out: Tensor, lse: Tensor
) -> None:
    """Write what `attend` returns to `out` and `lse`, by our own kernel."""
    batch, heads, tokens, head_dim = q.shape
    (q, of_q), (k, of_k), (v, of_v) = (strided(factor, q) for factor in (q, k, v))
    bias_or_dummy, of_bias = strided_bias(bias, q)
    launch(
        forward.attend_kernel,
        suitable(ATTEND, tokens, q.dtype, head_dim, v.shape[-1]),
        lambda tiling: triton.cdiv(tokens, tiling.m) * batch * heads,
        (
            q, k, v, bias_or_dummy, out, lse, *of_q, *of_k, *of_v, *of_bias, *out.stride()[:3],
            heads, heads // k.shape[1], heads // v.shape[1], tokens, scale,
        ),
        {**dims(head_dim, v.shape[-1]), "HAS_BIAS": bias is not None},
    )  # fmt: skip


def _stock_call_serves(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> bool:
    """Whether torch's own FlashAttention, which is hand-written, takes this call as it is."""
    return (
        q.is_cuda
        and bias is None
        and q.dtype != torch.float32
        and q.shape == k.shape == v.shape
        and q.shape[-1] % 8 == 0
        and q.numel() > 0
        and all(factor.stride(-1) == 1 for factor in (q, k, v))
    )


def _empty_results(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    del k, bias, scale
    batch, heads, tokens, _ = q.shape
    return empty_by_token(batch, heads, tokens, v.shape[-1], v), q.new_empty(batch, heads, tokens, dtype=torch.float32)


attend.register_fake(_empty_results)


@torch.library.custom_op(
    "atcache::value_gradient",
    mutates_args=(),
    schema="(Tensor grad_out, Tensor q, Tensor k, Tensor? bias, Tensor lse, float scale, int value_heads) -> Tensor",
)
def value_gradient(
    grad_out: Tensor, q: Tensor, k: Tensor, bias: Tensor | None, lse: Tensor, scale: float, value_heads: int
) -> Tensor:
    """The gradient of v."""
    batch, heads, tokens, head_dim = q.shape
    grad_v = _empty_gradient(grad_out, q, k, bias, lse, scale, value_heads)
    (q, of_q), (k, of_k), (grad_out, of_grad) = (strided(factor, q) for factor in (q, k, grad_out))
    bias_or_dummy, of_bias = strided_bias(bias, q)
    launch(
        backward.value_gradient_kernel,
        suitable(VALUE_GRADIENT, tokens, q.dtype, head_dim, grad_out.shape[-1]),
        lambda tiling: triton.cdiv(tokens, tiling.n) * batch * value_heads,
        (
            q, k, bias_or_dummy, lse.contiguous(), grad_out, grad_v,
            *of_q, *of_k, *of_bias, *of_grad, *grad_v.stride()[:3],
            value_heads, heads // k.shape[1], heads // value_heads, tokens, scale,
        ),
        {**dims(head_dim, grad_out.shape[-1]), "HAS_BIAS": bias is not None},
    )  # fmt: skip
    return grad_v


def _empty_gradient(
    grad_out: Tensor, q: Tensor, k: Tensor, bias: Tensor | None, lse: Tensor, scale: float, value_heads: int
) -> Tensor:
    del k, bias, lse, scale
    return empty_by_token(q.shape[0], value_heads, q.shape[2], grad_out.shape[-1], grad_out)


value_gradient.register_fake(_empty_gradient)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:  # noqa: ANN401 - torch's own type
    q, k, v, bias, scale = inputs
    ctx.save_for_backward(q, k, bias, output[1])
    ctx.scale, ctx.value_heads = scale, v.shape[1]
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad_out: Tensor | None, _grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:  # noqa: ANN401
    if grad_out is None or not ctx.needs_input_grad[2]:
        return (None,) * 5
    q, k, bias, lse = ctx.saved_tensors
    grad_v = torch.ops.atcache.value_gradient(grad_out, q, k, bias, lse, ctx.scale, ctx.value_heads)
    return None, None, grad_v, None, None


attend.register_autograd(_differentiate, setup_context=_keep)
