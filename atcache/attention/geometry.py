"""FactorGeometry: what all layers of one teacher's attention have in common. Importing it does not import torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from atcache.attention.tokens import TokenLayout

AttentionKind = Literal["factors", "maps"]
"""What a teacher gives: factors (q and k), or maps if its maps are not the softmax of one q k^T."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FactorGeometry:
    """The layers and heads that are kept, and their shapes. They are the same for every view of one teacher."""

    layers: tuple[int, ...]
    """Block indices of the teacher, ascending."""
    heads: tuple[int, ...]
    """Indices of the heads kept in each of these layers, ascending."""
    num_model_heads: int
    """Heads that the teacher has in a layer, kept or not."""
    num_kv_heads: int
    """Heads of k that are kept: `len(heads)`, or fewer in grouped-query attention. There the head at position h uses
    head h // (len(heads) // num_kv_heads) of k."""
    head_dim: int
    """Components of q and k in a head; 0 for maps."""
    tokens: TokenLayout
    """Prefix tokens and patch grid."""
    scale: float
    """Multiplies q k^T before the softmax, usually head_dim ** -0.5; 1 for maps."""
    kind: AttentionKind = "factors"
    """Whether the teacher gives factors or maps."""
    v_head_dim: int = 0
    """Components of v in each of its `num_kv_heads` heads; 0 if v is not kept."""

    @property
    def map_nbytes(self) -> int:
        """Bytes of one view's maps in float16. Compression is measured against this, the obvious way to store maps."""
        return len(self.layers) * len(self.heads) * self.tokens.num_tokens**2 * 2

    def to_json(self) -> dict[str, Any]:
        """The fields as a JSON object. It omits the last two if they are defaults, because older caches lack them."""
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
        """The geometry that `to_json` turned into `fields`."""
        parsed: dict[str, Any] = {
            "layers": tuple(fields["layers"]),
            "heads": tuple(fields["heads"]),
            "tokens": TokenLayout.from_json(fields["tokens"]),
        }
        return cls(**{**fields, **parsed})
