"""Factors: the q and k a map is the softmax of, and the geometry all factors of one teacher share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from atcache.errors import AttentionShapeError
from atcache.tokens import TokenLayout


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
    """Components of q and k in a head."""
    tokens: TokenLayout
    """Prefix tokens and patch grid."""
    scale: float
    """What q k^T is multiplied by before the softmax, usually head_dim ** -0.5."""

    @property
    def map_nbytes(self) -> int:
        """Bytes of one view's maps as float16: what people would store, and what compression is measured against."""
        return len(self.layers) * len(self.heads) * self.tokens.num_tokens**2 * 2

    def to_json(self) -> dict[str, Any]:
        """The fields as a JSON object."""
        return {
            "layers": list(self.layers),
            "heads": list(self.heads),
            "num_model_heads": self.num_model_heads,
            "num_kv_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "tokens": self.tokens.to_json(),
            "scale": self.scale,
        }

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> FactorGeometry:
        """The geometry `to_json` came from."""
        parsed: dict[str, Any] = {
            "layers": tuple(fields["layers"]),
            "heads": tuple(fields["heads"]),
            "tokens": TokenLayout.from_json(fields["tokens"]),
        }
        return cls(**{**fields, **parsed})


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class LayerFactors:
    """One layer's factors for a batch: attn_BHQK = softmax(scale * q_BHTD k_BHTD^T + bias)."""

    q_BHTD: Tensor
    """Queries, shape (batch, head, token, head dim), after q norm and rotary embedding."""
    k_BHTD: Tensor
    """Keys, same shape; the head axis may be shorter (grouped-query attention)."""
    scale: float
    """Multiplies q k^T."""
    bias: Tensor | None = None
    """Added to the logits: shape (1 or batch, 1 or head, token, token), float; None for none."""

    def __post_init__(self) -> None:
        if self.q_BHTD.ndim != 4 or self.k_BHTD.ndim != 4 or self.q_BHTD.shape[-2:] != self.k_BHTD.shape[-2:]:
            raise AttentionShapeError(
                f"factors of shapes {tuple(self.q_BHTD.shape)} and {tuple(self.k_BHTD.shape)}: expected "
                "(batch, head, token, head dim) for both, with equal tokens and head dim."
            )

    def repeated_k_BHTD(self) -> Tensor:
        """Keys with one head for every head of q: k itself, or repeated under grouped-query attention."""
        groups = self.q_BHTD.shape[1] // self.k_BHTD.shape[1]
        return self.k_BHTD if groups == 1 else self.k_BHTD.repeat_interleave(groups, dim=1)

    def maps(self) -> Tensor:
        """The maps, attn_BHQK float32: probabilities, rows along K sum to 1."""
        logits_BHQK = (self.q_BHTD.float() * self.scale) @ self.repeated_k_BHTD().float().mT
        if self.bias is not None:
            logits_BHQK = logits_BHQK + self.bias.float()
        return torch.softmax(logits_BHQK, dim=-1)

    def select(self, samples: slice) -> LayerFactors:
        """The factors of some samples of the batch; views, not copies."""
        bias = self.bias
        return LayerFactors(
            q_BHTD=self.q_BHTD[samples],
            k_BHTD=self.k_BHTD[samples],
            scale=self.scale,
            bias=bias if bias is None or bias.shape[0] == 1 else bias[samples],
        )
