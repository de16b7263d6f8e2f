"""Pictures of a few samples' maps while a student trains: the teacher's above the student's."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import nn

from atcache.attention.blocks import has_class_token
from atcache.attention.capture import FactorCapture
from atcache.feed.batch import Batch
from atcache.feed.loader import validation_batches
from atcache.pictures import images_for_log
from atcache.students.pairing import PairedFactors
from atcache.students.student import Student
from atcache.teachers.devices import autocast
from atcache.teachers.inputs import normalise_images

from .data import TrainingData

_TIMES = 20
"""How often in a run, evenly: often enough to see maps form, and seldom enough to cost next to nothing."""
_MOST_LAYERS = 4


def is_pictured(step: int, num_steps: int) -> bool:
    """Whether pictures are drawn after this step: 20 times in a run, the last time at its end.

    >>> [step for step in range(1, 101) if is_pictured(step, 100)][:3]
    [5, 10, 15]
    """
    return math.floor(step * _TIMES / num_steps) > math.floor((step - 1) * _TIMES / num_steps)


class MapPictures:
    """Draws the same samples' maps each time.

    They are training samples where a teacher is transferred, because its maps come with these; else validation samples,
    if there are any.

    Args:
        data: what the run reads.
        number: how many samples.
        device: where the student is.
        dtype: the precision it computes in.

    Raises:
        UnsupportedAttentionError: the student has no maps that could be drawn.
    """

    def __init__(self, data: TrainingData, number: int, device: torch.device, dtype: torch.dtype) -> None:
        self._data, self._device, self._dtype = data, device, dtype
        self._given = data.validation if data.teacher is None and data.validation is not None else None
        usable_S = data.order.sample_S if self._given is None else self._given.sample_S
        usable_S = np.sort(usable_S)
        self._sample_S = usable_S[np.unique(np.linspace(0, len(usable_S) - 1, number).astype(int))]
        self._batch: Batch | None = None
        model, size = data.student.model, data.student.input
        blocks = None if data.student.pairing is None else _spread(data.student.pairing.student_layers)
        _capture(model.eval(), blocks)(torch.zeros(1, 3, size.height, size.width, device=device))
        model.train()

    def draw(self, student: Student) -> Mapping[str, np.ndarray]:
        """One picture of each sample, uint8 (height, width, 3), by the name of its row.

        The student's module is left in eval mode.
        """
        batch = self._batch = self._read() if self._batch is None else self._batch
        pairing, teacher = student.pairing, self._data.teacher
        capture = _capture(student.model.eval(), None if pairing is None else _spread(pairing.student_layers))
        images = normalise_images(batch.pixels_BHWC, student.input.mean, student.input.std, self._device)
        rows: list[tuple[str, np.ndarray]] = []
        with torch.no_grad(), autocast(self._device, self._dtype):
            of_student = dict(zip(capture.layers, capture(images), strict=True))
            given = None
            if teacher is not None and pairing is not None:
                given = PairedFactors(teacher.factors(teacher.looked_at(batch)), pairing)
            for block in _spread(capture.layers):
                heads = None if pairing is None else list(pairing.student_heads)
                own = of_student[block] if heads is None else of_student[block].select_heads(heads)
                if given is not None:
                    num_rows = own.shape_BHT[2]
                    of_teacher = given.layer(block).maps()[:, :, :num_rows]
                    rows.append((f"layer {block}, teacher", of_teacher.float().cpu().numpy()))
                rows.append((f"layer {block}, student", own.maps().float().cpu().numpy()))
        tokens = capture.geometry.tokens
        pictures = images_for_log(batch.pixels_BHWC.numpy(), tokens, rows=rows)
        return {f"row-{sample}": picture for sample, picture in zip(self._sample_S, pictures, strict=True)}

    def _read(self) -> Batch:
        data = self._data if self._given is None else self._given
        (batch,) = validation_batches(
            data.views, data.label_S, self._sample_S, batch_size=len(self._sample_S), workers=0
        )
        return batch


def _capture(model: nn.Module, blocks: list[int] | None = None) -> FactorCapture:
    """What captures the rows that are drawn: the class token's, or all where the blocks attend without one."""
    return FactorCapture(model, blocks, queries="cls" if has_class_token(model) else "all")


def _spread(layers: tuple[int, ...]) -> list[int]:
    """A few of the layers, evenly, with the first and the last."""
    places = np.linspace(0, len(layers) - 1, min(_MOST_LAYERS, len(layers))).round().astype(int)
    return [layers[place] for place in places.tolist()]
