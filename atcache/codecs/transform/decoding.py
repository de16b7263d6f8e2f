"""Decoding of `transform`: bytes to components, components to coefficients, and these to q and k, layer by layer."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from atcache.attention.projection import HeadProjection
from atcache.codecs.transform.grid_dct import GridDCT
from atcache.codecs.transform.unpacking import OpenRows, signed

_SMALL_BAND_SHARE = 1 / 8


class Group(NamedTuple):
    """Neighbouring bands that are decoded in one product."""

    coefficients: slice
    num_components: int


class DecodedArrays(NamedTuple):
    """What decoding a layer needs of the state, on the decoder's device: float32, or another type for its products."""

    prediction_CC: Tensor
    """Multiplies the decoded coefficients of the layer below; zeros in the first layer."""
    basis_JC: Tensor
    """What one step of each component adds to the coefficients."""
    mean_TC: Tensor
    """Each position's mean."""
    component_of_256: Tensor
    """The component that each value of a cell stands for, if it has no escape."""
    projection: HeadProjection | None
    """Makes q and k; None if they are coded themselves."""

    def to(self, dtype: torch.dtype) -> DecodedArrays:
        """The same in another type."""
        projection = self.projection and dataclasses.replace(
            self.projection,
            weight_NC=self.projection.weight_NC.to(dtype),
            bias_N=self.projection.bias_N.to(dtype),
        )
        return DecodedArrays(*(array.to(dtype) for array in self[:-1]), projection=projection)


def plan_groups(bands: Sequence[slice], stored_BJ: Tensor, num_tokens: int) -> list[Group]:
    """Bands with many coefficients have a product of their own, with no more components than they store."""
    groups: list[Group] = []
    is_open = False
    for band, stored_J in zip(bands, stored_BJ, strict=True):
        count = int(stored_J.nonzero().max()) + 1 if bool(stored_J.any()) else 0
        is_small = band.stop - band.start < _SMALL_BAND_SHARE * num_tokens
        if is_open and is_small:
            last = groups.pop()
            groups.append(Group(slice(last.coefficients.start, band.stop), max(last.num_components, count)))
        else:
            groups.append(Group(band, count))
        is_open = is_small
    return groups


def reconstruct(codes: Tensor, shrink_3: Tensor) -> Tensor:
    """The components that integers stand for, float32, same shape.

    Args:
        codes: integers, any shape.
        shrink_3: added to magnitudes of 1, 2, and 3 or more; or for each integer its own, shape (3, ...).
    """
    steps = codes.float()
    # The quadratic through the three values.
    second = (shrink_3[2] - 2 * shrink_3[1] + shrink_3[0]) / 2
    first = shrink_3[1] - shrink_3[0] - 3 * second
    size = steps.abs().clamp_(max=3)
    shrink = (size * second).add_(first).mul_(size).add_(shrink_3[0] - first - second)
    return steps.addcmul_(shrink, size.clamp_(max=1).copysign_(steps))


def component_table(shrink_3: Tensor) -> Tensor:
    """The component that each value of a cell stands for: float32, shape (256)."""
    return reconstruct(signed(torch.arange(256, dtype=torch.int32, device=shrink_3.device)), shrink_3)


