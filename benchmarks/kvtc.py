"""A rival that stores factors: KVTC (Staniszewski and Lancucki, ICLR 2026, arXiv 2511.01815), with q and k for k and v.

KVTC is a transform coder for the key-value caches of language models. Here it is as published where that has a meaning
for attention factors: one PCA, centred, over all layers' q and k of a token side by side; bits of each component by
dynamic programming; uniform quantisers; packed bits; DEFLATE. It has no transform over tokens, and its errors are plain
squared errors of q and k, whatever they do to a map. What differs from the paper:

- The paper's groups of components share a scale. Here every component has a range of its own, fitted for its number of
  bits to the smallest error, and stored once in the state rather than beside the codes.
- Sinks and recent tokens are not kept exact: a ViT's prefix tokens are coded as all others.
- Position embeddings are not undone. timm's ViTs mostly add them before the first layer.

Fitting holds at most `_MAX_TOKENS` tokens of the calibration views in memory (about 600 MB for 12 layers of 768) and
finds at most `_MAX_COMPONENTS` components, by the randomised range finder of `torch.svd_lowrank`: a dense decomposition
of 9,216 dimensions would take many minutes. This bounds how close the rival gets. With DINOv2 ViT-S, 2,048 components
without any rounding have a KL of 0.005. Budgets of up to 4,095 bits a token (KL 0.016 and more) leave some of them out
anyway; from 5,792 bits on (KL 0.009 and less) all are kept, and more and more it is the limit that is measured.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from storage_ways import CHECKSUM_NBYTES, INDEX_NBYTES
from torch import Tensor

from atcache.attention.capture import CaptureCheck, FactorCapture
from atcache.attention.factors import LayerAttention, LayerFactors
from atcache.codecs.base import only_factors
from atcache.codecs.fidelity import row_kl
from atcache.teachers.run import TeacherRun

FAMILY = "KVTC-like"
MOST_BITS = 8
"""Of a component; 0 bits drop it."""
_MAX_TOKENS = 2**14
_MAX_COMPONENTS = 2048
_POWER_ITERATIONS = 1
_QUANTISER_SHARE = 5
"""One calibration view in this many is for the quantisers: on the PCA's own views, small components look too large."""
_MAX_QUANTISER_TOKENS = 2**12
_TAILS = (0.0, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.025, 0.05, 0.1)
"""Shares of values beyond a range, at each side. For a Gaussian the best are 0.055 (1 bit) to less than 0.001."""
_QUANTISERS_AT_ONCE = 32  # so few that their values stay in the processor's cache
_MARGIN = 0.125
"""What a range of all values is widened by at each side, as a share of its width: other views have larger values."""
_LEAST_GAIN = 1.05
"""A setting is left out if the next one, with fewer bits, has less than this times its KL."""
_SMALLEST_KL, _LARGEST_KL = 3e-4, 0.12
"""Settings are chosen to reach from one to the other, a little beyond the targets that they are compared at."""
_KL_VIEWS = 4
_BATCH = 16
_ZLIB_LEVEL = 6


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class KvtcFit:
    """What all settings share.

    P: values of q and k of a token in all layers. C: components. W: numbers of bits, 0 to `MOST_BITS`.
    """

    check: CaptureCheck
    mean_P: Tensor
    basis_CP: Tensor
    """Orthonormal rows, the largest variance first."""
    low_CW: Tensor
    """Where the first cell of a component's quantiser begins, for each number of bits."""
    step_CW: Tensor
    """The width of its cells."""
    choice_CR: np.ndarray
    """What `best_choices` returns."""
    fit_s: float
    """Seconds that fitting took, with the teacher's forwards."""

    def bits(self, bits_per_token: int) -> np.ndarray:
        """Bits of each component if all together have at most `bits_per_token`."""
        return allocate(self.choice_CR, bits_per_token)


