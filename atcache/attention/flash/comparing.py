"""Distillation: a student's attention, and how far its rows are from a given teacher's, with all gradients.

Both are one operation of torch with a derivative, so `torch.compile` keeps a model that uses it in one graph.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import triton
from torch import Tensor
from triton.runtime.errors import OutOfResources

from atcache.attention.flash import backward, forward
from atcache.attention.flash.launch import (
    LEAST_TILE,
    Tiling,
    block,
    dims,
    empty_by_token,
    launch,
    strided,
    strided_bias,
    suitable,
)

# The first is for the shared memory of an H100, the last for the smallest GPUs.
COMPARE = (Tiling(64, 64, 4, 3), Tiling(64, 64, 4, 2), Tiling(32, 32, 4, 1), Tiling(16, 16, 4, 1))
KEY_GRADIENTS = (Tiling(64, 64, 4, 2), Tiling(32, 64, 4, 1), Tiling(32, 32, 4, 1), Tiling(16, 16, 4, 1))
QUERY_GRADIENT = (Tiling(64, 64, 4, 2), Tiling(64, 32, 4, 1), Tiling(32, 32, 4, 1), Tiling(16, 16, 4, 1))
BIAS_GRADIENT = (Tiling(64, 64, 4, 2), Tiling(32, 32, 4, 1), Tiling(16, 16, 4, 1))
ROW_DOTS = (Tiling(64, 16, 4, 1),)
MOST_TOKENS_AT_ONCE = 288
"""The longest sequence of which one program forms all gradients of a head."""
_WIDEST_AT_ONCE = 64
AT_ONCE_FROM_GENERATION = 9
"""Older GPUs than Hopper keep both operands of a product in registers, and would spill some 500 bytes of each thread:
`benchmarks/kernel_resources.py --arch 80`."""


def compare(
    q_BHTD: Tensor,
    k_BHTD: Tensor,
    v_BHTD: Tensor | None,
    bias: Tensor | None,
    scale: float,
    given_q_BHTD: Tensor,
    given_k_BHTD: Tensor,
    given_bias: Tensor | None,
    given_scale: float,
) -> tuple[Tensor | None, Tensor]:
    """A student's attention, and the cross-entropy of its rows and the given teacher's: a mean over all rows, in nats.

    Gradients reach the student's q, k, v and bias.

    Args:
        q_BHTD: the student's queries.
        k_BHTD: its keys; they may have fewer heads than q.
        v_BHTD: its values, with as many heads as k and of any head dim; None if only the loss is wanted.
        bias: added to its logits, shape (1 or batch, 1 or head, 1 or query, 1 or key); or None.
        scale: multiplies its q k^T.
        given_q_BHTD: the teacher's queries, constants of any head dim.
        given_k_BHTD: its keys; they may have fewer heads than q.
        given_bias: added to its logits, of a shape as `bias`; or None.
        given_scale: multiplies its q k^T.

    Returns:
        The output, shape (batch, head, token, head dim of v), v's dtype, or None; and the loss, a float32 scalar.
    """
    out, _, _, loss = torch.ops.atcache.compare(
        q_BHTD, k_BHTD, v_BHTD, bias, scale, given_q_BHTD, given_k_BHTD, given_bias, given_scale
    )
    return None if v_BHTD is None else out, loss


_PAIR = (
    "Tensor q, Tensor k, Tensor? v, Tensor? bias, float scale, "
    "Tensor given_q, Tensor given_k, Tensor? given_bias, float given_scale"
)


@torch.library.custom_op(
    "atcache::compare", mutates_args=(), schema=f"({_PAIR}) -> (Tensor out, Tensor lse, Tensor given_lse, Tensor loss)"
)
def compare_op(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    bias: Tensor | None,
    scale: float,
    given_q: Tensor,
    given_k: Tensor,
    given_bias: Tensor | None,
    given_scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The output (empty without v); the log-sum-exps of both, float32 (batch, head, query); and the loss."""
    out, lse, given_lse, _ = _empty_results(q, k, v)
    batch, heads, tokens, _ = q.shape
    loss_BHQ = torch.empty_like(lse)
    tensors, strides = _pair(q, k, v, bias, given_q, given_k, given_bias)
    launch(
        forward.compare_kernel,
        suitable(COMPARE, tokens, q.dtype, *_widths(q, v, given_q)),
        lambda tiling: triton.cdiv(tokens, tiling.m) * batch * heads,
        (
            *tensors, out, lse, given_lse, loss_BHQ, *strides, *strided(None if v is None else out, q)[1],
            heads, heads // k.shape[1], heads // given_k.shape[1], tokens, scale, given_scale,
        ),
        _constants(q, v, bias, given_q, given_bias),
    )  # fmt: skip
    return out, lse, given_lse, loss_BHQ.mean()


