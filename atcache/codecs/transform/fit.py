"""Fitting the `transform` codec: each layer's prediction and basis, and the step that meets the target.

In words: (1) one pass over the calibration views keeps each layer's input, and measures what an error in it costs. (2)
Layer by layer, the input is predicted from the *decoded* one below, and the rest is rounded in the basis in which an
error's square is the KL it makes and components are uncorrelated (the Karhunen-Loeve transform). (3) The step is
searched for on held-back views: roughly with few views, then a fit of all, then finely.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from atcache.attention.factors import LayerAttention, LayerFactors
from atcache.attention.geometry import FactorGeometry
from atcache.attention.projection import InputRecipe
from atcache.codecs.base import FitProgress, State, only_factors
from atcache.codecs.fidelity import mean_row_kl
from atcache.codecs.search import find_step
from atcache.codecs.transform.coder import (
    PROJECTION,
    TransformCoder,
    layer_input,
    projection_state,
)
from atcache.codecs.transform.fit_layer import FittedLayer, MeasuredLayer, eigh, fit_layer, low_rank_mean
from atcache.codecs.transform.grid_dct import GridDCT
from atcache.codecs.transform.metric import before_projection, input_metric, kl_metric
from atcache.codecs.transform.packing import choose_buckets
from atcache.errors import CodecError
from atcache.machine import memory_nbytes

MAX_INPUT_NBYTES = 8 * 2**30
"""Bytes of inputs that are kept while fitting, or half the memory if that is less: 256 views of a ViT-L with 257 tokens
take 6.5 GB. Of larger ones fewer views are used."""
_METRIC_VIEWS = 48
"""Views whose maps are formed to measure what errors cost."""
_COARSE_VIEWS, _COARSE_HELD_BACK = 32, 8
"""Views of the rough search for a step."""
_LEAST_VIEWS = 16
"""Means of fewer views would be those views themselves, and leave nothing to fit a basis to."""
_METRIC_FLOOR = 1e-7
"""Smallest weight of a direction, relative to the layer's largest. Directions whose errors change no row need one too,
or the basis would not exist."""
_MOST_UNEVEN = 1.35
"""A layer whose KL is more than this many times the mean gets finer steps."""
_MAX_ROUNDS = 6
_FARTHEST = 1.4
"""A fit is used for steps up to so many times finer or coarser than its own."""
_COARSE_ROUNDS = 8
_SEARCH_VIEWS = 16
"""Held-back views that the step is searched on."""
_FINE_TARGET = 5e-4
"""Nats, below which a KL is computed in float64."""
_MOST_STEPS, _NO_STEPS = 2.0**20, 0.5
"""Steps in the largest component: more are lost in float32, and with fewer nothing is coded."""


class TransformSettings(Protocol):
    """The settings of the codec that fitting uses; the codec's fields describe them."""

    @property
    def target_kl(self) -> float: ...
    @property
    def target_nbytes(self) -> int | None: ...
    @property
    def predict(self) -> bool: ...
    @property
    def dct(self) -> bool: ...


