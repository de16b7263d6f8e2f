"""How far decoded maps are from the teacher's."""

from __future__ import annotations

import torch
from torch import Tensor

from atcache.attention.factors import LayerFactors


def row_kl(teacher: LayerFactors, decoded: LayerFactors) -> Tensor:
    """KL(A || decoded A) of every row, in nats: kl_BHQ float32, at least 0 up to rounding.

    Computed in float64 from the logits, so that small divergences are not rounding noise. Holds one
    (batch, head, token, token) matrix at a time: call it with few views.

    Args:
        teacher: the factors as captured.
        decoded: the factors as a coder gives them back, same shapes.
    """
    log_attn_BHQK, log_decoded_BHQK = (torch.log_softmax(_logits(factors), dim=-1) for factors in (teacher, decoded))
    attn_BHQK = log_attn_BHQK.exp()
    # Where the teacher's probability is 0 (a masked key) the term is 0, not 0 * inf.
    terms_BHQK = torch.where(attn_BHQK > 0, attn_BHQK * (log_attn_BHQK - log_decoded_BHQK), 0.0)
    return terms_BHQK.sum(dim=-1).float()


def _logits(factors: LayerFactors) -> Tensor:
    logits_BHQK = factors.q_BHTD.double() @ factors.repeated_k_BHTD().double().mT * factors.scale
    return logits_BHQK if factors.bias is None else logits_BHQK + factors.bias.double()
