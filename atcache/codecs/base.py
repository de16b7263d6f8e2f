"""What every codec is: a small frozen config that fits state to a teacher and makes coders.

A codec turns a layer's factors into integers of fixed shape and back. It has three parts, each data or pure functions:

- the *codec* is its configuration, equal to its JSON;
- `fit` looks at calibration factors and returns *state*, arrays that are stored once in the cache;
- `coder` binds codec, geometry and state to one device; the coder encodes and decodes batches there.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from atcache.attention.factors import INPUTS, LayerAttention, LayerFactors
from atcache.attention.geometry import FactorGeometry
from atcache.attention.projection import InputRecipe
from atcache.errors import CodecError

State = Mapping[str, Tensor]
"""Fitted arrays by name; empty for codecs that need none."""
FitProgress = Callable[[str, float], None]
"""Takes a stage of fitting, in a few words, and the share of it that is done, from 0 to 1."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Codec(ABC):
    """A codec's configuration. Two codecs with equal fields are the same codec."""

    name: ClassVar[str]
    keeps_values: ClassVar[bool] = False
    """Whether v, or what attention and MLP get, can be stored beside q and k."""
    keeps_rows: ClassVar[bool] = False
    """Whether single rows of the maps can be stored, of the tokens that `FactorGeometry.queries` names."""
    codes_inputs: ClassVar[bool] = False
    """Whether it codes the inputs of layers where q and k follow from them, so that these must be captured too."""

    def to_json(self) -> dict[str, Any]:
        """The codec as a JSON object: its name and its fields."""
        return {"name": self.name, **dataclasses.asdict(self)}

    def fit(
        self,
        geometry: FactorGeometry,
        batches: Iterable[Sequence[LayerAttention]],
        *,
        held_back: Sequence[LayerAttention] | None = None,
        nbytes_per_view: Callable[[Tensor], float] | None = None,
        recipe: InputRecipe | None = None,
        progress: FitProgress | None = None,
    ) -> State:
        """State fitted to calibration factors.

        Args:
            geometry: shapes of the factors.
            batches: for each batch of views, one `LayerFactors` or `LayerMaps` per kept layer. May be iterated several
                times.
            held_back: factors of views that are not in `batches`, on which a target must be met; None takes the
                first batch.
            nbytes_per_view: the bytes that one view of given codes_BLTC takes when stored; needed for targets in bytes.
            recipe: how q and k follow from the inputs that the factors carry; None if they carry none.
            progress: called by codecs whose fit takes long, often, with what they do and the share of it that is
                done: `progress("basis", 0.25)`. A share that falls, or another stage, begins anew. While `batches`
                are iterated the codec need not call it: whoever made them knows how many there are, and reports
                stage "teacher". None reports nothing.

        Returns:
            Arrays that `coder` needs beside the configuration; this base class returns none.
        """
        del geometry, batches, held_back, nbytes_per_view, recipe, progress
        return {}

    def refuse_values(self, what: str = "v") -> None:
        """Raise an error if this codec cannot store v, or what else `what` names.

        Raises:
            CodecError: this codec does not keep it.
        """
        if not self.keeps_values:
            raise CodecError(
                f"codec {self.name} stores only what the maps are made from, and {what} is not part of that. Use "
                f"--codec int8 or exact to store {what} too."
            )

    def refuse_rows(self) -> None:
        """Raise an error if this codec cannot store single rows of the maps.

        Raises:
            CodecError: this codec stores what whole maps are made from.
        """
        if not self.keeps_rows:
            raise CodecError(
                f"codec {self.name} stores what whole maps are made from, and only some of their rows are to be kept. "
                "Use --codec logmap, which is the default with --queries."
            )

    @abstractmethod
    def coder(
        self, geometry: FactorGeometry, state: State, *, bias_LHQK: Tensor | None = None, device: str = "cpu"
    ) -> Coder:
        """The coder for factors of this geometry on `device`.

        Args:
            geometry: shapes of the factors.
            state: what `fit` returned, or what was read back from a cache.
            bias_LHQK: the teacher's static bias, returned with the decoded factors; None if it has none.
            device: where `encode` and `decode` run.
        """


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Queued:
    """A batch whose encoding is queued on the device. Nothing has waited for the device to do it.

    Its tensors may be copied to the host meanwhile; `settle` and `Coder.finish` then make codes of the copies. As long
    as it lives, so do the factors, since only they can tell what was wrong.
    """

    parts: tuple[Tensor, ...]
    """What codes are made of; the first axis of each is the batch's views."""
    is_fine_N: Tensor
    """Bool: whether what was checked on the device was as it must be."""
    problems: Sequence[Callable[[], CodecError]]
    """For each of these, what to say if it was not."""
    whole: Callable[[Sequence[Tensor]], tuple[Tensor, ...]] = tuple
    """Completes copies of `parts`, if they are found not to hold everything; looks at the device only then."""

    def settle(self, parts: Sequence[Tensor], is_fine_N: Tensor) -> tuple[Tensor, ...]:
        """What `Coder.finish` takes, for all views or some.

        Args:
            parts: `parts`, or a copy of them.
            is_fine_N: the same.

        Raises:
            CodecError: the factors do not fit in the codes; the message names the layer and the value.
        """
        for is_fine, problem in zip(is_fine_N.cpu().numpy(), self.problems, strict=True):
            if not is_fine:
                raise problem()
        return self.whole(parts)


