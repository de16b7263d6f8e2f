"""A training step on a CPU in bfloat16, with torch's fused attention and with its plain one, by the number of tokens.

    python benchmarks/cpu_attention.py [--student vit_small_patch14_dinov2] [--image-sizes 56 112 168 224] [--rounds 5]

A step is the forward and the backward pass of a student without a teacher. `atcache train` takes the plain attention
for short sequences (`training_autocast` in `atcache/teachers/devices.py`). The two take turns in each round; times are
medians over the rounds.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence

import timm
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

WAYS = {"fused": SDPBackend.FLASH_ATTENTION, "plain": SDPBackend.MATH}


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The parsed options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", default="vit_small_patch14_dinov2")
    parser.add_argument("--image-sizes", type=int, nargs="+", default=[56, 112, 168, 224])
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    options = parse(arguments)
    table = Table(*("pixels", "patches", "fused, ms", "plain, ms", "fused / plain"))
    for size in options.image_sizes:
        model = timm.create_model(options.student, img_size=size, num_classes=10)
        times: dict[str, list[float]] = {way: [] for way in WAYS}
        for number in range(options.rounds + 1):
            for way, kernel in WAYS.items():
                seconds = step_seconds(model, size, options.batch_size, kernel)
                if number:  # the first round is for warming up
                    times[way].append(seconds)
        fused, plain = 1000 * statistics.median(times["fused"]), 1000 * statistics.median(times["plain"])
        patches = getattr(model.patch_embed, "num_patches", "?")
        table.add_row(f"{size} x {size}", str(patches), f"{fused:.0f}", f"{plain:.0f}", f"{fused / plain:.2f}")
    Console().print(table)


def step_seconds(model: nn.Module, size: int, batch_size: int, kernel: SDPBackend) -> float:
    """The time of one forward and backward pass."""
    images, label_B = torch.randn(batch_size, 3, size, size), torch.randint(10, (batch_size,))
    model.zero_grad()
    start_s = time.perf_counter()
    with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(kernel):
        loss = F.cross_entropy(model(images).float(), label_B)
    loss.backward()
    return time.perf_counter() - start_s


if __name__ == "__main__":
    main()
