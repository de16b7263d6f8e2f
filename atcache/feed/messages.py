"""Batches as messages between processes: the arrays lie in a slot of shared memory, and only the rest is pickled."""

from __future__ import annotations

import io
import math
import pickle
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from atcache.cache.slots import Slot, slot_nbytes

_SMALL_NBYTES = 4096  # arrays below this travel with the rest


class Part(NamedTuple):
    """Where an array of a batch lies in its slot."""

    start: int
    nbytes: int
    is_tensor: bool


class Message(NamedTuple):
    """A batch, but for the content of its large arrays."""

    pickled: bytes
    parts: list[Part]
    new_slot_nbytes: int | None
    """The size of the slot with the arrays, if it is a new one that replaces the old."""


class _Pickler(pickle.Pickler):
    """Sets large arrays aside, in `arrays`; True beside those that are tensors."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, protocol=5, buffer_callback=self._set_aside)
        self.arrays: list[tuple[np.ndarray, bool]] = []

    def _set_aside(self, buffer: pickle.PickleBuffer) -> bool:
        array = np.frombuffer(buffer.raw(), np.uint8)
        if array.nbytes < _SMALL_NBYTES:
            return True  # stays with the rest
        self.arrays.append((array, False))
        return False

    def reducer_override(self, obj: object) -> Any:  # noqa: ANN401 - pickle's own signature
        if not isinstance(obj, Tensor):
            return NotImplemented
        # Transposed codes keep their order in memory: a copy in another order would cost another pass.
        tensor: Tensor = obj
        axes = sorted(range(tensor.ndim), key=tensor.stride, reverse=True)
        stored = tensor.permute(axes).contiguous()
        content = stored.reshape(-1).view(torch.uint8).numpy() if stored.numel() else np.empty(0, np.uint8)
        if content.nbytes < _SMALL_NBYTES:
            return _tensor_of, (content.tobytes(), stored.dtype, tuple(stored.shape), axes)
        self.arrays.append((content, True))
        return _tensor_of, (_Aside(len(self.arrays) - 1), stored.dtype, tuple(stored.shape), axes)

    def persistent_id(self, obj: object) -> int | None:
        return obj.number if isinstance(obj, _Aside) else None


class _Aside(NamedTuple):
    number: int


class _Unpickler(pickle.Unpickler):
    def __init__(self, message: Message, arrays: Sequence[Tensor]) -> None:
        buffers = [array.numpy() for array, part in zip(arrays, message.parts, strict=True) if not part.is_tensor]
        super().__init__(io.BytesIO(message.pickled), buffers=buffers)
        self._arrays = arrays

    def persistent_load(self, pid: int) -> Tensor:
        return self._arrays[pid]


def _tensor_of(content: bytes | Tensor, dtype: torch.dtype, shape: tuple[int, ...], axes: list[int]) -> Tensor:
    if math.prod(shape) == 0:
        stored = torch.empty(shape, dtype=dtype)
    elif isinstance(content, bytes):
        stored = torch.frombuffer(bytearray(content), dtype=dtype).view(shape)
    else:
        stored = content.view(dtype).view(shape)
    return stored.permute([axes.index(axis) for axis in range(len(axes))])


def pack(batch: object, slot: Slot | None) -> tuple[Message, Slot | None]:
    """A batch as a message, with its large arrays in a slot.

    Args:
        batch: what to send. Arrays that lie in the slot already stay where they are.
        slot: what was being filled when the batch was made; None if there is none yet.

    Returns:
        The message, and the slot that it speaks of: another one if this one is too small.

    Raises:
        ConfigError: there is no memory for another slot.
    """
    file = io.BytesIO()
    pickler = _Pickler(file)
    pickler.dump(batch)
    arrays, new_slot_nbytes = pickler.arrays, None
    starts = [] if slot is None else [_place(slot, array) for array, _ in arrays]
    if arrays and (slot is None or None in starts):
        slot = Slot.create(slot_nbytes([array.nbytes for array, _ in arrays]))
        starts, new_slot_nbytes = [_place(slot, array) for array, _ in arrays], slot.nbytes
    parts = [
        Part(start, array.nbytes, is_tensor)
        for (array, is_tensor), start in zip(arrays, starts, strict=True)
        if start is not None
    ]
    return Message(file.getvalue(), parts, new_slot_nbytes), slot


def _place(slot: Slot, array: np.ndarray) -> int | None:
    """Where an array begins in the slot, copied there if need be; None if there is no room."""
    start = slot.find(array)
    if start is None and (room := slot.take(array.nbytes)) is not None:
        room[:] = array
        start = slot.find(room)
    return start


def unpack(message: Message, slot: Slot | None, *, pin_memory: bool) -> Any:  # noqa: ANN401 - whatever was packed
    """The batch, with its arrays copied out of the slot, into pinned memory if that is wanted."""
    copies: list[Tensor] = []
    for part in message.parts:
        assert slot is not None, "parts lie in a slot"
        copy = torch.empty(part.nbytes, dtype=torch.uint8, pin_memory=pin_memory)
        copy.numpy()[:] = slot.at(part.start, part.nbytes)
        copies.append(copy)
    return pinned(_Unpickler(message, copies).load()) if pin_memory else _Unpickler(message, copies).load()


def pinned(batch: Any) -> Any:  # noqa: ANN401 - a batch of any kind
    """The batch with all of it in pinned memory, if it knows how that is done; what is pinned already is not copied."""
    return batch.pin_memory() if hasattr(batch, "pin_memory") else batch