def fit_kvtc(run: TeacherRun, check: CaptureCheck, pixels_NHWC: Tensor) -> KvtcFit:
    """Fit the basis, the quantisers and the allocation of bits.

    Args:
        run: the teacher.
        check: the geometry and bias of its factors.
        pixels_NHWC: calibration views, uint8, at least 2.

    Raises:
        CodecError: the teacher gives maps.
    """
    start_s = time.perf_counter()
    is_for_quantisers_N = torch.arange(len(pixels_NHWC)) % _QUANTISER_SHARE == 1
    rows_NP = _token_rows(run, pixels_NHWC[~is_for_quantisers_N], _MAX_TOKENS)
    mean_P = rows_NP.mean(0)
    basis_CP = principal_components(rows_NP.sub_(mean_P))
    del rows_NP
    rows_NP = _token_rows(run, pixels_NHWC[is_for_quantisers_N], _MAX_QUANTISER_TOKENS)
    low_CW, step_CW, error_CW = fit_quantisers((rows_NP - mean_P) @ basis_CP.mT)
    return KvtcFit(
        check=check,
        mean_P=mean_P,
        basis_CP=basis_CP,
        low_CW=low_CW,
        step_CW=step_CW,
        choice_CR=best_choices(error_CW.numpy(), MOST_BITS * len(basis_CP)),
        fit_s=time.perf_counter() - start_s,
    )


