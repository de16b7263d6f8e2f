"""What a build does with a batch of rendered views: copy it to the device, run the teacher, encode, compress.

Nothing waits for the device but the thread that takes its results.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from statistics import fmean
from typing import NamedTuple

import numpy as np
from torch import Tensor

from atcache.attention.capture import FactorCapture
from atcache.attention.factors import LayerAttention
from atcache.codecs.base import Coder, Queued
from atcache.errors import CodecError
from atcache.store.layout import StoreLayout
from atcache.store.writer import encode_pixels, encode_view
from atcache.teachers.run import TeacherRun
from atcache.views.rendering import STORED

from ..fidelity import layer_row_kl, layer_v_error, layer_x_error
from .rendered import RenderedBatch
from .staging import overlapped
from .transfers import Fetched, Sent, Transfers

_BATCHES_ON_DEVICE = 3  # one that runs, one that is queued behind it, and one whose codes are on their way back
_CHECKED_VIEWS = 2  # of a checked batch; few, because their row KL is computed in float64
_LEAST_CHECKED_BATCHES = 8  # in all: if tasks are few, later batches are checked too


class Checked(NamedTuple):
    """How far the decoded attention of some views of a batch is from the teacher's."""

    num_views: int
    quality: dict[str, float]
    """`row_kl_nats`, the mean row KL, and if v is stored `v_error`, its relative error; `x_error` in the same way."""


class Chunks(NamedTuple):
    """One stored view, compressed or being compressed."""

    codes: Future[list[bytes]]
    pixels: Future[bytes] | None


class EncodedBatch(NamedTuple):
    """A batch on its way to the disk."""

    batch: RenderedBatch
    chunks: list[Chunks]
    """Of each stored view, in order."""
    checked: Future[Checked] | None
    """The quality of a few views, if the batch is one to check."""


class _Pixels(NamedTuple):
    on_host_BHWC: Tensor
    sent: Sent


class SentBatch(NamedTuple):
    """A batch whose views are on their way to the device."""

    batch: RenderedBatch
    pixels: _Pixels | None
    """Of the views that can be stored; None if there are none."""


class _Codes(NamedTuple):
    pixels_BHWC: Tensor
    queued: Queued
    fetched: Fetched
    layers: list[LayerAttention]
    """The teacher's attention, which `queued` keeps alive anyway; looked at if it does not fit in the codes."""
    few: list[LayerAttention] | None
    """The teacher's attention of the first views, if the batch is one to check."""


