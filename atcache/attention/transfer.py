"""Students that use a teacher's attention: by copying it, or by being pulled towards it.

Both wrap a timm model and take the teacher's factors with every batch, from a cache or from a live teacher alike.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol, cast

import torch
from torch import Tensor, nn

from atcache.attention.factors import FactorGeometry, LayerFactors
from atcache.attention.intercept import AttentionCall, AttentionIntercept
from atcache.attention.kernels import copy_attention
from atcache.attention.losses import attention_distillation_loss
from atcache.codecs import Coder
from atcache.errors import TeacherError


class TeacherFactors(Protocol):
    """The teacher's side of one batch."""

    def layer(self, block: int) -> LayerFactors:
        """The factors of the teacher's block `block`, for all samples of the batch."""
        ...


class CachedFactors:
    """Factors decoded from codes, each layer when it is asked for, so that one layer's floats live at a time."""

    def __init__(self, coder: Coder, codes_BLTC: Tensor, first_position: int = 0) -> None:
        """Take the codes of a batch; their first layer is the one at `first_position` of the coder's geometry."""
        self._coder = coder
        self._codes_BLTC = codes_BLTC
        self._first_position = first_position
        self._position_of = {block: position for position, block in enumerate(coder.geometry.layers)}

    def layer(self, block: int) -> LayerFactors:
        """See `TeacherFactors.layer`."""
        position = self._position_of[block]
        return self._coder.decode(position, self._codes_BLTC[:, position - self._first_position])


class LiveFactors:
    """Factors just captured from a running teacher."""

    def __init__(self, layers: Mapping[int, LayerFactors]) -> None:
        self._layers = layers

    def layer(self, block: int) -> LayerFactors:
        """See `TeacherFactors.layer`."""
        return self._layers[block]


