"""The coder of `transform`: each layer is predicted from the decoded one below, and the rest is rounded."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import NamedTuple, cast

import torch
from torch import Tensor

from atcache.attention.factors import LayerAttention, LayerFactors
from atcache.attention.geometry import FactorGeometry
from atcache.attention.projection import HeadProjection
from atcache.codecs.base import Coder, DecodedLayers, Queued, State, only_factors
from atcache.codecs.transform.decoding import (
    DecodedArrays,
    DecodedChain,
    Decoder,
    component_table,
    plan_groups,
    reconstruct,
)
from atcache.codecs.transform.grid_dct import GridDCT
from atcache.codecs.transform.metric import input_metric
from atcache.codecs.transform.packing import NUM_ROWS, Packing, entropy_bits
from atcache.codecs.transform.unpacking import num_open_slots
from atcache.errors import CodecError

_ROUNDING = 0.38
"""Added to a magnitude before it is cut to an integer. Below 0.5, since most codes are 0 or 1 and zeros cost least."""
_LARGEST_CODE = 2**22
"""Larger ones are cut. The largest components of real teachers have some thousand steps."""
_MOST_CELLS = 2**29
"""More than any view has: a ViT-7B of 1024 patches has a third of that."""
PROJECTION = "projection_"
"""The names of a state's arrays that say how q and k follow from a layer's input begin with this."""


class LayerArrays(NamedTuple):
    """What the state holds of one layer, float32 on the coder's device."""

    prediction_CC: Tensor
    """Multiplies the decoded coefficients of the layer below; zeros in the first layer."""
    basis_JC: Tensor
    """What one step of each component adds to the coefficients."""
    shrink_3: Tensor
    """Added to the magnitude of decoded integers of magnitude 1, 2, and 3 or more. Mostly below 0: within a step,
    small values are the more frequent ones."""
    metric_VDD: Tensor
    """The metric of errors in the linear product, for encoding."""
    mean_TC: Tensor
    """Each position's mean."""


class Walked(NamedTuple):
    """One layer of a batch, encoded."""

    codes_BTJ: Tensor
    """int32."""
    coefficients_TBC: Tensor
    """What they decode to."""
    largest: Tensor
    """Size of the largest component; NaN or infinite if any is."""


def layer_input(layer: LayerFactors, *, is_projected: bool) -> Tensor:
    """What is coded of a layer: shape (token, batch, C), float32.

    That is its captured input, or q's heads then k's if no projection makes q and k of it.

    Raises:
        CodecError: the input was not captured.
    """
    if is_projected:
        if layer.input_BTC is None:
            raise CodecError(
                "codec transform: it was fitted to the layers' inputs, but these factors come without. Capture them "
                "with the `input_calls` of the coder."
            )
        return layer.input_BTC.float().transpose(0, 1)
    vectors_BVTD = torch.cat([layer.q_BHTD.float(), layer.k_BHTD.float()], dim=1)
    return vectors_BVTD.permute(2, 0, 1, 3).flatten(2)


def quantise(components: Tensor) -> Tensor:
    """The whole steps, int32, of components in units of a step, any shape."""
    # In place, since these tensors are large.
    return components.abs().add_(_ROUNDING).floor_().clamp_(max=_LARGEST_CODE).copysign_(components).to(torch.int32)


