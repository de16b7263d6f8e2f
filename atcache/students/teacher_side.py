"""The attention of a teacher that comes with each batch: from one cache, from several, or from the running teacher."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import fields, replace
from pathlib import Path

import torch
from torch import Tensor

from atcache.attention.capture import FactorCapture
from atcache.attention.factors import LayerAttention, LayerFactors, LayerMaps
from atcache.cache.coders import stored_coder
from atcache.cache.record import CacheRecord
from atcache.choices import OF_VALUES, Queries, What
from atcache.codecs.base import Coder
from atcache.errors import ConfigError
from atcache.feed.batch import Batch, Codes
from atcache.feed.prefetch import copied
from atcache.store.reader import CacheReader
from atcache.students.pairing import Pairing, TeacherFactors
from atcache.teachers.load import load_teacher
from atcache.teachers.record import TeacherRecord
from atcache.teachers.run import TeacherRun


class CachedFactors:
    """Attention decoded from codes. Each layer is decoded when it is needed, after those that its codec needs for it.

    No q and k are kept here: autograd keeps what a student's backward pass needs, such as the q and k it copies.
    """

    def __init__(self, coder: Coder, codes_BLTC: Tensor, first_row: int = 0, extent: int | None = None) -> None:
        """Take the codes of a batch; see `Coder.decode`."""
        self._coder = coder
        self._decoded = coder.decode(codes_BLTC, first_row, extent)
        self._position_of = {block: position for position, block in enumerate(coder.geometry.layers)}

    @property
    def heads(self) -> tuple[int, ...]:
        """See `TeacherFactors.heads`."""
        return self._coder.geometry.heads

    def layer(self, block: int) -> LayerAttention:
        """See `TeacherFactors.layer`."""
        if block not in self._position_of:
            stored = ", ".join(map(str, self._position_of))
            raise ConfigError(f"layer {block} of the teacher is not in the cache, which holds layers {stored}.")
        try:
            return self._decoded.layer(self._position_of[block])
        except IndexError as error:
            raise ConfigError(
                f"layer {block} of the teacher is in the cache, but was not read with this batch. Ask for it in the "
                "`layers` of the batches."
            ) from error


class LiveFactors:
    """Attention just captured from a running teacher."""

    def __init__(self, layers: Mapping[int, LayerAttention], heads: tuple[int, ...] | None = None) -> None:
        """Take the attention by block, and the heads it has; None if they are just those that are wanted."""
        self._layers = layers
        self.heads = heads

    def layer(self, block: int) -> LayerAttention:
        """See `TeacherFactors.layer`."""
        return self._layers[block]


class JoinedFactors:
    """The attention that comes from several caches as one: each layer is put together when it is needed.

    Args:
        parts: the attention of one teacher; each part has some rows of the batch.
        row_B: the rows of each part, int64 on the parts' device; each row of the batch is in exactly one part.
    """

    def __init__(self, parts: Sequence[TeacherFactors], row_B: Sequence[Tensor]) -> None:
        self._parts, self._row_B = parts, row_B
        self._num_rows = sum(map(len, row_B))

    @property
    def heads(self) -> tuple[int, ...] | None:
        """See `TeacherFactors.heads`."""
        return self._parts[0].heads

    def layer(self, block: int) -> LayerAttention:
        """See `TeacherFactors.layer`. If one part has only maps, the whole layer comes as maps."""
        layers = [part.layer(block) for part in self._parts]
        factors = [layer for layer in layers if isinstance(layer, LayerFactors)]
        if len(factors) < len(layers):
            return LayerMaps(attn_BHQK=self._joined([layer.maps() for layer in layers]))
        # All parts have the same bias, the teacher's. Factors are joined by name, since some parts may lack v or x.
        parts = {
            field.name: [getattr(part, field.name) for part in factors]
            for field in fields(LayerFactors)
            if field.name.endswith(("_BHTD", "_BNTC"))
        }
        joined = {name: None if any(part is None for part in of) else self._joined(of) for name, of in parts.items()}
        return replace(factors[0], **joined)

    def _joined(self, parts: Sequence[Tensor]) -> Tensor:
        """Each part's rows in their places. Under autocast some codecs decode to its type and others to float32."""
        dtype = torch.float32 if len({part.dtype for part in parts}) > 1 else parts[0].dtype
        joined = parts[0].new_empty((self._num_rows, *parts[0].shape[1:]), dtype=dtype)
        for part, row_B in zip(parts, self._row_B, strict=True):
            joined[row_B] = part.to(dtype)
        return joined


