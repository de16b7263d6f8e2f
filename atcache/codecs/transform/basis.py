"""What calibration factors tell of a layer: how its vectors vary, what KL an error in them makes, and so its basis."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Literal, Protocol, cast

import torch
from torch import Tensor

from atcache.attention.factors import LayerAttention, LayerFactors
from atcache.attention.geometry import FactorGeometry
from atcache.codecs.base import only_factors
from atcache.codecs.fidelity import slices_of_views
from atcache.codecs.transform.coder import centred_vectors
from atcache.errors import CodecError

Basis = Literal["all", "layer", "head"]


class TransformSettings(Protocol):
    """The settings of the codec that fitting uses; the codec's fields describe them."""

    @property
    def target_kl(self) -> float: ...
    @property
    def target_nbytes(self) -> int | None: ...
    @property
    def basis(self) -> Basis: ...
    @property
    def positions(self) -> bool: ...
    @property
    def dct(self) -> bool: ...


_MAP_NUMEL = 2**25
"""Elements of maps held at a time: 128 MiB in float32."""
_UNIFORM = 1e-3
"""Weight of the metric that uniform rows would have. A row that looks at one key alone is not changed by small errors,
but by large ones it is."""
_LEAST_VIEWS = 16
"""Means of fewer views would be those views themselves, and leave nothing to fit a basis to."""
_METRIC_FLOOR = 1e-7
"""Smallest weight of a direction, relative to the layer's largest. Directions whose errors change no row need one too,
or the basis would not exist."""
_MEAN_ERROR = 0.02
"""Error that the means' low rank may add, as a share of the components' own."""


@dataclasses.dataclass(kw_only=True, slots=True, eq=False)
class LayerMoments:
    """Sums over calibration views of one layer, float64."""

    num_views: int
    sum_TN: Tensor
    """Of the vectors, by position."""
    gram_NN: Tensor
    """Of their products, over all positions."""
    metric_VDD: Tensor
    """Of the quadratic forms of all rows."""

    def add(self, layer: LayerFactors) -> None:
        vectors_BTN = centred_vectors(layer).double()
        flat = vectors_BTN.flatten(0, 1)
        self.num_views += len(vectors_BTN)
        self.sum_TN += vectors_BTN.sum(dim=0)
        self.gram_NN += flat.mT @ flat
        self.metric_VDD += kl_metric(layer)

    def basis(self, codec: TransformSettings) -> LayerBasis:
        """The basis in which an error's square is the KL it makes, and components are uncorrelated."""
        num_tokens = len(self.sum_TN)
        num_rows = self.num_views * num_tokens
        mean_TN = (
            self.sum_TN / self.num_views
            if codec.positions and self.num_views >= _LEAST_VIEWS
            else torch.zeros_like(self.sum_TN)
        )
        covariance_NN = self.gram_NN / num_rows - mean_TN.mT @ mean_TN / num_tokens
        metric_VDD, root_VDD, inverse_root_VDD = _metric_roots(self.metric_VDD / num_rows)
        weighted_NN = _both_sides(covariance_NN, root_VDD)
        if codec.basis == "head":
            weighted_NN = weighted_NN * block_diagonal(torch.ones_like(metric_VDD))
        variance_N, vectors_NN = eigh(weighted_NN)
        return LayerBasis(
            variance_J=variance_N.flip(0).clamp(min=0),
            basis_JN=_each_vector(vectors_NN.flip(1).mT, inverse_root_VDD),
            metric_VDD=metric_VDD,
            weighted_mean_TN=_each_vector(mean_TN, root_VDD),
            inverse_root_VDD=inverse_root_VDD,
        )


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class LayerBasis:
    """One layer's components, by falling variance, float64."""

    variance_J: Tensor
    basis_JN: Tensor
    metric_VDD: Tensor
    weighted_mean_TN: Tensor
    inverse_root_VDD: Tensor

    def mean_factors(self, finest: float) -> tuple[Tensor, Tensor]:
        """The positions' means as a product (token, rank) (rank, N), of the rank that matters at this step."""
        left_TR, size_R, right_RN = _svd(self.weighted_mean_TN)
        allowed = _MEAN_ERROR * float(self.variance_J.clamp(max=finest**2 / 12).sum()) * len(self.weighted_mean_TN)
        left_out = size_R.square().flip(0).cumsum(0).flip(0)
        rank = max(1, int((left_out > allowed).sum()))  # no Zarr array is empty
        return left_TR[:, :rank] * size_R[:rank], _each_vector(right_RN[:rank], self.inverse_root_VDD)


