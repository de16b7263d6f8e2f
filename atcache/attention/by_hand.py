"""The q and k of a model that forms its logits itself: found by the product that its softmax came from."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from atcache.attention.factors import LayerFactors

_MATRIX_PRODUCTS = (torch.matmul, Tensor.matmul, Tensor.__matmul__)
_EINSUM = re.compile(r"(\w{4}),(\w{4})->(\w{4})")
_SNAP = 1e-3
"""A measured scale this close to one of those that models use is taken to be it."""


class Product(NamedTuple):
    """Two factors whose product may be the logits, up to a scale: shape (batch, head, token, head dim) each."""

    q_BHTD: Tensor
    k_BHTD: Tensor

    @property
    def logits_shape(self) -> tuple[int, int, int, int]:
        """Shape of the product q k^T."""
        num_batch, num_heads, num_queries, _ = self.q_BHTD.shape
        return num_batch, num_heads, num_queries, self.k_BHTD.shape[2]

    def scale_to(self, logits_BHQK: Tensor) -> float | None:
        """What multiplies q k^T to give these logits; None if nothing does, apart from rounding.

        Only the first image is looked at. What a row's logits have in common does not count, as for its softmax.
        """
        with torch.no_grad(), torch.autocast(logits_BHQK.device.type, enabled=False):
            q_HQD, k_HKD = self.q_BHTD[0].float(), self.k_BHTD[0].float()
            product_HQK, logits_HQK = _centred(q_HQD @ k_HKD.mT), _centred(logits_BHQK[0].float())
            scale = float((product_HQK * logits_HQK).sum() / product_HQK.square().sum())
            error = float(((product_HQK * scale - logits_HQK).square().sum() / logits_HQK.square().sum()).sqrt())
        tolerance = 1e-3 if logits_BHQK.dtype == torch.float32 and self.q_BHTD.dtype == torch.float32 else 3e-2
        if not (error < tolerance and scale > 0):
            return None
        usual = (1.0, self.q_BHTD.shape[-1] ** -0.5, (self.q_BHTD.shape[1] * self.q_BHTD.shape[-1]) ** -0.5)
        return next((known for known in usual if abs(scale / known - 1) < _SNAP), float(f"{scale:.5g}"))


def factors_by_hand(products: Sequence[Product], logits_BHQK: Tensor, *, scale: float | None) -> LayerFactors | None:
    """The factors whose softmax was taken: those of the last product that gives these logits; None if there is none.

    Args:
        products: what the model multiplied before, or the q and k that a user's function gives.
        logits_BHQK: what the softmax was taken of.
        scale: multiplies q k^T; None finds it.
    """
    for found in reversed(products):
        if found.logits_shape == tuple(logits_BHQK.shape):
            measured = found.scale_to(logits_BHQK) if scale is None else scale
            if measured is not None:
                return LayerFactors(q_BHTD=found.q_BHTD.clone(), k_BHTD=found.k_BHTD.clone(), scale=measured)
    return None


def product(func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Product | None:
    """The factors, if `func` multiplies two tensors as q k^T is made: by `matmul` or by `einsum`."""
    given: list[Any] = [*args, *kwargs.values()]
    if func is torch.einsum and isinstance(given[0], str):
        operands = cast("Sequence[Tensor]", given[1] if isinstance(given[1], tuple | list) else given[1:])
        return _einsum_product(given[0], *operands) if len(operands) == 2 else None
    if func not in _MATRIX_PRODUCTS or len(given) != 2 or not all(_has_heads(one) for one in given):
        return None
    left, right = given
    return Product(left.detach(), right.detach().mT) if left.shape[:2] == right.shape[:2] else None


def _has_heads(value: object) -> bool:
    return isinstance(value, Tensor) and value.ndim == 4


def _einsum_product(equation: str, left: Tensor, right: Tensor) -> Product | None:
    match = _EINSUM.fullmatch(equation.replace(" ", ""))
    if match is None:
        return None
    axes_left, axes_right, axes_out = match.groups()
    summed = set(axes_left) & set(axes_right) - set(axes_out)
    batch, head, query, key = axes_out
    for one, other in ((left, right), (right, left)):
        axes_q, axes_k = (axes_left, axes_right) if one is left else (axes_right, axes_left)
        if len(summed) == 1 and set(axes_q) == {batch, head, query, *summed} == set(axes_k) - {key} | {query}:
            order = f"{batch}{head}{query}{''.join(summed)}"
            q_BHTD = one.detach().permute([axes_q.index(axis) for axis in order])
            return Product(q_BHTD, other.detach().permute([axes_k.index(axis) for axis in order.replace(query, key)]))
    return None


def _centred(logits_HQK: Tensor) -> Tensor:
    return logits_HQK - logits_HQK.mean(dim=-1, keepdim=True)
