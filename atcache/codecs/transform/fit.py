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
from typing import NamedTuple, Protocol, cast

import torch
from torch import Tensor

from atcache.attention.factors import LayerAttention, LayerFactors
from atcache.attention.geometry import FactorGeometry
from atcache.codecs.base import FitProgress, InputRecipe, State, only_factors
from atcache.codecs.fidelity import mean_row_kl
from atcache.codecs.search import find_step
from atcache.codecs.transform.coder import (
    PROJECTION,
    TransformCoder,
    layer_input,
    projection_state,
    quantise,
    reconstruct,
)
from atcache.codecs.transform.grid_dct import GridDCT
from atcache.codecs.transform.metric import before_projection, input_metric, kl_metric
from atcache.codecs.transform.packing import choose_buckets
from atcache.errors import CodecError

MAX_INPUT_NBYTES = 8 * 2**30
"""Bytes of inputs that are kept in memory while fitting: 256 views of a ViT-L with 257 tokens take 6.5 GB. Of larger
ones fewer views are used."""
_METRIC_VIEWS = 48
"""Views whose maps are formed to measure what errors cost."""
_SHRINK_VIEWS = 16
"""Views that say how much smaller decoded values are than their integers."""
_COARSE_VIEWS, _COARSE_HELD_BACK = 32, 8
"""Views of the rough search for a step."""
_LEAST_VIEWS = 16
"""Means of fewer views would be those views themselves, and leave nothing to fit a basis to."""
_METRIC_FLOOR = 1e-7
"""Smallest weight of a direction, relative to the layer's largest. Directions whose errors change no row need one too,
or the basis would not exist."""
_MEAN_ERROR = 0.1
"""Error that the means' low rank may add, as a share of the rounding's. It is not lost but coded."""
_RIDGE = 1e-3
_ROWS_PER_COLUMN = 4
"""A layer is predicted if there are so many coefficients for each of the prediction's unknowns in a column. With fewer
it would learn these views by heart."""
_PREFIX_WEIGHT = 0.3
"""Weight of prefix tokens in the prediction and the basis, beside patches: they are few, and unlike them."""
_KEPT_VARIANCE = 0.06
"""A component of a band is stored if its variance is more than this share of a squared step."""
_WORTH_VARIANCE = 0.04
"""A component is in the basis if its variance over all coefficients is more than this share of a squared step."""
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


class _Layer(NamedTuple):
    """What is known of a layer before any step is: its calibration views, and the metric of its errors."""

    x_BTC: Tensor
    mean_TC: Tensor
    metric_VDD: Tensor
    """Of errors in the linear product, for the state."""
    metric_CC: Tensor
    """Of errors in the input, float64."""
    root_CC: Tensor
    inverse_root_CC: Tensor


@dataclasses.dataclass(kw_only=True, slots=True, eq=False)
class _FittedLayer:
    """A layer's arrays of the state, and what chooses its buckets."""

    prediction_CC: Tensor
    basis_JC: Tensor
    shrink_3: Tensor
    mean_left_TR: Tensor
    mean_right_RC: Tensor
    mean_size_BJ: Tensor
    is_stored_BJ: Tensor
    finer: float = 1.0
    """How much finer its steps are than the fit's."""


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


def fit_transform(
    codec: TransformSettings,
    geometry: FactorGeometry,
    batches: Iterable[Sequence[LayerAttention]],
    held_back: Sequence[LayerAttention] | None,
    nbytes_per_view: Callable[[Tensor], float] | None,
    recipe: InputRecipe | None,
    progress: FitProgress | None,
) -> State:
    """What `TransformCodec.fit` returns; see there and `Codec.fit`."""
    if codec.target_nbytes is not None and nbytes_per_view is None:
        raise CodecError("codec transform: target_nbytes is met by measuring bytes; give fit a way to measure them.")
    return _Fit(codec, geometry, batches, held_back, nbytes_per_view, recipe, progress).run()


