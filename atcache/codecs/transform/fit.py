"""Fitting the `transform` codec: what all layers have in common, and the step that meets the target.

In words: (1) one pass over the calibration views measures, for every layer, how vectors of q and k vary and how much an
error in them raises a row's KL. (2) From both follows each layer's basis (`basis`). (3) A second pass
measures how the layers' components vary together, from which the stored components follow. (4) The step is searched
for on held-back views.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from atcache.attention.factors import LayerAttention, LayerFactors
from atcache.attention.geometry import FactorGeometry
from atcache.codecs.base import State
from atcache.codecs.fidelity import mean_row_kl
from atcache.codecs.search import find_step
from atcache.codecs.transform.basis import LayerBasis, TransformSettings, block_diagonal, eigh, measure_moments
from atcache.codecs.transform.coder import TransformCoder
from atcache.errors import CodecError

_KEPT_VARIANCE = 0.1
"""A layer's component is looked at where it varies more than this share of what rounding adds: alone it would be
rounded away, but many layers together may have it in common."""
_MAX_LAYER_COMPONENTS = 6144
"""Components of all layers together: bounds the second pass's matrix (300 MB) and its decomposition (minutes)."""
_SEEN_VARIANCE = 0.02
"""A stored component varies more than this share of what rounding adds, or was seen: below, a code that is not 0 lies
fifteen standard deviations out."""
_MOST_STEPS = 2.0**26
"""Steps in the largest component: finer ones are lost in float32 anyway."""
_FINER = 4.0
"""How much finer than predicted a step may be before components are missing that it would need."""
_MAX_ROUNDS = 6
"""How often they are added. Predictions hold for small errors; heads that look at one key alone need more."""


def fit_transform(
    codec: TransformSettings,
    geometry: FactorGeometry,
    batches: Iterable[Sequence[LayerAttention]],
    held_back: Sequence[LayerAttention] | None,
    nbytes_per_view: Callable[[Tensor], float] | None,
) -> State:
    """What `TransformCodec.fit` returns; see there and `Codec.fit`."""
    if codec.target_nbytes is not None and nbytes_per_view is None:
        raise CodecError("codec transform: target_nbytes is met by measuring bytes; give fit a way to measure them.")
    moments = measure_moments(geometry, batches)
    bases = [layer.basis(codec) for layer in moments]
    if held_back is None:
        held_back = next(iter(batches))
    finest = _predicted_step(bases, codec, geometry)
    found = None
    for _ in range(_MAX_ROUNDS):
        state, variance_C = _join_layers(codec, geometry, bases, batches, finest)
        found = _find_step(codec, geometry, state, held_back, nbytes_per_view, finest)
        if found.is_final:
            return _finished(state, found, variance_C)
        # A finer step than foreseen needs components that were left out.
        finest /= _FINER**2
    assert found is not None, "there is a round"
    raise _missed(codec, found.value)


class _Found(NamedTuple):
    """A step that meets the target."""

    step: float
    value: float
    """The KL or the bytes that were measured with it."""
    num_used: int
    """Components up to the last whose code is not 0 on some held-back view."""
    is_final: bool
    """Whether more components would change nothing."""


def _missed(codec: TransformSettings, value: float) -> CodecError:
    if codec.target_nbytes is not None:
        return CodecError(
            f"codec transform: target_nbytes={codec.target_nbytes} cannot be met: codes take {value:.4g} bytes a view "
            "then. Give another size, or --codec exact or int8."
        )
    return CodecError(
        f"codec transform: target_kl={codec.target_kl:g} cannot be met: the finest steps give {value:.2g} nats. Give a "
        "larger one, more --calibration-samples, or --codec exact:dtype=float32."
    )


def _finished(state: dict[str, Tensor], found: _Found, variance_C: Tensor) -> dict[str, Tensor]:
    """The state with the step that was found, without components whose codes are all zero."""
    # Held-back views are few: components that vary enough to be seen on others stay too.
    num_varied = int((variance_C > _SEEN_VARIANCE * found.step**2 / 12).sum())
    num_kept = max(1, found.num_used, num_varied)
    kept = {**state, "mixing_LJC": state["mixing_LJC"][..., :num_kept], "step": torch.tensor([found.step])}
    return {name: array.cpu().contiguous() for name, array in kept.items()}


def _predicted_step(bases: Sequence[LayerBasis], codec: TransformSettings, geometry: FactorGeometry) -> float:
    """The step at which layers coded apart would meet the target: reverse water-filling (Cover and Thomas, 10.3)."""
    variance = torch.cat([layer.variance_J for layer in bases]).cpu()
    num_tokens, num_maps = geometry.tokens.num_tokens, len(bases) * len(geometry.heads)

    def misses(step: float) -> bool:
        noise = step**2 / 12
        if codec.target_nbytes is None:
            return float(variance.clamp(max=noise).sum()) / num_maps > codec.target_kl
        bits = 0.5 * float((variance / noise).clamp(min=1).log2().sum()) * num_tokens
        return bits / 8 < codec.target_nbytes

    low, high = 1e-6, 1e4  # KL is never above a few nats: no useful step lies outside
    for _ in range(60):
        middle = math.sqrt(low * high)
        low, high = (low, middle) if misses(middle) else (middle, high)
    return low


