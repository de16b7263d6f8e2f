"""Finds out how a layer's q and k are made out of its input, from what one forward pass showed.

Nothing need be known of the model's class. Each call of `linear` before the attention call is cut into parts that may
be q or k. A rotation keeps lengths, and the model may put one factor on all: so parts whose heads have other lengths
drop out. The angles of a rotation are estimated from the data. A recipe counts only if it gives the captured q and k.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from atcache.attention.calls import LinearCall
from atcache.attention.factors import LayerFactors
from atcache.attention.projection import HeadNorm, HeadProjection, HeadRotation, split_pairs

_RMS_NORMS = ("RmsNorm", "RmsNormFp32", "RMSNorm")  # timm's two, and torch's


class FoundProjection(NamedTuple):
    """A recipe for all heads of a layer, and where its input is found."""

    projection: HeadProjection
    input_call: int
    """Which of the block's `linear` calls takes the input, counted from 0."""


def find_projection(calls: Sequence[LinearCall], factors: LayerFactors, block: nn.Module) -> FoundProjection | None:
    """The recipe that gives q and k of one layer; None if no recipe of this form does.

    Args:
        calls: the calls of `linear` in the block before its attention, in order.
        factors: the q and k of all heads with which it then attended.
        block: the block. Its attributes `q_norm` and `k_norm`, if any, are the norms of the heads.
    """
    q_norm, k_norm = _head_norms(block, factors)
    with torch.no_grad(), torch.autocast(factors.q_BHTD.device.type, enabled=False):
        num_kv_heads = factors.k_BHTD.shape[1] // _group_size(factors.k_BHTD)
        for q in _parts(calls, factors.q_BHTD, q_norm, factors.q_BHTD.shape[1], num_kv_heads):
            for k in _parts(calls, factors.k_BHTD, k_norm, num_kv_heads, num_kv_heads):
                if not torch.equal(q.call.input_BTC, k.call.input_BTC):
                    continue
                seen = dataclasses.replace(factors, input_BTC=q.call.input_BTC)
                plain = _without_rotation(q, k, seen)
                for rotation in _rotations(plain, seen):
                    projection = dataclasses.replace(plain, rotation=rotation)
                    if reproduces(projection, seen):
                        return FoundProjection(projection, q.index)
    return None


def reproduces(projection: HeadProjection, factors: LayerFactors) -> bool:
    """Whether the projection gives the captured q and k out of the captured input, apart from rounding."""
    if factors.input_BTC is None:
        return False
    with torch.no_grad(), torch.autocast(factors.q_BHTD.device.type, enabled=False):
        recomputed = projection(factors.input_BTC)
    tolerance = _tolerance(factors.q_BHTD)
    for captured_BHTD, recomputed_BHTD in zip((factors.q_BHTD, factors.k_BHTD), recomputed, strict=True):
        if captured_BHTD.shape != recomputed_BHTD.shape:
            return False
        lengths_BHT = _lengths(captured_BHTD)
        errors_BHT = _lengths(captured_BHTD.double() - recomputed_BHTD)
        mean_length = lengths_BHT.square().mean().sqrt()
        # The second rule is for what is wrong in few of many tokens, such as those before the patches.
        worst = (errors_BHT / lengths_BHT.clamp_min(mean_length)).max()
        # NaN is not below anything.
        if not (errors_BHT.square().mean().sqrt() < tolerance * mean_length and worst < 3 * tolerance):
            return False
    return True


def _lengths(heads: Tensor) -> Tensor:
    """The length of each head's vector in float64, shape (...,) for heads of shape (..., head dim)."""
    return heads.double().square().sum(dim=-1).sqrt()


def _size(values: Tensor) -> Tensor:
    """The root of the sum of squares of all values, float64."""
    return values.double().square().sum().sqrt()


def _tolerance(captured: Tensor) -> float:
    """The relative error that rounding may cause: bfloat16 has 8 bits, and some heads are small sums of large terms."""
    return 2e-2 if captured.dtype in (torch.bfloat16, torch.float16) else 1e-4


# Norms


