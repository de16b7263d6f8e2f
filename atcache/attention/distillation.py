"""Distillation losses of one layer: between maps, in one pass over tiles or slices; from logits; between factors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from atcache.attention.factors import LayerAttention, LayerFactors, LayerMaps
from atcache.attention.flash import availability
from atcache.attention.kernels import SlicedGradient, bias_slice, logits_slice, slices, wide
from atcache.errors import AttentionShapeError


def attention_distillation_loss(teacher: LayerAttention, student: LayerFactors) -> Tensor:
    """Cross-entropy, in nats, between the teacher's and the student's rows: a mean over batch, heads and queries.

    Gradients reach the student's q, k and bias. The teacher's factors are constants.

    Args:
        teacher: the layer's factors or maps, from a cache or a live teacher. Head dim may differ from the student's. If
            they have only the first tokens' rows, the loss is a mean over these.
        student: the student's own factors of the same layer; same batch, heads and tokens.

    Returns:
        A float32 scalar (float64 for float64 factors). It is at least the mean entropy of the teacher's rows.

    Raises:
        AttentionShapeError: batch, heads or tokens differ.
    """
    if teacher.shape_BHT[2] < teacher.num_keys == student.num_keys:
        # Formed first: these rows are few, and the kernels for GPUs take factors of all tokens only.
        teacher, student = LayerMaps(attn_BHQK=teacher.maps()), student.select_queries(teacher.shape_BHT[2])
    return _distil(teacher, student, has_values=False)[1]


def distilled_attention(teacher: LayerAttention, student: LayerFactors) -> tuple[Tensor, Tensor]:
    """The student's attention output, softmax(scale * q k^T + bias) v, and its `attention_distillation_loss`.

    Gradients reach the student's q, k, v and bias.

    Args:
        teacher: as for `attention_distillation_loss`.
        student: the student's own factors, with v.

    Returns:
        The output, shape (batch, head, token, head dim of v), v's dtype, as exact as softmax(...) @ v with maps of q's
        dtype; and the loss, as `attention_distillation_loss` returns it.

    Raises:
        AttentionShapeError: batch, heads or tokens differ, or the student's factors have no v.
    """
    attended_BHTD, loss = _distil(teacher, student, has_values=True)
    assert attended_BHTD is not None
    return attended_BHTD, loss


def check_equal_shapes(teacher_BHT: tuple[int, int, int], student_BHT: tuple[int, int, int]) -> None:
    """Check that teacher and student have the same (batch, head, token).

    Raises:
        AttentionShapeError: they differ; the message says both.
    """
    if teacher_BHT != student_BHT:
        raise AttentionShapeError(
            f"the teacher's attention has (batch, head, token) {teacher_BHT} and the student's has {student_BHT}: "
            "expected the same. Give the student the teacher's heads and tokens."
        )


def _distil(teacher: LayerAttention, student: LayerFactors, *, has_values: bool) -> tuple[Tensor | None, Tensor]:
    check_equal_shapes(teacher.shape_BHT, student.shape_BHT)
    v_BHTD = student.kept_v_BHTD() if has_values else None
    vectors = (student.q_BHTD,) if v_BHTD is None else (student.q_BHTD, v_BHTD)
    if isinstance(teacher, LayerFactors) and availability.serves(teacher.q_BHTD, *vectors):
        return _compare_in_tiles(teacher, student, v_BHTD)
    v_BHTD = student.repeated_v_BHTD() if has_values else None
    dtype = student.q_BHTD.dtype
    own = (student.q_BHTD, student.repeated_k_BHTD(), v_BHTD, student.bias, student.scale)
    if isinstance(teacher, LayerMaps):
        given = (None, None, None, 1.0, teacher.attn_BHQK)
    else:
        given = (teacher.q_BHTD.to(dtype), teacher.repeated_k_BHTD().to(dtype), teacher.bias, teacher.scale, None)
    return _Distillation.apply(*own, *given)  # pyright: ignore[reportReturnType]


def _compare_in_tiles(
    teacher: LayerFactors, student: LayerFactors, v_BHTD: Tensor | None
) -> tuple[Tensor | None, Tensor]:
    from atcache.attention.flash.comparing import compare

    device = student.q_BHTD.device.type
    # As torch's own attention call does, under autocast.
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else student.q_BHTD.dtype
    return compare(
        student.q_BHTD.to(dtype),
        student.k_BHTD.to(dtype),
        None if v_BHTD is None else v_BHTD.to(dtype),
        student.bias,
        student.scale,
        teacher.q_BHTD.to(dtype),
        teacher.k_BHTD.to(dtype),
        teacher.bias,
        teacher.scale,
    )


def _empty_by_token(like_BHTD: Tensor) -> Tensor:
    """An empty tensor of this shape, whose memory holds token after token, with a token's heads side by side.

    So the projection after attention needs no copy of it. For its backward pass it keeps this tensor, which is kept
    anyway.
    """
    batch, heads, tokens, head_dim = like_BHTD.shape
    return like_BHTD.new_empty(batch, tokens, heads, head_dim).transpose(1, 2)


class _LogitsGradients:
    """Gradients of q, k and bias, summed slice by slice from the gradient of the logits.

    Args:
        q_BHTD: queries of the logits scale * q k^T + bias.
        k_BHTD: keys of the logits.
        bias: bias of the logits, or None.
        scale: multiplies q k^T.
        wants: whether the gradients of q, k and bias are wanted.
        kept: for each of the three, a gradient to start from, or None.
        weight: multiplies `kept`; a scalar tensor or a number.
    """

    def __init__(
        self,
        q_BHTD: Tensor,
        k_BHTD: Tensor,
        bias: Tensor | None,
        scale: float,
        wants: Sequence[bool],
        kept: Sequence[Tensor | None] = (None, None, None),
        weight: Tensor | float = 1.0,
    ) -> None:
        self._q_BHTD, self._k_BHTD, self._bias, self._scale = q_BHTD, k_BHTD, bias, scale
        wants_q, wants_k, wants_bias = wants
        self.are_wanted = any(wants)
        self._of_q = SlicedGradient(q_BHTD, kept[0], weight) if wants_q else None
        self._of_k = SlicedGradient(k_BHTD, kept[1], weight, q_BHTD.shape[2]) if wants_k else None
        self._of_bias: Tensor | None = None
        if bias is not None and wants_bias:
            dtype = wide(bias.dtype)
            self._of_bias = torch.zeros_like(bias, dtype=dtype) if kept[2] is None else kept[2].to(dtype) * weight

    def add(self, grad_BHQK: Tensor, samples: slice, queries: slice) -> None:
        """Add the part of one slice. `grad_BHQK`, the gradient of its logits, is overwritten."""
        if self._of_bias is not None:
            rows = bias_slice(self._of_bias, samples, queries)
            rows += grad_BHQK.sum_to_size(rows.shape)
        grad_BHQK = grad_BHQK.mul_(self._scale).to(self._q_BHTD.dtype)
        if self._of_q is not None:
            self._of_q.add_to_queries(grad_BHQK @ self._k_BHTD[samples], samples, queries)
        if self._of_k is not None:
            self._of_k.add_to_keys(grad_BHQK.mT @ self._q_BHTD[samples, :, queries], samples, queries)

    def totals(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The gradients of q, k and bias in their dtypes, once all slices are added; None for those not wanted."""
        return (
            None if self._of_q is None else self._of_q.total_BHTD,
            None if self._of_k is None else self._of_k.total_BHTD,
            None if self._of_bias is None or self._bias is None else self._of_bias.to(self._bias.dtype),
        )


