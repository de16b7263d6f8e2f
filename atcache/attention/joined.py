"""One batch's attention out of several caches, each decoded by its own coder, put together on the device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace

import torch
from torch import Tensor

from atcache.attention.factors import LayerAttention, LayerFactors, LayerMaps
from atcache.attention.pairing import TeacherFactors


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