class TransformCoder(Coder):
    """A view is two rows of bytes: its integers, packed, and the few that do not fit in their share of a byte.

    Layers are decoded in order, since each is predicted from the one below: the last costs as much as all.
    """

    codes_dtype = torch.uint8

    def __init__(
        self, geometry: FactorGeometry, state: State, bias_LHQK: Tensor | None, device: str, *, predict: bool, dct: bool
    ) -> None:
        super().__init__(geometry, bias_LHQK, device)
        self._predict = predict
        self.projections = _read_projections(state, geometry)
        width = (
            self._num_head_vectors * geometry.head_dim
            if self.projections is None
            else self.projections[0].weight_NC.shape[1]
        )
        _check_state(state, geometry, width, self._num_head_vectors)
        self.dct = GridDCT(geometry.tokens, self.device, is_on=dct)
        _check_cells(state["bucket_LBJ"], self.dct.bands)
        if self.projections is not None:
            self.projections = tuple(projection.to(self.device) for projection in self.projections)
        self.layers = [self._layer_arrays(state, position) for position in range(len(geometry.layers))]
        self.packing = Packing(state["bucket_LBJ"], self.dct.bands, self.device)
        self.num_components = self.packing.row_nbytes
        self.products_may_round = state["basis_LJC"].dtype == torch.float16  # which has 10 bits too
        is_stored_LBJ = state["bucket_LBJ"].to(self.device) > 0
        width_B = torch.tensor([band.stop - band.start for band in self.dct.bands], device=self.device)
        self.is_stored_LTJ = is_stored_LBJ.repeat_interleave(width_B, dim=1)
        self._groups = [
            plan_groups(self.dct.bands, stored_BJ, geometry.tokens.num_tokens) for stored_BJ in is_stored_LBJ.cpu()
        ]
        self.input_calls = (
            None if self.projections is None else tuple(int(call) for call in state["input_call_L"].numpy())
        )
        """Which linear call of each layer takes what is coded: what `FactorCapture` needs to capture it. None if q and
        k are coded themselves."""

    def _layer_arrays(self, state: State, position: int) -> LayerArrays:
        of_layer = {name: state[name][position].to(self.device, torch.float32) for name in _SHAPES}
        return LayerArrays(
            prediction_CC=of_layer["prediction_LCC"] * of_layer["prediction_scale_LC"],
            basis_JC=of_layer["basis_LJC"][: self._num_layer_components(state, position)],
            shrink_3=of_layer["shrink_L3"],
            metric_VDD=_of_triangles(of_layer["metric_LVE"], self.geometry.head_dim),
            mean_TC=of_layer["mean_left_LTR"] @ of_layer["mean_right_LRC"],
        )

    @staticmethod
    def _num_layer_components(state: State, position: int) -> int:
        is_stored_J = (state["bucket_LBJ"][position] > 0).any(dim=0)
        return int(is_stored_J.nonzero().max()) + 1 if bool(is_stored_J.any()) else 0

    def queue(self, layers: Sequence[LayerAttention]) -> Queued:
        """See `Coder.queue`."""
        factors = only_factors(layers, "transform")
        walked = list(self.walk(factors))
        largest = torch.stack([layer.largest for layer in walked]).max()
        packed = self.packing.queue([layer.codes_BTJ for layer in walked])
        return Queued(
            parts=packed.parts,
            is_fine_N=torch.isfinite(largest).view(1),
            problems=[lambda: _not_finite(self.geometry, factors)],
            whole=packed.whole,
        )

    def finish(self, parts: Sequence[Tensor]) -> Tensor:
        """See `Coder.finish`."""
        return self.packing.finish(parts).unsqueeze(2)

    def walk(self, layers: Sequence[LayerAttention]) -> Iterator[Walked]:
        """Encode layer by layer, each beside what the layer below decodes to.

        Raises:
            CodecError: the layers are maps.
        """
        below_TBC: Tensor | None = None
        # The caller's autocast must not round the products.
        with torch.autocast(self.device.type, enabled=False):
            for position, layer in enumerate(only_factors(layers, "transform")):
                arrays = self.layers[position]
                x_TBC = layer_input(layer, is_projected=self.projections is not None)
                wanted_TBC = self.dct.forward(x_TBC - arrays.mean_TC.unsqueeze(1))
                predicted_TBC = self.predict(position, below_TBC)
                rest_TBC = wanted_TBC if predicted_TBC is None else wanted_TBC - predicted_TBC
                components_TBJ = rest_TBC @ self._analysis[position]
                is_stored_T1J = self.is_stored_LTJ[position, :, None, : components_TBJ.shape[2]]
                codes_TBJ = quantise(components_TBJ * is_stored_T1J)
                below_TBC = self.add(position, predicted_TBC, codes_TBJ)
                yield Walked(codes_TBJ.transpose(0, 1), below_TBC, components_TBJ.abs().max())

    def predict(self, position: int, below_TBC: Tensor | None) -> Tensor | None:
        """What is expected of a layer's coefficients; None for zeros."""
        if below_TBC is None or not self._predict:
            return None
        return (below_TBC @ self.layers[position].prediction_CC).float()

    def add(self, position: int, predicted_TBC: Tensor | None, codes_TBJ: Tensor) -> Tensor:
        """The coefficients of a layer: what was expected of them, and what its integers add."""
        arrays = self.layers[position]
        components_TBJ = reconstruct(codes_TBJ, arrays.shrink_3)
        if predicted_TBC is None:
            predicted_TBC = components_TBJ.new_zeros(*codes_TBJ.shape[:2], arrays.basis_JC.shape[1])
        for group in self._groups[position]:
            part, count = group.coefficients, group.num_components
            if count:
                # As a matrix: a product of slices would be done token by token.
                added_RC = components_TBJ[part, :, :count].flatten(0, 1) @ arrays.basis_JC[:count]
                predicted_TBC[part] += added_RC.view(predicted_TBC[part].shape)
        return predicted_TBC

    @cached_property
    def _decoder(self) -> Decoder:
        """Made once, by coders that decode."""
        projections = self.projections or (None,) * len(self.layers)
        with torch.inference_mode(False):  # the first caller may be in it, and later ones may train
            arrays = [
                DecodedArrays(
                    prediction_CC=layer.prediction_CC,
                    basis_JC=layer.basis_JC,
                    mean_TC=layer.mean_TC,
                    component_of_256=component_table(layer.shrink_3),
                    projection=projection,
                )
                for layer, projection in zip(self.layers, projections, strict=True)
            ]
            shrink_L3 = torch.stack([layer.shrink_3 for layer in self.layers])
        return Decoder(arrays, shrink_L3, self._groups, self.dct, predict=self._predict)

    def decode(self, codes_BLTC: Tensor, first_row: int = 0, extent: int | None = None) -> DecodedLayers:
        """See `Coder.decode`. Under autocast the products are computed in its type, and so are q and k."""
        assert first_row == 0, "code_rows asks for all rows"
        return _DecodedFactors(self, self._decoder.open(self.packing.open(codes_BLTC.squeeze(2), extent)))

    def extent(self, codes_BLTC: Tensor) -> int:
        """See `Coder.extent`: how many slots of escapes are used, rounded up."""
        return num_open_slots(codes_BLTC.squeeze(2))

    def factors(self, position: int, coefficients_TBC: Tensor) -> LayerFactors:
        """q and k of a layer, with the teacher's bias, from its coefficients; float32."""
        x_BTC = self.dct.tokens(coefficients_TBC, self.layers[position].mean_TC)
        projection = None if self.projections is None else self.projections[position]
        return self.to_factors(position, x_BTC, projection)

    def to_factors(self, position: int, x_BTC: Tensor, projection: HeadProjection | None) -> LayerFactors:
        """q and k of a layer, with the teacher's bias, from what was coded."""
        if projection is None:
            return self._split(position, x_BTC.view(*x_BTC.shape[:2], -1, self.geometry.head_dim))
        with torch.autocast(self.device.type, enabled=False):
            q_BHTD, k_BHTD = projection(x_BTC)
        return LayerFactors(q_BHTD=q_BHTD, k_BHTD=k_BHTD, scale=self.geometry.scale, bias=self.bias(position))

    @property
    def num_code_rows(self) -> int:
        """See `Coder.num_code_rows`."""
        return NUM_ROWS

    @property
    def num_code_tokens(self) -> int:
        """See `Coder.num_code_tokens`: all tokens are packed together."""
        return 1

    def code_rows(self, positions: Sequence[int]) -> slice:
        """See `Coder.code_rows`: both rows hold all layers."""
        del positions
        return slice(0, NUM_ROWS)

    def layer_shares_L(self, codes_BLTC: Tensor) -> Tensor:
        """See `Coder.layer_shares_L`: the entropy of each layer's integers, a table for each component."""
        rows = self.packing.open(codes_BLTC.squeeze(2))
        bits_L = [entropy_bits(rows.layer(position).cpu().numpy()) for position in range(len(self.layers))]
        total = sum(bits_L)
        return torch.tensor([bits / total if total else 1 / len(bits_L) for bits in bits_L])

    @property
    def decode_macs_per_view(self) -> int:
        """See `Coder.decode_macs_per_view`."""
        num_tokens, total = self.geometry.tokens.num_tokens, 0
        for position, arrays in enumerate(self.layers):
            width = arrays.basis_JC.shape[1]
            if position and self._predict:
                total += num_tokens * width**2
            total += sum(
                (group.coefficients.stop - group.coefficients.start) * group.num_components * width
                for group in self._groups[position]
            )
            total += num_tokens * width * self.dct.macs_per_token
            if self.projections is not None:
                total += num_tokens * self.projections[position].weight_NC.numel()
        return total

    @cached_property
    def _analysis(self) -> list[Tensor]:
        """For each layer, what takes the coefficients to components: (C, J), float32. Made once, by coders that encode.

        Of all integers those are wanted whose error is least in the layer's metric M: E = M B' (B M B')^-1.
        """
        analysis: list[Tensor] = []
        with torch.autocast(self.device.type, enabled=False):
            for position, arrays in enumerate(self.layers):
                weight_NC = None if self.projections is None else self.projections[position].weight_NC
                basis_JC = arrays.basis_JC.double()
                weighted_CJ = input_metric(arrays.metric_VDD, weight_NC) @ basis_JC.mT
                gram_JJ = basis_JC @ weighted_CJ
                # A layer whose errors cost nothing has a metric of zeros.
                floor = 1e-9 * float(gram_JJ.diagonal().mean()) or 1.0
                gram_JJ = gram_JJ + floor * torch.eye(len(gram_JJ), device=self.device)
                solved_JC = cast("Tensor", torch.linalg.solve(gram_JJ, weighted_CJ.mT))
                analysis.append(solved_JC.mT.float().contiguous())
        return analysis


