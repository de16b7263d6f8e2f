"""What an error in a layer's input costs: the quadratic form whose value is the row KL that a small error makes."""

from __future__ import annotations

import dataclasses
from typing import cast

import torch
from torch import Tensor

from atcache.attention.factors import LayerFactors
from atcache.attention.projection import HeadNorm, HeadProjection, HeadRotation
from atcache.codecs.fidelity import slices_of_views

_MAP_NUMEL = 2**25
"""Elements of maps held at a time: 128 MiB in float32."""
_UNIFORM = 1e-3
"""Weight of the metric that uniform rows would have. A row that looks at one key alone is not changed by small errors,
but by large ones it is."""
_ROTATED_TOKENS = 64
"""Tokens whose rotations are averaged."""


def kl_metric(layer: LayerFactors) -> Tensor:
    """The quadratic forms whose value is the KL that small errors of q and k make: shape (head vector, D, D), float64.

    KL(softmax(x) || softmax(x + e)) is half the variance of e under softmax(x), up to third order. With e = scale dq.k
    that is dq' M dq, M = scale^2 / 2 Cov_A(k); with errors of k that are independent between tokens, the sum over keys
    of A (1 - A) (scale q.dk)^2 / 2. Summed over all rows of the batch. A thousandth of what uniform rows would give is
    added. Head vectors are the heads of q, then those of k.
    """
    num_kv_heads, head_dim = layer.k_BHTD.shape[1], layer.q_BHTD.shape[3]
    total_VDD = layer.q_BHTD.new_zeros(layer.q_BHTD.shape[1] + num_kv_heads, head_dim, head_dim, dtype=torch.float64)
    for few in slices_of_views(layer, _MAP_NUMEL):
        part = layer.select(few)
        attn_BHQK = part.maps()
        q_BHTD, k_BHTD = part.q_BHTD.float(), part.repeated_k_BHTD().float()
        # A constant added to all keys of a head changes no row, so it must not count as variance either.
        k_BHTD = k_BHTD - k_BHTD.mean(dim=2, keepdim=True)
        mean_k_BHQD = attn_BHQK @ k_BHTD
        of_q_HDD = _weighted_gram(k_BHTD, attn_BHQK.sum(dim=2) + _UNIFORM) - _weighted_gram(mean_k_BHQD, None)
        of_k_HDD = _weighted_gram(q_BHTD, 1 - attn_BHQK.square().sum(dim=3) + _UNIFORM)
        of_k_GDD = of_k_HDD.view(num_kv_heads, -1, head_dim, head_dim).sum(dim=1)
        total_VDD += torch.cat([of_q_HDD, of_k_GDD])
    return total_VDD * (layer.scale**2 / 2)


def before_projection(metric_VDD: Tensor, projection: HeadProjection | None, x_RC: Tensor) -> Tensor:
    """The metric of errors in the linear product instead of in q and k, so before norms and rotation; same shape.

    A rotation turns the metric differently at each token: the mean over tokens is taken. A norm divides by the head's
    size: the mean size is taken. Both are approximations, which only cost some bytes.

    Args:
        metric_VDD: of q's heads and k's, float64.
        projection: of the layer; None where q and k themselves are coded.
        x_RC: inputs of some tokens, to measure sizes on.
    """
    if projection is None:
        return metric_VDD
    num_heads = projection.num_heads
    if projection.rotation is not None:
        metric_VDD = _before_rotation(metric_VDD, projection.rotation, num_heads)
    heads_RVD = (x_RC @ projection.weight_NC.mT + projection.bias_N).view(len(x_RC), *metric_VDD.shape[:2])
    parts = ((slice(0, num_heads), projection.q_norm), (slice(num_heads, None), projection.k_norm))
    for part, norm in parts:
        if norm is not None:
            gain_VD = _gain(norm, heads_RVD[:, part])
            metric_VDD[part] *= gain_VD.unsqueeze(2) * gain_VD.unsqueeze(1)
    return metric_VDD


def _before_rotation(metric_VDD: Tensor, rotation: HeadRotation, num_heads: int) -> Tensor:
    """The mean over tokens of R' M R."""
    num_tokens, head_dim = rotation.cos_HTP.shape[1], metric_VDD.shape[2]
    tokens = torch.linspace(0, num_tokens - 1, min(num_tokens, _ROTATED_TOKENS), device=metric_VDD.device).long()
    some = dataclasses.replace(rotation, cos_HTP=rotation.cos_HTP[:, tokens], sin_HTP=rotation.sin_HTP[:, tokens])
    # As a batch of unit vectors, one for each component.
    units_ETHD = torch.eye(head_dim, device=metric_VDD.device)[:, None, None].expand(-1, len(tokens), num_heads, -1)
    parts: list[Tensor] = []
    for heads_VDD in (metric_VDD[:num_heads], metric_VDD[num_heads:]):
        rotated_ETHD = some(units_ETHD[:, :, : len(heads_VDD)]).double()
        parts.append(torch.einsum("ethd,hdf,gthf->heg", rotated_ETHD, heads_VDD, rotated_ETHD) / len(tokens))
    return torch.cat(parts)


def _gain(norm: HeadNorm, heads_RVD: Tensor) -> Tensor:
    """What the norm multiplies each component of each head with, on average: shape (head, D), float64."""
    centred = heads_RVD if norm.bias_D is None else heads_RVD - heads_RVD.mean(dim=2, keepdim=True)
    size_RV = (centred.square().mean(dim=2) + norm.eps).sqrt()
    return (1 / size_RV).mean(dim=0).double().unsqueeze(1) * norm.weight_D.double()


def input_metric(metric_VDD: Tensor, weight_NC: Tensor | None) -> Tensor:
    """The metric of errors in the layer's input: shape (C, C), float64.

    Args:
        metric_VDD: of errors in the linear product.
        weight_NC: of the product; None where q and k themselves are coded.
    """
    if weight_NC is None:
        return cast("Tensor", torch.block_diag(*metric_VDD.double()))
    weight_VDC = weight_NC.double().view(*metric_VDD.shape[:2], -1)
    return (weight_VDC.mT @ (metric_VDD.double() @ weight_VDC)).sum(dim=0)


def _weighted_gram(vectors_BHTD: Tensor, weight_BHT: Tensor | None) -> Tensor:
    """Sum over views and tokens of weight * v v': shape (head, D, D), float64."""
    by_head_HND = vectors_BHTD.transpose(0, 1).flatten(1, 2).double()
    if weight_BHT is None:
        return by_head_HND.mT @ by_head_HND
    return (by_head_HND * weight_BHT.transpose(0, 1).flatten(1, 2).unsqueeze(2).double()).mT @ by_head_HND
