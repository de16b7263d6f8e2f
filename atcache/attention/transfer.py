"""Students that use a teacher's attention: by copying it, or by being pulled towards it.

Both wrap a timm model and take the teacher's factors with every batch, from a cache or from a live teacher alike.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from atcache.attention.distillation import attention_distillation_loss, distilled_attention
from atcache.attention.factors import LayerAttention, LayerFactors
from atcache.attention.given import TakesGiven, can_give_values, give_values
from atcache.attention.intercept import AttentionCall, AttentionIntercept, MapCall
from atcache.attention.kernels import copy_attention
from atcache.attention.losses import factor_distillation_loss, logits_distillation_loss
from atcache.attention.pairing import PairedFactors, Pairing, TeacherFactors, What
from atcache.attention.value_only import ValueOnlyAttention
from atcache.codecs import Coder

__all__ = [
    "CachedFactors",
    "CopyStudent",
    "DistilledStudent",
    "LiveFactors",
    "TeacherFactors",
    "attend_with_given",
    "attend_with_one_factor",
]


class CachedFactors:
    """Attention decoded from codes, each layer when it is asked for: no layer that nobody uses is decoded.

    Nothing is kept here. What a student's backward pass needs of a layer, such as the q and k it copies, autograd keeps
    until then.
    """

    def __init__(self, coder: Coder, codes_BLTC: Tensor, first_code_layer: int = 0) -> None:
        """Take the codes of a batch, from `first_code_layer` of what the coder makes on."""
        self._coder = coder
        self._codes_BLTC = codes_BLTC
        self._first_code_layer = first_code_layer
        self._position_of = {block: position for position, block in enumerate(coder.geometry.layers)}

    @property
    def heads(self) -> tuple[int, ...]:
        """See `TeacherFactors.heads`."""
        return self._coder.geometry.heads

    def layer(self, block: int) -> LayerAttention:
        """See `TeacherFactors.layer`."""
        position = self._position_of[block]
        return self._coder.decode(
            position, self._codes_BLTC[:, self._coder.code_layer(position) - self._first_code_layer]
        )


class LiveFactors:
    """Attention just captured from a running teacher."""

    def __init__(self, layers: Mapping[int, LayerAttention], heads: tuple[int, ...] | None = None) -> None:
        """Take the attention by block, and which heads it is of; None for just those that are wanted."""
        self._layers = layers
        self.heads = heads

    def layer(self, block: int) -> LayerAttention:
        """See `TeacherFactors.layer`."""
        return self._layers[block]


def attend_with_given(
    call: AttentionCall | MapCall, given: LayerAttention, heads: Sequence[int], *, with_values: bool = False
) -> Tensor:
    """What an attention call returns when some heads attend with what is given, and the others with their own.

    Args:
        call: the call, on any timm ViT.
        given: factors or maps of the heads `heads`.
        heads: indices, ascending, of the heads that are given; where that is all, the call itself is not made.
        with_values: whether these heads attend to the given v too, and not to their own; for factors with v.

    Returns:
        Shape (batch, head, token, head dim), or maps for a `MapCall`; no gradient reaches q and k of the given heads.
    """
    if isinstance(call, MapCall):
        if len(heads) == call.logits_BHQK.shape[1]:
            return given.maps().to(call.logits_BHQK.dtype)
        attn_BHQK = call.run().clone()
        attn_BHQK[:, heads] = given.maps().to(attn_BHQK.dtype)
        return attn_BHQK
    values_BHTD = call.value.repeat_interleave(call.query.shape[1] // call.value.shape[1], dim=1)
    all_heads = len(heads) == values_BHTD.shape[1]
    values_BHTD = values_BHTD if all_heads else values_BHTD[:, heads]
    if with_values:
        assert isinstance(given, LayerFactors), "PairedFactors.factors refuses maps"
        values_BHTD = given.repeated_v_BHTD().to(values_BHTD.dtype)
    attended_BHTD = copy_attention(given, values_BHTD)
    if all_heads:
        return attended_BHTD
    outputs_BHTD = call.run().clone()
    outputs_BHTD[:, heads] = attended_BHTD
    return outputs_BHTD


def attend_with_one_factor(call: AttentionCall, given: LayerFactors, heads: Sequence[int], what: What) -> Tensor:
    """What an attention call returns when some heads attend with a given q, k or v and with their own others.

    Args:
        call: the call, on any timm ViT; its own bias stays.
        given: factors of the heads `heads`, of the call's head dim.
        heads: indices, ascending, of the heads that are given one.
        what: "q", "k" or "v", the one that is given.

    Returns:
        Shape (batch, head, token, head dim); gradients reach what is not given.
    """
    own = LayerFactors(q_BHTD=call.query, k_BHTD=call.key, scale=call.scale, v_BHTD=call.value)
    factors = {one: own.repeated(one) for one in ("q", "k", "v")}
    factors[what] = factors[what].clone()
    factors[what][:, list(heads)] = given.repeated(what).to(factors[what].dtype)
    return replace(call, query=factors["q"], key=factors["k"], value=factors["v"], enable_gqa=False).run()


class CopyStudent(nn.Module):
    """A timm ViT whose chosen layers attend as the teacher does; it learns everything else.

    Where all heads of a layer are given their maps, its attention module is replaced by `ValueOnlyAttention`: the
    weights of q and k are gone, from the forward and from the optimizer, and those of v where v is given too. Where v
    alone is given, the module keeps its q and k, and `GivenValues` takes the place of v's weights. Where only some
    heads are given, or the attention is not a module of its own, the layer keeps its weights and what is given is put
    in. Where only q is given, or only k, the layer keeps its weights too, the unused third of them included.

    Args:
        model: a timm ViT with fresh weights; changed in place.
        blocks: its transformer blocks.
        pairing: what it is given, and where: maps (given by q and k together), q, k, v, or maps and v.
    """

    def __init__(self, model: nn.Module, blocks: nn.ModuleList, pairing: Pairing) -> None:
        super().__init__()
        self.model = model
        self._blocks = [blocks]  # in a list, or the blocks would be registered a second time
        self._pairing = pairing
        self._takers: dict[int, TakesGiven] = {}
        for index in pairing.student_layers:
            taker = _replace_weights(blocks[index], pairing.what) if pairing.all_heads else None
            if taker is not None:
                self._takers[index] = taker
        self._intercepted = frozenset(pairing.student_layers) - self._takers.keys()

    def forward(self, images: Tensor, teacher: TeacherFactors) -> Tensor:
        """Class logits, shape (batch, class).

        Args:
            images: normalised for the student, shape (batch, channel, height, width).
            teacher: factors of the same views.
        """
        given = PairedFactors(teacher, self._pairing)
        for index, taker in self._takers.items():
            taker.give(given, index)
        try:
            return self._run(images, given)
        finally:
            # Or a batch's factors would live until the next one's are here, and a moving average's for ever.
            for taker in self._takers.values():
                taker.take_back()

    def _run(self, images: Tensor, given: PairedFactors) -> Tensor:
        """The model, with the given attention put in where no module takes it by itself."""
        if not self._intercepted:
            return self.model(images)

        def put_in_given_heads(call: AttentionCall | MapCall) -> Tensor:
            if call.block not in self._intercepted:
                return call.run()
            heads, what = self._pairing.student_heads, self._pairing.what
            if what in ("q", "k", "v") and isinstance(call, AttentionCall):
                return attend_with_one_factor(call, given.factors(call.block), heads, what)
            if what == "qkv":
                return attend_with_given(call, given.factors(call.block), heads, with_values=True)
            return attend_with_given(call, given.layer(call.block), heads)

        with AttentionIntercept(self._blocks[0], put_in_given_heads):
            return self.model(images)


def _replace_weights(block: nn.Module, what: What) -> TakesGiven | None:
    """Put into a block what takes the given in place of the weights that would make it; None where it cannot be."""
    attention = getattr(block, "attn", None)
    if not isinstance(attention, nn.Module):
        return None
    if what in ("map", "qkv") and ValueOnlyAttention.can_replace(attention):
        block.attn = ValueOnlyAttention(attention, own_values=what == "map")
        return block.attn
    if what == "v" and can_give_values(attention):
        return give_values(attention)
    return None


class DistilledStudent(nn.Module):
    """A timm ViT with its own attention, and the loss that pulls chosen layers towards the teacher's.

    The model inside stays as timm made it: its weights load anywhere.

    Args:
        model: a timm ViT.
        blocks: its transformer blocks.
        pairing: what is distilled, and where; heads that are not in it stay free. "q", "k", "v", "qk" and "qkv" are
            distilled by their mean squared error instead of the map's cross-entropy (Li et al. 2024's ablation).
    """

    def __init__(self, model: nn.Module, blocks: nn.ModuleList, pairing: Pairing) -> None:
        super().__init__()
        self.model = model
        self._blocks = [blocks]
        self._pairing = pairing
        self._layers = frozenset(pairing.student_layers)

    def forward(self, images: Tensor, teacher: TeacherFactors) -> tuple[Tensor, Tensor]:
        """Class logits (batch, class), and the attention loss: the mean over the chosen layers, in nats for maps.

        Args:
            images: normalised for the student, shape (batch, channel, height, width).
            teacher: factors of the same views.
        """
        given = PairedFactors(teacher, self._pairing)
        losses: list[Tensor] = []

        def measure(call: AttentionCall | MapCall) -> Tensor:
            if call.block not in self._layers:
                return call.run()
            outputs, loss = self._attend(given, call)
            losses.append(loss)
            return outputs

        with AttentionIntercept(self._blocks[0], measure):
            logits = self.model(images)
        return logits, torch.stack(losses).mean()

    def _attend(self, given: PairedFactors, call: AttentionCall | MapCall) -> tuple[Tensor, Tensor]:
        """What a call returns, and its loss."""
        heads = None if self._pairing.all_heads else list(self._pairing.student_heads)
        if isinstance(call, MapCall):
            logits_BHQK = call.logits_BHQK if heads is None else call.logits_BHQK[:, heads]
            return call.run(), logits_distillation_loss(given.layer(call.block), logits_BHQK)
        own = LayerFactors(q_BHTD=call.query, k_BHTD=call.key, scale=call.scale, bias=call.bias())
        if self._pairing.what == "map" and heads is None and _is_quicker_in_one_pass(call):
            return distilled_attention(given.layer(call.block), replace(own, v_BHTD=call.value))
        if self._pairing.needs_values:
            own = replace(own, v_BHTD=call.value)
        own = own if heads is None else own.select_heads(heads)
        if self._pairing.what == "map":
            return call.run(), attention_distillation_loss(given.layer(call.block), own)
        return call.run(), factor_distillation_loss(given.factors(call.block), own, self._pairing.what)


def _is_quicker_in_one_pass(call: AttentionCall) -> bool:
    """Whether one pass for output and loss beats the fused call and a pass for the loss beside it: on CPUs, mostly.

    `benchmarks/kernels.py`, and with `--dtype bfloat16`: only in float32 at 1,370 tokens is it slower. The pass knows
    no dropout.
    """
    return call.query.device.type == "cpu" and call.dropout_p == 0