def kl_metric(layer: LayerFactors) -> Tensor:
    """The quadratic forms whose value is the KL that small errors of q and k make: shape (head vector, D, D), float64.

    KL(softmax(x) || softmax(x + e)) is half the variance of e under softmax(x), up to third order. With e = scale dq.k
    that is dq' M dq, M = scale^2 / 2 Cov_A(k); with errors of k that are independent between tokens, the sum over keys
    of A (1 - A) (scale q.dk)^2 / 2. Summed over all rows of the batch. A thousandth of what uniform rows would give is
    added.
    """
    num_kv_heads, head_dim = layer.k_BHTD.shape[1], layer.q_BHTD.shape[3]
    total_VDD = layer.q_BHTD.new_zeros(layer.q_BHTD.shape[1] + num_kv_heads, head_dim, head_dim, dtype=torch.float64)
    for few in slices_of_views(layer, _MAP_NUMEL):
        part = layer.select(few)
        attn_BHQK = part.maps()
        q_BHTD, k_BHTD = part.q_BHTD.float(), part.repeated_k_BHTD().float()
        k_BHTD = k_BHTD - k_BHTD.mean(dim=2, keepdim=True)
        mean_k_BHQD = attn_BHQK @ k_BHTD
        of_q_HDD = _weighted_gram(k_BHTD, attn_BHQK.sum(dim=2) + _UNIFORM) - _weighted_gram(mean_k_BHQD, None)
        of_k_HDD = _weighted_gram(q_BHTD, 1 - attn_BHQK.square().sum(dim=3) + _UNIFORM)
        of_k_GDD = of_k_HDD.view(num_kv_heads, -1, head_dim, head_dim).sum(dim=1)
        total_VDD += torch.cat([of_q_HDD, of_k_GDD])
    return total_VDD * (layer.scale**2 / 2)


def _weighted_gram(vectors_BHTD: Tensor, weight_BHT: Tensor | None) -> Tensor:
    """Sum over views and tokens of weight * v v': shape (head, D, D), float64."""
    by_head_HND = vectors_BHTD.transpose(0, 1).flatten(1, 2).double()
    if weight_BHT is None:
        return by_head_HND.mT @ by_head_HND
    return (by_head_HND * weight_BHT.transpose(0, 1).flatten(1, 2).unsqueeze(2).double()).mT @ by_head_HND


def _metric_roots(metric_VDD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The metric, its square root and the inverse of that root, none of them singular."""
    weight_VD, vectors_VDD = eigh(metric_VDD)
    largest = float(weight_VD.max())
    weight_VD = weight_VD.clamp(min=_METRIC_FLOOR * largest if largest > 0 else 1.0)

    def power(exponent: float) -> Tensor:
        return (vectors_VDD * weight_VD.unsqueeze(1) ** exponent) @ vectors_VDD.mT

    return power(1.0), power(0.5), power(-0.5)


def block_diagonal(blocks_NXX: Tensor) -> Tensor:
    return cast("Tensor", torch.block_diag(*blocks_NXX))


def eigh(symmetric: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, rising, and eigenvectors in columns."""
    values, vectors = cast("tuple[Tensor, Tensor]", torch.linalg.eigh(symmetric))
    return values, vectors


def _svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U, singular values, V transposed; thin."""
    left, sizes, right = cast("tuple[Tensor, Tensor, Tensor]", torch.linalg.svd(matrix, full_matrices=False))
    return left, sizes, right


def _each_vector(rows_XN: Tensor, matrix_VDD: Tensor) -> Tensor:
    """Multiply each head vector of each row by its matrix, which is symmetric."""
    rows_XVD = rows_XN.view(len(rows_XN), *matrix_VDD.shape[:2])
    return torch.einsum("xvd,vde->xve", rows_XVD, matrix_VDD).flatten(1)


def _both_sides(matrix_NN: Tensor, root_VDD: Tensor) -> Tensor:
    return _each_vector(_each_vector(matrix_NN, root_VDD).mT, root_VDD)


def measure_moments(geometry: FactorGeometry, batches: Iterable[Sequence[LayerAttention]]) -> list[LayerMoments]:
    moments: list[LayerMoments] = []
    num_vectors = len(geometry.heads) + geometry.num_kv_heads
    num_values = num_vectors * geometry.head_dim
    for layers in batches:
        for position, layer in enumerate(only_factors(layers, "transform")):
            if position == len(moments):
                zeros = layer.q_BHTD.new_zeros((), dtype=torch.float64)
                moments.append(
                    LayerMoments(
                        num_views=0,
                        sum_TN=zeros.new_zeros(geometry.tokens.num_tokens, num_values),
                        gram_NN=zeros.new_zeros(num_values, num_values),
                        metric_VDD=zeros.new_zeros(num_vectors, geometry.head_dim, geometry.head_dim),
                    )
                )
            moments[position].add(layer)
    if not moments or not moments[0].num_views:
        raise CodecError("codec transform: there is no view to fit it on. Give calibration samples.")
    for block, layer in zip(geometry.layers, moments, strict=True):
        if not bool(torch.isfinite(layer.gram_NN).all()):
            raise CodecError(f"layer {block}: a factor is not finite. Check the teacher's weights and precision.")
    return moments
