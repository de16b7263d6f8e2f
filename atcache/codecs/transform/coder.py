"""The coder of `transform`: projects factors on the fitted basis, rounds them to equal steps, and back."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from atcache.attention.factors import LayerAttention, LayerFactors
from atcache.attention.geometry import FactorGeometry
from atcache.codecs.base import Coder, State, only_factors
from atcache.codecs.transform.grid_dct import GridDCT
from atcache.errors import CodecError

_ROUNDING = 0.4
"""Added to a magnitude before it is cut to an integer. Below 0.5, since most codes are 0 or 1 and zeros cost least."""
_STATE = frozenset({"step", "basis_LJN", "mixing_LJC", "metric_LVDD", "mean_left_LTR", "mean_right_LRN"})
_LARGEST_NUMBER = 2**30 - 1  # what fits in int32 with the sign in the lowest bit


class _Projection(NamedTuple):
    """What takes each layer's vectors to components: in one product or in two, whichever needs fewer operations."""

    weights: Tensor
    """float32, (L, N, C) where it is whole, else (L, N, J), with the mixing to follow."""
    is_whole: bool


class TransformCoder(Coder):
    """All layers share one row of codes: codes_BLTC has L = 1, and C stored components.

    A code is a whole number of steps, its sign in the lowest bit (0, -1, 1, -2, ... become 0, 1, 2, 3, ...), so that
    small codes have empty upper bytes. These cost next to nothing after a byte shuffle, so codes are int32 and a token
    of any size fits: nothing is clipped. With `dct`, the tokens after the prefix are the coefficients of the patch
    grid, low frequencies first.
    """

    layers_share_codes = True
    codes_dtype = torch.int32

    def __init__(
        self, geometry: FactorGeometry, state: State, bias_LHQK: Tensor | None, device: str, *, dct: bool
    ) -> None:
        super().__init__(geometry, bias_LHQK, device)
        if missing := sorted(_STATE - state.keys()):
            raise CodecError(f"codec transform: its state lacks {missing[0]}.")
        arrays = {name: state[name].to(self.device, torch.float32) for name in _STATE}
        self.step = float(state["step"].reshape(-1)[0]) if state["step"].numel() else math.nan
        _check_state(arrays, geometry, self._num_head_vectors * geometry.head_dim, self.step)
        self._basis_LJN, self._mixing_LJC = arrays["basis_LJN"], arrays["mixing_LJC"]
        self._metric_LVDD = arrays["metric_LVDD"]
        self._mean_left_LTR, self._mean_right_LRN = arrays["mean_left_LTR"], arrays["mean_right_LRN"]
        self._dct = GridDCT(geometry.tokens, self.device) if dct else None
        self.num_components = self._mixing_LJC.shape[2]

    def encode(self, layers: Sequence[LayerAttention]) -> Tensor:
        """See `Coder.encode`."""
        components_BTC = self.project(layers)
        if self.largest(components_BTC, layers) > _LARGEST_NUMBER * self.step:
            raise _too_large(self.geometry, layers)
        return self.quantise(components_BTC, self.step)

    def project(self, layers: Sequence[LayerAttention]) -> Tensor:
        """Stored components before rounding: shape (batch, token or coefficient, component), float32.

        Raises:
            CodecError: the layers are maps.
        """
        factors = only_factors(layers, "transform")
        num_views, _, num_tokens = factors[0].shape_BHT
        q_N, k_N = self._vectors_of_q, self._vectors_of_k
        # Projecting is linear, so the means of keys and positions are subtracted after it, where they are small. The
        # caller's autocast must not round the products.
        with torch.autocast(self.device.type, enabled=False):
            components_RC = self._mean_TC.new_zeros(num_views * num_tokens, self.num_components)
            mean_BC = self._mean_TC.new_zeros(num_views, self.num_components)
            for position, layer in enumerate(factors):
                k_mean_BN = layer.k_BHTD.mean(dim=2, dtype=torch.float32).flatten(1)
                self._add_projected(
                    components_RC, position, (_by_token(layer.q_BHTD), q_N), (_by_token(layer.k_BHTD), k_N)
                )
                self._add_projected(mean_BC, position, (k_mean_BN, k_N))
        components_BTC = components_RC.view(num_views, num_tokens, self.num_components)
        components_BTC -= mean_BC.unsqueeze(1)
        components_BTC -= self._mean_TC
        return components_BTC if self._dct is None else self._dct.forward(components_BTC)

    def largest(self, components_BTC: Tensor, layers: Sequence[LayerAttention]) -> float:
        """Size of the largest component of `layers`; the one number that encoding waits for.

        Raises:
            CodecError: a component is not finite.
        """
        # The maximum is NaN if any value is, so one number from the device answers both questions.
        largest = float(components_BTC.abs().max()) if components_BTC.numel() else 0.0
        if not math.isfinite(largest):
            raise _too_large(self.geometry, layers)
        return largest

    def _add_projected(self, total_RC: Tensor, position: int, *parts: tuple[Tensor, slice]) -> None:
        """Add the stored components of one layer's vectors, given in parts (vectors_RN, their place among all N)."""
        projection = self._projection
        if projection.is_whole:
            for vectors_RN, place in parts:
                total_RC.addmm_(vectors_RN, projection.weights[position, place])
            return
        layer_RJ = sum(vectors_RN @ projection.weights[position, place] for vectors_RN, place in parts)
        assert isinstance(layer_RJ, Tensor), "there is a part"
        total_RC.addmm_(layer_RJ, self._mixing_LJC[position])

    @property
    def _vectors_of_q(self) -> slice:
        return slice(0, len(self.geometry.heads) * self.geometry.head_dim)

    @property
    def _vectors_of_k(self) -> slice:
        return slice(len(self.geometry.heads) * self.geometry.head_dim, None)

    @cached_property
    def _projection(self) -> _Projection:
        """Made once, and only by coders that encode."""
        basis_LJVD = self._basis_LJN.view(*self._basis_LJN.shape[:2], *self._metric_LVDD.shape[1:3])
        _, num_joined, num_values = self._basis_LJN.shape
        # It outlives the first call, whose autocast must not round it.
        with torch.autocast(self.device.type, enabled=False):
            weights_LNJ = torch.einsum("lvde,ljve->lvdj", self._metric_LVDD, basis_LJVD).flatten(1, 2)
            if num_values * self.num_components > num_joined * (num_values + self.num_components):
                return _Projection(weights_LNJ, is_whole=False)
            return _Projection(weights_LNJ @ self._mixing_LJC, is_whole=True)

    @cached_property
    def _mean_TC(self) -> Tensor:
        """The stored components of the positions' means, of all layers together: the same for every view."""
        mean_TC = self._mean_left_LTR.new_zeros(self._mean_left_LTR.shape[1], self.num_components)
        with torch.autocast(self.device.type, enabled=False):
            for position, (left_TR, right_RN) in enumerate(zip(self._mean_left_LTR, self._mean_right_LRN, strict=True)):
                self._add_projected(mean_TC, position, (left_TR @ right_RN, slice(None)))
        return mean_TC

    def quantise(self, components_BTC: Tensor, step: float) -> Tensor:
        """Codes of what `project` gives, with steps of this width."""
        numbers_BTC = (components_BTC.abs() / step + _ROUNDING).floor().to(self.codes_dtype)
        is_negative_BTC = (components_BTC < 0) & (numbers_BTC > 0)
        return (2 * numbers_BTC - is_negative_BTC.to(self.codes_dtype)).unsqueeze(1)

    def decode(self, position: int, codes_BTC: Tensor) -> LayerFactors:
        """See `Coder.decode`. Under autocast the products are computed in its type."""
        return self.rebuild(position, self.dequantise(codes_BTC, self.step))

    def dequantise(self, codes_BTC: Tensor, step: float) -> Tensor:
        """Stored components that codes stand for, float32."""
        # Code 1 means -1 and code 2 means 1: halve, and flip all bits if the code was odd.
        return ((codes_BTC >> 1) ^ -(codes_BTC & 1)).float() * step

    def rebuild(self, position: int, components_BTC: Tensor) -> LayerFactors:
        """One layer's factors from stored components."""
        layer_BTJ = components_BTC @ self._mixing_LJC[position].mT
        if self._dct is not None:
            layer_BTJ = self._dct.inverse(layer_BTJ)
        vectors_BTN = layer_BTJ @ self._basis_LJN[position]
        vectors_BTN += self._mean_left_LTR[position] @ self._mean_right_LRN[position]
        return self._split(position, vectors_BTN.view(*vectors_BTN.shape[:2], -1, self.geometry.head_dim))

    def layer_shares_LC(self) -> Tensor:
        """See `Coder.layer_shares_LC`: the basis is orthonormal over layers and their components."""
        return self._mixing_LJC.square().sum(dim=1)