def _token_rows(run: TeacherRun, pixels_NHWC: Tensor, max_tokens: int) -> Tensor:
    """q and k of all layers side by side: shape (token, P), float32. Of every view equally many tokens, at random."""
    capture = FactorCapture(run.teacher.model)
    generator = torch.Generator().manual_seed(0)
    rows: list[Tensor] = []
    for pixels_BHWC in pixels_NHWC.split(_BATCH):
        for rows_TP in side_by_side(run.factors(capture, pixels_BHWC)):
            chosen = torch.randperm(len(rows_TP), generator=generator)[: max(1, max_tokens // len(pixels_NHWC))]
            rows.append(rows_TP[chosen])
    return torch.cat(rows)


def side_by_side(layers: Sequence[LayerAttention]) -> Tensor:
    """rows_BTP, float32: for each layer the heads of q, then those of k.

    Raises:
        CodecError: a layer holds maps.
    """
    sides = [side for layer in only_factors(layers, FAMILY) for side in (layer.q_BHTD, layer.k_BHTD)]
    return torch.cat([side_BHTD.transpose(1, 2).flatten(2).float() for side_BHTD in sides], dim=-1)


def apart(rows_BTP: Tensor, check: CaptureCheck) -> list[LayerFactors]:
    """The inverse of `side_by_side`, with the teacher's scale and bias."""
    geometry, bias_LHQK = check.geometry, check.bias_LHQK
    num_heads, num_kv_heads = len(geometry.heads), geometry.num_kv_heads
    rows_BTLND = rows_BTP.unflatten(-1, (len(geometry.layers), num_heads + num_kv_heads, geometry.head_dim))
    return [
        LayerFactors(
            q_BHTD=vectors_BTND[:, :, :num_heads].transpose(1, 2),
            k_BHTD=vectors_BTND[:, :, num_heads:].transpose(1, 2),
            scale=geometry.scale,
            bias=None if bias_LHQK is None else bias_LHQK[position].unsqueeze(0),
        )
        for position, vectors_BTND in enumerate(rows_BTLND.unbind(2))
    ]


def principal_components(centred_NP: Tensor) -> Tensor:
    """basis_CP: the directions of largest variance, orthonormal rows, at most `_MAX_COMPONENTS`."""
    num_components = min(_MAX_COMPONENTS, *centred_NP.shape)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        _, _, basis_PC = torch.svd_lowrank(centred_NP, q=num_components, niter=_POWER_ITERATIONS)
    return basis_PC.mT.contiguous()


def fit_quantisers(values_NC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The uniform quantiser with the smallest squared error, for each component and number of bits.

    A quantiser of b bits has 2^b cells of one width, and a value becomes its cell's middle. Of the ranges tried, each
    leaves out a share of the smallest and of the largest values; these get the first or last cell.

    Returns:
        low_CW, step_CW and the summed squared error_CW, for W = 0 to `MOST_BITS` bits. 0 bits give 0.
    """
    parts = [_fit_quantisers(values_Nc.contiguous()) for values_Nc in values_NC.split(_QUANTISERS_AT_ONCE, dim=1)]
    low_CW, step_CW, error_CW = (torch.cat(arrays) for arrays in zip(*parts, strict=True))
    return low_CW, step_CW, error_CW


def _fit_quantisers(values_NC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    sorted_NC = values_NC.sort(dim=0).values
    last = len(values_NC) - 1
    low_CW = torch.zeros(values_NC.shape[1], MOST_BITS + 1)
    step_CW, error_CW = torch.ones_like(low_CW), torch.full_like(low_CW, torch.inf)
    error_CW[:, 0] = values_NC.square().sum(0)
    for tail in _TAILS:
        low_C, high_C = sorted_NC[round(tail * last)], sorted_NC[last - round(tail * last)]
        if not tail:
            margin_C = _MARGIN * (high_C - low_C)
            low_C, high_C = low_C - margin_C, high_C + margin_C
        for bits in range(1, MOST_BITS + 1):
            step_C = ((high_C - low_C) / 2**bits).clamp_min(1e-30)
            codes_NC = to_codes(values_NC, low_C, step_C, 2**bits - 1)
            error_C = from_codes(codes_NC, low_C, step_C).sub_(values_NC).square_().sum(0)
            is_better_C = error_C < error_CW[:, bits]
            for found_CW, new_C in ((low_CW, low_C), (step_CW, step_C), (error_CW, error_C)):
                found_CW[:, bits] = torch.where(is_better_C, new_C, found_CW[:, bits])
    return low_CW, step_CW, error_CW.double()


def to_codes(values_xC: Tensor, low_C: Tensor, step_C: Tensor, most_C: Tensor | int) -> Tensor:
    """Numbers of cells, whole but of the values' dtype; `most_C` is the last cell's."""
    codes_xC = (values_xC - low_C).div_(step_C).floor_().clamp_min_(0)
    return codes_xC.clamp_max_(torch.as_tensor(most_C, dtype=codes_xC.dtype))


def from_codes(codes_xC: Tensor, low_C: Tensor, step_C: Tensor) -> Tensor:
    """The middles of cells."""
    return (codes_xC + 0.5).mul_(step_C).add_(low_C)


def best_choices(error_CW: np.ndarray, most_bits: int) -> np.ndarray:
    """How many bits component C gets if it and the components before it have R = 0 to `most_bits` bits together.

    By dynamic programming: the smallest error of the first C components within R bits is that of the first C - 1 within
    R - w bits plus error_CW[C, w], for the best w. One table answers all budgets (see `allocate`).

    Args:
        error_CW: squared error of each component for each number of bits.
        most_bits: the largest budget, in bits.

    Returns:
        choice_CR, uint8.
    """
    num_components, num_choices = error_CW.shape
    choice_CR = np.zeros((num_components, most_bits + 1), np.uint8)
    smallest_R = np.zeros(most_bits + 1)
    candidates_WR = np.full((num_choices, most_bits + 1), np.inf)
    for choice_R, error_W in zip(choice_CR, error_CW, strict=True):
        for bits, error in enumerate(error_W[: most_bits + 1]):
            candidates_WR[bits, bits:] = smallest_R[: most_bits + 1 - bits] + error
        choice_R[:] = candidates_WR.argmin(0)
        smallest_R = candidates_WR.min(0)
    return choice_CR


def allocate(choice_CR: np.ndarray, budget_bits: int) -> np.ndarray:
    """bits_C: the allocation with the smallest total error among those of at most `budget_bits` bits."""
    bits_C = np.zeros(len(choice_CR), np.int64)
    for component in reversed(range(len(choice_CR))):
        bits_C[component] = choice_CR[component, budget_bits]
        budget_bits -= bits_C[component]
    return bits_C


def pack(codes_CT: np.ndarray, bits_C: np.ndarray) -> bytes:
    """The lowest bits of each code one after another, all tokens of a component together.

    >>> pack(np.array([[1, 0, 1], [3, 1, 2]], np.uint8), np.array([1, 2])).hex()
    'bb00'
    """
    planes_CT8 = np.unpackbits(codes_CT[..., None], axis=-1)
    return np.packbits(planes_CT8[_is_kept(bits_C, codes_CT.shape[1])]).tobytes()


def unpack(data: bytes, bits_C: np.ndarray, num_tokens: int) -> np.ndarray:
    """The inverse of `pack`: codes_CT, uint8."""
    is_kept_CT8 = _is_kept(bits_C, num_tokens)
    planes_CT8 = np.zeros(is_kept_CT8.shape, np.uint8)
    num_bits = int(bits_C.sum()) * num_tokens
    planes_CT8[is_kept_CT8] = np.unpackbits(np.frombuffer(data, np.uint8), count=num_bits)
    return np.packbits(planes_CT8, axis=-1)[..., 0]


def _is_kept(bits_C: np.ndarray, num_tokens: int) -> np.ndarray:
    """Which of a byte's bits, highest first, are stored: shape (component, token, 8)."""
    is_kept_C8 = np.arange(8) >= 8 - bits_C[:, None]
    return np.broadcast_to(is_kept_C8[:, None], (len(bits_C), num_tokens, 8))


class KvtcWay:
    """KVTC at one bit budget. All layers of a view are one chunk."""

    kind = "factors"
    family = FAMILY

    def __init__(self, fit: KvtcFit, bits_per_token: int) -> None:
        self.name = f"{FAMILY}, {bits_per_token} bits a token"
        bits_C = fit.bits(bits_per_token)
        kept = np.flatnonzero(bits_C)
        self._bits_C = bits_C[kept]
        self._check, self._mean_P, self._basis_CP = fit.check, fit.mean_P, fit.basis_CP[kept]
        self._low_C, self._step_C = (array_CW[kept, self._bits_C] for array_CW in (fit.low_CW, fit.step_CW))
        self._most_C = torch.from_numpy(2.0**self._bits_C - 1).float()
        self.fit_s = fit.fit_s
        arrays = (self._mean_P, self._basis_CP, self._low_C, self._step_C)
        self.state_nbytes = sum(array.numel() * array.element_size() for array in arrays) + len(kept)
        self.decode_macs_per_view = self._num_tokens * self._basis_CP.numel()

    @property
    def _num_tokens(self) -> int:
        return self._check.geometry.tokens.num_tokens

    def prepare(self, layers):
        return list(layers)

    def encode(self, prepared):
        values_BTC = (side_by_side(prepared) - self._mean_P) @ self._basis_CP.mT
        codes_BTC = to_codes(values_BTC, self._low_C, self._step_C, self._most_C).to(torch.uint8)
        return [[[zlib.compress(pack(codes_TC.T, self._bits_C), _ZLIB_LEVEL)]] for codes_TC in codes_BTC.numpy()]

    def decode(self, stored):
        codes_BCT = np.stack([unpack(zlib.decompress(part), self._bits_C, self._num_tokens) for ((part,),) in stored])
        values_BTC = from_codes(torch.from_numpy(codes_BCT).mT.float(), self._low_C, self._step_C)
        return apart(values_BTC @ self._basis_CP + self._mean_P, self._check)

    def chunk_nbytes(self, parts):
        return sum(map(len, parts)) + INDEX_NBYTES + CHECKSUM_NBYTES


def kvtc_ways(run: TeacherRun, check: CaptureCheck, pixels_NHWC: Tensor) -> list[KvtcWay]:
    """Settings from about 0.1 to 0.0003 nats a row, the finest first: bits fall by a factor of 2 ** 0.5 from each to
    the next. If `_MAX_COMPONENTS` components of `MOST_BITS` bits are not as close as that, they are the first.

    Raises:
        CodecError: the teacher gives maps.
    """
    fit = fit_kvtc(run, check, pixels_NHWC)
    layers = run.factors(FactorCapture(run.teacher.model), pixels_NHWC[:_KL_VIEWS])
    found: list[tuple[float, KvtcWay]] = []
    budget_bits = float(MOST_BITS * len(fit.basis_CP))
    while budget_bits >= 1:
        way = KvtcWay(fit, int(budget_bits))
        decoded = way.decode(way.encode(way.prepare(layers)))
        kls = [float(row_kl(layer, back).mean()) for layer, back in zip(layers, decoded, strict=True)]
        kl = sum(kls) / len(kls)
        if found and kl < _LEAST_GAIN * found[-1][0]:
            found.pop()
        found.append((kl, way))
        if kl > _LARGEST_KL:
            break
        budget_bits /= 2**0.5
    return [way for kl, way in found if kl >= _SMALLEST_KL]