def _head_norms(block: nn.Module, factors: LayerFactors) -> tuple[HeadNorm | None, HeadNorm | None]:
    ones_D = torch.ones(factors.q_BHTD.shape[3], device=factors.q_BHTD.device)
    for module in block.modules():
        if hasattr(module, "q_norm") and hasattr(module, "k_norm"):
            return _head_norm(module.q_norm, ones_D), _head_norm(module.k_norm, ones_D)
    return None, None


def _head_norm(module: Any, ones_D: Tensor) -> HeadNorm | None:  # noqa: ANN401 - whatever the model calls a norm
    """The norm, or None for an identity. A norm of another kind is None too: then no recipe gives q and k."""
    is_layer_norm = isinstance(module, nn.LayerNorm)
    if not is_layer_norm and type(module).__name__ not in _RMS_NORMS:
        return None
    if tuple(module.normalized_shape) != tuple(ones_D.shape):
        return None
    weight: Tensor | None = module.weight
    bias: Tensor | None = getattr(module, "bias", None)
    weight_D = ones_D if weight is None else weight.detach().float().clone()
    bias_D = torch.zeros_like(ones_D) if bias is None else bias.detach().float().clone()
    eps = torch.finfo(torch.float32).eps if module.eps is None else module.eps
    # As float32 can hold it, so that a projection read back from its state is the same to the last bit.
    return HeadNorm(weight_D=weight_D, bias_D=bias_D if is_layer_norm else None, eps=float(torch.tensor(eps)))


# Parts of the output of `linear` calls


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Part:
    """Rows of one linear call that may be q or k: their heads are as long as the captured ones, up to a factor."""

    index: int
    """Which call."""
    call: LinearCall
    rows_N: Tensor
    """The rows of the weight, head by head; repeated where the model repeats heads of k."""
    norm: HeadNorm | None
    factor: float
    """Multiplies these rows, or their norm if there is one."""

    def weight_and_bias(self) -> tuple[Tensor, Tensor]:
        """The weight and bias of these rows in float32, before the factor."""
        weight_NC = self.call.weight_NC[self.rows_N].float()
        bias = self.call.bias_N
        bias_N = weight_NC.new_zeros(len(weight_NC)) if bias is None else bias[self.rows_N].float()
        output_BTN = self.call.output_BTN[..., self.rows_N].double()
        missing_BTN = output_BTN - F.linear(self.call.input_BTC.float(), weight_NC, bias_N)
        if _size(missing_BTN) > _tolerance(self.call.output_BTN) * _size(output_BTN):
            # Some models add the bias in place, after the call.
            bias_N = bias_N + missing_BTN.mean(dim=(0, 1)).float()
        return weight_NC, bias_N


