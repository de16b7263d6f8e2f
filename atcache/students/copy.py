"""A student that copies: chosen layers attend as the teacher does."""

from __future__ import annotations

from torch import Tensor, nn

from atcache.attention.calls import AttentionCall, MapCall
from atcache.attention.intercept import AttentionIntercept
from atcache.choices import What
from atcache.students.attend import attend_with_given, attend_with_one_factor
from atcache.students.given import TakesGiven, ValueOnlyAttention, can_give_values, give_values
from atcache.students.pairing import PairedFactors, Pairing, TeacherFactors


class CopyStudent(nn.Module):
    """A timm ViT whose chosen layers attend as the teacher does; it learns everything else.

    If all heads of a layer are given maps, `ValueOnlyAttention` replaces its attention module: the weights of q and k
    are gone, from the forward pass and from the optimizer, and so are those of v if v is given too. If only v is given,
    the module keeps its q and k, and `GivenValues` replaces the weights of v. If only some heads are given, or the
    attention is not a module of its own, the layer keeps all its weights, and what is given is put in during the call.
    If only q or only k is given, the layer also keeps all its weights, even the third that it no longer uses.

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

    @property
    def pairing(self) -> Pairing:
        """What it is given of the teacher, and where."""
        return self._pairing

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
            # Else a batch's factors would stay in memory until the next batch's are there too, and the modules of a
            # moving average, which is seldom run, would keep them even longer.
            for taker in self._takers.values():
                taker.take_back()

    def _run(self, images: Tensor, given: PairedFactors) -> Tensor:
        """Run the model; put the given attention into the layers whose modules do not take it themselves."""
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
    """Replace a block's weights by a module that takes what they would compute; None if the block does not allow it."""
    attention = getattr(block, "attn", None)
    if not isinstance(attention, nn.Module):
        return None
    if what in ("map", "qkv") and ValueOnlyAttention.can_replace(attention):
        block.attn = ValueOnlyAttention(attention, own_values=what == "map")
        return block.attn
    if what == "v" and can_give_values(attention):
        return give_values(attention)
    return None
