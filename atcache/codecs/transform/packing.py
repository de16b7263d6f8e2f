"""How the integers of a view become bytes, in an order in which a general-purpose compressor finds little to waste.

A *cell* is one component of one coefficient of one layer; a *block* is the cells of one layer, band and component.
Blocks with large integers come first and blocks that are mostly 0 last, whatever layer they are of. So neighbours are
alike, and each part of the row is coded by a table of its own that suits it (deflate starts a new one every few kB).
Small integers share a byte. A Huffman table gives no byte less than one bit, which four cells then share.

Few integers do not fit in their share of a byte: these are *escapes*. The byte holds the largest value that fits, and
what is missing is listed beside the bytes.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from atcache.codecs.transform.escapes import Escapes, find_escapes, write_escapes
from atcache.codecs.transform.unpacking import SLOT_NBYTES, OpenRows, Places, num_open_slots

NUM_ROWS = 2
"""Rows of bytes of a view: the cells, then the escapes."""
_BUCKETS_PER_KIND = 85
_BITS_OF_KIND = (8, 4, 2)
"""Bits that a cell has. A block's kind is (bucket - 1) // 85."""
_LARGEST_MEAN_OF_KIND = (2.0**11, 1.0, 0.4)
"""A block is of the last kind whose bound is at least its mean integer's size. Few cells then escape."""
_SMALLEST_MEAN = 0.01
_FEW_CELLS = 8192
"""Rows are so long that this many cells could escape, or all of them if there are fewer."""
_LEAST_LISTED = 1024
_CELLS_PER_LISTED = 256
"""Escapes of a view that the device lists at first: one in so many cells. Of DINOv2's, one in 3,000 escapes."""


def choose_buckets(mean_size: Tensor, is_stored: Tensor) -> Tensor:
    """The bucket of each block: uint8, 0 for blocks that are not stored, and lower numbers for larger integers.

    Args:
        mean_size: mean size of a block's integers before rounding, any shape.
        is_stored: bool, same shape.
    """
    edges = (*_LARGEST_MEAN_OF_KIND, _SMALLEST_MEAN)
    size = mean_size.double().clamp(edges[-1], edges[0])
    bucket = torch.zeros_like(size)
    for kind, (largest, smallest) in enumerate(itertools.pairwise(edges)):
        share = (math.log(largest) - size.log()) / math.log(largest / smallest)
        place = (share * _BUCKETS_PER_KIND).floor().clamp(0, _BUCKETS_PER_KIND - 1)
        bucket = torch.where(size <= largest, 1 + kind * _BUCKETS_PER_KIND + place, bucket)
    return torch.where(is_stored, bucket, 0).to(torch.uint8)