class Coder(ABC):
    """A codec bound to a geometry, its state and a device. Stateless between calls; threads may share it."""

    factors_are_teachers: ClassVar[bool] = False
    """Whether decoded q and k are each the teacher's own. If False, they are in another basis, in which only their
    product has a meaning."""
    geometry: FactorGeometry
    codes_dtype: torch.dtype
    """Integer type of the codes."""
    num_components: int
    """C: codes of one token in one layer."""
    products_may_round: bool = False
    """Whether encoding loses nothing that counts if the factors of its products are rounded to 10 bits (TF32)."""
    input_calls: tuple[int, ...] | None = None
    """What `FactorCapture` needs to capture the inputs that this coder encodes; None if it encodes q and k."""

    def __init__(self, geometry: FactorGeometry, bias_LHQK: Tensor | None, device: str) -> None:
        self.geometry = geometry
        self.device = torch.device(device)
        self._bias_LHQK = None if bias_LHQK is None else bias_LHQK.to(self.device)

    def encode(self, layers: Sequence[LayerAttention]) -> Tensor:
        """Codes of a batch of views.

        Args:
            layers: one `LayerFactors` or `LayerMaps` per kept layer, in the geometry's order, on the coder's device.

        Returns:
            codes_BLTC, integers of `codes_dtype`, on the same device. Equal input gives equal codes.

        Raises:
            CodecError: the factors do not fit in the codes; the message names the layer and the value.
        """
        if not layers[0].shape_BHT[0]:
            shape = (0, self.num_code_rows, self.num_code_tokens, self.num_components)
            return torch.zeros(shape, dtype=self.codes_dtype, device=self.device)
        queued = self.queue(layers)
        return self.finish(queued.settle(queued.parts, queued.is_fine_N))

    @abstractmethod
    def queue(self, layers: Sequence[LayerAttention]) -> Queued:
        """Begin to encode a batch of views, at least one, without waiting for the device; see `encode`.

        Raises:
            CodecError: the layers are not of the kind that this codec codes. What is wrong with their values is said
                by `Queued.settle`.
        """

    def finish(self, parts: Sequence[Tensor]) -> Tensor:
        """codes_BLTC of the views whose parts these are, see `Queued.settle`; on the device of the first part.

        Threads may call it, each for views of its own.
        """
        return parts[0]

    @property
    def num_code_rows(self) -> int:
        """The length of codes_BLTC along L."""
        return len(self.geometry.layers)

    @property
    def num_code_tokens(self) -> int:
        """The length of codes_BLTC along T."""
        return self.geometry.num_queries

    def code_rows(self, positions: Sequence[int]) -> slice:
        """The rows along L of codes_BLTC that decoding the layers at these positions needs."""
        return slice(min(positions), max(positions) + 1)

    def layer_shares_L(self, codes_BLTC: Tensor) -> Tensor | None:
        """The share of the codes' bytes that each layer causes, sum 1. None if each layer has its own row."""
        del codes_BLTC
        return None

    @property
    def decode_macs_per_view(self) -> int | None:
        """Multiply-adds that decoding q and k of all layers of a view takes; None if they are next to none."""
        return None

    def extent(self, codes_BLTC: Tensor) -> int:
        """How much of the codes `decode` must look at; of no meaning for most codecs.

        Cheap for codes in host memory. For codes on a GPU it may wait for that, so ask before they are copied.

        Args:
            codes_BLTC: the codes of a batch, as `decode` takes them.
        """
        del codes_BLTC
        return 0

    def decode(self, codes_BLTC: Tensor, first_row: int = 0, extent: int | None = None) -> DecodedLayers:
        """A batch of views, whose layers are decoded when they are asked for.

        Args:
            codes_BLTC: rows of codes, on the coder's device.
            first_row: the number of its first row, if rows before it were left out; see `code_rows`.
            extent: what `extent` says of these codes, or of any that they are a part of. None asks it, which may wait
                for the device.
        """
        del extent
        return _IndependentLayers(self, codes_BLTC, first_row)

    def decode_row(self, position: int, codes_BTC: Tensor) -> LayerAttention:
        """One layer from its own row of codes; coders whose layers do not depend on each other define this.

        Args:
            position: index into the geometry's `layers` (not the block index).
            codes_BTC: the layer's row.
        """
        raise NotImplementedError

    def bias(self, position: int) -> Tensor | None:
        """The teacher's static bias of one layer, shape (1, head, query, key), or None."""
        return None if self._bias_LHQK is None else self._bias_LHQK[position].unsqueeze(0)

    @property
    def _num_head_vectors(self) -> int:
        """How many vectors of length head_dim a token has in a layer: one for each head of q and of k."""
        return len(self.geometry.heads) + self.geometry.num_kv_heads

    @property
    def _part_shapes(self) -> tuple[tuple[int, int], ...]:
        """(vectors, their length) of one token in a layer: for q and k together, then for what else is stored."""
        of_maps = (self._num_head_vectors, self.geometry.head_dim)
        of_v, of_inputs = (
            (self.geometry.num_kv_heads, self.geometry.v_head_dim),
            (len(INPUTS), self.geometry.input_width),
        )
        return (of_maps, *(shape for shape in (of_v, of_inputs) if shape[1]))

    def _parts_BTND(self, layer: LayerFactors) -> tuple[Tensor, ...]:
        """The heads of q and k together, then of v and the block's inputs, as far as they are stored.

        Each has the shape (batch, token, vectors, their length).
        """
        parts = [torch.cat([layer.q_BHTD.transpose(1, 2), layer.k_BHTD.transpose(1, 2)], dim=2)]
        for stored, part in ((self.geometry.v_head_dim, layer.v_BHTD), (self.geometry.input_width, layer.inputs_BNTC)):
            if stored:
                assert part is not None, "captured as the geometry says"
                parts.append(part.transpose(1, 2))
        return tuple(parts)

    def _split(self, position: int, *parts_BTND: Tensor) -> LayerFactors:
        """The inverse of `_parts_BTND`, with the geometry's scale and this layer's bias."""
        of_maps_BTND, *more_BTND = parts_BTND
        vectors_BNTD = of_maps_BTND.transpose(1, 2)
        others = (part.transpose(1, 2) for part in more_BTND)
        num_heads = len(self.geometry.heads)
        return LayerFactors(
            q_BHTD=vectors_BNTD[:, :num_heads],
            k_BHTD=vectors_BNTD[:, num_heads:],
            scale=self.geometry.scale,
            bias=self.bias(position),
            v_BHTD=next(others, None) if self.geometry.v_head_dim else None,
            inputs_BNTC=next(others, None) if self.geometry.input_width else None,
        )


