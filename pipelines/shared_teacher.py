"""One teacher for several students of a sweep: what it gives for a batch is worked out once."""

from __future__ import annotations

from atcache.attention.factors import LayerAttention
from atcache.attention.pairing import TeacherFactors
from atcache.loader import Batch

from .students import CacheTeacher, LiveTeacher


class SharedTeacher:
    """Gives students that take the same batch, one after another, the same factors.

    They stay until the next batch. So a cache's are shared by students that copy, whose own steps hold the factors of
    all layers anyway; distilling holds one layer at a time, and decodes for itself.
    """

    def __init__(self, teacher: CacheTeacher | LiveTeacher) -> None:
        self._teacher = teacher
        self._batch: Batch | None = None
        self._factors: TeacherFactors | None = None

    def factors(self, batch: Batch) -> TeacherFactors:
        """The factors of a batch; the same object for the same batch."""
        if self._factors is None or batch is not self._batch:
            self._batch = self._factors = None  # before the next ones need room
            self._factors = _KeptLayers(self._teacher.factors(batch))
            self._batch = batch
        return self._factors


class _KeptLayers:
    """Factors whose layers are decoded when they are first asked for."""

    def __init__(self, factors: TeacherFactors) -> None:
        self._given = factors
        self._layers: dict[int, LayerAttention] = {}

    @property
    def heads(self) -> tuple[int, ...] | None:
        """See `TeacherFactors.heads`."""
        return self._given.heads

    def layer(self, block: int) -> LayerAttention:
        """See `TeacherFactors.layer`."""
        if block not in self._layers:
            self._layers[block] = self._given.layer(block)
        return self._layers[block]
