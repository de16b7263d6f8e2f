"""A student that is distilled: it has its own attention, and a loss pulls that towards the teacher's."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from atcache.attention.calls import AttentionCall, MapCall
from atcache.attention.distillation import (
    attention_distillation_loss,
    distilled_attention,
    factor_distillation_loss,
    logits_distillation_loss,
)
from atcache.attention.factors import LayerAttention, LayerFactors, take_heads
from atcache.attention.flash import availability
from atcache.attention.intercept import AttentionIntercept
from atcache.students.pairing import PairedFactors, Pairing, TeacherFactors


class DistilledStudent(nn.Module):
    """A timm ViT with its own attention, and the loss that pulls chosen layers towards the teacher's.

    The model inside stays as timm made it, so its weights load into any timm model of that architecture.

    Args:
        model: a timm ViT.
        blocks: its transformer blocks.
        pairing: what is distilled, and where; heads that are not in it stay free. "q", "k", "v", "qk" and "qkv" are
            distilled by their mean squared error instead of the map's cross-entropy (Li et al. 2024's ablation).
    """

    def __init__(self, model: nn.Module, blocks: nn.ModuleList, pairing: Pairing) -> None:
        super().__init__()
        self.model = model
        self._blocks = [blocks]  # in a list, or the blocks would be registered a second time
        self._pairing = pairing
        self._layers = frozenset(pairing.student_layers)

    @property
    def pairing(self) -> Pairing:
        """What is distilled of the teacher, and where."""
        return self._pairing

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
            logits_BHQK = call.logits_BHQK if heads is None else take_heads(call.logits_BHQK, heads)
            return call.run(), logits_distillation_loss(given.layer(call.block), logits_BHQK)
        own = LayerFactors(q_BHTD=call.query, k_BHTD=call.key, scale=call.scale, bias=call.bias())
        if self._pairing.what == "map":
            return self._attend_to_maps(given.layer(call.block), call, own, heads)
        if self._pairing.needs_values:
            own = replace(own, v_BHTD=call.value)
        own = own if heads is None else own.select_heads(heads)
        return call.run(), factor_distillation_loss(given.factors(call.block), own, self._pairing.what)

    @staticmethod
    def _attend_to_maps(
        given: LayerAttention, call: AttentionCall, own: LayerFactors, heads: list[int] | None
    ) -> tuple[Tensor, Tensor]:
        """What a call returns, and its loss, if maps are distilled."""
        has_all_rows = given.shape_BHT[2] == given.num_keys
        if has_all_rows and heads is None and _is_quicker_in_one_pass(call):
            return distilled_attention(given, replace(own, v_BHTD=call.value))
        return call.run(), attention_distillation_loss(given, own if heads is None else own.select_heads(heads))


def _is_quicker_in_one_pass(call: AttentionCall) -> bool:
    """Whether one pass for output and loss is faster than the fused call plus a pass for the loss.

    It is on CPUs, and with the kernels for GPUs. Measured by `benchmarks/kernels.py`, also with `--dtype bfloat16`: on
    CPUs it is slower only in float32 at 1,370 tokens. The single pass cannot do dropout.
    """
    has_kernels = call.query.device.type == "cpu" or availability.serves(call.query, call.value)
    return has_kernels and call.dropout_p == 0
