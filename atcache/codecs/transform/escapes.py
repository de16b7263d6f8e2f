"""The integers that do not fit in their share of a byte: found on the device, listed as bytes on the host.

Both halves are apart, so that the device is never waited for: it finds as many escapes of each view as there is room
for and counts them all, in tensors of fixed shape. Whoever has a copy of these on the host makes rows of bytes of them.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from atcache.codecs.transform.unpacking import SLOT_NBYTES

_MOST_DISTANCE = 2**16 - 1
_MOST_MISSING = 2**24 - 1


class Escapes(NamedTuple):
    """The escapes of each view of a batch, in the order of the cells."""

    place_BK: Tensor
    """Which cell, int32; of no meaning beyond a view's number of escapes."""
    missing_BK: Tensor
    """What its byte lacks, int32."""
    num_B: Tensor
    """How many there are, int32; if that is over K, the last ones are not listed."""


def find_escapes(missing_BS: Tensor, capacity: int) -> Escapes:
    """The first `capacity` escapes of each view, without waiting for the device.

    Args:
        missing_BS: what each cell's byte lacks, int32, mostly 0.
        capacity: K, at least 1.
    """
    count_BS = (missing_BS != 0).cumsum(dim=1, dtype=torch.int32)
    # The k-th escape is the first cell up to which there are k.
    wanted_K = torch.arange(1, capacity + 1, dtype=torch.int32, device=missing_BS.device)
    place_BK = torch.searchsorted(count_BS, wanted_K.repeat(len(missing_BS), 1)).clamp_(max=missing_BS.shape[1] - 1)
    return Escapes(place_BK.to(torch.int32), missing_BS.gather(1, place_BK), count_BS[:, -1].clone())


def write_escapes(cell_N: np.ndarray, missing_N: np.ndarray, row_R: np.ndarray) -> None:
    """Write a view's escapes as bytes.

    Args:
        cell_N: the number of each escape's cell.
        missing_N: what is missing in it, above 0.
        row_R: where, uint8, all 0. If there are more escapes than it holds, the largest are kept.
    """
    cell_N, missing_N = cell_N.astype(np.int64), missing_N.clip(max=_MOST_MISSING).astype(np.int64)
    if not len(cell_N):
        return
    num_slots = len(row_R) // SLOT_NBYTES
    num_kept = len(cell_N)
    while True:
        # An image unlike all others may have more escapes than there are slots. Then the largest ones count.
        kept = np.argsort(-missing_N, kind="stable")[:num_kept]
        cells, missing = cell_N[kept], missing_N[kept]
        order = np.argsort(cells)
        distance = np.diff(cells[order], prepend=-1)
        # A distance that is too large for its bytes is made of steps that add nothing.
        num_steps = (distance - 1) // _MOST_DISTANCE
        if len(cells) + int(num_steps.sum()) <= num_slots:
            break
        num_kept = min(num_kept - 1, num_slots - int(num_steps.sum()))
        if num_kept <= 0:
            return
    ends = np.cumsum(num_steps + 1)
    slots_N2 = np.zeros((int(ends[-1]), 2), np.int64)
    slots_N2[:, 0] = _MOST_DISTANCE
    slots_N2[ends - 1, 0] = distance - num_steps * _MOST_DISTANCE
    slots_N2[ends - 1, 1] = missing[order]
    # Byte by byte, so that the upper ones, which are mostly 0, lie together.
    planes_5R = row_R[: SLOT_NBYTES * num_slots].reshape(SLOT_NBYTES, num_slots)[:, : len(slots_N2)]
    for plane_R, (column, shift) in zip(planes_5R, ((0, 0), (0, 8), (1, 0), (1, 8), (1, 16)), strict=True):
        plane_R[:] = slots_N2[:, column] >> shift & 255
