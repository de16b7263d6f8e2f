"""What the GPU kernels need of a GPU: registers, spilled bytes and shared memory. It needs no GPU, only its compiler.

    python benchmarks/kernel_resources.py [--arch 90] [--dtype bfloat16] [--head-dim 64] [--tokens 197] [--bias]

Triton brings NVIDIA's assembler, so kernels can be compiled, for any generation, on a machine without a GPU. For each
kernel this takes the arguments that `copy` and `compare` give it, and compiles it with each of its tilings. "Programs"
is how many of them registers and shared memory let run side by side on one multiprocessor, of an A100 (80), of an
RTX 30 or 40 (86, 89), or of an H100 (90). A kernel that spills keeps some of its values in slow memory. On older GPUs
than an H100 `all_gradients_kernel` does, so there two other kernels are used in its place.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

os.environ["TRITON_INTERPRET"] = "0"  # the interpreter has no compiler

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from atcache.attention.flash import comparing, copying
from atcache.attention.flash.launch import Tiling

SHARED_KIB = {80: 163, 86: 99, 89: 99, 90: 227}
"""Shared memory that one program can have, by generation."""
REGISTERS = 65_536  # of a multiprocessor, in all generations
POINTERS = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}


class Launch(NamedTuple):
    """The arguments of `launch` that decide how a kernel is compiled."""

    kernel: Any
    tilings: Sequence[Tiling]
    arguments: Sequence[Any]
    constants: dict[str, int | bool]


class Resources(NamedTuple):
    """What one compiled kernel takes."""

    registers: int
    """Of each thread."""
    spilled_nbytes: int
    """Of each thread."""
    shared_nbytes: int
    """Of each program."""


@contextlib.contextmanager
def launches() -> Iterator[list[Launch]]:
    """Record what would be launched, instead of launching it."""
    recorded: list[Launch] = []

    def record(kernel: Any, tilings: Sequence[Tiling], programs: Callable, arguments: Any, constants: dict) -> None:
        del programs
        recorded.append(Launch(kernel, tilings, arguments, constants))

    before = copying.launch
    copying.launch = comparing.launch = record
    try:
        yield recorded
    finally:
        copying.launch = comparing.launch = before


def all_launches(dtype: torch.dtype, head_dim: int, tokens: int, *, bias: bool) -> list[Launch]:
    """Each kernel once, with the arguments it gets in a timm student of two samples and 16 heads.

    At 577 tokens more kernels are needed than at a number that one program can take.
    """
    found: dict[str, Launch] = {}
    for num_tokens in (tokens, 577):
        q, k, v = torch.empty(2, num_tokens, 3, 16, head_dim, dtype=dtype).permute(2, 0, 3, 1, 4).unbind(0)
        given = torch.empty(2, 16, num_tokens, head_dim, dtype=dtype)
        out, lse = torch.empty(2, num_tokens, 16, head_dim, dtype=dtype).transpose(1, 2), torch.empty(2, 16, num_tokens)
        its_bias = torch.empty(1, 16, num_tokens, num_tokens, dtype=dtype) if bias else None
        pair = (q, k, v, its_bias, 0.1, given, given, its_bias, 0.1)
        with launches() as recorded:
            copying.attend_in_tiles(given, given, v, its_bias, 0.1, out, lse)
            copying.value_gradient(out, given, given, its_bias, lse, 0.1, 16)
            comparing.compare_op(*pair)
            comparing.compare_gradients(out, lse.sum(), *pair, out, lse, lse, bias)
        found = {launch.kernel.fn.__name__: launch for launch in recorded} | found
    return list(found.values())


def compile_kernel(launch: Launch, tiling: Tiling, arch: int) -> Resources:
    """Compile one kernel as its first call would."""
    signature: dict[str, str] = {}
    constants: dict[str, Any] = dict(launch.constants)
    constants |= {name: side for name, side in (("M", tiling.m), ("N", tiling.n)) if name in launch.kernel.arg_names}
    attributes = {}
    for place, (name, argument) in enumerate(zip(launch.kernel.arg_names, launch.arguments, strict=False)):
        if isinstance(argument, torch.Tensor):
            signature[name] = POINTERS[argument.dtype]
            attributes[(place,)] = [["tt.divisibility", 16]]
        elif isinstance(argument, float):
            signature[name] = "fp32"
        elif argument == 1:
            constants[name] = 1
        else:
            signature[name] = "i32"
            if argument % 16 == 0:
                attributes[(place,)] = [["tt.divisibility", 16]]
    signature |= dict.fromkeys(constants, "constexpr")
    source = ASTSource(fn=launch.kernel, signature=signature, constexprs=constants, attrs=attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=tiling.options)
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(compiled.asm["cubin"])
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        listing = subprocess.run(
            [tool, "--dump-resource-usage", cubin], capture_output=True, text=True, check=True
        ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", listing)
    assert found is not None, listing
    return Resources(int(found[1]), int(found[2]), compiled.metadata.shared)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The parsed options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, default=90, choices=sorted(SHARED_KIB))
    parser.add_argument(
        "--dtype", choices=[str(dtype).removeprefix("torch.") for dtype in POINTERS], default="bfloat16"
    )
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=197)
    parser.add_argument("--bias", action="store_true", help="student and teacher have a bias by head")
    parser.add_argument("--first", action="store_true", help="only the tiling that is tried first")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    for launch in all_launches(getattr(torch, options.dtype), options.head_dim, options.tokens, bias=options.bias):
        for tiling in launch.tilings[: 1 if options.first else None]:
            used = compile_kernel(launch, tiling, options.arch)
            shared_kib = used.shared_nbytes / 1024
            by_registers = REGISTERS // (used.registers * 32 * tiling.warps)
            by_memory = int((SHARED_KIB[options.arch] + 1) // (shared_kib + 1))
            fits = "" if shared_kib <= SHARED_KIB[options.arch] else "  does not fit"
            print(
                f"{launch.kernel.fn.__name__:22} {tiling.m:4} x {tiling.n:4}, {tiling.warps:2} warps, "
                f"{tiling.stages} stages: {used.registers:4} registers, {used.spilled_nbytes:4} B spilled, "
                f"{shared_kib:6.1f} KiB shared, {min(by_registers, by_memory)} programs{fits}",
                flush=True,
            )


if __name__ == "__main__":
    main()
