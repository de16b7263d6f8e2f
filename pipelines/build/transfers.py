"""Copies between host and device, on streams of their own beside the one that computes.

On a CPU nothing is copied, and nothing is waited for.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor


class Sent(NamedTuple):
    """A tensor on its way to the device."""

    tensor: Tensor
    arrived: torch.cuda.Event | None


class Fetched(NamedTuple):
    """Tensors on their way to the host."""

    sources: tuple[Tensor, ...]
    """On the device. They are kept until they are copied, lest the memory be given to other work meanwhile."""
    copies: tuple[Tensor, ...]
    arrived: torch.cuda.Event | None

    def wait(self) -> tuple[Tensor, ...]:
        """The copies, complete. Waits without the interpreter's lock, and without a busy processor."""
        if self.arrived is not None:
            self.arrived.synchronize()
        return self.copies


class Transfers:
    """Streams of one device. `send`, `use` and `fetch` are for the thread that computes, `aside` is for others."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._is_cuda = device.type == "cuda"
        if self._is_cuda:
            self._up, self._down, self._aside = (torch.cuda.Stream(device) for _ in range(3))

    def on_device(self) -> AbstractContextManager[object]:
        """A context in which this device is the current one of this thread, which pins memory for it."""
        return torch.cuda.device(self._device) if self._is_cuda else nullcontext()

    def send(self, tensor: Tensor) -> Sent:
        """Begin to copy a tensor to the device, best from pinned memory."""
        if not self._is_cuda:
            return Sent(tensor.to(self._device), None)
        with torch.cuda.stream(self._up):
            pinned = tensor if tensor.is_pinned() else tensor.pin_memory()
            # Pinned memory is not reused before this copy is done: torch's allocator sees to it.
            on_device = pinned.to(self._device, non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record(self._up)
        return Sent(on_device, arrived)

    def use(self, sent: Sent) -> Tensor:
        """The tensor, for work that is queued from now on in this thread's stream."""
        if sent.arrived is not None:
            computing = torch.cuda.current_stream(self._device)
            computing.wait_event(sent.arrived)
            # It was allocated for the stream of the copies, which would else overwrite it while it is still in use.
            sent.tensor.record_stream(computing)
        return sent.tensor

    def fetch(self, tensors: Sequence[Tensor]) -> Fetched:
        """Begin to copy tensors to pinned memory, once all work is done that this thread has queued so far."""
        sources = tuple(tensors)
        if not self._is_cuda:
            return Fetched(sources, tuple(tensor.cpu() for tensor in sources), None)
        computed, arrived = torch.cuda.Event(), torch.cuda.Event(blocking=True)
        computed.record(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._down):
            self._down.wait_event(computed)
            copies = tuple(
                torch.empty(source.shape, dtype=source.dtype, pin_memory=True).copy_(source, non_blocking=True)
                for source in sources
            )
            arrived.record(self._down)
        return Fetched(sources, copies, arrived)

    @contextmanager
    def aside(self) -> Generator[None]:
        """A context for work on tensors that have been fetched, which does not wait for what is being computed."""
        if self._is_cuda:
            with self.on_device(), torch.cuda.stream(self._aside):
                yield
        else:
            yield
