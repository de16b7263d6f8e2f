"""The words that an option accepts.

They are apart from the code that acts on them, so that a command's help imports nothing slow.
"""

from __future__ import annotations

from typing import Literal, get_args

Mode = Literal["copy", "distill", "scratch", "finetune"]
"""How a student is trained: it copies the teacher's attention, learns to imitate it, starts from random weights without
a teacher, or starts from the teacher's weights."""
MODES: tuple[Mode, ...] = get_args(Mode)

What = Literal["map", "qk", "q", "k", "v", "qkv"]
"""What the student gets from the teacher: the map; q and k; only one of q, k and v, while the other two are the
student's own; or all three."""
WHATS: tuple[What, ...] = get_args(What)
OF_VALUES: frozenset[What] = frozenset({"v", "qkv"})
"""The `What` words that need the teacher's v."""

PolicyName = Literal["eval", "crop-flip", "randaug"]
"""How views are drawn: with timm's evaluation transform; with random resized crop and flip; or with crop, flip,
RandAugment and random erasing."""

Shuffle = Literal["global", "block"]
"""How the samples of an epoch are shuffled: all together; or in blocks of neighbours, for disks with slow random
reads."""
SHUFFLES: tuple[Shuffle, ...] = get_args(Shuffle)

Precision = Literal["auto", "fp32", "bf16"]
"""The number format of matrix products."""
PRECISIONS: tuple[Precision, ...] = get_args(Precision)

Queries = Literal["all", "cls", "prefix"]
"""The tokens whose rows of the maps are kept: all; only the class token; or all prefix tokens (class token and
registers)."""

Pixels = Literal["replay", "store"]
"""Where training gets a view's image: made again from its tar, or read from the cache."""

Decoding = Literal["full", "reduced"]
"""How large an image is decoded: in full, or a JPEG only as large as a view of it needs."""

Labels = Literal["required", "optional", "none"]
"""Whether samples need labels: each must have one; or some may have none; or labels are not read at all."""
LABELS: tuple[Labels, ...] = get_args(Labels)

MAX_SEED = 2**63 - 1
"""The largest seed that torch's generators accept."""
