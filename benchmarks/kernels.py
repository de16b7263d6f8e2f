"""Copy and distillation of one layer, forward and backward: our kernels against the usual ways, in one run.

    python benchmarks/kernels.py [--threads 2] [--dtype float32] [--value-dim 64] [--sweep]

Copy compares `copy_attention` with materialised maps and with torch's fused call on the teacher's q and k. Distillation
computes the loss and the layer's output. It compares `distilled_attention`, which does both in one pass, with
materialised maps and with the fused call. Beside the fused call, the loss is the identity
CE = logsumexp(S) - scale q.o, or `attention_distillation_loss`.

For each number of tokens it prints milliseconds (the fastest of some runs; the ways take turns), how many times as fast
as materialised maps a way is, and the bytes that autograd keeps for backward besides q, k and v. Milliseconds vary with
the load of the machine; compare ratios. `--sweep` prints our ratios for several slice sizes instead.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence

import torch
import torch.nn.functional as F

from atcache.attention import kernels
from atcache.attention.distillation import attention_distillation_loss, distilled_attention
from atcache.attention.factors import LayerFactors
from atcache.attention.kernels import copy_attention, logits_slice, slices

HEADS, HEAD_DIM = 12, 64
SCALE = HEAD_DIM**-0.5
# (samples, tokens): ViT-B at 224 and 384 pixels, and DINOv2's 518.
SHAPES = [(8, 197), (2, 577), (1, 1370)]


class LogSumExp(torch.autograd.Function):
    """logsumexp over keys of scale q k^T: forward and dk in slices, dq with the fused call."""

    @staticmethod
    def forward(ctx, q, k):
        ctx.save_for_backward(q, k)
        out = torch.empty(q.shape[:3], dtype=q.dtype)
        for samples, queries in slices(q):
            out[samples, :, queries] = logits_slice(q, k, None, SCALE, samples, queries).logsumexp(-1)
        return out

    @staticmethod
    def backward(ctx, grad):
        q, k = ctx.saved_tensors
        upstream = SCALE * grad.unsqueeze(-1)
        grad_k = torch.zeros_like(k)
        for samples, queries in slices(q):
            attn = logits_slice(q, k, None, SCALE, samples, queries).softmax(-1).to(q.dtype)
            grad_k[samples] += attn.mT @ (upstream * q)[samples, :, queries]
        return upstream * F.scaled_dot_product_attention(q, k, k, scale=SCALE), grad_k


def distil_by_maps(q_t, k_t, q_s, k_s, v):
    given, logits = torch.softmax(SCALE * q_t @ k_t.mT, -1), SCALE * q_s @ k_s.mT
    loss = -(given.float() * torch.log_softmax(logits.float(), -1)).sum(-1).mean()
    return loss + (torch.softmax(logits, -1) @ v).sum()


def distil_by_identity(q_t, k_t, q_s, k_s, v):
    attended = F.scaled_dot_product_attention(q_t, k_t, k_s, scale=SCALE)
    loss = (LogSumExp.apply(q_s, k_s) - SCALE * (q_s * attended).sum(-1)).mean()
    return loss + F.scaled_dot_product_attention(q_s, k_s, v, scale=SCALE).sum()


def distil_beside_fused_call(q_t, k_t, q_s, k_s, v):
    teacher = LayerFactors(q_BHTD=q_t, k_BHTD=k_t, scale=SCALE)
    loss = attention_distillation_loss(teacher, LayerFactors(q_BHTD=q_s, k_BHTD=k_s, scale=SCALE))
    return loss + F.scaled_dot_product_attention(q_s, k_s, v, scale=SCALE).sum()


def distil_in_one_pass(q_t, k_t, q_s, k_s, v):
    teacher = LayerFactors(q_BHTD=q_t, k_BHTD=k_t, scale=SCALE)
    attended, loss = distilled_attention(teacher, LayerFactors(q_BHTD=q_s, k_BHTD=k_s, v_BHTD=v, scale=SCALE))
    return loss + attended.sum()


def copy_by_maps(q_t, k_t, v):
    return (torch.softmax(SCALE * q_t @ k_t.mT, -1) @ v).sum()


def copy_by_fused_call(q_t, k_t, v):
    # Usually q and k come out of a decoder, so autograd does not know that nobody needs their gradients.
    decoded = (factor.detach().requires_grad_() for factor in (q_t, k_t))
    return F.scaled_dot_product_attention(*decoded, v, scale=SCALE).sum()


def copy_ours(q_t, k_t, v):
    return copy_attention(LayerFactors(q_BHTD=q_t, k_BHTD=k_t, scale=SCALE), v).sum()


def kept_nbytes(function, tensors):
    """Bytes that autograd keeps between forward and backward, without the inputs."""
    given = {tensor.untyped_storage().data_ptr() for tensor in tensors}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in given:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        function(*tensors).backward()
    return sum(kept.values())


def fastest_s(ways, tensors, runs=7):
    """Seconds of each way's fastest run. Ways take turns, and the first run of each warms up."""
    times = {name: [] for name in ways}
    for _ in range(1 + runs):
        for name, function in ways.items():
            start = time.perf_counter()
            function(*tensors).backward()
            times[name].append(time.perf_counter() - start)
    return {name: min(seconds[1:]) for name, seconds in times.items()}