class _Fit:
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

    def _report(self, stage: str, share: float) -> None:
        if self._progress is not None:
            self._progress(stage, share)

    # -- (1) what is known before a step is chosen

    def _measure(self, batches: Iterable[Sequence[LayerAttention]]) -> list[_Layer]:
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
            if num_views and nbytes * (1 + len(factors[0].q_BHTD) / num_views) > MAX_INPUT_NBYTES:
                break
        if not num_views:
            raise _no_views()
        num_rows = num_metric_views * self._geometry.tokens.num_tokens * len(self._geometry.heads)
        return [
            self._layer(position, torch.cat(kept), metric_VDD / num_rows)
            for position, (kept, metric_VDD) in enumerate(zip(inputs, metrics, strict=True))
        ]

    def _check_finite(self, factors: Sequence[LayerFactors]) -> None:
        for block, layer in zip(self._geometry.layers, factors, strict=True):
            if not all(bool(torch.isfinite(factor).all()) for factor in (layer.q_BHTD, layer.k_BHTD)):
                raise CodecError(f"layer {block}: a factor is not finite. Check the teacher's weights and precision.")

    def _layer(self, position: int, x_BTC: Tensor, metric_VDD: Tensor) -> _Layer:
        projection = None if self._recipe is None else self._recipe.projections[position].to(self._device)
        some_RC = x_BTC[:: max(1, len(x_BTC) // 8)].flatten(0, 1).to(self._device)
        metric_VDD = before_projection(metric_VDD, projection, some_RC)
        metric_CC = input_metric(metric_VDD, None if projection is None else projection.weight_NC)
        weight_C, vectors_CC = _eigh(metric_CC)
        largest = float(weight_C.max())
        root_C = weight_C.clamp(min=_METRIC_FLOOR * largest if largest > 0 else 1.0).sqrt()
        mean_TC = x_BTC.mean(dim=0).to(self._device)
        return _Layer(
            x_BTC=x_BTC,
            mean_TC=mean_TC if len(x_BTC) >= _LEAST_VIEWS else torch.zeros_like(mean_TC),
            metric_VDD=metric_VDD,
            metric_CC=metric_CC,
            root_CC=(vectors_CC * root_C) @ vectors_CC.mT,
            inverse_root_CC=(vectors_CC / root_C) @ vectors_CC.mT,
        )

    # -- (2) the fit at a step

    def _fit_layers(self, step: float, num_views: int, stage: str) -> list[_FittedLayer]:
        """The arrays of all layers for steps of this width, fitted to the first `num_views` views."""
        fitted: list[_FittedLayer] = []
        below_TBC: Tensor | None = None
        self._largest = 1e-30
        for position, layer in enumerate(self._layers):
            self._report(stage, position / len(self._layers))
            left_TR, right_RC = self._low_rank(layer, step)
            # Every so many views, so that few views are of all sorts.
            x_BTC = layer.x_BTC[:: max(1, len(layer.x_BTC) // num_views)].to(self._device)
            wanted_TBC = self._dct.forward(x_BTC.transpose(0, 1) - (left_TR @ right_RC).unsqueeze(1))
            one, below_TBC = self._fit_layer(layer, wanted_TBC, below_TBC if self._codec.predict else None, step)
            fitted.append(dataclasses.replace(one, mean_left_TR=left_TR, mean_right_RC=right_RC))
        return fitted

    def _fit_layer(
        self, layer: _Layer, wanted_TBC: Tensor, below_TBC: Tensor | None, step: float
    ) -> tuple[_FittedLayer, Tensor]:
        noise = step**2 / 12
        width = wanted_TBC.shape[2]
        grams = [_Gram.of(wanted_TBC[band], None if below_TBC is None else below_TBC[band]) for band in self._dct.bands]
        first_weight = _PREFIX_WEIGHT if self._geometry.tokens.num_prefix_tokens else 1.0
        kind_weights = [first_weight, *(1.0 for _ in grams[1:])]
        prediction_CC = wanted_TBC.new_zeros(width, width, dtype=torch.float64)
        num_rows = sum(gram.num_rows for gram in grams)
        if below_TBC is not None and num_rows >= _ROWS_PER_COLUMN * width:
            weights = kind_weights
            for _ in range(2):
                prediction_CC = _regress(grams, weights)
                # Bits are the logarithm of what is left, so bands count in proportion to it: low frequencies, which
                # few coefficients have, would otherwise decide alone.
                rests = [gram.rest(prediction_CC) for gram in grams]
                weights = [
                    kind / (float((rest * layer.metric_CC).sum()) / width + noise)
                    for kind, rest in zip(kind_weights, rests, strict=True)
                ]
        # As it is stored, or what rounding it adds to the rest would not be coded.
        prediction_CC = _from_int8(*_to_int8(prediction_CC)).double()
        root_CC = layer.root_CC
        covariances = [root_CC @ gram.rest(prediction_CC) @ root_CC for gram in grams]
        pooled_CC = sum(
            kind * gram.num_rows * covariance / (float(covariance.diagonal().mean()) + noise)
            for kind, gram, covariance in zip(kind_weights, grams, covariances, strict=True)
        )
        _, vectors_CC = _eigh(cast("Tensor", pooled_CC))
        vectors_CJ = vectors_CC.flip(1)
        variance_BJ = torch.stack([(vectors_CJ * (each @ vectors_CJ)).sum(dim=0) for each in covariances]) / step**2
        is_stored_BJ = variance_BJ > _KEPT_VARIANCE
        is_stored_BJ[0, 0] = True  # no layer is without a component
        # A component that few coefficients use is not worth its place in the basis.
        num_rows_B1 = torch.tensor([[float(gram.num_rows)] for gram in grams], device=variance_BJ.device)
        mean_variance_J = (variance_BJ * num_rows_B1).sum(dim=0) / num_rows_B1.sum()
        is_worth_it_J = (mean_variance_J > _WORTH_VARIANCE) & is_stored_BJ.any(dim=0)
        is_worth_it_J[0] = True
        chosen = is_worth_it_J.nonzero()[:, 0]
        # Sorted by use, so that each band uses a first part of them.
        chosen = chosen[is_stored_BJ[:, chosen].sum(dim=0).argsort(descending=True, stable=True)]
        is_stored_BJ, vectors_CJ = is_stored_BJ[:, chosen], vectors_CJ[:, chosen]
        basis_JC = (vectors_CJ.mT @ layer.inverse_root_CC * step).float()
        analysis_CJ = (layer.root_CC @ vectors_CJ / step).float()
        predicted_TBC = None if below_TBC is None else below_TBC @ prediction_CC.float()
        rest_TBC = wanted_TBC if predicted_TBC is None else wanted_TBC - predicted_TBC
        components_TBJ = rest_TBC @ analysis_CJ
        self._largest = max(self._largest, float(components_TBJ.abs().max()))
        mean_size_BJ = torch.stack([components_TBJ[band].abs().mean(dim=(0, 1)) for band in self._dct.bands])
        for band, is_stored_J in zip(self._dct.bands, is_stored_BJ, strict=True):
            components_TBJ[band] *= is_stored_J
        codes_TBJ = quantise(components_TBJ)
        some = slice(None, None, max(1, components_TBJ.shape[1] // _SHRINK_VIEWS))
        shrink_3 = _shrink(components_TBJ[:, some], codes_TBJ[:, some])
        decoded_TBC = reconstruct(codes_TBJ, shrink_3) @ basis_JC
        fitted = _FittedLayer(
            prediction_CC=prediction_CC.float(),
            basis_JC=basis_JC,
            shrink_3=shrink_3,
            mean_left_TR=basis_JC,
            mean_right_RC=basis_JC,
            mean_size_BJ=mean_size_BJ,
            is_stored_BJ=is_stored_BJ,
        )
        return fitted, decoded_TBC if predicted_TBC is None else decoded_TBC + predicted_TBC

    def _low_rank(self, layer: _Layer, step: float) -> tuple[Tensor, Tensor]:
        """The positions' means as a product (token, rank) (rank, C), of the rank that matters at this step."""
        weighted_TC = layer.mean_TC.double() @ layer.root_CC
        left_TR, size_R, right_RC = cast(
            "tuple[Tensor, Tensor, Tensor]", torch.linalg.svd(weighted_TC, full_matrices=False)
        )
        allowed = _MEAN_ERROR * step**2 / 12 * weighted_TC.numel()
        left_out = size_R.square().flip(0).cumsum(0).flip(0)
        rank = max(1, int((left_out > allowed).sum()))  # no Zarr array is empty
        return (left_TR[:, :rank] * size_R[:rank]).float(), (right_RC[:rank] @ layer.inverse_root_CC).float()

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

    def _even_out(self, fitted: list[_FittedLayer], *, precise: bool) -> None:
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
        fitted: Sequence[_FittedLayer],
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

    def _coder(self, fitted: Sequence[_FittedLayer], scale: float, *, precise: bool) -> TransformCoder:
        state = self._state(fitted, scale, precise=precise)
        return TransformCoder(
            self._geometry, state, None, str(self._device), predict=self._codec.predict, dct=self._codec.dct
        )

    def _state(self, fitted: Sequence[_FittedLayer], scale: float, *, precise: bool) -> dict[str, Tensor]:
        """The arrays that are stored: float16 where that is exact enough."""
        scales = [scale / one.finer for one in fitted]
        buckets = [
            choose_buckets(one.mean_size_BJ.cpu() / its, one.is_stored_BJ.cpu())
            for one, its in zip(fitted, scales, strict=True)
        ]
        metrics = [layer.metric_VDD / layer.metric_VDD.abs().max().clamp(min=1e-300) for layer in self._layers]
        state = {
            **dict(zip(("prediction_LCC", "prediction_scale_LC"), _stacked_int8(fitted), strict=True)),
            "basis_LJC": _padded([one.basis_JC * its for one, its in zip(fitted, scales, strict=True)]),
            "shrink_L3": torch.stack([one.shrink_3 for one in fitted]),
            "bucket_LBJ": _padded([bucket_BJ.mT for bucket_BJ in buckets]).mT.contiguous(),
            "metric_LVE": _lower_triangles(torch.stack(metrics)).float(),
            "mean_left_LTR": _padded([one.mean_left_TR.mT for one in fitted]).mT.contiguous(),
            "mean_right_LRC": _padded([one.mean_right_RC for one in fitted]),
        }
        if self._recipe is not None and self._projection_state is not None:
            state |= self._projection_state
            state["input_call_L"] = torch.tensor(self._recipe.input_calls, dtype=torch.int32)
        if not precise:
            large = ("basis_LJC", "metric_LVE", f"{PROJECTION}weight_NC")
            state |= {name: _to_float16(state[name]) for name in large if name in state}
        return {name: array.cpu() for name, array in state.items()}


class _Gram(NamedTuple):
    """Products of the coefficients of a band, float64: what regression needs to know of them."""

    num_rows: int
    wanted_CC: Tensor
    below_CC: Tensor | None
    cross_CC: Tensor | None
    """Below times wanted."""

    @classmethod
    def of(cls, wanted_TBC: Tensor, below_TBC: Tensor | None) -> _Gram:
        wanted_RC = wanted_TBC.flatten(0, 1)
        wanted_CC = (wanted_RC.mT @ wanted_RC).double()
        if below_TBC is None:
            return cls(len(wanted_RC), wanted_CC, None, None)
        below_RC = below_TBC.flatten(0, 1)
        return cls(len(wanted_RC), wanted_CC, (below_RC.mT @ below_RC).double(), (below_RC.mT @ wanted_RC).double())

    def rest(self, prediction_CC: Tensor) -> Tensor:
        """The covariance of what the prediction leaves, about 0."""
        if self.below_CC is None or self.cross_CC is None:
            return self.wanted_CC / self.num_rows
        half_CC = prediction_CC.mT @ self.cross_CC
        explained_CC = prediction_CC.mT @ self.below_CC @ prediction_CC
        return (self.wanted_CC - half_CC - half_CC.mT + explained_CC) / self.num_rows


def _regress(grams: Sequence[_Gram], weights: Sequence[float]) -> Tensor:
    """The matrix that predicts the wanted coefficients best from those below, by weighted least squares."""
    below_CC = _weighted_sum(weights, [gram.below_CC for gram in grams])
    cross_CC = _weighted_sum(weights, [gram.cross_CC for gram in grams])
    size = below_CC.diagonal().mean().clamp(min=1e-250)
    ridge_CC = _RIDGE * size * torch.eye(len(below_CC), dtype=torch.float64, device=below_CC.device)
    return cast("Tensor", torch.linalg.solve(below_CC + ridge_CC, cross_CC))


def _weighted_sum(weights: Sequence[float], matrices: Sequence[Tensor | None]) -> Tensor:
    total = sum(weight * matrix for weight, matrix in zip(weights, matrices, strict=True) if matrix is not None)
    return cast("Tensor", total)


def _shrink(components: Tensor, codes: Tensor) -> Tensor:
    """How much larger components of integers of magnitude 1, 2, and 3 or more are on average: shape (3,)."""
    size = codes.abs()
    excess = components.abs() - size
    return torch.stack([(excess * chosen).sum() / (chosen.sum() + 20) for chosen in (size == 1, size == 2, size >= 3)])


def _to_int8(matrix_CC: Tensor) -> tuple[Tensor, Tensor]:
    """A matrix as bytes, and the scale of each column. A prediction need not be exact: the rest is coded after it."""
    scale_C = (matrix_CC.abs().amax(dim=0) / 127).clamp(min=1e-30).float()
    return (matrix_CC / scale_C).round().to(torch.int8), scale_C


def _from_int8(bytes_CC: Tensor, scale_C: Tensor) -> Tensor:
    return bytes_CC * scale_C


def _stacked_int8(fitted: Sequence[_FittedLayer]) -> tuple[Tensor, Tensor]:
    """The predictions of all layers, and their scales."""
    matrices, scales = zip(*(_to_int8(one.prediction_CC) for one in fitted), strict=True)
    return torch.stack(matrices), torch.stack(scales)


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


def _eigh(symmetric: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, rising, and eigenvectors in columns."""
    values, vectors = cast("tuple[Tensor, Tensor]", torch.linalg.eigh((symmetric + symmetric.mT) / 2))
    return values, vectors


def _no_views() -> CodecError:
    return CodecError("codec transform: there is no view to fit it on. Give calibration samples.")


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