def _empty_results(q: Tensor, k: Tensor, v: Tensor | None, *_others: object) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    del k
    batch, heads, tokens, _ = q.shape
    out = q.new_empty(0) if v is None else empty_by_token(batch, heads, tokens, v.shape[-1], v)
    lse = q.new_empty(batch, heads, tokens, dtype=torch.float32)
    return out, lse, torch.empty_like(lse), lse.new_empty(())


compare_op.register_fake(_empty_results)


def _pair(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    bias: Tensor | None,
    given_q: Tensor,
    given_k: Tensor,
    given_bias: Tensor | None,
) -> tuple[list[Tensor], list[int]]:
    """What the kernels take of student and teacher, in the kernels' order: tensors, and their strides."""
    student = [strided(q, q), strided(k, q), strided(v, q), strided_bias(bias, q)]
    teacher = [strided(given_q, q), strided(given_k, q), strided_bias(given_bias, q)]
    both = student + teacher
    return [tensor for tensor, _ in both], [stride for _, strides in both for stride in strides]


def _widths(q: Tensor, v: Tensor | None, given_q: Tensor) -> tuple[int, int, int]:
    return q.shape[-1], (q if v is None else v).shape[-1], given_q.shape[-1]


def _constants(
    q: Tensor, v: Tensor | None, bias: Tensor | None, given_q: Tensor, given_bias: Tensor | None
) -> dict[str, int | bool]:
    return {
        **dims(*_widths(q, v, given_q)),
        "HAS_VALUES": v is not None,
        "HAS_BIAS": bias is not None,
        "HAS_GIVEN_BIAS": given_bias is not None,
    }