class _Distillation(torch.autograd.Function):
    """Attention's output and the loss; without v, None and the loss."""

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401 - torch's own signature
        q_BHTD: Tensor,
        k_BHTD: Tensor,
        v_BHTD: Tensor | None,
        bias: Tensor | None,
        scale: float,
        teacher_q_BHTD: Tensor | None,
        teacher_k_BHTD: Tensor | None,
        teacher_bias: Tensor | None,
        teacher_scale: float,
        teacher_attn_BHQK: Tensor | None,
    ) -> tuple[Tensor | None, Tensor]:
        # Several products use each of them. Parts of a projection's output would be copied for every product.
        q_BHTD, k_BHTD = q_BHTD.contiguous(), k_BHTD.contiguous()
        v_BHTD = None if v_BHTD is None else v_BHTD.contiguous()
        wants_q, wants_k, _, wants_bias = ctx.needs_input_grad[:4]
        gradients = _LogitsGradients(q_BHTD, k_BHTD, bias, scale, (wants_q, wants_k, wants_bias))
        dtype = wide(q_BHTD.dtype)
        attended_BHTD = None if v_BHTD is None else _empty_by_token(v_BHTD)
        logsumexp_BHQ1 = q_BHTD.new_empty((*q_BHTD.shape[:3], 1), dtype=dtype)
        device = q_BHTD.device
        # float64 costs a CPU nothing; some GPU backends do not have it.
        total = torch.zeros((), dtype=torch.float64 if device.type == "cpu" else dtype, device=device)
        num_rows = q_BHTD.shape[:3].numel()
        with torch.autocast(device.type, enabled=False):
            for samples, queries in slices(q_BHTD, k_BHTD.shape[2]):
                if teacher_attn_BHQK is None:
                    assert teacher_q_BHTD is not None
                    assert teacher_k_BHTD is not None
                    teacher_logits = logits_slice(
                        teacher_q_BHTD, teacher_k_BHTD, teacher_bias, teacher_scale, samples, queries
                    )
                    given_BHQK = torch.softmax(teacher_logits, dim=-1)
                else:
                    given_BHQK = teacher_attn_BHQK[samples, :, queries].to(dtype)
                logits_BHQK = logits_slice(q_BHTD, k_BHTD, bias, scale, samples, queries)
                attn_BHQK = torch.softmax(logits_BHQK, dim=-1)
                # log-sum-exp = logit - log(probability) for every key. The largest logit has a probability of at least
                # 1 / T, so its logarithm is exact enough, and no second pass of exponentials is needed.
                slice_logsumexp = logits_BHQK.amax(-1, keepdim=True) - attn_BHQK.amax(-1, keepdim=True).log()
                logsumexp_BHQ1[samples, :, queries] = slice_logsumexp
                # Subtract before the sum over keys: after it, large logits would cancel with large rounding errors.
                log_attn_BHQK = logits_BHQK.sub_(slice_logsumexp)
                if bias is not None:
                    # A key that teacher and student both mask has 0 * -inf = NaN here, but must add nothing.
                    log_attn_BHQK.masked_fill_(given_BHQK == 0, 0.0)
                total -= torch.dot(given_BHQK.flatten(), log_attn_BHQK.flatten())
                if v_BHTD is not None and attended_BHTD is not None:
                    attended_BHTD[samples, :, queries] = attn_BHQK.to(v_BHTD.dtype) @ v_BHTD[samples]
                if gradients.are_wanted:
                    gradients.add(attn_BHQK.sub_(given_BHQK).div_(num_rows), samples, queries)
        kept = (None,) * 6 if v_BHTD is None else (q_BHTD, k_BHTD, v_BHTD, bias, attended_BHTD, logsumexp_BHQ1)
        ctx.save_for_backward(*kept, *gradients.totals())
        ctx.scale = scale
        ctx.set_materialize_grads(False)
        return attended_BHTD, (total / num_rows).to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:  # noqa: ANN401 # pyright: ignore[reportIncompatibleMethodOverride]
        upstream_BHTD, upstream_loss = upstream
        q_BHTD, k_BHTD, v_BHTD, bias, attended_BHTD, logsumexp_BHQ1, *kept = ctx.saved_tensors
        if upstream_loss is None:
            kept, upstream_loss = (None, None, None), 1.0
        if upstream_BHTD is None:
            of_q, of_k, of_bias = (None if grad is None else grad * upstream_loss for grad in kept)
            return of_q, of_k, None, of_bias, *(None,) * 6
        wants_q, wants_k, wants_v, wants_bias = ctx.needs_input_grad[:4]
        wants = (wants_q, wants_k, wants_bias)
        gradients = _LogitsGradients(q_BHTD, k_BHTD, bias, ctx.scale, wants, kept, upstream_loss)
        of_v = SlicedGradient(v_BHTD) if wants_v else None
        upstream_BHTD = upstream_BHTD.contiguous()
        with torch.autocast(q_BHTD.device.type, enabled=False):
            # The gradient of a softmax is dS = A (dA - sum_j A_j dA_j). The sum equals dO . O, which needs no map.
            means_BHQ1 = (upstream_BHTD.to(logsumexp_BHQ1.dtype) * attended_BHTD).sum(-1, keepdim=True)
            for samples, queries in slices(q_BHTD):
                logits_BHQK = logits_slice(q_BHTD, k_BHTD, bias, ctx.scale, samples, queries)
                attn_BHQK = logits_BHQK.sub_(logsumexp_BHQ1[samples, :, queries]).exp_()
                slice_upstream = upstream_BHTD[samples, :, queries]
                if of_v is not None:
                    of_v.add_to_keys(attn_BHQK.to(v_BHTD.dtype).mT @ slice_upstream, samples, queries)
                if gradients.are_wanted:
                    grad_attn_BHQK = (slice_upstream @ v_BHTD[samples].mT).to(attn_BHQK.dtype)
                    grad_attn_BHQK = grad_attn_BHQK.sub_(means_BHQ1[samples, :, queries])
                    gradients.add(attn_BHQK.mul_(grad_attn_BHQK), samples, queries)
        of_q, of_k, of_bias = gradients.totals()
        return of_q, of_k, None if of_v is None else of_v.total_BHTD, of_bias, *(None,) * 6