def _parts(
    calls: Sequence[LinearCall], captured_BHTD: Tensor, head_norm: HeadNorm | None, num_heads: int, num_kv_heads: int
) -> Iterator[_Part]:
    """Parts of `num_heads` heads that may be q or k, which has these heads repeated to its own number of heads."""
    num_batch, num_repeated, num_tokens, head_dim = captured_BHTD.shape
    captured_BTH = _lengths(captured_BHTD.transpose(1, 2))
    for index, call in enumerate(calls):
        if call.output_BTN.shape[:-1] != (num_batch, num_tokens):
            continue
        for start in _starts(call.output_BTN.shape[-1], num_heads * head_dim, num_kv_heads * head_dim):
            rows_HD = torch.arange(start, start + num_heads * head_dim, device=captured_BHTD.device)
            rows_HD = rows_HD.view(num_heads, head_dim).repeat_interleave(num_repeated // num_heads, dim=0)
            heads_BTHD = call.output_BTN[..., rows_HD].float()
            lengths_BTH = _lengths(heads_BTHD if head_norm is None else head_norm(heads_BTHD))
            factor = float(_size(captured_BTH) / _size(lengths_BTH))
            tolerance = _tolerance(captured_BHTD)
            if _size(lengths_BTH * factor - captured_BTH) < tolerance * _size(captured_BTH):
                # What rounding explains is no factor.
                factor = 1.0 if abs(factor - 1) < tolerance / 10 else factor
                yield _Part(index=index, call=call, rows_N=rows_HD.flatten(), norm=head_norm, factor=factor)


def _starts(num_outputs: int, num_rows: int, step: int) -> list[int]:
    """Where q or k may begin. Something else may stand before or after it (v, or the MLP's share), of any size."""
    from_start = range(0, num_outputs - num_rows + 1, step)
    return sorted({*from_start, *(num_outputs - num_rows - start for start in from_start)})


def _group_size(k_BHTD: Tensor) -> int:
    """How often each head of k is repeated. Some models share heads in groups, and repeat them for the call."""
    num_heads = k_BHTD.shape[1]
    for size in range(num_heads, 1, -1):
        if num_heads % size == 0 and torch.equal(k_BHTD[:, ::size].repeat_interleave(size, dim=1), k_BHTD):
            return size
    return 1


def _without_rotation(q: _Part, k: _Part, factors: LayerFactors) -> HeadProjection:
    weights: list[Tensor] = []
    biases: list[Tensor] = []
    for part in (q, k):
        factor = part.factor if part.norm is None else 1.0
        weight_NC, bias_N = part.weight_and_bias()
        weights.append(weight_NC * factor)
        biases.append(bias_N * factor)
    return HeadProjection(
        weight_NC=torch.cat(weights),
        bias_N=torch.cat(biases),
        num_heads=factors.q_BHTD.shape[1],
        num_kv_heads=factors.k_BHTD.shape[1],
        q_norm=None if q.norm is None else q.norm.scaled(q.factor),
        k_norm=None if k.norm is None else k.norm.scaled(k.factor),
    )


# Rotations


def _rotations(plain: HeadProjection, factors: LayerFactors) -> Iterator[HeadRotation | None]:
    """Rotations that may turn what `plain` gives into the captured q and k, the simplest first."""
    yield None
    if plain.head_dim % 2 == 0 and factors.input_BTC is not None:
        plain_factors = plain(factors.input_BTC)
        for is_shared in (True, False):
            for is_adjacent in (True, False):
                yield _fitted_rotation(plain_factors, factors, is_shared=is_shared, is_adjacent=is_adjacent)


def _fitted_rotation(
    plain: tuple[Tensor, Tensor], factors: LayerFactors, *, is_shared: bool, is_adjacent: bool
) -> HeadRotation:
    """The angles that turn plain q and k best into the captured ones, fitted to all views of the batch."""
    num_kv_heads = factors.k_BHTD.shape[1]
    before: list[Tensor] = []
    after: list[Tensor] = []
    for plain_BHTD, captured_BHTD in zip(plain, (factors.q_BHTD, factors.k_BHTD), strict=True):
        length = _size(captured_BHTD)  # so that neither q nor k decides alone
        for heads_BHTD, into in ((plain_BHTD, before), (captured_BHTD, after)):
            pairs_BHTP = torch.complex(*split_pairs(heads_BHTD.double() / length, is_adjacent=is_adjacent))
            into.append(torch.unflatten(pairs_BHTP, 1, (num_kv_heads, -1)).transpose(1, 2))
    # G is the heads of q that use one head of k, and that head.
    before_BGHTP, after_BGHTP = torch.cat(before, dim=1), torch.cat(after, dim=1)
    over_heads = (0, 1, 2) if is_shared else (0, 1)
    sums_HTP = (before_BGHTP.conj() * after_BGHTP).sum(dim=over_heads)
    turned_HTP = torch.polar(torch.ones_like(sums_HTP.real), sums_HTP.angle())
    error_HT = (after_BGHTP - turned_HTP * before_BGHTP).abs().square().sum(dim=(*over_heads, -1))
    error_without_HT = (after_BGHTP - before_BGHTP).abs().square().sum(dim=(*over_heads, -1))
    # The fitted angles of a token without a position (a class token) are only noise.
    is_turned_HT1 = (error_without_HT > 4 * error_HT).unsqueeze(-1)
    turned_HTP = torch.where(is_turned_HT1, turned_HTP, torch.ones_like(turned_HTP))
    if is_shared:
        turned_HTP = turned_HTP.unsqueeze(0)
    return HeadRotation(
        cos_HTP=turned_HTP.real.float().contiguous(),
        sin_HTP=turned_HTP.imag.float().contiguous(),
        is_adjacent=is_adjacent,
    )
