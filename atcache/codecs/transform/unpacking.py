"""A batch of rows of bytes, from which the integers of each layer are read. Nothing here waits for the device.

Views are the last axis here, and components come before coefficients: then reading a cell copies whole rows of bytes,
and what is read multiplies a basis without being moved.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

SLOT_NBYTES = 5  # an escape: 2 bytes for the distance to the one before, 3 for what is missing
_LEAST_OPEN_SLOTS = 1024
"""Slots that are looked at, at least; else a power of two, so that a compiled student sees few shapes."""


class Places(NamedTuple):
    """Where the cells of all layers are in a row of bytes. Cells that are not stored read as 0."""

    byte_S: Tensor
    """int64; S = cells of all layers, layer by layer, each of shape (component, coefficient)."""
    shift_S1: Tensor
    """uint8, like all that follows."""
    mask_S1: Tensor
    first_L: Tensor
    """The number of each layer's first cell, int64."""
    count_L: Tensor
    """The components of each layer, int64."""


class Escapes(NamedTuple):
    """What is missing in some cells of a batch; K slots, of which any may be empty."""

    place_KB: Tensor
    """Which cell of S, int64; S itself if the slot is empty or holds none of them."""
    layer_KB: Tensor
    """Which layer that is in, int64; any if the slot is empty."""
    mask_KB: Tensor
    """The largest value that the cell's bits can have, int32: an escaped cell has it."""
    missing_KB: Tensor
    """int32."""


def num_open_slots(rows_B2R: Tensor) -> int:
    """How many slots of escapes must be looked at, so that all used ones are. For rows on a GPU this waits for it."""
    num_slots = rows_B2R.shape[2] // SLOT_NBYTES
    count = _LEAST_OPEN_SLOTS
    # Slots are used from the first on, and a used one has a distance of at least 1.
    while count < num_slots and bool(rows_B2R[:, 1, count : 2 * num_slots : num_slots].any()):
        count *= 2
    return min(count, num_slots)


class OpenRows:
    """The rows of bytes of a batch of views. Layers may be unpacked in any order.

    All that is not the same for every batch is worked out when it is made, so that a compiled student, which decodes
    layers within its graph, needs no other graph for the next batch.

    Args:
        rows_B2R: the rows.
        places: where cells are.
        first_cell: the number of each layer's first cell, and at the end the number of all cells.
        num_components: the components of each layer.
        num_open: what `num_open_slots` says of the rows.
    """

    def __init__(
        self, rows_B2R: Tensor, places: Places, first_cell: list[int], num_components: list[int], num_open: int
    ) -> None:
        self._places, self._first_cell, self._num_components = places, first_cell, num_components
        self._bytes_RB = rows_B2R[:, 0].mT.contiguous()
        self.num_views = len(rows_B2R)
        num_slots = rows_B2R.shape[2] // SLOT_NBYTES
        planes_5KB = rows_B2R[:, 1, : SLOT_NBYTES * num_slots].view(-1, SLOT_NBYTES, num_slots)[:, :, :num_open]
        planes_5KB = planes_5KB.permute(1, 2, 0).to(torch.int32)
        distance_KB = planes_5KB[0] + 256 * planes_5KB[1]
        self._slot_K1 = torch.arange(num_open, device=rows_B2R.device).unsqueeze(1)
        # The first slot of distance 0 ends the list. Three times as fast as a running product over the slots.
        num_listed_B = torch.where(distance_KB == 0, self._slot_K1, num_open).amin(dim=0)
        self.escapes = self._located(
            distance_KB.cumsum(dim=0) - 1,
            self._slot_K1 < num_listed_B,
            planes_5KB[2] + 256 * planes_5KB[3] + 65536 * planes_5KB[4],
        )
        """The escapes of all layers."""

    def _located(self, cell_KB: Tensor, is_listed_KB: Tensor, missing_KB: Tensor) -> Escapes:
        """Escapes by the numbers of their cells, which in the format run over components first."""
        device, num_cells = cell_KB.device, self._first_cell[-1]
        layer_KB = torch.bucketize(cell_KB, self._places.first_L[1:], right=True)
        first_KB, count_KB = self._places.first_L[layer_KB], self._places.count_L[layer_KB]
        num_tokens = num_cells // sum(self._num_components)
        local_KB = cell_KB - first_KB
        place_KB = first_KB + local_KB % count_KB * num_tokens + local_KB // count_KB
        is_used_KB = is_listed_KB & (cell_KB < num_cells)
        place_KB = place_KB.where(is_used_KB, torch.full((), num_cells, device=device))
        mask_KB = self._places.mask_S1.view(-1)[place_KB.clamp(max=num_cells - 1)]
        return Escapes(place_KB, layer_KB, mask_KB.to(torch.int32), missing_KB)

    def layer(self, layer: int) -> Tensor:
        """The integers of one layer, int32 of shape (view, token or coefficient, component)."""
        cells_NB = self.cells(layer).to(torch.int32)
        return signed(self.add_escapes(layer, cells_NB, self.escapes.missing_KB)).permute(2, 1, 0)

    def cells(self, layer: int) -> Tensor:
        """What the bytes say of a layer, without the escapes: uint8 of shape (component, coefficient, view)."""
        of_layer = slice(self._first_cell[layer], self._first_cell[layer + 1])
        cells_NB = self._bytes_RB.index_select(0, self._places.byte_S[of_layer])
        cells_NB = (cells_NB >> self._places.shift_S1[of_layer]) & self._places.mask_S1[of_layer]
        return cells_NB.view(self._num_components[layer], -1, self.num_views)

    def add_escapes(self, layer: int, values_JTB: Tensor, added_KB: Tensor) -> Tensor:
        """Add to a layer's cells, in place, what each escape adds; returns them.

        Args:
            layer: which layer.
            values_JTB: something for each of its cells.
            added_KB: what each of `escapes` adds, of the same dtype.
        """
        values_NB = values_JTB.view(-1, self.num_views)
        num_cells = len(values_NB)
        local_KB = self.escapes.place_KB - self._first_cell[layer]
        is_here_KB = (local_KB >= 0) & (local_KB < num_cells)
        # Escapes of other layers add 0, to cells far apart: a GPU is slow where many add to one.
        values_NB.scatter_add_(
            0, torch.where(is_here_KB, local_KB, self._slot_K1 % num_cells), torch.where(is_here_KB, added_KB, 0)
        )
        return values_JTB


def signed(cells: Tensor) -> Tensor:
    """The integers that 0, 1, 2, 3, ... are stored for: 0, -1, 1, -2, ..."""
    return (cells >> 1) ^ -(cells & 1)
