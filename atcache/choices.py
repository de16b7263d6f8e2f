"""The words an option may take.

They stand apart from the code that acts on them, so that a command's help imports nothing slow.
"""

from __future__ import annotations

from typing import Literal, get_args

Mode = Literal["copy", "distill", "scratch", "finetune"]
"""What a student does: copy the teacher's attention, be pulled towards it, begin fresh without it, or begin with the
teacher's weights."""
MODES: tuple[Mode, ...] = get_args(Mode)

What = Literal["map", "qk", "q", "k", "v", "qkv"]
"""What is transferred: the map; q and k; one of q, k and v, with the student's own others beside it; or all three."""
WHATS: tuple[What, ...] = get_args(What)
OF_VALUES: frozenset[What] = frozenset({"v", "qkv"})
"""Those that need v."""

PolicyName = Literal["eval", "crop-flip", "randaug"]
"""How views are drawn: by timm's evaluation transform; by random resized crop and flip; or by these, RandAugment and
random erasing."""

Shuffle = Literal["global", "block"]
"""In which order samples come: all of them mixed; or blocks of neighbours, for disks that are slow at random reads."""
SHUFFLES: tuple[Shuffle, ...] = get_args(Shuffle)

Precision = Literal["auto", "fp32", "bf16"]
"""What matrix products are computed in."""
PRECISIONS: tuple[Precision, ...] = get_args(Precision)

Pixels = Literal["replay", "store"]
"""Whether training replays a view's image from its tar, or reads it from the cache."""

MAX_SEED = 2**63 - 1
"""The largest seed: what torch's generators take."""