class DecodedLayers(Protocol):
    """The attention of a batch of views, decoded layer by layer."""

    def layer(self, position: int) -> LayerAttention:
        """One layer's factors, on the codes' device, with the teacher's bias if it has one; or its maps.

        They are float32, or under autocast of its type, if the codec computes products.

        Args:
            position: index into the geometry's `layers` (not the block index). Ascending ones cost least.

        Raises:
            IndexError: its rows are not among the codes.
        """
        ...


class _IndependentLayers:
    """Layers with a row of codes each."""

    def __init__(self, coder: Coder, codes_BLTC: Tensor, first_row: int) -> None:
        self._coder, self._codes_BLTC, self._first_row = coder, codes_BLTC, first_row

    def layer(self, position: int) -> LayerAttention:
        row = position - self._first_row
        if not 0 <= row < self._codes_BLTC.shape[1]:
            raise IndexError(f"the codes of the layer at {position} were not given")
        return self._coder.decode_row(position, self._codes_BLTC[:, row])


def only_factors(layers: Sequence[LayerAttention], codec_name: str) -> list[LayerFactors]:
    """The layers, checked to be factors; codecs of q and k call this first.

    Raises:
        CodecError: a layer holds maps.
    """
    factors = [layer for layer in layers if isinstance(layer, LayerFactors)]
    if len(factors) < len(layers):
        raise _needs_factors(codec_name)
    return factors


def _needs_factors(codec_name: str) -> CodecError:
    return CodecError(
        f"codec {codec_name} stores q and k, but this teacher's maps are not the softmax of one q k^T, so only maps "
        "can be stored. Use --codec logmap."
    )
