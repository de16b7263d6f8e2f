"""Batches on their way to a GPU, copied on a stream of their own while the step before runs."""

from __future__ import annotations

import torch
from torch import Tensor

from atcache.feed.batch import Batch


class Prefetcher:
    """Sends batches to a device. On a CPU nothing happens.

    A GPU works on what was queued while the host goes on. So the batch of the next step can travel as soon as the host
    has queued this step, as long as nothing in a step waits for the device, and as long as batches come in pinned
    memory. One batch ahead is enough. Before each copy the host waits until the step before the last is done: else it
    would run ahead and fill the device with batches.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._queued: torch.cuda.Event | None = None
        """Comes when all is done that was queued before the last batch was sent."""

    def send(self, batch: Batch) -> Batch:
        """The batch on the device, for work that this thread queues from now on in its current stream."""
        if batch.pixels_BHWC.device.type == self._device.type:
            return batch  # the same object: students of a sweep share what is made of it
        if self._stream is None:
            return batch.to(self._device)
        if self._queued is not None:
            self._queued.synchronize()
        computing = torch.cuda.current_stream(self._device)
        self._queued = torch.cuda.Event(blocking=True)  # the host's processors have other work
        self._queued.record(computing)
        with torch.cuda.stream(self._stream):
            # Pinned memory is not reused before its copy is done: torch's allocator sees to that.
            sent = batch.to(self._device)
            arrived = torch.cuda.Event()
            arrived.record(self._stream)
        computing.wait_event(arrived)
        for tensor in sent.tensors():
            # Its memory belongs to the stream of copies, which would else reuse it while the step still reads it.
            tensor.record_stream(computing)
        return sent


def copied(tensor: Tensor, device: torch.device) -> Tensor:
    """A small tensor of the host on the device. No copy waits for the device, as one from ordinary memory does."""
    pinned = tensor.pin_memory() if device.type == "cuda" and tensor.device.type == "cpu" else tensor
    return pinned.to(device, non_blocking=True)