class TransformFit:
    """What a fit knows, and its three steps. Making it does the first; `run` the others."""

    def __init__(
        self,
        codec: TransformSettings,
        geometry: FactorGeometry,
        batches: Iterable[Sequence[LayerAttention]],
        held_back: Sequence[LayerAttention] | None,
        nbytes_per_view: Callable[[Tensor], float] | None,
        recipe: InputRecipe | None,
        progress: FitProgress | None,
    ) -> None:
        """Look at the calibration views. The arguments are those of `Codec.fit`."""
        if codec.target_nbytes is not None and nbytes_per_view is None:
            raise CodecError(
                "codec transform: target_nbytes is met by measuring bytes; give fit a way to measure them."
            )
        self._codec, self._geometry, self._nbytes_per_view = codec, geometry, nbytes_per_view
        self._progress = progress
        # Twice as fast, and exact enough unless the target is very fine.
        self._kl_dtype = torch.float64 if codec.target_kl < _FINE_TARGET else torch.float32
        self._projection_state = None if recipe is None else projection_state(recipe.projections)
        self._recipe = recipe if self._projection_state is not None else None
        if held_back is None:
            held_back = next(iter(batches), None)
            if not held_back:
                raise _no_views()
        stride = max(1, held_back[0].shape_BHT[0] // _SEARCH_VIEWS)
        self._held_back = [layer.select(slice(None, None, stride)) for layer in only_factors(held_back, "transform")]
        self._device = self._held_back[0].q_BHTD.device
        self._dct = GridDCT(geometry.tokens, self._device, is_on=codec.dct)
        with torch.autocast(self._device.type, enabled=False):
            self._layers = self._measure(batches)
        self._largest = 0.0
        """Steps in the largest component of the last fit."""
        self._means: list[tuple[Tensor, Tensor]] = []
        """The factors of each layer's positions' means, of the rank that matters at the last fit's step."""

    def _report(self, stage: str, share: float) -> None:
        if self._progress is not None:
            self._progress(stage, share)

    # -- (1) what is known before a step is chosen

    def _measure(self, batches: Iterable[Sequence[LayerAttention]]) -> list[MeasuredLayer]:
        inputs: list[list[Tensor]] = [[] for _ in self._geometry.layers]
        metrics: list[Tensor] = []
        num_views = nbytes = num_metric_views = 0
        for layers in batches:
            factors = only_factors(layers, "transform")
            self._check_finite(factors)
            for kept, layer in zip(inputs, factors, strict=True):
                x_TBC = layer_input(layer, is_projected=self._recipe is not None)
                kept.append(x_TBC.transpose(0, 1).cpu())
                nbytes += x_TBC.numel() * 4
            if num_metric_views < _METRIC_VIEWS:
                few = slice(0, _METRIC_VIEWS - num_metric_views)
                sums = [kl_metric(layer.select(few)) for layer in factors]
                metrics = sums if not metrics else [one + other for one, other in zip(metrics, sums, strict=True)]
                num_metric_views += len(factors[0].q_BHTD[few])
            num_views += len(factors[0].q_BHTD)
            if num_views and nbytes * (1 + len(factors[0].q_BHTD) / num_views) > min(
                MAX_INPUT_NBYTES, memory_nbytes() // 2
            ):
                break
        if not num_views:
            raise _no_views()
        if not any(bool(metric_VDD.any()) for metric_VDD in metrics):
            raise CodecError(
                "every map is uniform, whatever the image: q or k is 0 in all layers, so there is nothing to fit to. "
                "Check the teacher's weights, or build with --codec int8."
            )
        num_rows = num_metric_views * self._geometry.tokens.num_tokens * len(self._geometry.heads)
        measured: list[MeasuredLayer] = []
        for position, (kept, metric_VDD) in enumerate(zip(inputs, metrics, strict=True)):
            x_BTC = torch.cat(kept)
            kept.clear()  # so that only one layer is in memory twice
            measured.append(self._layer(position, x_BTC, metric_VDD / num_rows))
        return measured

    def _check_finite(self, factors: Sequence[LayerFactors]) -> None:
        for block, layer in zip(self._geometry.layers, factors, strict=True):
            if not all(bool(torch.isfinite(factor).all()) for factor in (layer.q_BHTD, layer.k_BHTD)):
                raise CodecError(f"layer {block}: a factor is not finite. Check the teacher's weights and precision.")

    def _layer(self, position: int, x_BTC: Tensor, metric_VDD: Tensor) -> MeasuredLayer:
        projection = None if self._recipe is None else self._recipe.projections[position].to(self._device)
        some_RC = x_BTC[:: max(1, len(x_BTC) // 8)].flatten(0, 1).to(self._device)
        metric_VDD = before_projection(metric_VDD, projection, some_RC)
        metric_CC = input_metric(metric_VDD, None if projection is None else projection.weight_NC)
        weight_C, vectors_CC = eigh(metric_CC)
        largest = float(weight_C.max())
        root_C = weight_C.clamp(min=_METRIC_FLOOR * largest if largest > 0 else 1.0).sqrt()
        mean_TC = x_BTC.mean(dim=0).to(self._device)
        return MeasuredLayer(
            x_BTC=x_BTC,
            mean_TC=mean_TC if len(x_BTC) >= _LEAST_VIEWS else torch.zeros_like(mean_TC),
            metric_VDD=metric_VDD,
            metric_CC=metric_CC,
            root_CC=(vectors_CC * root_C) @ vectors_CC.mT,
            inverse_root_CC=(vectors_CC / root_C) @ vectors_CC.mT,
        )

    # -- (2) the fit at a step

    def _fit_layers(self, step: float, num_views: int, stage: str) -> list[FittedLayer]:
        """The arrays of all layers for steps of this width, fitted to about `num_views` views."""
        fitted: list[FittedLayer] = []
        below_TBC: Tensor | None = None
        means: list[tuple[Tensor, Tensor]] = []
        for position, layer in enumerate(self._layers):
            self._report(stage, position / len(self._layers))
            left_TR, right_RC = low_rank_mean(layer, step)
            # Every so many views, so that few views are of all sorts.
            x_BTC = layer.x_BTC[:: max(1, len(layer.x_BTC) // num_views)].to(self._device)
            wanted_TBC = self._dct.forward(x_BTC.transpose(0, 1) - (left_TR @ right_RC).unsqueeze(1))
            one, below_TBC = fit_layer(
                layer,
                wanted_TBC,
                below_TBC if self._codec.predict else None,
                step,
                self._dct.bands,
                has_prefix=self._geometry.tokens.num_prefix_tokens > 0,
            )
            fitted.append(one)
            means.append((left_TR, right_RC))
        self._largest = max(one.largest for one in fitted)
        self._means = means
        return fitted

    # -- (3) the step that meets the target

    def run(self) -> State:
        """Search for the step, roughly and then finely, and fit all layers for it."""
        by_kl = self._codec.target_nbytes is None
        target = self._codec.target_kl if self._codec.target_nbytes is None else self._codec.target_nbytes
        step = self._coarse_step(target, by_kl=by_kl)
        num_views = len(self._layers[0].x_BTC)
        precise, value = False, math.nan
        best: tuple[float, dict[str, Tensor]] | None = None
        for _ in range(_MAX_ROUNDS):
            fitted = self._fit_layers(step, num_views, "fit")
            self._report("search", 0.0)
            if by_kl:
                self._even_out(fitted, precise=precise)
            measured = functools.partial(self._measure_scaled, fitted, by_kl=by_kl, precise=precise)
            measure = functools.cache(measured)
            finest, coarsest = self._largest / _MOST_STEPS, self._largest / _NO_STEPS
            least, most = max(1 / _FARTHEST, min(1.0, finest)), min(_FARTHEST, max(1.0, coarsest))
            scale = find_step(measure, target, start=1.0, rises=by_kl, least=least, most=most)
            value = measure(scale)
            if value <= target and (best is None or value > best[0]):
                best = (value, self._state(fitted, scale, precise=precise))
            is_at_end = scale <= finest or scale >= coarsest
            is_precise_enough = by_kl or precise or scale > finest
            if value <= target and is_precise_enough and (is_at_end or 1 / _FARTHEST < scale < _FARTHEST):
                break
            if value > target and is_at_end and (precise or not by_kl):
                break
            # What float16 loses of the weights and the basis counts where the target is fine.
            precise = precise or (value > target if by_kl else scale <= finest)
            step *= scale if 1 / _FARTHEST < scale < _FARTHEST else scale**2
        if best is None:
            raise _missed(self._codec, value)
        return best[1]

    def _coarse_step(self, target: float, *, by_kl: bool) -> float:
        """About the step that meets the target, found with few views."""
        width = self._layers[0].mean_TC.shape[1]
        # An error of step^2 / 12 in each component; most components matter.
        step = math.sqrt(12 * (self._codec.target_kl if by_kl else 0.005) / (0.8 * width))
        few = [
            layer.select(slice(0, None, max(1, len(layer.q_BHTD) // _COARSE_HELD_BACK))) for layer in self._held_back
        ]
        for _ in range(_COARSE_ROUNDS):
            fitted = self._fit_layers(step, _COARSE_VIEWS, "rough fit")
            value = self._measure_scaled(fitted, 1.0, by_kl=by_kl, held_back=few)
            ratio = target / max(value, 1e-300)
            if 0.8 < ratio < 1.25:
                return step * ratio ** (0.5 if by_kl else -1.0)
            change = min(16.0, max(1 / 16, ratio ** (0.55 if by_kl else -1.2)))
            change = max(self._largest / _MOST_STEPS, min(self._largest / _NO_STEPS, change))
            if 0.99 < change < 1.01:
                break
            step *= change
        return step

    def _even_out(self, fitted: list[FittedLayer], *, precise: bool) -> None:
        """Finer steps for layers whose maps are less well kept than most."""
        for _ in range(2):
            kl_L = self._layer_kl(self._coder(fitted, 1.0, precise=precise), self._held_back)
            limit = _MOST_UNEVEN * sum(kl_L) / len(kl_L)
            if max(kl_L) <= limit:
                return
            for one, kl in zip(fitted, kl_L, strict=True):
                one.finer *= max(1.0, (kl / limit) ** 0.6)

    def _measure_scaled(
        self,
        fitted: Sequence[FittedLayer],
        scale: float,
        *,
        by_kl: bool,
        precise: bool = False,
        held_back: Sequence[LayerFactors] | None = None,
    ) -> float:
        """The mean row KL, or the bytes of a view, if all steps are `scale` times as wide as those of the fit."""
        coder = self._coder(fitted, scale, precise=precise)
        held_back = self._held_back if held_back is None else held_back
        if by_kl:
            kl_L = self._layer_kl(coder, held_back)
            return sum(kl_L) / len(kl_L)
        assert self._nbytes_per_view is not None, "checked before anything was measured"
        return self._nbytes_per_view(coder.encode(held_back))

    def _layer_kl(self, coder: TransformCoder, held_back: Sequence[LayerFactors]) -> list[float]:
        kl_L: list[float] = []
        for position, (layer, walked) in enumerate(zip(held_back, coder.walk(held_back), strict=True)):

            def rebuilt(
                few: slice,
                position: int = position,
                layer: LayerFactors = layer,
                decoded_TBC: Tensor = walked.coefficients_TBC,
            ) -> LayerFactors:
                factors = coder.factors(position, decoded_TBC[:, few])
                return dataclasses.replace(factors, bias=layer.select(few).bias)

            kl_L.append(mean_row_kl(layer, rebuilt, self._kl_dtype))
        return kl_L

    def _coder(self, fitted: Sequence[FittedLayer], scale: float, *, precise: bool) -> TransformCoder:
        state = self._state(fitted, scale, precise=precise)
        return TransformCoder(
            self._geometry, state, None, str(self._device), predict=self._codec.predict, dct=self._codec.dct
        )

    def _state(self, fitted: Sequence[FittedLayer], scale: float, *, precise: bool) -> dict[str, Tensor]:
        """The arrays that are stored: float16 where that is exact enough."""
        scales = [scale / one.finer for one in fitted]
        buckets = [
            choose_buckets(one.mean_size_BJ.cpu() / its, one.is_stored_BJ.cpu())
            for one, its in zip(fitted, scales, strict=True)
        ]
        metrics = [layer.metric_VDD / layer.metric_VDD.abs().max().clamp(min=1e-300) for layer in self._layers]
        state = {
            "prediction_LCC": torch.stack([one.prediction_int8_CC for one in fitted]),
            "prediction_scale_LC": torch.stack([one.prediction_scale_C for one in fitted]),
            "basis_LJC": _padded([one.basis_JC * its for one, its in zip(fitted, scales, strict=True)]),
            "shrink_L3": torch.stack([one.shrink_3 for one in fitted]),
            "bucket_LBJ": _padded([bucket_BJ.mT for bucket_BJ in buckets]).mT.contiguous(),
            "metric_LVE": _lower_triangles(torch.stack(metrics)).float(),
            "mean_left_LTR": _padded([left_TR.mT for left_TR, _ in self._means]).mT.contiguous(),
            "mean_right_LRC": _padded([right_RC for _, right_RC in self._means]),
        }
        if self._recipe is not None and self._projection_state is not None:
            state |= self._projection_state
            state["input_call_L"] = torch.tensor(self._recipe.input_calls, dtype=torch.int32)
        if not precise:
            large = ("basis_LJC", "metric_LVE", f"{PROJECTION}weight_NC")
            state |= {name: _to_float16(state[name]) for name in large if name in state}
        return {name: array.cpu() for name, array in state.items()}


def _to_float16(array: Tensor) -> Tensor:
    """The array in half as many bytes, if its values are such that float16 keeps 11 bits of the largest."""
    largest = float(array.abs().max())
    return array.half() if 1e-3 < largest < 6e4 else array


def _lower_triangles(symmetric: Tensor) -> Tensor:
    """The lower triangles of symmetric matrices along the last two axes, row by row."""
    row, column = torch.tril_indices(symmetric.shape[-2], symmetric.shape[-1], device=symmetric.device)
    return symmetric[..., row, column]


def _padded(matrices: Sequence[Tensor]) -> Tensor:
    """Matrices stacked; rows of zeros fill up the shorter ones."""
    return torch.nn.utils.rnn.pad_sequence(list(matrices), batch_first=True).contiguous()


def _no_views() -> CodecError:
    return CodecError("codec transform: there is no view to fit it on. Give calibration samples.")


def _missed(codec: TransformSettings, value: float) -> CodecError:
    if codec.target_nbytes is not None:
        return CodecError(
            f"codec transform: target_nbytes={codec.target_nbytes} cannot be met: codes take {value:.4g} bytes a view "
            "then. Give another size with --target-mb-per-view or --budget, or --codec exact or int8."
        )
    return CodecError(
        f"codec transform: target_kl={codec.target_kl:g} cannot be met: the finest steps give {value:.2g} nats. Give a "
        "larger one, more --calibration-samples, or --codec exact:dtype=float32."
    )