class Decoder:
    """What decodes all views of a cache. Threads may share it.

    Under autocast the products have its type: their operands are rounded to it, while sums inside a product are kept
    wider. The arrays of each type are made once, by the first layer that is decoded outside a compiled graph.
    """

    def __init__(
        self,
        arrays: Sequence[DecodedArrays],
        shrink_L3: Tensor,
        groups: Sequence[Sequence[Group]],
        dct: GridDCT,
        *,
        predict: bool,
    ) -> None:
        self._arrays: dict[torch.dtype, list[DecodedArrays]] = {torch.float32: list(arrays)}
        self.shrink_3L = shrink_L3.mT
        self.groups, self.dct, self.predict = groups, dct, predict

    @property
    def device(self) -> torch.device:
        """Where it decodes."""
        return self.shrink_3L.device

    def dtype(self) -> torch.dtype:
        """The type of products here: autocast's, or float32."""
        device_type = self.device.type
        is_on = torch.is_autocast_enabled(device_type)
        return torch.get_autocast_dtype(device_type) if is_on else torch.float32

    def arrays(self, position: int, dtype: torch.dtype) -> DecodedArrays:
        """A layer's arrays in this type."""
        if dtype not in self._arrays:
            if torch.compiler.is_compiling():  # what a graph makes is gone after each run
                return self._arrays[torch.float32][position].to(dtype)
            with torch.inference_mode(False):  # the first caller may be in it, and later ones may train
                self._arrays[dtype] = [each.to(dtype) for each in self._arrays[torch.float32]]
        return self._arrays[dtype][position]

    def open(self, rows: OpenRows) -> DecodedChain:
        """A batch, ready to decode layers of."""
        return DecodedChain(self, rows)


class DecodedChain:
    """A batch of views. Each layer is decoded when it is needed, after those below it.

    Ascending layers cost least: then each is decoded once. A layer below the last starts again from the first.
    """

    def __init__(self, decoder: Decoder, rows: OpenRows) -> None:
        self._decoder, self._rows = decoder, rows
        self._position = -1
        self._coefficients_TBC: Tensor | None = None
        # A cell with an escape reads as the component of the largest value of its bits; this is what that lacks.
        escapes = rows.escapes
        shrink_3KB = decoder.shrink_3L[:, escapes.layer_KB]
        whole_KB = reconstruct(signed(escapes.mask_KB + escapes.missing_KB), shrink_3KB)
        self._missing_KB = whole_KB - reconstruct(signed(escapes.mask_KB), shrink_3KB)

    def tokens(self, position: int) -> tuple[Tensor, HeadProjection | None]:
        """What was coded of a layer, shape (batch, token, C), and what makes q and k of it."""
        dtype = self._decoder.dtype()
        with torch.autocast(self._decoder.device.type, enabled=False):
            if position < self._position:
                self._position, self._coefficients_TBC = -1, None
            while self._position < position:
                self._position += 1
                self._coefficients_TBC = self._coefficients(self._position, self._coefficients_TBC, dtype)
            assert self._coefficients_TBC is not None, "some layer was decoded"
            arrays = self._decoder.arrays(position, dtype)
            return self._decoder.dct.tokens(self._coefficients_TBC.to(dtype), arrays.mean_TC), arrays.projection

    def _coefficients(self, position: int, below_TBC: Tensor | None, dtype: torch.dtype) -> Tensor:
        arrays = self._decoder.arrays(position, dtype)
        components_JTB = self._components(position, arrays.component_of_256)
        if below_TBC is None or not self._decoder.predict:
            shape = (components_JTB.shape[1], components_JTB.shape[2], arrays.basis_JC.shape[1])
            sum_TBC = torch.zeros(shape, dtype=dtype, device=components_JTB.device)
        else:
            sum_TBC = below_TBC.to(dtype) @ arrays.prediction_CC
        for part, count in self._decoder.groups[position]:
            if count:
                # Matrices, none of which is copied: coefficient and view are one axis, and components another.
                components_RJ = components_JTB[:count, part].flatten(1).mT
                sum_TBC[part].view(-1, sum_TBC.shape[2]).addmm_(components_RJ, arrays.basis_JC[:count])
        return sum_TBC

    def _components(self, position: int, component_of_256: Tensor) -> Tensor:
        cells_JTB = self._rows.cells(position)
        # By `index_select` and 32-bit numbers: five times as fast on a CPU as other ways to look values up.
        components_N = component_of_256.index_select(0, cells_JTB.flatten().to(torch.int32))
        components_JTB = components_N.view(cells_JTB.shape)
        return self._rows.add_escapes(position, components_JTB, self._missing_KB.to(components_JTB.dtype))
