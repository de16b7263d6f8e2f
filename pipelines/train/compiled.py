"""`torch.compile` of a student, for training only: validation and files keep the student as it is."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from atcache.attention.flash.availability import HAS_TRITON
from atcache.errors import AtcacheError
from atcache.students.student import Student

from ..running.ranks import Ranks


class Compiled(NamedTuple):
    """A student to train, compiled if that was possible."""

    student: Student
    problem: str | None = None
    """Why it is not compiled."""


_STEPS_THAT_PAY = 500
"""Compiling takes as long as some hundred steps. Shorter runs are over sooner without."""


def compiles(wanted: bool | None, device: torch.device, ranks: Ranks, num_steps: int) -> bool:
    """Whether to compile a student; `wanted` is what the user said, None leaves it to this function.

    By default on GPUs with Triton, which writes their kernels, in runs that are long enough. Not in several processes:
    all gradients of a compiled student come at once, so none is averaged while others are still computed. Not on CPUs,
    where it takes minutes.
    """
    if wanted is not None:
        return wanted
    is_worth_it = num_steps >= _STEPS_THAT_PAY and ranks.is_alone
    return is_worth_it and device.type == "cuda" and HAS_TRITON


def with_module(student: Student, module: nn.Module) -> Student:
    """The student with its module wrapped in another."""
    return replace(student, module=module, model=module if student.model is student.module else student.model)


def compile_student(student: Student, losses: Callable[[Student], Tensor], backend: Any = "inductor") -> Compiled:  # noqa: ANN401 - as torch's
    """The student with its module compiled and tried, or the student itself if that fails.

    Args:
        student: what to compile. Both share their weights.
        losses: computes the loss of a student on a batch like those of the training.
        backend: torch's backend.
    """
    # All batches of a training have one shape. The module inside the compiled one is the student's own.
    module = cast("nn.Module", torch.compile(student.module, dynamic=False, backend=backend))
    compiled = with_module(student, module)
    buffers = {name: buffer.clone() for name, buffer in student.module.named_buffers()}
    try:
        # Backward too: only then is all of it compiled.
        weights = [weight for weight in student.module.parameters() if weight.requires_grad]
        torch.autograd.grad(losses(compiled), weights, allow_unused=True)
    except AtcacheError:
        raise
    except Exception as error:  # torch raises errors of all kinds here, some of which only a compiler's log explains
        reason = textwrap.shorten(str(error), 160, placeholder="...")
        return Compiled(student, f"the student could not be compiled ({type(error).__name__}: {reason})")
    finally:
        with torch.no_grad():
            for name, buffer in student.module.named_buffers():
                buffer.copy_(buffers[name])
    return Compiled(compiled)