class CacheTeacher:
    """Gives each batch its teacher's factors: decodes the batch's codes, with the codec of each cache."""

    def __init__(self, readers: Sequence[CacheReader], pairings: Sequence[Pairing], device: torch.device) -> None:
        """Take the caches in the order of their rows, and what students are given of them.

        Raises:
            ConfigError: a student is given q or k, but those of a cache are not the teacher's own, only have the same
                maps; or it is given v, but a cache has none.
        """
        self._device = device
        layers = sorted({layer for pairing in pairings for layer in pairing.teacher_layers})
        whats: set[What] = {pairing.what for pairing in pairings}
        self._coders = [_coder(reader, whats - {"map"}, device) for reader in readers]
        self.code_layers = tuple(
            coder.code_rows([coder.geometry.layers.index(layer) for layer in layers]) for coder in self._coders
        )
        """For each cache, the rows of L to read."""

    def factors(self, batch: Batch) -> TeacherFactors:
        """The factors of a batch that came with codes."""
        assert batch.codes, "batches for a cache's teacher are read with codes"
        parts = [self._part(codes) for codes in batch.codes]
        if len(parts) == 1:
            return parts[0]
        return JoinedFactors(parts, [copied(torch.from_numpy(codes.row_B), self._device) for codes in batch.codes])

    def looked_at(self, batch: Batch) -> Batch:
        """The batch, with what decoding must know of its codes; to be called while they are in host memory."""
        if all(codes.extent is not None for codes in batch.codes):
            return batch
        codes = (each._replace(extent=self._extent(each)) for each in batch.codes)
        return batch._replace(codes=tuple(codes))

    def _extent(self, codes: Codes) -> int:
        return self._coders[codes.part].extent(codes.codes_BLTC) if codes.extent is None else codes.extent

    def _part(self, codes: Codes) -> CachedFactors:
        extent = self._extent(codes)  # before they are on the device
        codes_BLTC = codes.codes_BLTC.to(self._device, non_blocking=True)
        return CachedFactors(self._coders[codes.part], codes_BLTC, self.code_layers[codes.part].start, extent)


def _coder(reader: CacheReader, factors: Set[What], device: torch.device) -> Coder:
    """A cache's coder, which must decode the teacher's own `factors` if any are named."""
    record = CacheRecord.of(reader)
    codec = record.make_codec(reader.path)
    coder = stored_coder(reader, codec, record.geometry, str(device))
    if (of_values := sorted(factors & OF_VALUES)) and not coder.geometry.v_head_dim:
        raise ConfigError(
            f"--what {of_values[0]} needs the teacher's v, which {reader.path} does not hold. Build it with --store v, "
            "or train with another --what."
        )
    if factors and not coder.factors_are_teachers:
        raise ConfigError(
            f"--what {min(factors)} needs the teacher's own q and k, but codec {codec.name} of {reader.path} keeps "
            "only their maps. Build it with --codec int8 or exact, or train without --what."
        )
    return coder


class LiveTeacher:
    """Gives each batch its teacher's factors by running the teacher: what a cache replaces, kept for comparison."""

    def __init__(
        self,
        run: TeacherRun,
        heads: Sequence[int],
        layers: Sequence[int],
        *,
        queries: Queries = "all",
        with_values: bool = False,
    ) -> None:
        self._run = run
        self._capture = FactorCapture(run.teacher.model, layers, heads, queries=queries, with_values=with_values)
        self._heads = tuple(heads)

    def factors(self, batch: Batch) -> TeacherFactors:
        """The factors of a batch's pixels."""
        layers = self._run.factors(self._capture, batch.pixels_BHWC)
        return LiveFactors(dict(zip(self._capture.layers, layers, strict=True)), self._heads)

    def looked_at(self, batch: Batch) -> Batch:
        """See `CacheTeacher.looked_at`: there is nothing to know."""
        return batch


class SharedTeacher:
    """Gives students that take the same batch, one after another, the same factors.

    The factors stay in memory until the next batch. So only students that copy share a cache's factors: their own steps
    hold those of all layers anyway. A student that is distilled holds one layer at a time, and decodes for itself.
    """

    def __init__(self, teacher: CacheTeacher | LiveTeacher) -> None:
        self._teacher = teacher
        self._batch: Batch | None = None
        self._factors: TeacherFactors | None = None

    def looked_at(self, batch: Batch) -> Batch:
        """See `CacheTeacher.looked_at`."""
        return self._teacher.looked_at(batch)

    def factors(self, batch: Batch) -> TeacherFactors:
        """The factors of a batch; the same object for the same batch."""
        if self._factors is None or batch is not self._batch:
            self._batch = self._factors = None  # freed before the next ones need memory
            self._factors = _KeptLayers(self._teacher.factors(batch))
            self._batch = batch
        return self._factors


class _KeptLayers:
    """Factors whose layers are decoded once, when they are first needed, and then kept."""

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


def start_teacher(
    record: TeacherRecord, weights: Path | None, pairings: Sequence[Pairing], device: torch.device
) -> LiveTeacher:
    """A cache's teacher, loaded and ready to run.

    Args:
        record: which teacher it was.
        weights: its weights; None takes timm's.
        pairings: what students are given of it.
        device: where it runs.

    Raises:
        CacheMismatchError: the weights are not the recorded ones.
    """
    teacher = load_teacher(record.name, weights=weights, device=device)
    layers = sorted({layer for pairing in pairings for layer in pairing.teacher_layers})
    heads = sorted({head for pairing in pairings for head in pairing.teacher_heads})
    with_values = any(pairing.needs_values for pairing in pairings)
    queries = record.geometry.queries
    return LiveTeacher(record.run(teacher, device), heads, layers, queries=queries, with_values=with_values)
