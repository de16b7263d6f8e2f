"""Losses of distillation but that of attention calls (`distillation`): for students that form maps, and for factors."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from atcache.attention.distillation import check_equal_shapes
from atcache.attention.factors import LayerAttention, LayerFactors


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
    check_equal_shapes(teacher.shape_BHT, (batch, heads, tokens))
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
    check_equal_shapes(teacher.shape_BHT, student.shape_BHT)
    losses = [F.mse_loss(student.repeated(one).float(), teacher.repeated(one).float()) for one in what]
    return torch.stack(losses).mean()
