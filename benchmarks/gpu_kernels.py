"""Copy and distillation of one layer, forward and backward, on a GPU in bf16, beside torch's fused call.

    python benchmarks/gpu_kernels.py [--value-dim 64] [--tune]

The measure is torch's fused call forward and backward with all gradients: what a student trained from scratch does.
Each way's time and peak memory are given as multiples of it. Ways are the usual ones (maps, or the fused call for given
q and k, whose gradients nobody needs) and ours. Times are medians, with the GPU's cache emptied before each run.

`--tune` times each kernel alone with several tilings, and marks the one that `atcache.attention.flash` tries first.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton.testing

from atcache.attention.distillation import distilled_attention
from atcache.attention.factors import LayerFactors
from atcache.attention.flash import comparing, copying
from atcache.attention.flash.launch import Tiling
from atcache.attention.kernels import copy_attention

HEADS, HEAD_DIM = 16, 64  # ViT-L's
SCALE = HEAD_DIM**-0.5
DTYPE = torch.bfloat16
# (samples, tokens): 224, 384 and 592 pixels with patches of 16, and DINOv2's 224 with patches of 14.
SHAPES = [(256, 197), (256, 257), (64, 577), (16, 1370)]
CANDIDATES = [
    Tiling(m, n, warps, stages)
    for m, n, warps in (
        (128, 64, 4), (128, 64, 8), (64, 64, 4), (64, 128, 8), (32, 64, 4), (32, 128, 8), (64, 32, 4),
    )
    for stages in (2, 3)
]  # fmt: skip


def draw(samples, tokens, width=HEAD_DIM):
    """Random vectors as a projection makes them: token after token, with a token's heads side by side."""
    return torch.randn(samples, tokens, HEADS, width, dtype=DTYPE, device="cuda").transpose(1, 2)


@dataclass(frozen=True)
class Measured:
    """What one way takes on a GPU."""

    ms: float
    peak_nbytes: int
    """Beyond its arguments and their gradients' upstream."""


def measure(samples, tokens, value_dim):
    """Every way of one shape, by name; "stock" is what the others are compared with."""
    q_t, k_t = draw(samples, tokens), draw(samples, tokens)
    q_s, k_s, v = (draw(samples, tokens, width).requires_grad_() for width in (HEAD_DIM, HEAD_DIM, value_dim))
    stock = [draw(samples, tokens).requires_grad_() for _ in range(3)]
    teacher = LayerFactors(q_BHTD=q_t, k_BHTD=k_t, scale=SCALE)
    student = LayerFactors(q_BHTD=q_s, k_BHTD=k_s, v_BHTD=v, scale=SCALE)
    upstream = {width: draw(samples, tokens, width) for width in {HEAD_DIM, value_dim}}
    one = torch.ones((), device="cuda")

    def backward(attended, loss=None):
        outputs, upstreams = [attended], [upstream[attended.shape[-1]]]
        if loss is not None:
            outputs, upstreams = [attended, loss], [*upstreams, one]
        torch.autograd.backward(outputs, upstreams)

    def copy_stock():
        decoded = (factor.detach().requires_grad_() for factor in (q_t, k_t))
        backward(F.scaled_dot_product_attention(*decoded, v, scale=SCALE))

    def distil_maps():
        given, logits = torch.softmax((SCALE * q_t @ k_t.mT).float(), -1), (SCALE * q_s @ k_s.mT).float()
        loss = -(given * torch.log_softmax(logits, -1)).sum(-1).mean()
        backward(torch.softmax(logits, -1).to(DTYPE) @ v, loss)

    ways = {
        "stock": lambda: backward(F.scaled_dot_product_attention(*stock, scale=SCALE)),
        "copy, maps": lambda: backward(torch.softmax((SCALE * q_t @ k_t.mT).float(), -1).to(DTYPE) @ v),
        "copy, stock call": copy_stock,
        "copy, ours": lambda: backward(copy_attention(teacher, v)),
        "distill, maps": distil_maps,
        "distill, ours": lambda: backward(*distilled_attention(teacher, student)),
    }
    leaves = [q_s, k_s, v, *stock]
    found = {}
    for name, way in ways.items():
        try:
            way()
            for leaf in leaves:
                leaf.grad = None
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            way()
            peak_nbytes = torch.cuda.max_memory_allocated() - before
            found[name] = Measured(triton.testing.do_bench(way, grad_to_none=leaves, return_mode="median"), peak_nbytes)
        except torch.cuda.OutOfMemoryError:
            print(f"{name} at {tokens} tokens does not fit in the GPU's memory")
    return found