@torch.library.custom_op(
    "atcache::compare_gradients",
    mutates_args=(),
    schema=f"(Tensor? grad_out, Tensor? grad_loss, {_PAIR}, Tensor out, Tensor lse, Tensor given_lse, bool wants_bias) "
    "-> (Tensor grad_q, Tensor grad_k, Tensor grad_v, Tensor grad_bias)",
)
def compare_gradients(
    grad_out: Tensor | None,
    grad_loss: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    bias: Tensor | None,
    scale: float,
    given_q: Tensor,
    given_k: Tensor,
    given_bias: Tensor | None,
    given_scale: float,
    out: Tensor,
    lse: Tensor,
    given_lse: Tensor,
    wants_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of q, k, v and bias: an empty one of v if the output has none, and of a bias that wants none."""
    batch, heads, tokens, _ = q.shape
    v = None if grad_out is None else v
    grad_q, grad_k, grad_v, grad_bias = _empty_gradients(q, k, v, bias if wants_bias else None)
    tensors, strides = _pair(q, k, v, bias, given_q, given_k, given_bias)
    upstream, of_upstream = strided(grad_out, q)
    dots = lse if grad_out is None else _row_dots(out, upstream)
    weight = lse.new_zeros(1) if grad_loss is None else grad_loss.float().reshape(1) / max(1, lse.numel())
    tensors += [upstream, lse, given_lse, dots, weight]
    strides += of_upstream
    per_key_head, per_given_key_head = heads // k.shape[1], heads // given_k.shape[1]
    numbers, widths = (tokens, scale, given_scale), _widths(q, v, given_q)
    constants = _constants(q, v, bias, given_q, given_bias)
    are_formed = False
    if per_key_head == 1 and _is_formed_at_once(q, constants):
        keys, tail = two_tiles(tokens)
        tiling = Tiling(m=16 if keys > 128 else 32, n=keys, warps=8 if keys > 64 else 4, stages=1)
        # A GPU with less shared memory than an H100 may have no room for all keys of a head.
        with contextlib.suppress(OutOfResources):
            launch(
                backward.all_gradients_kernel,
                [tiling],
                lambda _: batch * heads,
                (*tensors, grad_q, grad_k, grad_v, *strides, heads, per_given_key_head, *numbers),
                {**constants, "TAIL": tail},
            )
            are_formed = True
    if not are_formed:
        launch(
            backward.key_gradients_kernel,
            suitable(KEY_GRADIENTS, tokens, q.dtype, *widths),
            lambda tiling: triton.cdiv(tokens, tiling.n) * batch * k.shape[1],
            (*tensors, grad_k, grad_v, *strides, k.shape[1], per_key_head, per_given_key_head, *numbers),
            constants,
        )
        launch(
            backward.query_gradient_kernel,
            suitable(QUERY_GRADIENT, tokens, q.dtype, *widths),
            lambda tiling: triton.cdiv(tokens, tiling.m) * batch * heads,
            (*tensors, grad_q, *strides, heads, per_key_head, per_given_key_head, *numbers),
            constants,
        )
    if bias is not None and wants_bias:
        rows, bias_heads = bias.shape[:2]
        sums = lse.new_empty(rows, bias_heads, tokens, tokens)
        launch(
            backward.bias_gradient_kernel,
            suitable(BIAS_GRADIENT, tokens, q.dtype, *widths),
            lambda tiling: triton.cdiv(tokens, tiling.m) * triton.cdiv(tokens, tiling.n) * rows * bias_heads,
            (
                *tensors, sums, *strides, heads, bias_heads, batch // rows, heads // bias_heads,
                per_key_head, per_given_key_head, *numbers,
            ),
            constants,
        )  # fmt: skip
        grad_bias.copy_(sums.sum_to_size(bias.shape))
    return grad_q, grad_k, grad_v, grad_bias


def _row_dots(out: Tensor, upstream: Tensor) -> Tensor:
    """rowsum(dO * O), float32 (batch, head, query)."""
    batch, heads, tokens, value_dim = out.shape
    dots = out.new_empty(batch, heads, tokens, dtype=torch.float32)
    launch(
        backward.row_dots_kernel,
        suitable(ROW_DOTS, tokens, out.dtype, value_dim),
        lambda tiling: triton.cdiv(tokens, tiling.m) * batch * heads,
        (out, upstream, dots, *out.stride()[:3], *upstream.stride()[:3], heads, tokens),
        {"VALUE_DIM": value_dim, "BLOCK_V": block(value_dim)},
    )
    return dots


def _is_formed_at_once(q: Tensor, constants: dict[str, int | bool]) -> bool:
    """Whether `all_gradients_kernel` serves: whether the keys of a head and their gradients fit in registers."""
    if q.is_cuda and torch.cuda.get_device_properties(q.device).major < AT_ONCE_FROM_GENERATION:
        return False
    widest = max(constants["BLOCK_D"], constants["BLOCK_V"], constants["BLOCK_G"])
    return q.shape[2] <= MOST_TOKENS_AT_ONCE and widest <= _WIDEST_AT_ONCE and q.dtype != torch.float32


def two_tiles(num_tokens: int) -> tuple[int, int]:
    """The sides of two tiles that hold so many keys, the second smaller and perhaps 0, with the least room left."""
    whole = block(num_tokens)
    half = whole // 2
    tail = block(num_tokens - half)
    return (half, tail) if half >= LEAST_TILE and half + tail < whole else (whole, 0)


def _empty_gradients(
    q: Tensor, k: Tensor, v: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Room for the gradients of q, k, v and bias; an operation of torch has no None among its results."""

    def like(tensor: Tensor | None) -> Tensor:
        if tensor is None:
            return q.new_empty(0)
        return torch.empty_like(tensor, memory_format=torch.contiguous_format)

    return like(q), like(k), like(v), like(bias)


def _empty_gradients_of(
    grad_out: Tensor | None,
    grad_loss: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    bias: Tensor | None,
    *others: Any,  # noqa: ANN401 - the rest changes no shape but for the last one
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    del grad_loss
    return _empty_gradients(q, k, None if grad_out is None else v, bias if others[-1] else None)


compare_gradients.register_fake(_empty_gradients_of)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:  # noqa: ANN401 - torch's own type
    q, k, v, bias, ctx.scale, given_q, given_k, given_bias, ctx.given_scale = inputs
    ctx.save_for_backward(q, k, v, bias, given_q, given_k, given_bias, *output[:3])
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:  # noqa: ANN401
    grad_out, _, _, grad_loss = upstream
    q, k, v, bias, given_q, given_k, given_bias, out, lse, given_lse = ctx.saved_tensors
    wants_bias = bias is not None and ctx.needs_input_grad[3]
    grad_out = None if v is None else grad_out
    grad_q, grad_k, grad_v, grad_bias = torch.ops.atcache.compare_gradients(
        grad_out, grad_loss, q, k, v, bias, ctx.scale, given_q, given_k, given_bias, ctx.given_scale,
        out, lse, given_lse, wants_bias,
    )  # fmt: skip
    of_student = grad_q, grad_k, None if grad_out is None else grad_v, grad_bias if wants_bias else None
    return *of_student, *(None,) * 5


compare_op.register_autograd(_differentiate, setup_context=_keep)