class QueuedBatch(NamedTuple):
    """A batch that the device was asked to encode."""

    batch: RenderedBatch
    codes: _Codes | None
    """None if no view can be stored."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class BatchEncoder:
    """What happens to a batch between its rendering and the disk: the stages `send`, `queue` and `finish`."""

    layout: StoreLayout
    run: TeacherRun
    coder: Coder
    capture: FactorCapture
    transfers: Transfers
    batch_size: int
    name_of: Callable[[int], str]
    """What the user calls a sample."""
    compressors: ThreadPoolExecutor
    """Threads that compress."""
    checker: ThreadPoolExecutor
    """One thread, which measures quality."""

    def encoded(self, rendered: Iterable[RenderedBatch]) -> Generator[EncodedBatch]:
        """The batches, in order, with their codes on their way to the disk."""
        return overlapped(
            rendered, prepare=self.send, queue=self.queue, finish=self.finish, most_in_flight=_BATCHES_ON_DEVICE
        )

    def send(self, batch: RenderedBatch) -> SentBatch:
        """Begin to copy the views that can be stored to the device."""
        stored = np.flatnonzero(batch.status_B == STORED)
        if not len(stored):
            return SentBatch(batch, None)
        all_are = len(stored) == len(batch.status_B)
        pixels_BHWC = batch.pixels_BHWC if all_are else batch.pixels_BHWC[stored]
        return SentBatch(batch, _Pixels(pixels_BHWC, self.transfers.send(pixels_BHWC)))

    def queue(self, given: SentBatch) -> QueuedBatch:
        """Ask the device to run the teacher on a batch, to encode, and to send back the codes."""
        batch, pixels = given
        if pixels is None:
            return QueuedBatch(batch, None)
        layers = self.run.factors(self.capture, self.transfers.use(pixels.sent))
        queued = self.coder.queue(layers)
        few = None
        if self._is_checked(batch):
            # A copy, or the whole batch would be kept until they are checked.
            few = [_copied(layer.select(slice(0, _CHECKED_VIEWS))) for layer in layers]
        fetched = self.transfers.fetch([*queued.parts, queued.is_fine_N])
        return QueuedBatch(batch, _Codes(pixels.on_host_BHWC, queued, fetched, layers, few))

    def finish(self, given: QueuedBatch) -> EncodedBatch:
        """Wait for the codes of a batch, and begin to compress and to check them.

        Raises:
            NotFiniteError: the teacher computed NaN or infinity.
            CodecError: the factors do not fit in the codes.
        """
        batch, codes = given
        if codes is None:
            return EncodedBatch(batch, [], None)
        with self.transfers.aside():
            *parts, is_fine_N = codes.fetched.wait()
            try:
                whole = codes.queued.settle(parts, is_fine_N)
            except CodecError:
                stored = np.flatnonzero(batch.status_B == STORED)
                self.run.check_finite(
                    self.capture, codes.layers, lambda view: self.name_of(batch.start + int(stored[view]))
                )
                raise
        checked = None if codes.few is None else self.checker.submit(self._check, codes.few, whole)
        return EncodedBatch(
            batch,
            [
                Chunks(
                    self.compressors.submit(self._compress, [part[view : view + 1] for part in whole]),
                    None
                    if self.layout.pixels is None
                    else self.compressors.submit(encode_pixels, self.layout, pixels_HWC.numpy()),
                )
                for view, pixels_HWC in enumerate(codes.pixels_BHWC)
            ],
            checked,
        )

    def _compress(self, parts: Sequence[Tensor]) -> list[bytes]:
        """The chunks of one view."""
        return encode_view(self.layout, self.coder.finish(parts)[0].numpy())

    def _is_checked(self, batch: RenderedBatch) -> bool:
        """Whether row KL is measured: in each task's first batch and, if tasks are few, in more, spaced evenly."""
        num_batches = -(-batch.task.num_samples // self.batch_size)
        num_checks = -(-_LEAST_CHECKED_BATCHES // self.layout.num_tasks)
        number = (batch.start - batch.task.start) // self.batch_size
        return number * num_checks % num_batches < num_checks

    def _check(self, layers: Sequence[LayerAttention], parts: Sequence[Tensor]) -> Checked:
        """How well the first views of a batch come back."""
        num_views = layers[0].shape_BHT[0]
        codes_BLTC = self.coder.finish([part[:num_views] for part in parts])
        with self.transfers.aside():
            return Checked(num_views, self._quality(layers, codes_BLTC.to(self.run.device)))

    def _quality(self, layers: Sequence[LayerAttention], codes_BLTC: Tensor) -> dict[str, float]:
        """See `_Checked.quality`."""
        quality = {"row_kl_nats": fmean(layer_row_kl(self.coder, layers, codes_BLTC))}
        v_errors = layer_v_error(self.coder, layers, codes_BLTC)
        x_errors = layer_x_error(self.coder, layers, codes_BLTC)
        errors = {"v_error": v_errors, "x_error": x_errors}
        return quality | {name: fmean(each) for name, each in errors.items() if each is not None}


def _copied(layer: LayerAttention) -> LayerAttention:
    tensors = {field.name: getattr(layer, field.name) for field in fields(layer)}
    return replace(layer, **{name: each.clone() for name, each in tensors.items() if isinstance(each, Tensor)})