class Packed:
    """A packed batch, on the device, which may still be at it.

    Args:
        bytes_BR: the first row of each view.
        missing_BS: what each cell's byte lacks, int32, in the order of `Packing`.
        capacity: how many escapes of a view are listed at first.
    """

    def __init__(self, bytes_BR: Tensor, missing_BS: Tensor, capacity: int) -> None:
        self._missing_BS = missing_BS
        self._capacity = max(1, min(capacity, missing_BS.shape[1]))
        self.parts: tuple[Tensor, ...] = (bytes_BR, *self._escapes(self._capacity))
        """What `Packing.finish` makes rows of, of each view."""

    def _escapes(self, capacity: int) -> Escapes:
        if self._missing_BS.shape[1]:
            return find_escapes(self._missing_BS, capacity)
        nothing_BK = self._missing_BS.new_zeros(len(self._missing_BS), capacity)
        return Escapes(nothing_BK, nothing_BK, nothing_BK[:, 0])

    def whole(self, parts: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The parts, or a copy of them on the host, with all escapes.

        The device is looked at again only if a view has more of them than were listed.
        """
        most = int(parts[3].max())
        if most <= self._capacity:
            return tuple(parts)
        return (parts[0], *(part.to(parts[0].device) for part in self._escapes(most)))


class Packing:
    """Packs the integers of all layers of a view in two rows of bytes, and unpacks a layer at a time."""

    def __init__(self, bucket_LBJ: Tensor, bands: Sequence[slice], device: torch.device) -> None:
        """Plan the order of the cells.

        Args:
            bucket_LBJ: what `choose_buckets` gave for each block, uint8 of shape (layer, band, component).
            bands: the coefficients of each band, contiguous, in order.
            device: where rows are packed and unpacked.
        """
        self._device = device
        self._bucket_LBJ = bucket_LBJ.cpu().numpy()
        width_B = np.array([band.stop - band.start for band in bands])
        self._rank_T = np.array([rank for band in bands for rank in range(band.stop - band.start)])
        self._band_T = np.repeat(np.arange(len(bands)), width_B)
        used = [np.flatnonzero((bucket_BJ > 0).any(axis=0)) for bucket_BJ in self._bucket_LBJ]
        self.num_components = [int(numbers.max(initial=-1)) + 1 for numbers in used]
        """J of each layer: components up to the last that is stored."""
        self._first_cell = np.cumsum([0, *(len(self._band_T) * count for count in self.num_components)])
        # The sort keeps blocks of a bucket in the order of layer, band and component.
        flat = self._bucket_LBJ.reshape(-1)
        blocks = np.flatnonzero(flat)
        blocks = blocks[np.argsort(flat[blocks], kind="stable")]
        kind = (flat[blocks].astype(int) - 1) // _BUCKETS_PER_KIND
        width = width_B[blocks // self._bucket_LBJ.shape[2] % len(bands)]
        start = np.zeros_like(width)
        self._num_cells = [0] * len(_BITS_OF_KIND)
        for number in range(len(_BITS_OF_KIND)):
            of_kind = kind == number
            ends = np.cumsum(width[of_kind])
            start[of_kind] = ends - width[of_kind]
            self._num_cells[number] = int(ends[-1]) if len(ends) else 0
        self._start_LBJ = np.zeros(flat.shape, np.int64)
        self._start_LBJ[blocks] = start
        self._start_LBJ = self._start_LBJ.reshape(self._bucket_LBJ.shape)
        self._num_bytes = [-(-count * bits // 8) for count, bits in zip(self._num_cells, _BITS_OF_KIND, strict=True)]
        self.num_cells = sum(self._num_cells)
        """Integers of a view that are stored."""
        fewest_slots = min(_FEW_CELLS, max(1, self.num_cells))
        self.row_nbytes = max(1, sum(self._num_bytes), SLOT_NBYTES * fewest_slots)
        """Bytes of a row."""

    @cached_property
    def places(self) -> Places:
        """Where cells are. Made once, and only by coders that decode."""
        parts = [self._find_places(layer) for layer in range(len(self.num_components))]
        byte_S, shift_S, mask_S = (np.concatenate(of_layers) for of_layers in zip(*parts, strict=True))
        return Places(
            torch.from_numpy(byte_S).to(self._device, torch.int64),
            torch.from_numpy(shift_S).to(self._device, torch.uint8).unsqueeze(1),
            torch.from_numpy(mask_S).to(self._device, torch.uint8).unsqueeze(1),
            torch.from_numpy(self._first_cell[:-1]).to(self._device),
            torch.tensor(self.num_components, device=self._device),
        )

    def _cells(self, layer: int) -> tuple[np.ndarray, np.ndarray]:
        """For each cell of a layer, shape (token, component): its number within its kind, and its kind or -1."""
        components = slice(0, self.num_components[layer])
        bucket_TJ = self._bucket_LBJ[layer, :, components][self._band_T]
        number_TJ = self._start_LBJ[layer, :, components][self._band_T] + self._rank_T[:, None]
        return number_TJ, np.where(bucket_TJ > 0, (bucket_TJ.astype(int) - 1) // _BUCKETS_PER_KIND, -1)

    def _find_places(self, layer: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        number_TJ, kind_TJ = self._cells(layer)
        bits_TJ = np.array([*_BITS_OF_KIND, 0])[kind_TJ]
        num_bytes_TJ = np.array([*(max(1, count) for count in self._num_bytes), 1])[kind_TJ]
        first_TJ = np.array([0, *np.cumsum(self._num_bytes)[:-1], 0])[kind_TJ]
        byte_TJ = np.where(kind_TJ >= 0, first_TJ + number_TJ % num_bytes_TJ, 0)
        shift_TJ = np.where(kind_TJ >= 0, number_TJ // num_bytes_TJ * bits_TJ, 0)
        mask_TJ = (1 << bits_TJ) - 1
        return byte_TJ.T.reshape(-1), shift_TJ.T.reshape(-1), mask_TJ.T.reshape(-1)

    @cached_property
    def _order(self) -> np.ndarray:
        """For each stored cell, kind by kind, its number among all cells, int64."""
        first = np.cumsum([0, *self._num_cells])
        order = np.zeros(self.num_cells, np.int64)
        for layer, first_cell in enumerate(self._first_cell[:-1]):
            number_TJ, kind_TJ = self._cells(layer)
            cells = first_cell + np.arange(number_TJ.size).reshape(number_TJ.shape)
            is_stored = kind_TJ >= 0
            order[first[kind_TJ[is_stored]] + number_TJ[is_stored]] = cells[is_stored]
        return order

    @cached_property
    def _order_on_device(self) -> Tensor:
        return torch.from_numpy(self._order).to(self._device)

    def pack(self, codes: Sequence[Tensor]) -> Tensor:
        """Rows of bytes of a batch of views: uint8 of shape (view, 2, row_nbytes).

        Args:
            codes: for each layer, int32 of shape (view, token or coefficient, component). Where a block is not stored
                they are not looked at.
        """
        packed = self.queue(codes)
        return self.finish(packed.whole(packed.parts))

    def queue(self, codes: Sequence[Tensor]) -> Packed:
        """Pack a batch without waiting for the device; `finish` makes rows of its parts. Takes what `pack` takes."""
        flat_BN = torch.cat([layer_BTJ.flatten(1) for layer_BTJ in codes], dim=1)
        # The sign becomes the lowest bit: 0, -1, 1, -2, ... are stored as 0, 1, 2, 3, ...
        cells_BS = flat_BN.index_select(1, self._order_on_device)
        cells_BS = torch.where(cells_BS < 0, -2 * cells_BS - 1, 2 * cells_BS)
        bytes_BR = torch.zeros(len(cells_BS), sum(self._num_bytes), dtype=torch.uint8, device=self._device)
        most_S = torch.cat(
            [
                torch.full((count,), 2**bits - 1, dtype=cells_BS.dtype, device=self._device)
                for count, bits in zip(self._num_cells, _BITS_OF_KIND, strict=True)
            ]
        )
        fitting_BS = torch.minimum(cells_BS, most_S)
        first_byte = first_cell = 0
        for count, num_bytes, bits in zip(self._num_cells, self._num_bytes, _BITS_OF_KIND, strict=True):
            target_BR = bytes_BR[:, first_byte : first_byte + num_bytes]
            for number in range(8 // bits):
                stop = first_cell + min(count, (number + 1) * num_bytes)
                part_BS = fitting_BS[:, first_cell + number * num_bytes : stop]
                target_BR[:, : part_BS.shape[1]] |= (part_BS << (bits * number)).to(torch.uint8)
            first_byte, first_cell = first_byte + num_bytes, first_cell + count
        return Packed(bytes_BR, cells_BS - fitting_BS, max(_LEAST_LISTED, self.num_cells // _CELLS_PER_LISTED))

    def finish(self, parts: Sequence[Tensor]) -> Tensor:
        """Rows of bytes of some views, from their `Packed.whole` parts; on the device of the first part."""
        bytes_BR, place_BK, missing_BK, num_B = (part.cpu().numpy() for part in parts)
        rows_B2R = np.zeros((len(bytes_BR), NUM_ROWS, self.row_nbytes), np.uint8)
        rows_B2R[:, 0, : bytes_BR.shape[1]] = bytes_BR
        for view, count in enumerate(num_B):
            write_escapes(self._order[place_BK[view, :count]], missing_BK[view, :count], rows_B2R[view, 1])
        return torch.from_numpy(rows_B2R).to(parts[0].device)

    def open(self, rows_B2R: Tensor, num_open: int | None = None) -> OpenRows:
        """The rows of a batch, ready to unpack layers of.

        Args:
            rows_B2R: the rows, on the packing's device.
            num_open: what `num_open_slots` says of them; None looks, which waits for the device.
        """
        num_open = num_open_slots(rows_B2R) if num_open is None else num_open
        return OpenRows(rows_B2R, self.places, self._first_cell.tolist(), self.num_components, num_open)


def entropy_bits(codes_BTJ: np.ndarray) -> float:
    """The order-0 entropy of a layer's integers, with a table for each component."""
    bits = 0.0
    for component in range(codes_BTJ.shape[2]):
        _, counts = np.unique(codes_BTJ[..., component], return_counts=True)
        share = counts / counts.sum()
        bits -= float((share * np.log2(share)).sum()) * codes_BTJ[..., component].size
    return bits