def attend_with_given(call: AttentionCall, given: LayerFactors, heads: Sequence[int]) -> Tensor:
    """What an attention call returns when some heads attend with given factors, and the others with their own.

    Args:
        call: the call, on any timm ViT.
        given: factors of the heads `heads`.
        heads: indices, ascending, of the heads that are given; where that is all, the call itself is not made.

    Returns:
        Shape (batch, head, token, head dim); no gradient reaches q and k of the given heads.
    """
    values_BHTD = call.value.repeat_interleave(call.query.shape[1] // call.value.shape[1], dim=1)
    if len(heads) == values_BHTD.shape[1]:
        return copy_attention(given, values_BHTD)
    outputs_BHTD = call.run().clone()
    outputs_BHTD[:, heads] = copy_attention(given, values_BHTD[:, heads])
    return outputs_BHTD


class CopyStudent(nn.Module):
    """A timm ViT whose chosen layers attend as the teacher does; it learns everything else.

    Where all heads of a layer are given, its attention module is replaced by `ValueOnlyAttention`: the weights of q and
    k are gone, from the forward and from the optimizer. Where only some heads are given, or the attention is not a
    module of its own, the layer keeps its weights and the given heads' outputs are put in.

    Args:
        model: a timm ViT with fresh weights; changed in place.
        blocks: its transformer blocks.
        geometry: the teacher's. Heads and tokens must fit the student.
        layers: block indices to copy, a subset of the geometry's.
    """

    def __init__(
        self, model: nn.Module, blocks: nn.ModuleList, geometry: FactorGeometry, layers: Sequence[int]
    ) -> None:
        super().__init__()
        self.model = model
        self._blocks = [blocks]  # in a list, or the blocks would be registered a second time
        self._heads = list(geometry.heads)
        all_heads = len(geometry.heads) == geometry.num_model_heads
        self._value_only: dict[int, ValueOnlyAttention] = {}
        for index in layers:
            block = blocks[index]
            attention = getattr(block, "attn", None)
            if all_heads and isinstance(attention, nn.Module) and ValueOnlyAttention.can_replace(attention):
                self._value_only[index] = ValueOnlyAttention(attention)
                block.attn = self._value_only[index]
        self._intercepted = frozenset(layers) - self._value_only.keys()

    def forward(self, images: Tensor, teacher: TeacherFactors) -> Tensor:
        """Class logits, shape (batch, class).

        Args:
            images: normalised for the student, shape (batch, channel, height, width).
            teacher: factors of the same views.
        """
        for index, attention in self._value_only.items():
            attention.give(teacher, index)
        if not self._intercepted:
            return self.model(images)

        def put_in_given_heads(call: AttentionCall) -> Tensor:
            if call.block not in self._intercepted:
                return call.run()
            return attend_with_given(call, teacher.layer(call.block), self._heads)

        with AttentionIntercept(self._blocks[0], put_in_given_heads):
            return self.model(images)


class ValueOnlyAttention(nn.Module):
    """The rest of an attention module when q and k are given: value, norm, gate and output projections.

    timm's attention classes (`Attention`, `AttentionRope`, `EvaAttention`, BEiT's, `RelPosAttention`) differ in how
    they make q and k; what comes after is the same, and is taken over from the replaced module, value weights included.
    """

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.num_heads = cast("int", attention.num_heads)
        self.v = _value_projection(attention)
        self.norm = _submodule(attention, "norm") or nn.Identity()
        self.gate = _submodule(attention, "gate")
        self.proj = cast("nn.Linear", attention.proj)
        self.proj_drop = cast("nn.Module", attention.proj_drop)
        self._given: tuple[TeacherFactors, int] | None = None

    @staticmethod
    def can_replace(attention: nn.Module) -> bool:
        """Whether this module is one of the classes whose value path is known."""
        fused = isinstance(getattr(attention, "qkv", None), nn.Linear)
        split = isinstance(getattr(attention, "v_proj", None), nn.Linear)
        return (fused or split) and all(hasattr(attention, part) for part in ("num_heads", "proj", "proj_drop"))

    def give(self, teacher: TeacherFactors, block: int) -> None:
        """Use this teacher's factors of `block` in the forward calls that follow."""
        self._given = (teacher, block)

    def forward(self, x: Tensor, *_: object, **__: object) -> Tensor:
        """Attention output, shape (batch, token, dim). Rotary embeddings, masks and biases passed in are ignored."""
        assert self._given is not None, "CopyStudent.forward gives the factors"
        teacher, block = self._given
        value_BHTD = self.v(x).view(*x.shape[:2], self._num_value_heads(), self._head_dim()).transpose(1, 2)
        groups = self.num_heads // value_BHTD.shape[1]
        if groups > 1:
            value_BHTD = value_BHTD.repeat_interleave(groups, dim=1)
        attended_BTC = copy_attention(teacher.layer(block), value_BHTD).transpose(1, 2).flatten(2)
        attended_BTC = self.norm(attended_BTC)
        if self.gate is not None:
            attended_BTC = attended_BTC * self.gate(x).sigmoid()
        return cast("Tensor", self.proj_drop(self.proj(attended_BTC)))

    def _head_dim(self) -> int:
        return self.proj.in_features // self.num_heads

    def _num_value_heads(self) -> int:
        return self.v.out_features // self._head_dim()


class DistilledStudent(nn.Module):
    """A timm ViT with its own attention, and the loss that pulls chosen layers towards the teacher's.

    The model inside stays as timm made it: its weights load anywhere.

    Args:
        model: a timm ViT.
        blocks: its transformer blocks.
        geometry: the teacher's; heads that are not in it stay free.
        layers: block indices to distil, a subset of the geometry's.
    """

    def __init__(
        self, model: nn.Module, blocks: nn.ModuleList, geometry: FactorGeometry, layers: Sequence[int]
    ) -> None:
        super().__init__()
        self.model = model
        self._blocks = [blocks]
        self._layers = frozenset(layers)
        self._heads = list(geometry.heads)
        self._all_heads = len(geometry.heads) == geometry.num_model_heads

    def forward(self, images: Tensor, teacher: TeacherFactors) -> tuple[Tensor, Tensor]:
        """Class logits (batch, class), and the attention loss in nats: the mean over the chosen layers.

        Args:
            images: normalised for the student, shape (batch, channel, height, width).
            teacher: factors of the same views.
        """
        losses: list[Tensor] = []

        def measure(call: AttentionCall) -> Tensor:
            if call.block in self._layers:
                losses.append(attention_distillation_loss(teacher.layer(call.block), self._own_factors(call)))
            return call.run()

        with AttentionIntercept(self._blocks[0], measure):
            logits = self.model(images)
        return logits, torch.stack(losses).mean()

    def _own_factors(self, call: AttentionCall) -> LayerFactors:
        own = LayerFactors(q_BHTD=call.query, k_BHTD=call.key, scale=call.scale, bias=call.bias())
        if self._all_heads:
            return own
        bias = own.bias
        return LayerFactors(
            q_BHTD=own.q_BHTD[:, self._heads],
            k_BHTD=own.repeated_k_BHTD()[:, self._heads],
            scale=own.scale,
            bias=bias[:, self._heads] if bias is not None and bias.shape[1] > 1 else bias,
        )


def check_student(
    geometry: FactorGeometry, student: FactorGeometry, layers: Sequence[int], *, student_name: str
) -> None:
    """Refuse a student that the teacher's factors do not fit.

    Raises:
        TeacherError: heads, tokens or layers differ; the message names both sides.
    """
    differences: list[str] = []
    if student.num_model_heads != geometry.num_model_heads:
        differences.append(f"{student.num_model_heads} heads a layer, the teacher {geometry.num_model_heads}")
    if student.tokens != geometry.tokens:
        differences.append(f"{_describe_tokens(student)}, the teacher {_describe_tokens(geometry)}")
    if missing := sorted(set(layers) - set(student.layers)):
        differences.append(f"{len(student.layers)} layers and so no layer {missing[0]}")
    if differences:
        raise TeacherError(
            f"student {student_name} has {'; '.join(differences)}. Attention can only be transferred between equal "
            "heads and tokens: leave --student out to use the teacher's own architecture, or choose one that matches."
        )


def _describe_tokens(geometry: FactorGeometry) -> str:
    tokens = geometry.tokens
    return f"{tokens.num_prefix_tokens} + {tokens.grid_height}x{tokens.grid_width} tokens"


def _submodule(module: nn.Module, name: str) -> nn.Module | None:
    found = getattr(module, name, None)
    return found if isinstance(found, nn.Module) else None


def _value_projection(attention: nn.Module) -> nn.Linear:
    """A linear layer with the attention's own value weights: the last third of a fused qkv, or its v_proj."""
    if isinstance(split := getattr(attention, "v_proj", None), nn.Linear):
        return split
    qkv = cast("nn.Linear", attention.qkv)
    # BEiT and EVA keep biases apart from the projection, which then has none of its own.
    own_bias = cast("Tensor | None", qkv.bias)
    v_bias: Tensor | None = getattr(attention, "v_bias", None)
    if v_bias is None and own_bias is not None:
        v_bias = own_bias.chunk(3)[2]
    weight = qkv.weight.chunk(3)[2]
    # Made without storage, so that no random numbers are drawn for weights that are replaced at once.
    value = nn.Linear(weight.shape[1], weight.shape[0], bias=v_bias is not None, device="meta")
    value.weight = nn.Parameter(weight.detach().clone())
    if v_bias is not None:
        value.bias = nn.Parameter(v_bias.detach().clone())
    return value
