"""Copying and distilling as it is usually done: maps are formed in teacher and student, and autograd does the rest."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from atcache.attention.blocks import find_blocks
from atcache.choices import Mode
from atcache.feed.batch import Batch
from atcache.teachers.devices import autocast
from atcache.teachers.run import TeacherRun


class UsualAttention(nn.Module):
    """A plain timm attention that forms its maps, or uses given ones, and leaves the rest to autograd."""

    def __init__(self, stock: nn.Module) -> None:
        super().__init__()
        self.stock = stock
        self.given_BHQK: Tensor | None = None
        self.attn_BHQK: Tensor | None = None

    def forward(self, x: Tensor, *_: object, **__: object) -> Tensor:
        stock = self.stock
        qkv = stock.qkv(x).reshape(*x.shape[:2], 3, stock.num_heads, stock.head_dim).permute(2, 0, 3, 1, 4)
        q_BHTD, k_BHTD, v_BHTD = qkv.unbind(0)
        attn_BHQK = self.given_BHQK
        if attn_BHQK is None:
            attn_BHQK = self.attn_BHQK = torch.softmax((q_BHTD * stock.scale) @ k_BHTD.mT, dim=-1)
        return stock.proj((attn_BHQK.to(v_BHTD.dtype) @ v_BHTD).transpose(1, 2).flatten(2))


def use_usual_attention(model: nn.Module) -> list[UsualAttention]:
    """Replace the attention of each block, and return the replacements."""
    attentions = []
    for block in find_blocks(model):
        block.attn = UsualAttention(block.attn)
        attentions.append(block.attn)
    return attentions


class UsualStudent(nn.Module):
    """A student as most code has it: copying multiplies the teacher's maps by v, distilling compares both maps."""

    def __init__(self, model: nn.Module, mode: Mode) -> None:
        super().__init__()
        self.model, self.mode = model, mode
        self.attentions = use_usual_attention(model)

    def forward(self, images: Tensor, teacher: Sequence[Tensor]) -> Tensor | tuple[Tensor, Tensor]:
        if self.mode == "copy":
            for attention, attn_BHQK in zip(self.attentions, teacher, strict=True):
                attention.given_BHQK = attn_BHQK
            return self.model(images)
        logits = self.model(images)
        losses = [
            -(given.float() * attention.attn_BHQK.float().clamp(min=1e-30).log()).sum(-1).mean()
            for attention, given in zip(self.attentions, teacher, strict=True)
        ]
        return logits, torch.stack(losses).mean()


class UsualTeacher:
    """Runs a teacher that forms its maps, and returns them."""

    def __init__(self, run: TeacherRun) -> None:
        self._run = run
        self._attentions = use_usual_attention(run.teacher.model)

    def factors(self, batch: Batch) -> list[Tensor]:
        with torch.no_grad(), autocast(self._run.device, self._run.dtype):
            self._run.teacher.model.forward_features(self._run.images(batch.pixels_BHWC))
        maps = [attention.attn_BHQK for attention in self._attentions]
        for attention in self._attentions:
            attention.attn_BHQK = None
        return maps

    def looked_at(self, batch: Batch) -> Batch:
        return batch
