"""FactorGeometry: what all layers of one teacher's attention share. Pure: reading it needs no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from atcache.attention.tokens import MOST_VALUES, TokenLayout
from atcache.fields import JsonFields, Omitted, Range

AttentionKind = Literal["factors", "maps"]
"""What a teacher hands over: q and k, or maps where these are no softmax of one q k^T."""
_Index = Annotated[int, Range(at_least=0)]
_Count = Annotated[int, Range(at_least=1, at_most=MOST_VALUES)]


@dataclass(frozen=True, kw_only=True, slots=True)
class FactorGeometry(JsonFields):
    """What is the same for every view of a teacher: which layers and heads are kept, and their shapes."""

    is_strict: ClassVar[bool] = True
    layers: tuple[_Index, ...]
    """Block indices of the teacher, ascending."""
    heads: tuple[_Index, ...]
    """Head indices kept in each of these layers, ascending."""
    num_model_heads: _Count
    """Heads the teacher has in a layer, kept or not."""
    num_kv_heads: _Count
    """Heads of k that are kept: `len(heads)`, or fewer under grouped-query attention, where head position h uses
    k head h // (len(heads) // num_kv_heads)."""
    head_dim: Annotated[int, Range(at_least=0, at_most=MOST_VALUES)]
    """Components of q and k in a head; 0 for maps."""
    tokens: TokenLayout
    """Prefix tokens and patch grid."""
    scale: Annotated[float, Range(above=0, at_most=1e6)]
    """What q k^T is multiplied by before the softmax, usually head_dim ** -0.5; 1 for maps."""
    kind: Annotated[AttentionKind, Omitted] = "factors"
    """What the teacher hands over. Older caches lack this and `v_head_dim`."""
    v_head_dim: Annotated[_Count, Omitted] = 0
    """Components of v in a head, `num_kv_heads` heads; 0 where v is not kept."""

    @property
    def map_nbytes(self) -> int:
        """Bytes of one view's maps as float16: what people would store, and what compression is measured against."""
        return len(self.layers) * len(self.heads) * self.tokens.num_tokens**2 * 2
