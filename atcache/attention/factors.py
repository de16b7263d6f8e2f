"""The attention of one layer: its factors (the q and k that give the map), or the map itself.

Both kinds can compute maps and select samples and heads. `FactorGeometry` (geometry.py) holds what all layers of one
teacher have in common.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from atcache.errors import AttentionShapeError

INPUTS = ("attention", "mlp")
"""The parts of a block whose inputs can be kept, in the order of N in `inputs_BNTC`."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class LayerFactors:
    """One layer's factors for a batch: attn_BHQK = softmax(scale * q_BHTD k_BHTD^T + bias).

    Where only some rows of the maps are kept, q has only the first tokens, and bias only their rows.
    """

    q_BHTD: Tensor
    """Queries, shape (batch, head, token, head dim), after q norm and rotary embedding."""
    k_BHTD: Tensor
    """Keys, same shape, except that the head axis may be shorter (grouped-query attention)."""
    scale: float
    """Multiplies q k^T."""
    bias: Tensor | None = None
    """Added to the logits: shape (1 or batch, 1 or head, query, key), float; or None."""
    v_BHTD: Tensor | None = None
    """Values, with k's batch, heads and tokens, and any head dim. The map does not need them. None if not kept."""
    input_BTC: Tensor | None = None
    """What q and k of all heads are projections of, shape (batch, token, width), as the model made it: under autocast
    it may be wider than q and k. None if not kept."""
    inputs_BNTC: Tensor | None = None
    """What the block's attention and its MLP get, after the norms before them: shape (batch, 2, token, width). None if
    not kept."""

    def __post_init__(self) -> None:
        if (
            self.q_BHTD.ndim != 4
            or self.k_BHTD.ndim != 4
            or self.q_BHTD.shape[2] > self.k_BHTD.shape[2]
            or self.q_BHTD.shape[3] != self.k_BHTD.shape[3]
        ):
            raise AttentionShapeError(
                f"q has shape {tuple(self.q_BHTD.shape)} and k has shape {tuple(self.k_BHTD.shape)}: expected "
                "(batch, head, token, head dim) for both, with equal head dim, and all tokens or the first ones in q."
            )
        if self.v_BHTD is not None and (self.v_BHTD.ndim != 4 or self.v_BHTD.shape[:3] != self.k_BHTD.shape[:3]):
            raise AttentionShapeError(
                f"v has shape {tuple(self.v_BHTD.shape)} and k has shape {tuple(self.k_BHTD.shape)}: expected (batch, "
                "head, token, head dim) for both, with the first three equal."
            )
        batch_and_tokens = (self.k_BHTD.shape[0], self.k_BHTD.shape[2])
        if self.input_BTC is not None and (self.input_BTC.ndim != 3 or self.input_BTC.shape[:2] != batch_and_tokens):
            raise AttentionShapeError(
                f"the input has shape {tuple(self.input_BTC.shape)} and k has shape {tuple(self.k_BHTD.shape)}: "
                "expected (batch, token, width) and (batch, head, token, head dim)."
            )
        if self.inputs_BNTC is not None and (
            self.inputs_BNTC.ndim != 4
            or self.inputs_BNTC.shape[:3] != (self.k_BHTD.shape[0], len(INPUTS), self.k_BHTD.shape[2])
        ):
            raise AttentionShapeError(
                f"the block's inputs have shape {tuple(self.inputs_BNTC.shape)} and k has shape "
                f"{tuple(self.k_BHTD.shape)}: expected (batch, {len(INPUTS)}, token, width) and (batch, head, token, "
                "head dim)."
            )

    @property
    def shape_BHT(self) -> tuple[int, int, int]:
        """(batch, head, token); the tokens are those whose rows there are."""
        return self.q_BHTD.shape[0], self.q_BHTD.shape[1], self.q_BHTD.shape[2]

    @property
    def num_keys(self) -> int:
        """The length of the maps' rows: all tokens."""
        return self.k_BHTD.shape[2]

    def repeated_k_BHTD(self) -> Tensor:
        """Keys with one head for every head of q: k itself, or its repeated heads in grouped-query attention."""
        return self._repeated(self.k_BHTD)

    def repeated_v_BHTD(self) -> Tensor:
        """Values with one head for every head of q, as `repeated_k_BHTD`.

        Raises:
            AttentionShapeError: v was not kept.
        """
        return self._repeated(self.kept_v_BHTD())

    def kept_v_BHTD(self) -> Tensor:
        """Values as they are.

        Raises:
            AttentionShapeError: v was not kept.
        """
        if self.v_BHTD is None:
            raise AttentionShapeError("v is needed, but these factors have only q and k. Capture or build with v.")
        return self.v_BHTD

    def repeated(self, name: str) -> Tensor:
        """The factor "q", "k" or "v" with one head for every head of q."""
        if name == "q":
            return self.q_BHTD
        return self.repeated_k_BHTD() if name == "k" else self.repeated_v_BHTD()

    def _repeated(self, grouped_BHTD: Tensor) -> Tensor:
        groups = self.q_BHTD.shape[1] // grouped_BHTD.shape[1]
        return grouped_BHTD if groups == 1 else grouped_BHTD.repeat_interleave(groups, dim=1)

    def maps(self) -> Tensor:
        """The maps, attn_BHQK float32: probabilities, rows along K sum to 1."""
        return torch.softmax(self._logits(torch.float32), dim=-1)

    def log_maps(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Logarithms of the maps, computed in `dtype`. Only masked keys are -inf, not the smallest probabilities."""
        return torch.log_softmax(self._logits(dtype), dim=-1)

    def _logits(self, dtype: torch.dtype) -> Tensor:
        # Autocast would round the product to its own dtype, and rows of the map would not sum to 1.
        with torch.autocast(self.q_BHTD.device.type, enabled=False):
            logits_BHQK = (self.q_BHTD.to(dtype) * self.scale) @ self.repeated_k_BHTD().to(dtype).mT
        return logits_BHQK if self.bias is None else logits_BHQK + self.bias.to(dtype)

    def select(self, samples: slice) -> LayerFactors:
        """The factors of some samples of the batch; views, not copies."""
        bias = self.bias
        return LayerFactors(
            q_BHTD=self.q_BHTD[samples],
            k_BHTD=self.k_BHTD[samples],
            scale=self.scale,
            bias=bias if bias is None or bias.shape[0] == 1 else bias[samples],
            v_BHTD=None if self.v_BHTD is None else self.v_BHTD[samples],
            input_BTC=None if self.input_BTC is None else self.input_BTC[samples],
            inputs_BNTC=None if self.inputs_BNTC is None else self.inputs_BNTC[samples],
        )

    def select_heads(self, heads: Sequence[int]) -> LayerFactors:
        """The factors of some heads of q, by position and in the order given; grouped keys and values are repeated."""
        return LayerFactors(
            q_BHTD=take_heads(self.q_BHTD, heads),
            k_BHTD=take_heads(self.repeated_k_BHTD(), heads),
            scale=self.scale,
            bias=self.bias if self.bias is None or self.bias.shape[1] == 1 else take_heads(self.bias, heads),
            v_BHTD=None if self.v_BHTD is None else take_heads(self.repeated_v_BHTD(), heads),
            input_BTC=self.input_BTC,
            inputs_BNTC=self.inputs_BNTC,
        )

    def select_queries(self, queries: int | Sequence[int]) -> LayerFactors:
        """The factors of some rows of the maps: q and bias are cut. Keys stay whole, so rows still sum to 1.

        Args:
            queries: so many first rows, which are views; or the rows of these tokens in the order given, copies.
        """
        rows = slice(queries) if isinstance(queries, int) else list(queries)
        bias = None if self.bias is None else self.bias[:, :, rows]
        return replace(self, q_BHTD=self.q_BHTD[:, :, rows], bias=bias)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class LayerMaps:
    """One layer's maps for a batch, for models without factors and for caches that store maps."""

    attn_BHQK: Tensor
    """Probabilities, shape (batch, head, query, key), any float dtype; rows along K sum to 1. Masked keys are 0. There
    is a row for every token, or only for the first ones."""

    def __post_init__(self) -> None:
        if self.attn_BHQK.ndim != 4 or self.attn_BHQK.shape[2] > self.attn_BHQK.shape[3]:
            raise AttentionShapeError(
                f"maps of shape {tuple(self.attn_BHQK.shape)}: expected (batch, head, query, key), with at most as "
                "many queries as keys."
            )

    @property
    def shape_BHT(self) -> tuple[int, int, int]:
        """(batch, head, token); the tokens are those whose rows there are."""
        return self.attn_BHQK.shape[0], self.attn_BHQK.shape[1], self.attn_BHQK.shape[2]

    @property
    def num_keys(self) -> int:
        """The length of the maps' rows: all tokens."""
        return self.attn_BHQK.shape[3]

    def maps(self) -> Tensor:
        """The maps, attn_BHQK float32."""
        return self.attn_BHQK.float()

    def log_maps(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Logarithms of the maps in `dtype`; -inf for a probability of 0."""
        return self.attn_BHQK.to(dtype).log()

    def select(self, samples: slice) -> LayerMaps:
        """The maps of some samples of the batch; views, not copies."""
        return LayerMaps(attn_BHQK=self.attn_BHQK[samples])

    def select_heads(self, heads: Sequence[int]) -> LayerMaps:
        """The maps of some heads, by position and in the order given."""
        return LayerMaps(attn_BHQK=take_heads(self.attn_BHQK, heads))

    def select_queries(self, queries: int | Sequence[int]) -> LayerMaps:
        """Some rows of the maps, as `LayerFactors.select_queries`."""
        return LayerMaps(attn_BHQK=self.attn_BHQK[:, :, slice(queries) if isinstance(queries, int) else list(queries)])


LayerAttention = LayerFactors | LayerMaps
"""The attention of one layer for a batch, as factors or as maps."""


def take_heads(tensor_BHXX: Tensor, heads: Sequence[int]) -> Tensor:
    """A copy of some heads of (batch, head, ..., ...), by position and in the order given."""
    return tensor_BHXX.index_select(1, head_index(tuple(heads), tensor_BHXX.device))


@lru_cache(maxsize=16)
def head_index(heads: tuple[int, ...], device: torch.device) -> Tensor:
    """The heads as an index; cached, since the copy of a list to a GPU makes the host wait for it."""
    with torch.inference_mode(False):  # the first caller may be in it, and later ones may train
        return torch.tensor(heads, device=device)
