"""Families of teachers: which one a name belongs to, its components, and whether its attention is known to transfer.

Only what a source says stands here; all else is "not known". `docs/families.md` is made from this table.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from atcache.teachers.trained import Trained

Outcome = Literal["transfers", "needs its components", "not known"]
"""Whether students profit from the attention of a family: always, only with the teacher's components, or not known.

"needs its components": a plain ViT as the student ends below training from scratch; with the teacher's components,
freshly initialised, it ends above.
"""
FIRST = "[arXiv 2411.09702](https://arxiv.org/abs/2411.09702)"
# Its abstract names no family; a published summary, which docs/families.md links, names six.
LATER = "[arXiv 2605.07191](https://arxiv.org/abs/2605.07191), as summarised"


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """Teachers that were pre-trained alike and have the same components."""

    name: str
    pattern: str
    """Regular expression for the names of its models, in lower case and without arguments."""
    example: str
    """A model of it: a name of timm, or one of atcache's short names."""
    components: tuple[str, ...] = ()
    """Where the example differs from a plain ViT, in the words of `special_components`."""
    outcome: Outcome = "not known"
    evidence: str = ""
    """What the source says, in a sentence; empty if nothing is known."""
    source: str = ""
    """The paper, as a link in Markdown."""

    @property
    def paper(self) -> str:
        """The source as plain text, such as "arXiv 2605.07191"; empty if there is none."""
        return self.source.partition("]")[0].removeprefix("[")


_FAILS_IF_PLAIN = "A plain student ends below one from scratch; with the teacher's components it ends above."
_SMALL_GAINS = "The small model's student ends above one from scratch, also after 100 epochs."
# The first family whose pattern is found is the one, so a name within another comes after it.
FAMILIES: tuple[Family, ...] = (
    Family(
        name="MAE",
        pattern=r"vit_.*\.mae$|vit-mae(?!.*finetuned)",
        example="mae-vit-l",
        outcome="transfers",
        evidence="ViT-L on ImageNet-1k: copy closes 77.8% of the gap from scratch to fine-tuning, distill all of it.",
        source=FIRST,
    ),
    Family(
        name="DINO",
        pattern=r"\.dino$|dino[-_]vit",
        example="dino-vit-s",
        outcome="transfers",
        evidence=_SMALL_GAINS,
        source=LATER,
    ),
    Family(
        name="DeiT",
        pattern=r"(^|[:/])deit[-_](?!.*distilled)",
        example="deit_small_patch16_224",
        outcome="transfers",
        evidence=_SMALL_GAINS,
        source=LATER,
    ),
    Family(
        name="DINOv3",
        pattern=r"dinov3",
        example="dinov3-vit-b",
        components=(
            "LayerScale",
            "rotary position embedding",
            "no absolute position embedding",
            "no bias of q, k, v",
            "4 register tokens",
        ),
    ),
    Family(
        name="DINOv2 with registers",
        pattern=r"reg4_dinov2|dinov2.*reg",
        example="dinov2-vit-s-reg",
        components=("LayerScale", "4 register tokens"),
        outcome="needs its components",
        evidence=_FAILS_IF_PLAIN,
        source=LATER,
    ),
    Family(
        name="DINOv2",
        pattern=r"dinov2",
        example="dinov2-vit-s",
        components=("LayerScale",),
        outcome="needs its components",
        evidence=_FAILS_IF_PLAIN,
        source=LATER,
    ),
    Family(
        name="BEiT v2",
        pattern=r"beitv2",
        example="beitv2-vit-b",
        components=("LayerScale", "relative position bias", "no absolute position embedding"),
        outcome="needs its components",
        evidence=_FAILS_IF_PLAIN,
        source=LATER,
    ),
    Family(
        name="BEiT",
        pattern=r"(^|[:/])beit[-_]",
        example="beit_base_patch16_224",
        components=("LayerScale", "relative position bias", "no absolute position embedding"),
    ),
    Family(
        name="EVA-02",
        pattern=r"eva-?02",
        example="eva02-vit-b",
        components=("rotary position embedding", "norm inside the MLP", "gated MLP"),
    ),
    Family(name="SigLIP", pattern=r"siglip", example="siglip-vit-b", components=("no class token",)),
    Family(
        name="CLIP",
        # ViTs only: not those that were fine-tuned on labels, nor other models that were trained as CLIP was. (Names
        # of OpenCLIP begin with open-clip, whatever the model.)
        pattern=r"^(?!.*(eva|mobile|coca|_ft)).*(clip.*vit[-_]|vit[-_].*clip)",
        example="clip-vit-b",
        components=("norm before the blocks",),
        outcome="needs its components",
        evidence=_FAILS_IF_PLAIN,
        source=LATER,
    ),
    Family(name="DeiT III", pattern=r"deit3", example="deit3-vit-b", components=("LayerScale",)),
)
"""All families that have a name here."""


def family_of(teacher: str, trained: Trained | None = None) -> Family | None:
    """The family of a teacher, by its name; None if the name says none.

    Args:
        teacher: the name that caches record: of timm, or of another library with its prefix; arguments do not count.
        trained: the training with `atcache train` that made its weights, if it was one. Only fine-tuning keeps what
            a pre-trained model attends to.

    >>> family_of("vit_small_patch14_reg4_dinov2.lvd142m:img_size=112").name
    'DINOv2 with registers'
    >>> family_of("vit_small_patch16_224") is None
    True
    """
    if trained is not None and trained.mode != "finetune":
        return None
    is_of_timm = not teacher.startswith(("transformers:", "open-clip:", "own:"))
    name = (teacher.partition(":")[0] if is_of_timm else teacher).lower()
    if name.startswith("own:"):
        return None
    return next((family for family in FAMILIES if re.search(family.pattern, name)), None)
