"""What every codec is: a small frozen config that fits state to a teacher and makes coders.

A codec turns a layer's factors into integers of fixed shape and back. Three steps, so that each is data or pure:

- the *codec* is its configuration, equal to its JSON;
- `fit` looks at calibration factors and returns *state*, small float32 arrays that are stored in the cache;
- `coder` binds codec, geometry and state on one device; the coder encodes and decodes batches there.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from atcache.attention.factors import FactorGeometry, LayerFactors

State = Mapping[str, Tensor]
"""Fitted arrays by name, float32, first axis the layer position; empty for codecs that need none."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Codec(ABC):
    """A codec's configuration. Two codecs with equal fields are the same codec."""

    name: ClassVar[str]

    def to_json(self) -> dict[str, Any]:
        """The codec as a JSON object: its name and its fields."""
        return {"name": self.name, **dataclasses.asdict(self)}

    def fit(self, geometry: FactorGeometry, batches: Iterable[Sequence[LayerFactors]]) -> State:
        """State fitted to calibration factors.

        Args:
            geometry: shapes of the factors.
            batches: per batch of views one `LayerFactors` a kept layer; read once, in order.

        Returns:
            Arrays that `coder` needs beside the configuration; none here.
        """
        del geometry, batches
        return {}

    @abstractmethod
    def coder(
        self, geometry: FactorGeometry, state: State, *, bias_LHQK: Tensor | None = None, device: str = "cpu"
    ) -> Coder:
        """The coder for factors of this geometry on `device`.

        Args:
            geometry: shapes of the factors.
            state: what `fit` returned, or what was read back from a cache.
            bias_LHQK: the teacher's static bias, handed out with the decoded factors; None for none.
            device: where `encode` and `decode` run.
        """


class Coder(ABC):
    """A codec bound to a geometry, its state and a device. Stateless between calls; threads may share it."""

    geometry: FactorGeometry
    codes_dtype: torch.dtype
    """Integer type of the codes."""
    num_components: int
    """C: codes of one token in one layer."""

    def __init__(self, geometry: FactorGeometry, bias_LHQK: Tensor | None, device: str) -> None:
        self.geometry = geometry
        self.device = torch.device(device)
        self._bias_LHQK = None if bias_LHQK is None else bias_LHQK.to(self.device)

    @abstractmethod
    def encode(self, layers: Sequence[LayerFactors]) -> Tensor:
        """Codes of a batch of views.

        Args:
            layers: one `LayerFactors` a kept layer, in the geometry's order, on the coder's device.

        Returns:
            codes_BLTC, integers of `codes_dtype`, on the same device. Equal input gives equal codes.

        Raises:
            CodecError: the factors do not fit in the codes (named with layer and value).
        """

    @abstractmethod
    def decode(self, position: int, codes_BTC: Tensor) -> LayerFactors:
        """Factors of one layer, float32, on the codes' device, with the teacher's bias if it has one.

        Args:
            position: index into the geometry's `layers` (not the block index).
            codes_BTC: this layer's codes.
        """

    def bias(self, position: int) -> Tensor | None:
        """The teacher's static bias of one layer, shape (1, head, token, token), or None."""
        return None if self._bias_LHQK is None else self._bias_LHQK[position].unsqueeze(0)

    @property
    def _num_head_vectors(self) -> int:
        """Vectors of head_dim a token has in a layer: q's heads and k's."""
        return len(self.geometry.heads) + self.geometry.num_kv_heads

    def _join_BTND(self, layer: LayerFactors) -> Tensor:
        """q's heads then k's, by token: shape (batch, token, head vectors, head dim)."""
        return torch.cat([layer.q_BHTD, layer.k_BHTD], dim=1).transpose(1, 2)

    def _split(self, position: int, vectors_BTND: Tensor) -> LayerFactors:
        """The inverse of `_join_BTND`, with the geometry's scale and this layer's bias."""
        vectors_BNTD = vectors_BTND.transpose(1, 2)
        num_heads = len(self.geometry.heads)
        return LayerFactors(
            q_BHTD=vectors_BNTD[:, :num_heads],
            k_BHTD=vectors_BNTD[:, num_heads:],
            scale=self.geometry.scale,
            bias=self.bias(position),
        )
