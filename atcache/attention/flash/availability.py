"""Whether the Triton kernels can run on given tensors."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any, cast

import torch
from torch import Tensor

HAS_TRITON = find_spec("triton") is not None
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_LARGEST_HEAD_DIM = 128
_FIRST_GENERATION = 8  # Ampere; Triton does not support older ones


def serves(*vectors: Tensor) -> bool:
    """Whether the kernels take these vectors, of shape (batch, head, token, head dim) each.

    They run on NVIDIA GPUs of the Ampere generation and newer, where Triton is installed, in bf16, fp16 and float32,
    for head dims up to 128. Everywhere else the same results come from plain torch, in slices.
    """
    can_run = (
        HAS_TRITON
        and torch.version.cuda is not None
        and all(each.is_cuda and each.dtype in _DTYPES and each.shape[-1] <= _LARGEST_HEAD_DIM for each in vectors)
    )
    if not can_run:
        return False
    properties = cast("Any", torch.cuda.get_device_properties(vectors[0].device))
    return bool(properties.major >= _FIRST_GENERATION)