def print_table(value_dim):
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {HEADS} heads of {HEAD_DIM}, v's of {value_dim}")
    for samples, tokens in SHAPES:
        found = measure(samples, tokens, value_dim)
        stock = found["stock"]
        for name, way in found.items():
            print(
                f"{samples:3} x {tokens:4} tokens  {name:17} {way.ms:7.3f} ms, {way.ms / stock.ms:5.2f} x stock  "
                f"{way.peak_nbytes / 2**20:7.0f} MiB, {way.peak_nbytes / stock.peak_nbytes:5.2f} x stock",
                flush=True,
            )


class Kernels:
    """Each kernel alone, on random tensors of one shape."""

    def __init__(self, samples, tokens):
        self.q, self.k, self.v, self.given_q, self.given_k, self.grad = (draw(samples, tokens) for _ in range(6))
        self.pair = (self.q, self.k, self.v, None, SCALE, self.given_q, self.given_k, None, SCALE)
        self.out, self.lse, self.given_lse, self.loss = comparing.compare_op(*self.pair)

    def attend(self):
        out, lse = torch.empty_like(self.out), torch.empty_like(self.lse)
        copying.attend_in_tiles(self.given_q, self.given_k, self.v, None, SCALE, out, lse)

    def value_gradient(self):
        copying.value_gradient(self.grad, self.given_q, self.given_k, None, self.given_lse, SCALE, HEADS)

    def compare(self):
        comparing.compare_op(*self.pair)

    def gradients(self):
        kept = (self.out, self.lse, self.given_lse, False)
        comparing.compare_gradients(self.grad, self.loss, *self.pair, *kept)


def tune():
    """Time the gradients of distillation by one kernel and by two, and each kernel with several tilings."""
    at_once = comparing.MOST_TOKENS_AT_ONCE
    for samples, tokens in SHAPES:
        kernels = Kernels(samples, tokens)
        for most, name in ((at_once, "as they are"), (0, "by two kernels")):
            comparing.MOST_TOKENS_AT_ONCE = most
            ms = triton.testing.do_bench(kernels.gradients, return_mode="median")
            print(f"{tokens:4} tokens  gradients of distillation, {name}: {ms:7.3f} ms", flush=True)
    for samples, tokens in (SHAPES[0], SHAPES[-1]):
        kernels = Kernels(samples, tokens)
        comparing.MOST_TOKENS_AT_ONCE = 0
        for module, name, call in (
            (copying, "ATTEND", kernels.attend),
            (copying, "VALUE_GRADIENT", kernels.value_gradient),
            (comparing, "COMPARE", kernels.compare),
            # These two are timed together: while one changes, the other stays as it is.
            (comparing, "KEY_GRADIENTS", kernels.gradients),
            (comparing, "QUERY_GRADIENT", kernels.gradients),
        ):
            tilings = getattr(module, name)
            for candidate in dict.fromkeys([tilings[0], *CANDIDATES]):
                setattr(module, name, (candidate,))
                try:
                    found = f"{triton.testing.do_bench(call, warmup=5, rep=20, return_mode='median'):7.3f} ms"
                except triton.runtime.errors.OutOfResources:
                    found = "does not fit"
                mark = "  <- tried first" if candidate == tilings[0] else ""
                print(f"{tokens:4} tokens  {name:15} {candidate}: {found}{mark}", flush=True)
            setattr(module, name, tilings)
        comparing.MOST_TOKENS_AT_ONCE = at_once


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The parsed options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--value-dim", type=int, default=HEAD_DIM, help="head dim of the student's v")
    parser.add_argument("--tune", action="store_true")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    if not torch.cuda.is_available():
        sys.exit("torch finds no GPU here; benchmarks/kernels.py measures on a CPU.")
    if options.tune:
        tune()
    else:
        print_table(options.value_dim)


if __name__ == "__main__":
    main()
