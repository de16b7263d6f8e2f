"""What decoding a view costs beside what it replaces: one forward pass of the teacher."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from atcache.codecs.base import Coder
from atcache.teachers.devices import autocast
from atcache.teachers.run import TeacherRun

_TIMED_VIEWS = 8
_ROUNDS = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodeCost:
    """Shares of the teacher's forward pass; 0.25 is a quarter."""

    operations: float | None
    """Of its multiply-adds; None if the codec multiplies next to nothing."""
    seconds: float
    """Of its time, on this device, as measured just now."""

    def __str__(self) -> str:
        if self.operations is None:
            return f"decoding takes {self.seconds:.0%} of the teacher's time"
        return f"decoding takes {self.operations:.0%} of the teacher's operations, {self.seconds:.0%} of its time"


def measure_decode_cost(run: TeacherRun, coder: Coder, pixels_BHWC: Tensor, codes_BLTC: Tensor) -> DecodeCost:
    """Count and time both on some views.

    Args:
        run: the teacher.
        coder: the codec, fitted.
        pixels_BHWC: views, uint8.
        codes_BLTC: their codes, on the teacher's device.
    """
    few = slice(0, _TIMED_VIEWS)
    images, codes_BLTC = run.images(pixels_BHWC[few]), codes_BLTC[few]
    model: Any = run.teacher.model
    forward: Callable[[Tensor], Any] = getattr(model, "forward_features", model)

    def decode() -> None:
        decoded = coder.decode(codes_BLTC)
        for position in range(len(coder.geometry.layers)):
            decoded.layer(position)

    with torch.inference_mode(), autocast(run.device, run.dtype):
        with FlopCounterMode(display=False) as counter:
            forward(images[:1])
        macs = coder.decode_macs_per_view
        # In turn, since other work on the machine slows both.
        pairs = [(_seconds(decode, run.device), _seconds(lambda: forward(images), run.device)) for _ in range(_ROUNDS)]
    return DecodeCost(
        operations=None if macs is None else 2 * macs / max(1, counter.get_total_flops()),
        seconds=statistics.median(decoding / teacher for decoding, teacher in pairs),
    )


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    wait()
    start_s = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - start_s