def _join_layers(
    codec: TransformSettings,
    geometry: FactorGeometry,
    bases: Sequence[LayerBasis],
    batches: Iterable[Sequence[LayerAttention]],
    finest: float,
) -> tuple[dict[str, Tensor], Tensor]:
    """The state, with every component that may matter at steps down to a quarter of `finest`; and their variance."""
    num_kept = [
        max(1, min(_MAX_LAYER_COMPONENTS // len(bases), int((layer.variance_J > least).sum())))
        for layer in bases
        for least in [_KEPT_VARIANCE * finest**2 / 12]
    ]
    means = [layer.mean_factors(finest) for layer in bases]
    state = {
        "step": torch.tensor([finest]),
        "basis_LJN": _padded([layer.basis_JN[:kept] for layer, kept in zip(bases, num_kept, strict=True)]),
        "metric_LVDD": torch.stack([layer.metric_VDD for layer in bases]).float(),
        "mean_left_LTR": _padded([left_TR.mT for left_TR, _ in means]).mT,
        "mean_right_LRN": _padded([right_RN for _, right_RN in means]),
    }
    num_layers, width = state["basis_LJN"].shape[:2]
    every = torch.eye(num_layers * width, device=state["basis_LJN"].device)
    apart = TransformCoder(
        geometry,
        {**state, "mixing_LJC": every.view(num_layers, width, -1)},
        None,
        str(every.device),
        dct=False,
    )
    num_rows = 0
    gram_CC: Tensor = torch.zeros_like(every, dtype=torch.float64)
    for layers in batches:
        components_NC = apart.project(layers).flatten(0, 1).double()
        gram_CC += components_NC.mT @ components_NC
        num_rows += len(components_NC)
    if codec.basis == "layer":
        gram_CC *= block_diagonal(gram_CC.new_ones(num_layers, width, width))
    elif codec.basis == "head":
        gram_CC = gram_CC.diag().diag()
    sums_C, vectors_CC = eigh(gram_CC)
    # Rows that are only padding have no variance and come last; there are sum(num_kept) others.
    state["mixing_LJC"] = vectors_CC.flip(1)[:, : sum(num_kept)].float().view(num_layers, width, -1)
    return state, sums_C.flip(0)[: sum(num_kept)] / max(1, num_rows)


def _padded(matrices: Sequence[Tensor]) -> Tensor:
    """Matrices stacked, float32; rows of zeros fill up the shorter ones."""
    return torch.nn.utils.rnn.pad_sequence([matrix.float() for matrix in matrices], batch_first=True).contiguous()


def _find_step(
    codec: TransformSettings,
    geometry: FactorGeometry,
    state: dict[str, Tensor],
    held_back: Sequence[LayerAttention],
    nbytes_per_view: Callable[[Tensor], float] | None,
    finest: float,
) -> _Found:
    """The step that meets the target on the held-back views, or the finest allowed.

    Raises:
        CodecError: no step can meet it, however many components there are.
    """
    coder = TransformCoder(geometry, state, None, str(state["basis_LJN"].device), dct=codec.dct)
    components_BTC = coder.project(held_back)
    # Layers that share components get by with coarser steps than layers apart, which `finest` was predicted for.
    largest = max(coder.largest(components_BTC, held_back), 1e-30)
    bounds = {"start": 2 * finest, "least": max(finest / _FINER, largest / _MOST_STEPS), "most": 2 * largest}

    def mean_kl(step: float) -> float:
        decoded_BTC = coder.dequantise(coder.quantise(components_BTC, step)[:, 0], step)
        total = sum(_layer_kl(coder, position, layer, decoded_BTC) for position, layer in enumerate(held_back))
        return total / len(held_back)

    def mean_nbytes(step: float) -> float:
        assert nbytes_per_view is not None, "checked before anything was measured"
        return nbytes_per_view(coder.quantise(components_BTC, step))

    by_kl = codec.target_nbytes is None
    measure = functools.cache(mean_kl if by_kl else mean_nbytes)  # the step that is found is needed once more
    target = codec.target_kl if codec.target_nbytes is None else codec.target_nbytes
    step = find_step(measure, target, rises=by_kl, **bounds)
    value = measure(step)
    # At the finest steps that were foreseen, more components may help; at the finest of float32 they do not.
    is_at_limit = step <= largest / _MOST_STEPS
    if value > target and (is_at_limit or not by_kl):
        raise _missed(codec, value)
    is_used_C = (coder.quantise(components_BTC, step)[:, 0] != 0).any(dim=(0, 1))
    num_used = int(is_used_C.nonzero().max()) + 1 if bool(is_used_C.any()) else 0
    is_final = value <= target and (is_at_limit or step > finest / _FINER or step >= bounds["most"])
    return _Found(step, value, num_used, is_final)


def _layer_kl(coder: TransformCoder, position: int, layer: LayerAttention, components_BTC: Tensor) -> float:
    assert isinstance(layer, LayerFactors), "checked when the moments were measured"

    def rebuilt(few: slice) -> LayerFactors:
        return dataclasses.replace(coder.rebuild(position, components_BTC[few]), bias=layer.select(few).bias)

    return mean_row_kl(layer, rebuilt)
