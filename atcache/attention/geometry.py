"""FactorGeometry: what all layers of one teacher's attention have in common. Importing it does not import torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from atcache.attention.tokens import MOST_VALUES, TokenLayout
from atcache.fields import JsonFields, Omitted, Range

AttentionKind = Literal["factors", "maps"]
"""What a teacher gives: factors (q and k), or maps if its maps are not the softmax of one q k^T."""
_Index = Annotated[int, Range(at_least=0)]
_Count = Annotated[int, Range(at_least=1, at_most=MOST_VALUES)]


@dataclass(frozen=True, kw_only=True, slots=True)
class FactorGeometry(JsonFields):
    """The layers and heads that are kept, and their shapes. They are the same for every view of one teacher."""

    is_strict: ClassVar[bool] = True
    layers: tuple[_Index, ...]
    """Block indices of the teacher, ascending."""
    heads: tuple[_Index, ...]
    """Indices of the heads kept in each of these layers, ascending."""
    num_model_heads: _Count
    """Heads that the teacher has in a layer, kept or not."""
    num_kv_heads: _Count
    """Heads of k that are kept: `len(heads)`, or fewer in grouped-query attention. There the head at position h uses
    head h // (len(heads) // num_kv_heads) of k."""
    head_dim: Annotated[int, Range(at_least=0, at_most=MOST_VALUES)]
    """Components of q and k in a head; 0 for maps."""
    tokens: TokenLayout
    """Prefix tokens and patch grid."""
    scale: Annotated[float, Range(above=0, at_most=1e6)]
    """Multiplies q k^T before the softmax, usually head_dim ** -0.5; 1 for maps."""
    kind: Annotated[AttentionKind, Omitted] = "factors"
    """Whether the teacher gives factors or maps."""
    v_head_dim: Annotated[_Count, Omitted] = 0
    """Components of v in each of its `num_kv_heads` heads; 0 if v is not kept."""

    @property
    def map_nbytes(self) -> int:
        """Bytes of one view's maps in float16. Compression is measured against this, the obvious way to store maps."""
        return len(self.layers) * len(self.heads) * self.tokens.num_tokens**2 * 2
