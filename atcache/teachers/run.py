"""A loaded teacher with the device and the precision it runs in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from atcache.attention.capture import FactorCapture
from atcache.attention.factors import LayerAttention
from atcache.attention.finite import NotFiniteError, find_not_finite
from atcache.attention.geometry import FactorGeometry
from atcache.attention.indices import parse_indices
from atcache.teachers.devices import autocast, memory_errors_explained, resolve_device, resolve_precision
from atcache.teachers.foreign.own import OwnTeacher
from atcache.teachers.inputs import normalise_images
from atcache.teachers.load import Teacher, load_teacher


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class TeacherRun:
    """A teacher with its device and precision: what calibration and building share."""

    teacher: Teacher
    device: torch.device
    dtype: torch.dtype

    @classmethod
    def load(cls, name: str | OwnTeacher, weights: Path | None, *, device: str, precision: str) -> Self:
        """The teacher that a command's options name, or that a Python call hands over.

        Raises:
            ConfigError: there is no such device or precision.
            AtcacheError: what `load_teacher` raises.
        """
        place = resolve_device(device)
        teacher = load_teacher(name, weights=weights, device=place)
        return cls(teacher=teacher, device=place, dtype=resolve_precision(precision, place))

    def select(self, layers: str | None, heads: str | None) -> tuple[tuple[int, ...], tuple[int, ...] | None]:
        """The block indices and the head indices to keep; None for all heads, whose number only capture knows.

        Args:
            layers: as typed, such as "0-17"; None for all.
            heads: as typed, such as "0,3"; None for all.

        Raises:
            ConfigError: they cannot be read, or the teacher does not have them.
        """
        # A model need not say how many heads it has; capture checks the heads again.
        num_heads = getattr(self.teacher.model, "num_heads", 2**16)
        return (
            parse_indices("all" if layers is None else layers, self.teacher.depth, what="layer"),
            None if heads in (None, "all") else parse_indices(heads, num_heads, what="head"),
        )

    def images(self, pixels_BHWC: Tensor) -> Tensor:
        """The teacher's input, on its device."""
        return normalise_images(pixels_BHWC, self.teacher.input.mean, self.teacher.input.std, self.device)

    def capture(self, geometry: FactorGeometry, input_calls: Sequence[int] | None = None) -> FactorCapture:
        """What captures the factors of this geometry from the teacher.

        Args:
            geometry: the layers, heads and rows to capture, and whether v or the blocks' inputs are wanted.
            input_calls: as in `FactorCapture`, to capture each layer's input too.
        """
        return FactorCapture(
            self.teacher.model,
            geometry.layers,
            geometry.heads,
            queries=geometry.queries,
            with_values=geometry.v_head_dim > 0,
            with_block_inputs=geometry.input_width > 0,
            input_calls=input_calls,
        )

    def check_finite(
        self, capture: FactorCapture, layers: Sequence[LayerAttention], name_of: Callable[[int], str] | None = None
    ) -> None:
        """Refuse attention that is not finite.

        Args:
            capture: what captured it.
            layers: the captured attention of a batch.
            name_of: what the user calls the view at a position of the batch.

        Raises:
            NotFiniteError: some is NaN or infinite.
        """
        with autocast(self.device, self.dtype):  # which says what it was computed in
            found = find_not_finite(capture.layers, layers)
        if found is not None:
            raise NotFiniteError(found, name_of)

    def factors(self, capture: FactorCapture, pixels_BHWC: Tensor) -> list[LayerAttention]:
        """The wanted layers' factors, or maps, of a batch of views.

        Args:
            capture: what captures them.
            pixels_BHWC: uint8.

        Raises:
            ConfigError: the batch does not fit in the device's memory.
            UnsupportedAttentionError: as `FactorCapture`.
        """
        explained = memory_errors_explained(self.teacher.name, len(pixels_BHWC), self.device)
        with explained, autocast(self.device, self.dtype):
            return capture(self.images(pixels_BHWC))
