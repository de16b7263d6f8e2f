"""What a student is given of its teacher with each batch: from a cache, from the running teacher, or both joined."""

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
from atcache.choices import OF_VALUES, What
from atcache.codecs.base import Coder
from atcache.errors import ConfigError
from atcache.feed.batch import Batch, Codes
from atcache.store.reader import CacheReader
from atcache.students.pairing import Pairing, TeacherFactors
from atcache.teachers.load import load_teacher
from atcache.teachers.record import TeacherRecord
from atcache.teachers.run import TeacherRun


class CachedFactors:
    """Attention decoded from codes, each layer when it is asked for: no layer that nobody uses is decoded.

    Nothing is kept here. What a student's backward pass needs of a layer, such as the q and k it copies, autograd keeps
    until then.
    """

    def __init__(self, coder: Coder, codes_BLTC: Tensor, first_code_layer: int = 0) -> None:
        """Take the codes of a batch, from `first_code_layer` of what the coder makes on."""
        self._coder = coder
        self._codes_BLTC = codes_BLTC
        self._first_code_layer = first_code_layer
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
        position = self._position_of[block]
        row = self._coder.code_layer(position) - self._first_code_layer
        if not 0 <= row < self._codes_BLTC.shape[1]:
            raise ConfigError(
                f"layer {block} of the teacher is in the cache, but was not read with this batch. Ask for it in the "
                "`layers` of the batches."
            )
        return self._coder.decode(position, self._codes_BLTC[:, row])


class LiveFactors:
    """Attention just captured from a running teacher."""

    def __init__(self, layers: Mapping[int, LayerAttention], heads: tuple[int, ...] | None = None) -> None:
        """Take the attention by block, and which heads it is of; None for just those that are wanted."""
        self._layers = layers
        self.heads = heads

    def layer(self, block: int) -> LayerAttention:
        """See `TeacherFactors.layer`."""
        return self._layers[block]


class JoinedFactors:
    """Several teacher's sides as one: each layer is put together when it is asked for.

    Args:
        parts: the attention of some rows of the batch each, of one teacher.
        row_B: which rows, int64 on the parts' device; together each row of the batch once.
    """

    def __init__(self, parts: Sequence[TeacherFactors], row_B: Sequence[Tensor]) -> None:
        self._parts, self._row_B = parts, row_B
        self._num_rows = sum(map(len, row_B))

    @property
    def heads(self) -> tuple[int, ...] | None:
        """See `TeacherFactors.heads`."""
        return self._parts[0].heads

    def layer(self, block: int) -> LayerAttention:
        """See `TeacherFactors.layer`. Where one part has maps only, all of it is maps."""
        layers = [part.layer(block) for part in self._parts]
        factors = [layer for layer in layers if isinstance(layer, LayerFactors)]
        if len(factors) < len(layers):
            return LayerMaps(attn_BHQK=self._joined([layer.maps() for layer in layers]))
        # The bias is the teacher's own, and so one for all. By name, since not all factors have all of them.
        parts = {
            field.name: [getattr(part, field.name) for part in factors]
            for field in fields(LayerFactors)
            if field.name.endswith("_BHTD")
        }
        joined = {name: None if any(part is None for part in of) else self._joined(of) for name, of in parts.items()}
        return replace(factors[0], **joined)

    def _joined(self, parts: Sequence[Tensor]) -> Tensor:
        """Each part's rows in their places; under autocast some codecs decode to its type, others to float32."""
        dtype = torch.float32 if len({part.dtype for part in parts}) > 1 else parts[0].dtype
        joined = parts[0].new_empty((self._num_rows, *parts[0].shape[1:]), dtype=dtype)
        for part, row_B in zip(parts, self._row_B, strict=True):
            joined[row_B] = part.to(dtype)
        return joined


class CacheTeacher:
    """Gives each batch its teacher's factors, decoded from the batch's codes, those of each cache by its own codec."""

    def __init__(self, readers: Sequence[CacheReader], pairings: Sequence[Pairing], device: torch.device) -> None:
        """Take the caches in the order of their rows, and what students are given of them.

        Raises:
            ConfigError: a student is given q or k, and a cache's are in another basis than the teacher's; or v, and a
                cache has none.
        """
        self._device = device
        layers = sorted({layer for pairing in pairings for layer in pairing.teacher_layers})
        whats: set[What] = {pairing.what for pairing in pairings}
        self._coders = [_coder(reader, whats - {"map"}, device) for reader in readers]
        self.code_layers = tuple(_code_layers(coder, layers) for coder in self._coders)
        """For each cache, the rows of L to read."""

    def factors(self, batch: Batch) -> TeacherFactors:
        """The factors of a batch that came with codes."""
        assert batch.codes, "batches for a cache's teacher are read with codes"
        parts = [self._part(codes) for codes in batch.codes]
        if len(parts) == 1:
            return parts[0]
        return JoinedFactors(parts, [torch.from_numpy(codes.row_B).to(self._device) for codes in batch.codes])

    def _part(self, codes: Codes) -> CachedFactors:
        codes_BLTC = codes.codes_BLTC.to(self._device, non_blocking=True)
        return CachedFactors(self._coders[codes.part], codes_BLTC, self.code_layers[codes.part].start)


def _coder(reader: CacheReader, factors: Set[What], device: torch.device) -> Coder:
    """A cache's coder, which must give the teacher's own `factors` where there are any."""
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
            f"--what {min(factors)} needs the teacher's own q and k, but codec {codec.name} of {reader.path} keeps no "
            "more of them than their maps. Build it with --codec int8 or exact, or train without --what."
        )
    return coder


def _code_layers(coder: Coder, layers: Sequence[int]) -> slice:
    """The rows of L that these blocks are decoded from. One range is one read; what is between them comes along."""
    rows = [coder.code_layer(coder.geometry.layers.index(layer)) for layer in layers]
    return slice(min(rows), max(rows) + 1)


class LiveTeacher:
    """Gives each batch its teacher's factors by running the teacher: what a cache replaces, kept for comparison."""

    def __init__(
        self, run: TeacherRun, heads: Sequence[int], layers: Sequence[int], *, with_values: bool = False
    ) -> None:
        self._run = run
        self._capture = FactorCapture(run.teacher.model, layers, heads, with_values=with_values)
        self._heads = tuple(heads)

    def factors(self, batch: Batch) -> TeacherFactors:
        """The factors of a batch's pixels."""
        layers = self._run.factors(self._capture, batch.pixels_BHWC)
        return LiveFactors(dict(zip(self._capture.layers, layers, strict=True)), self._heads)


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


def start_teacher(
    record: TeacherRecord, weights: Path | None, pairings: Sequence[Pairing], device: torch.device
) -> LiveTeacher:
    """A cache's teacher itself, running.

    Args:
        record: which teacher it was.
        weights: its weights; None takes timm's.
        pairings: what students are given of it.
        device: where it runs.

    Raises:
        CacheMismatchError: these are other weights than the recorded ones.
    """
    teacher = load_teacher(record.name, weights=weights, device=device)
    layers = sorted({layer for pairing in pairings for layer in pairing.teacher_layers})
    heads = sorted({head for pairing in pairings for head in pairing.teacher_heads})
    with_values = any(pairing.needs_values for pairing in pairings)
    return LiveTeacher(record.run(teacher, device), heads, layers, with_values=with_values)