class _DecodedFactors:
    """The factors of a batch of views."""

    def __init__(self, coder: TransformCoder, chain: DecodedChain) -> None:
        self._coder, self._chain = coder, chain

    def layer(self, position: int) -> LayerFactors:
        """See `DecodedLayers.layer`."""
        return self._coder.to_factors(position, *self._chain.tokens(position))


def projection_state(projections: Sequence[HeadProjection]) -> dict[str, Tensor] | None:
    """The projections of all layers as arrays of a state, or None if they differ in what they do."""
    states = [projection.to_state() for projection in projections]
    shapes = [{name: each.shape for name, each in state.items()} for state in states]
    if any(its != shapes[0] for its in shapes):
        return None
    return {
        PROJECTION + name.replace(".", "__"): torch.stack([state[name].cpu() for state in states]) for name in states[0]
    }


def _read_projections(state: State, geometry: FactorGeometry) -> tuple[HeadProjection, ...] | None:
    arrays = {
        name.removeprefix(PROJECTION).replace("__", "."): each
        for name, each in state.items()
        if name.startswith(PROJECTION)
    }
    if not arrays:
        return None
    num_layers = len(geometry.layers)
    for name, array in {**arrays, "input_call_L": state.get("input_call_L", torch.zeros(0))}.items():
        if array.ndim == 0 or len(array) != num_layers:
            raise CodecError(f"codec transform: {name} of its state is not of {num_layers} layers.")
    return tuple(
        HeadProjection.from_state({name: array[position].float() for name, array in arrays.items()}, geometry)
        for position in range(num_layers)
    )