def _check_state(arrays: State, geometry: FactorGeometry, num_values: int, step: float) -> None:
    """Refuse arrays that do not fit together: a cache may come from anybody."""
    num_layers, num_tokens, head_dim = len(geometry.layers), geometry.tokens.num_tokens, geometry.head_dim
    shapes = {name: tuple(array.shape) for name, array in arrays.items()}
    num_joined, rank = shapes["basis_LJN"][1:2], shapes["mean_right_LRN"][1:2]
    expected = {
        "basis_LJN": (num_layers, *num_joined, num_values),
        "mixing_LJC": (num_layers, *num_joined, *shapes["mixing_LJC"][2:3]),
        "metric_LVDD": (num_layers, num_values // head_dim, head_dim, head_dim),
        "mean_left_LTR": (num_layers, num_tokens, *rank),
        "mean_right_LRN": (num_layers, *rank, num_values),
    }
    for name, shape in expected.items():
        if shapes[name] != shape or len(shape) != len(name.rpartition("_")[2]):
            raise CodecError(f"codec transform: {name} of its state has shape {shapes[name]}, expected {shape}.")
    if not 0 < step < math.inf:
        raise CodecError(f"codec transform: step of its state is {step}, expected a number above 0.")


def centred_vectors(layer: LayerFactors) -> Tensor:
    """q's heads then k's, by token: shape (batch, token, N), float32. k is centred over each image's tokens.

    A constant added to all keys of a head adds the same to all logits of a row, which softmax does not see.
    """
    k_BHTD = layer.k_BHTD.float()
    k_BHTD = k_BHTD - k_BHTD.mean(dim=2, keepdim=True)
    return torch.cat([layer.q_BHTD.float(), k_BHTD], dim=1).transpose(1, 2).flatten(2)


def _by_token(vectors_BHTD: Tensor) -> Tensor:
    """Heads side by side, a row a token: shape (batch * token, head * head dim), float32."""
    return vectors_BHTD.transpose(1, 2).flatten(2).flatten(0, 1).float()


def _too_large(geometry: FactorGeometry, layers: Sequence[LayerAttention]) -> CodecError:
    factors = only_factors(layers, "transform")
    largest = [max(float(layer.q_BHTD.abs().max()), float(layer.k_BHTD.abs().max())) for layer in factors]
    worst = max(range(len(layers)), key=lambda position: (largest[position] != largest[position], largest[position]))
    return CodecError(
        f"layer {geometry.layers[worst]}: a factor of size {largest[worst]:.4g} is NaN, infinite, or too large for "
        "codec transform. Check the teacher's weights and precision."
    )