def logits_distillation_loss(teacher: LayerAttention, logits_BHQK: Tensor) -> Tensor:
    """`attention_distillation_loss` for a student that forms its own maps. Backward keeps all of its logits in memory.

    Args:
        teacher: the layer's factors or maps; as for `attention_distillation_loss`.
        logits_BHQK: the student's logits, before the softmax; gradients reach them.

    Returns:
        A float32 scalar.

    Raises:
        AttentionShapeError: batch, heads or tokens differ.
    """
    if teacher.shape_BHT[2] < teacher.num_keys == logits_BHQK.shape[3]:
        logits_BHQK = logits_BHQK[:, :, : teacher.shape_BHT[2]]
    batch, heads, tokens = logits_BHQK.shape[:3]
    check_equal_shapes(teacher.shape_BHT, (batch, heads, tokens))
    attn_BHQK, log_student_BHQK = teacher.maps(), F.log_softmax(logits_BHQK.float(), dim=-1)
    # A key that is masked in both has the logarithm -inf and no attention, which cost nothing.
    return -(attn_BHQK * log_student_BHQK.masked_fill(attn_BHQK == 0, 0)).sum(dim=-1).mean()


def factor_distillation_loss(teacher: LayerFactors, student: LayerFactors, what: str) -> Tensor:
    """Mean squared error between the student's factors and the teacher's: an ablation of the paper.

    Factors are compared as they arrive at the attention call: after q/k norm and rotary embedding, and v before any
    gate. A factor's error is a mean over batch, heads, tokens and head dim. Several factors give the mean of their
    errors.

    Args:
        teacher: the layer's factors, constants.
        student: the student's own factors of the same layer; same shapes.
        what: which of q, k and v, such as "q" or "qk".

    Returns:
        A float32 scalar.

    Raises:
        AttentionShapeError: shapes differ, or `what` names v but some factors have none.
    """
    check_equal_shapes(teacher.shape_BHT, student.shape_BHT)
    losses = [F.mse_loss(student.repeated(one).float(), teacher.repeated(one).float()) for one in what]
    return torch.stack(losses).mean()
