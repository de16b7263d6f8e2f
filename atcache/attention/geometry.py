"""FactorGeometry: what all layers of one teacher's attention have in common. Importing it does not import torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from atcache.attention.tokens import MOST_VALUES, TokenLayout
from atcache.choices import Queries
from atcache.errors import ConfigError
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
    input_width: Annotated[_Count, Omitted] = 0
    """Width of what attention and MLP of each layer's block get; 0 if that is not kept."""
    queries: Annotated[Queries, Omitted] = "all"
    """The tokens whose rows of the maps are kept; every row has all keys."""

    def __post_init__(self) -> None:
        if self.num_queries < 1 or (self.queries == "cls" and not self.tokens.num_prefix_tokens):
            raise ConfigError(
                f"queries={self.queries}: the teacher has no prefix tokens (class token, registers), so its maps have "
                "no rows of them. Leave --queries out."
            )

    @property
    def num_queries(self) -> int:
        """Rows that are kept of each map: those of this many first tokens."""
        return num_query_rows(self.queries, self.tokens)

    @property
    def keeps_all_queries(self) -> bool:
        """Whether maps are whole, with a row for every token."""
        return self.queries == "all"

    @property
    def map_nbytes(self) -> int:
        """Bytes of one view's maps, as far as they are kept, in float16: the obvious way to store them.

        Compression is measured against this.
        """
        return len(self.layers) * len(self.heads) * self.num_queries * self.tokens.num_tokens * 2


def num_query_rows(queries: Queries, tokens: TokenLayout) -> int:
    """The number of first tokens whose rows `queries` names. A class token is always the first of all tokens.

    >>> num_query_rows("prefix", TokenLayout(num_prefix_tokens=5, grid_height=14, grid_width=14))
    5
    """
    return {"all": tokens.num_tokens, "cls": 1, "prefix": tokens.num_prefix_tokens}[queries]
