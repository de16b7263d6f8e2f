"""Attention distillation: cross-entropy from each teacher row to the student's row (Li et al. 2024).

For one row, with A the teacher's probabilities and S the student's logits, CE(A, S) = logsumexp_j S_j - sum_j A_j S_j,
and its gradient in S is softmax(S) - A. Loss and gradient therefore come out of one pass over slices: two products for
the logits, two for the gradients of q and k, nothing recomputed in backward, nothing of token x token size kept.
(`docs/design.md` compares this with the identity on top of the fused call, which needs nine products.)
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from atcache.attention.factors import LayerAttention, LayerFactors, LayerMaps
from atcache.attention.kernels import logits_slice, slices
from atcache.errors import AttentionShapeError


def attention_distillation_loss(teacher: LayerAttention, student: LayerFactors) -> Tensor:
    """Mean cross-entropy, in nats, from the teacher's rows to the student's: mean over batch, heads and queries.

    Gradients reach the student's q, k and bias; the teacher's factors are constants.

    Args:
        teacher: the layer's factors or maps, from a cache or a live teacher. Head dim may differ from the student's.
        student: the student's own factors of the same layer; same batch, heads and tokens.

    Returns:
        A float32 scalar (float64 for float64 factors), at least the teacher rows' mean entropy.

    Raises:
        AttentionShapeError: batch, heads or tokens differ.
    """
    _check_shapes(teacher.shape_BHT, student.shape_BHT)
    dtype = student.q_BHTD.dtype
    own = (student.q_BHTD, student.repeated_k_BHTD(), student.bias, student.scale)
    if isinstance(teacher, LayerMaps):
        given = (None, None, None, 1.0, teacher.attn_BHQK)
    else:
        given = (teacher.q_BHTD.to(dtype), teacher.repeated_k_BHTD().to(dtype), teacher.bias, teacher.scale, None)
    return _DistillationLoss.apply(*own, *given)  # pyright: ignore[reportReturnType]


def logits_distillation_loss(teacher: LayerAttention, logits_BHQK: Tensor) -> Tensor:
    """`attention_distillation_loss` for a student that forms its maps itself: from its logits, kept for backward.

    Args:
        teacher: the layer's factors or maps.
        logits_BHQK: the student's own, before the softmax; gradients reach them.

    Returns:
        A float32 scalar.

    Raises:
        AttentionShapeError: batch, heads or tokens differ.
    """
    batch, heads, tokens = logits_BHQK.shape[:3]
    _check_shapes(teacher.shape_BHT, (batch, heads, tokens))
    return F.cross_entropy(logits_BHQK.float().flatten(0, 2), teacher.maps().flatten(0, 2))


def factor_distillation_loss(teacher: LayerFactors, student: LayerFactors, what: str) -> Tensor:
    """Mean squared error of the student's factors to the teacher's: an ablation of the paper.

    Each factor as it arrives at the attention call: behind q/k norm and rotary embedding, and v before any gate. Its
    error is the mean over batch, heads, tokens and head dim; that of several factors is the mean of theirs.

    Args:
        teacher: the layer's factors, constants.
        student: the student's own factors of the same layer; same shapes.
        what: which of q, k and v, such as "q" or "qk".

    Returns:
        A float32 scalar.

    Raises:
        AttentionShapeError: shapes differ, or v is wanted of factors without.
    """
    _check_shapes(teacher.shape_BHT, student.shape_BHT)
    losses = [F.mse_loss(student.repeated(one).float(), teacher.repeated(one).float()) for one in what]
    return torch.stack(losses).mean()


def _check_shapes(teacher_BHT: tuple[int, int, int], student_BHT: tuple[int, int, int]) -> None:
    if teacher_BHT != student_BHT:
        raise AttentionShapeError(
            f"teacher attention of (batch, head, token) {teacher_BHT} and student attention of {student_BHT}: expected "
            "the same. Give the student the teacher's heads and tokens."
        )


class _DistillationLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401 - torch's own signature
        q_BHTD: Tensor,
        k_BHTD: Tensor,
        bias: Tensor | None,
        scale: float,
        teacher_q_BHTD: Tensor | None,
        teacher_k_BHTD: Tensor | None,
        teacher_bias: Tensor | None,
        teacher_scale: float,
        teacher_attn_BHQK: Tensor | None,
    ) -> Tensor:
        wants = tuple(bool(want) for want in ctx.needs_input_grad[:3])
        grad_q_BHTD = torch.empty_like(q_BHTD, memory_format=torch.contiguous_format) if wants[0] else None
        grad_k_BHTD = torch.zeros_like(k_BHTD, memory_format=torch.contiguous_format) if wants[1] else None
        grad_bias = torch.zeros_like(bias) if bias is not None and wants[2] else None
        loss_dtype = torch.promote_types(torch.float32, q_BHTD.dtype)
        total = torch.zeros(
            (), dtype=torch.float64 if q_BHTD.device.type == "cpu" else loss_dtype, device=q_BHTD.device
        )
        num_rows = q_BHTD.shape[0] * q_BHTD.shape[1] * q_BHTD.shape[2]
        with torch.autocast(q_BHTD.device.type, enabled=False):
            for samples, queries in slices(q_BHTD):
                if teacher_attn_BHQK is None:
                    assert teacher_q_BHTD is not None
                    assert teacher_k_BHTD is not None
                    teacher_logits = logits_slice(
                        teacher_q_BHTD, teacher_k_BHTD, teacher_bias, teacher_scale, samples, queries
                    )
                    attn_BHQK = torch.softmax(teacher_logits, dim=-1)
                else:
                    attn_BHQK = teacher_attn_BHQK[samples, :, queries].to(loss_dtype)
                logits_BHQK = logits_slice(q_BHTD, k_BHTD, bias, scale, samples, queries)
                logsumexp_BHQ1 = torch.logsumexp(logits_BHQK, dim=-1, keepdim=True)
                # A key masked on both sides has A = 0 and S = -inf: it adds nothing, not 0 * -inf.
                products = (
                    attn_BHQK * logits_BHQK
                    if bias is None
                    else torch.where(attn_BHQK > 0, attn_BHQK * logits_BHQK, 0.0)
                )
                total += logsumexp_BHQ1.sum() - products.sum()
                if not any(wants):
                    continue
                grad_BHQK = logits_BHQK.sub_(logsumexp_BHQ1).exp_().sub_(attn_BHQK).div_(num_rows)
                if grad_bias is not None:
                    _add_bias_gradient(grad_bias, grad_BHQK, samples, queries)
                grad_BHQK = grad_BHQK.mul_(scale).to(q_BHTD.dtype)
                if grad_q_BHTD is not None:
                    grad_q_BHTD[samples, :, queries] = grad_BHQK @ k_BHTD[samples]
                if grad_k_BHTD is not None:
                    grad_k_BHTD[samples] += grad_BHQK.mT @ q_BHTD[samples, :, queries]
        ctx.save_for_backward(grad_q_BHTD, grad_k_BHTD, grad_bias)
        return (total / num_rows).to(loss_dtype)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        (upstream_loss,) = upstream
        grads = [None if grad is None else grad * upstream_loss.to(grad.dtype) for grad in ctx.saved_tensors]
        return (*grads, None, None, None, None, None, None)


def _add_bias_gradient(grad_bias: Tensor, grad_BHQK: Tensor, samples: slice, queries: slice) -> None:
    """Add a slice's gradient to the bias's own, summed over the axes the bias was broadcast along."""
    rows = grad_bias[
        samples if grad_bias.shape[0] > 1 else slice(None), :, queries if grad_bias.shape[2] > 1 else slice(None)
    ]
    rows += grad_BHQK.sum_to_size(rows.shape).to(rows.dtype)