_SHAPES = {
    "prediction_LCC": "LCC",
    "basis_LJC": "LJC",
    "shrink_L3": "L3",
    "prediction_scale_LC": "LC",
    "metric_LVE": "LVE",
    "mean_left_LTR": "LTR",
    "mean_right_LRC": "LRC",
}


def _check_state(state: State, geometry: FactorGeometry, width: int, num_vectors: int) -> None:
    """Refuse arrays that do not fit together, before anything is made of them: a cache may come from anybody."""
    sides: dict[str, int] = {
        "L": len(geometry.layers),
        "C": width,
        "V": num_vectors,
        "E": geometry.head_dim * (geometry.head_dim + 1) // 2,
        "T": geometry.tokens.num_tokens,
        "3": 3,
    }
    for name, axes in {"bucket_LBJ": "LBJ", **_SHAPES}.items():
        if name not in state:
            raise CodecError(f"codec transform: its state lacks {name}.")
        array = state[name]
        found = tuple(array.shape)
        if len(found) == len(axes):
            for axis, side in zip(axes, found, strict=True):
                sides.setdefault(axis, side)  # B, J and R: any length, the same everywhere
        expected = tuple(sides.get(axis, 0) for axis in axes)
        if found != expected:
            raise CodecError(f"codec transform: {name} of its state has shape {found}, expected {expected}.")
        if not bool(torch.isfinite(array.float()).all()):
            raise CodecError(f"codec transform: {name} of its state has a value that is not finite.")
    if sides["J"] > width:
        raise CodecError(f"codec transform: basis_LJC of its state has {sides['J']} rows, expected at most {width}.")
    if state["bucket_LBJ"].dtype != torch.uint8:
        raise CodecError(f"codec transform: bucket_LBJ of its state is {state['bucket_LBJ'].dtype}, expected uint8.")
    if not bool((state["bucket_LBJ"] > 0).flatten(1).any(dim=1).all()):
        raise CodecError("codec transform: bucket_LBJ of its state stores nothing of a layer.")


