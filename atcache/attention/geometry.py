"""FactorGeometry: what all layers of one teacher's attention share. Pure: reading it needs no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from atcache.attention.tokens import TokenLayout

AttentionKind = Literal["factors", "maps"]
"""What a teacher hands over: q and k, or maps where these are no softmax of one q k^T."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FactorGeometry:
    """What is the same for every view of a teacher: which layers and heads are kept, and their shapes."""

    layers: tuple[int, ...]
    """Block indices of the teacher, ascending."""
    heads: tuple[int, ...]
    """Head indices kept in each of these layers, ascending."""
    num_model_heads: int
    """Heads the teacher has in a layer, kept or not."""
    num_kv_heads: int
    """Heads of k that are kept: `len(heads)`, or fewer under grouped-query attention, where head position h uses
    k head h // (len(heads) // num_kv_heads)."""
    head_dim: int
    """Components of q and k in a head; 0 for maps."""
    tokens: TokenLayout
    """Prefix tokens and patch grid."""
    scale: float
    """What q k^T is multiplied by before the softmax, usually head_dim ** -0.5; 1 for maps."""
    kind: AttentionKind = "factors"
    """What the teacher hands over."""
    v_head_dim: int = 0
    """Components of v in a head, `num_kv_heads` heads; 0 where v is not kept."""

    @property
    def map_nbytes(self) -> int:
        """Bytes of one view's maps as float16: what people would store, and what compression is measured against."""
        return len(self.layers) * len(self.heads) * self.tokens.num_tokens**2 * 2

    def to_json(self) -> dict[str, Any]:
        """The fields as a JSON object; the last two only where they are not their defaults: older caches lack them."""
        fields: dict[str, Any] = {
            "layers": list(self.layers),
            "heads": list(self.heads),
            "num_model_heads": self.num_model_heads,
            "num_kv_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "tokens": self.tokens.to_json(),
            "scale": self.scale,
        }
        if self.kind != "factors":
            fields["kind"] = self.kind
        if self.v_head_dim:
            fields["v_head_dim"] = self.v_head_dim
        return fields

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> FactorGeometry:
        """The geometry `to_json` came from."""
        parsed: dict[str, Any] = {
            "layers": tuple(fields["layers"]),
            "heads": tuple(fields["heads"]),
            "tokens": TokenLayout.from_json(fields["tokens"]),
        }
        return cls(**{**fields, **parsed})
