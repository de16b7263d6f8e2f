"""Which device and float type a model runs in: bfloat16 where it is fast, float32 elsewhere; and if memory is full."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from atcache.choices import PRECISIONS
from atcache.errors import ConfigError

_SHORT_SEQUENCE = 150
"""Patches up to which torch's plain attention trains faster on a CPU in bfloat16 than its fused one."""


def resolve_precision(name: str, device: str | torch.device) -> torch.dtype:
    """The type matrix products run in on `device`: torch.bfloat16 or torch.float32.

    "auto" takes bfloat16 only if the device has instructions for it. A processor without them emulates each product
    and is hundreds of times slower than in float32; one with AMX or AVX512-BF16 is several times faster.

    Raises:
        ConfigError: `name` is not "auto", "fp32" or "bf16".
    """
    if name == "fp32":
        return torch.float32
    if name == "bf16":
        return torch.bfloat16
    if name != "auto":
        raise ConfigError(f"precision {name!r}: expected one of {', '.join(PRECISIONS)}.")
    return torch.bfloat16 if _is_fast_at_bf16(torch.device(device)) else torch.float32


def autocast(device: str | torch.device, dtype: torch.dtype) -> AbstractContextManager[Any]:
    """A context in which matrix products run in `dtype` on `device`; nothing changes for float32."""
    if dtype == torch.float32:
        return nullcontext()
    return torch.autocast(torch.device(device).type, dtype=dtype)


@contextmanager
def training_autocast(model: nn.Module, device: str | torch.device, dtype: torch.dtype) -> Generator[None]:
    """`autocast` for a forward pass of `model` whose gradients are wanted.

    On a CPU in bfloat16, the backward pass of torch's fused attention is slow where the sequence is short, so its plain
    attention is taken there (`benchmarks/cpu_attention.py`).
    """
    num_patches: object = getattr(getattr(model, "patch_embed", None), "num_patches", None)
    is_short = isinstance(num_patches, int) and num_patches <= _SHORT_SEQUENCE
    with ExitStack() as stack:
        stack.enter_context(autocast(device, dtype))
        if torch.device(device).type == "cpu" and dtype == torch.bfloat16 and is_short:
            choose_kernel: Any = sdpa_kernel  # torch types only a part of it
            stack.enter_context(choose_kernel(SDPBackend.MATH))
        yield


@contextmanager
def rounded_products(device: str | torch.device) -> Generator[None]:
    """A context in which a GPU rounds the factors of float32 products to 10 bits (TF32); several times as fast.

    The switch is of the whole process: other threads' products are rounded too. On a CPU nothing changes.
    """
    if torch.device(device).type != "cuda":
        yield
        return
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextmanager
def memory_errors_explained(
    what: object, num_images: int, device: str | torch.device, advice: str = "Give a smaller --batch-size"
) -> Generator[None]:
    """A context that makes one sentence of torch's error if a batch does not fit in the memory of its device.

    Args:
        what: the model, for the message.
        num_images: images in the batch.
        device: where it runs.
        advice: what a user can do about it, without a full stop.

    Raises:
        ConfigError: it does not fit.
    """
    try:
        yield
    except RuntimeError as error:
        # torch has a class of errors for the memory of GPUs only.
        if not isinstance(error, torch.OutOfMemoryError) and "DefaultCPUAllocator" not in str(error):
            raise
        raise ConfigError(
            f"{what}: a batch of {num_images} images does not fit in the memory of device {device}. {advice} "
            "(in Python batch_size=), or another --device."
        ) from error


def _is_fast_at_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        # Without `including_emulation=False` GPUs before Ampere answer yes and are slower than in float32.
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu":
        return False
    # torch's checks of the processor are private and differ between versions; a missing check counts as no.
    checks = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    return any(bool(getattr(torch.cpu, check, lambda: False)()) for check in checks)


def resolve_device(name: str) -> torch.device:
    """The device that `name` stands for; "auto" is the first GPU, or the CPU if there is none.

    Raises:
        ConfigError: there is no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"device {name!r}: expected auto, cpu, cuda or cuda:N.") from error
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device {name!r}: expected auto, cpu, cuda or cuda:N. Other devices are not supported.")
    num_gpus = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= num_gpus:
        raise ConfigError(f"device {name!r}: torch sees {num_gpus} GPUs here. Use --device cpu, or check the driver.")
    return device