def draw(samples, tokens, dtype, value_dim):
    """Random tensors: the arguments of distillation, and those of copying."""
    q_t, k_t, q_s, k_s, v_s = (torch.randn(samples, HEADS, tokens, HEAD_DIM, dtype=dtype) for _ in range(5))
    v = torch.randn(samples, HEADS, tokens, value_dim, dtype=dtype)
    return (q_t, k_t, *(own.requires_grad_() for own in (q_s, k_s, v_s))), (q_t, k_t, v.requires_grad_())


def sweep(dtype, value_dim):
    for samples, tokens in SHAPES:
        distil, copying = draw(samples, tokens, dtype, value_dim)
        for mib in (1, 2, 4, 8, 16, 64, 256):
            kernels.CPU_SLICE_NBYTES = mib * 2**20
            distil_s = fastest_s({"maps": distil_by_maps, "ours": distil_in_one_pass}, distil)
            copying_s = fastest_s({"maps": copy_by_maps, "ours": copy_ours}, copying)
            print(
                f"{samples} x {tokens:4} tokens, slices of {mib:3} MiB: "
                f"distill {distil_s['maps'] / distil_s['ours']:5.2f}x, "
                f"copy {copying_s['maps'] / copying_s['ours']:5.2f}x as fast as maps"
            )


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The parsed options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--value-dim", type=int, default=HEAD_DIM, help="head dim of a copying student's v")
    parser.add_argument("--sweep", action="store_true")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    dtype = getattr(torch, options.dtype)
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, {options.dtype}, {HEADS} heads of {HEAD_DIM}"
        f", v's of {options.value_dim}"
    )
    if options.sweep:
        sweep(dtype, options.value_dim)
        return
    distil = {
        "maps": distil_by_maps,
        "fused call + identity": distil_by_identity,
        "fused call + slices": distil_beside_fused_call,
        "one pass (ours)": distil_in_one_pass,
    }
    copying = {"maps": copy_by_maps, "fused call": copy_by_fused_call, "v only (ours)": copy_ours}
    for samples, tokens in SHAPES:
        for_distil, for_copying = draw(samples, tokens, dtype, options.value_dim)
        for kind, ways, tensors in (("distill", distil, for_distil), ("copy", copying, for_copying)):
            seconds = fastest_s(ways, tensors)
            for name, function in ways.items():
                kept = kept_nbytes(function, tensors) / 2**20
                print(
                    f"{kind:8} {samples} x {tokens:4} tokens  {name:21} {1e3 * seconds[name]:8.1f} ms  "
                    f"{seconds['maps'] / seconds[name]:5.2f}x  keeps {kept:7.1f} MiB"
                )


if __name__ == "__main__":
    main()