def _check_cells(bucket_LBJ: Tensor, bands: Sequence[slice]) -> None:
    """Refuse a plan of other bands than the grid has, or of so many cells that lists of them would fill the memory."""
    if bucket_LBJ.shape[1] != len(bands):
        raise CodecError(
            f"codec transform: bucket_LBJ of its state has {bucket_LBJ.shape[1]} bands, expected {len(bands)}, as the "
            "patch grid has."
        )
    num_cells = bucket_LBJ.shape[0] * bucket_LBJ.shape[2] * bands[-1].stop
    if num_cells > _MOST_CELLS:
        raise CodecError(
            f"codec transform: bucket_LBJ of its state has {num_cells} cells a view, expected at most {_MOST_CELLS}."
        )


def _of_triangles(triangles: Tensor, size: int) -> Tensor:
    """Symmetric matrices from their lower triangles along the last axis."""
    row, column = torch.tril_indices(size, size, device=triangles.device)
    matrices = triangles.new_zeros(*triangles.shape[:-1], size, size)
    matrices[..., row, column] = triangles
    matrices[..., column, row] = triangles
    return matrices


def _not_finite(geometry: FactorGeometry, factors: Sequence[LayerFactors]) -> CodecError:
    largest = [max(float(layer.q_BHTD.abs().max()), float(layer.k_BHTD.abs().max())) for layer in factors]
    worst = max(range(len(factors)), key=lambda position: (math.isnan(largest[position]), largest[position]))
    return CodecError(
        f"layer {geometry.layers[worst]}: a factor of size {largest[worst]:.4g} is NaN, infinite, or comes of an input "
        "that is. Check the teacher's weights and precision."
    )
