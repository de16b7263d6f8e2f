"""The arrays of one layer of the `transform` codec: its prediction, its basis, and which blocks are stored."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor

from atcache.codecs.transform.coder import quantise
from atcache.codecs.transform.decoding import reconstruct

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
_SHRINK_VIEWS = 16
"""Views that say how much smaller decoded values are than their integers."""


class MeasuredLayer(NamedTuple):
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
class FittedLayer:
    """A layer's arrays of the state, and what chooses its buckets."""

    prediction_int8_CC: Tensor
    prediction_scale_C: Tensor
    """Of each column of the prediction."""
    basis_JC: Tensor
    shrink_3: Tensor
    mean_size_BJ: Tensor
    """Mean size of the components of each band, in steps."""
    is_stored_BJ: Tensor
    largest: float
    """Size of the largest component, in steps."""
    finer: float = 1.0
    """How much finer its steps are than the fit's."""


def fit_layer(
    layer: MeasuredLayer,
    wanted_TBC: Tensor,
    below_TBC: Tensor | None,
    step: float,
    bands: Sequence[slice],
    *,
    has_prefix: bool,
) -> tuple[FittedLayer, Tensor]:
    """The arrays of one layer for steps of this width, and the coefficients that the views then decode to.

    Args:
        layer: its metric.
        wanted_TBC: coefficients of the calibration views, without each position's mean.
        below_TBC: what the layer below decodes to; None to predict nothing.
        step: the width of a step.
        bands: the coefficients of each band.
        has_prefix: whether the first band is prefix tokens.
    """
    noise = step**2 / 12
    width = wanted_TBC.shape[2]
    grams = [_Gram.of(wanted_TBC[band], None if below_TBC is None else below_TBC[band]) for band in bands]
    first_weight = _PREFIX_WEIGHT if has_prefix else 1.0
    kind_weights = [first_weight, *(1.0 for _ in grams[1:])]
    prediction_CC = wanted_TBC.new_zeros(width, width, dtype=torch.float64)
    num_rows = sum(gram.num_rows for gram in grams)
    if below_TBC is not None and num_rows >= _ROWS_PER_COLUMN * width:
        unweighted_CC = _regress(grams, kind_weights)
        rests = [gram.rest(unweighted_CC) for gram in grams]
        # Bits are the logarithm of what is left, so bands count in inverse proportion to it: low frequencies, which few
        # coefficients have, would otherwise decide alone.
        weights = [
            kind / (float((rest * layer.metric_CC).sum()) / width + noise)
            for kind, rest in zip(kind_weights, rests, strict=True)
        ]
        prediction_CC = _regress(grams, weights)
    # As it is stored, or what rounding it adds to the rest would not be coded.
    prediction_int8_CC, prediction_scale_C = _to_int8(prediction_CC)
    prediction_CC = (prediction_int8_CC * prediction_scale_C).double()
    root_CC = layer.root_CC
    covariances = [root_CC @ gram.rest(prediction_CC) @ root_CC for gram in grams]
    pooled_CC = sum(
        kind * gram.num_rows * covariance / (float(covariance.diagonal().mean()) + noise)
        for kind, gram, covariance in zip(kind_weights, grams, covariances, strict=True)
    )
    _, vectors_CC = eigh(cast("Tensor", pooled_CC))
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
    largest = float(components_TBJ.abs().max())
    mean_size_BJ = torch.stack([components_TBJ[band].abs().mean(dim=(0, 1)) for band in bands])
    for band, is_stored_J in zip(bands, is_stored_BJ, strict=True):
        components_TBJ[band] *= is_stored_J
    codes_TBJ = quantise(components_TBJ)
    some = slice(None, None, max(1, components_TBJ.shape[1] // _SHRINK_VIEWS))
    shrink_3 = _shrink(components_TBJ[:, some], codes_TBJ[:, some])
    decoded_TBC = reconstruct(codes_TBJ, shrink_3) @ basis_JC
    fitted = FittedLayer(
        prediction_int8_CC=prediction_int8_CC,
        prediction_scale_C=prediction_scale_C,
        basis_JC=basis_JC,
        shrink_3=shrink_3,
        mean_size_BJ=mean_size_BJ,
        is_stored_BJ=is_stored_BJ,
        largest=largest,
    )
    return fitted, decoded_TBC if predicted_TBC is None else decoded_TBC + predicted_TBC


def low_rank_mean(layer: MeasuredLayer, step: float) -> tuple[Tensor, Tensor]:
    """The positions' means as a product (token, rank) (rank, C), of the rank that matters at this step."""
    weighted_TC = layer.mean_TC.double() @ layer.root_CC
    left_TR, size_R, right_RC = cast(
        "tuple[Tensor, Tensor, Tensor]", torch.linalg.svd(weighted_TC, full_matrices=False)
    )
    allowed = _MEAN_ERROR * step**2 / 12 * weighted_TC.numel()
    left_out = size_R.square().flip(0).cumsum(0).flip(0)
    rank = max(1, int((left_out > allowed).sum()))  # no Zarr array is empty
    return (left_TR[:, :rank] * size_R[:rank]).float(), (right_RC[:rank] @ layer.inverse_root_CC).float()


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


def eigh(symmetric: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, rising, and eigenvectors in columns."""
    values, vectors = cast("tuple[Tensor, Tensor]", torch.linalg.eigh((symmetric + symmetric.mT) / 2))
    return values, vectors
