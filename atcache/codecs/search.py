"""Finding the step that meets a target."""

from __future__ import annotations

import math
from collections.abc import Callable

from atcache.errors import CodecError

_CLOSE_ENOUGH = 0.96
"""Share of the target that ends the search. A step is measured on a few views only, so closer would mean nothing."""
_MAX_TRIES = 24
_AIM = math.log(_CLOSE_ENOUGH) / 2  # the middle of what is accepted, in logarithms
_LARGEST_JUMP = math.log(8)  # the slope holds near the measured steps only
_STEEPEST, _FLATTEST = 2.0, 0.1  # slopes of log measure over log step


def find_step(
    measure: Callable[[float], float],
    target: float,
    *,
    start: float,
    rises: bool,
    least: float = 0.0,
    most: float = math.inf,
) -> float:
    """A step at which `measure` is at most `target`, and not far below it.

    Args:
        measure: returns a number of at least 0 that rises with the step (a divergence) or falls with it (bytes).
        target: above 0.
        start: the step tried first.
        rises: whether `measure` rises.
        least: no step below this is tried.
        most: no step above this is tried.

    Returns:
        The best step seen that meets the target; if none does, the one that came nearest.

    Raises:
        CodecError: `measure` returned NaN.
    """
    meets: tuple[float, float] | None = None
    misses: tuple[float, float] | None = None
    before: tuple[float, float] | None = None
    slope = _STEEPEST if rises else -_STEEPEST / 4  # a divergence grows with the step's square, bytes fall slowly
    step = min(most, max(least, start))
    for _ in range(_MAX_TRIES):
        value = measure(step)
        if math.isnan(value):
            raise CodecError(
                f"the codec's fidelity or size is NaN at step {step:.3g}. Check the teacher's weights and precision."
            )
        excess = math.log(max(value / target, 1e-12))
        if excess <= 0:
            meets = (step, excess)
            if excess >= math.log(_CLOSE_ENOUGH):
                break
        else:
            misses = (step, excess)
        if meets is not None and misses is not None:
            if abs(math.log(meets[0] / misses[0])) < 1e-3:
                break
            step = _between(meets, misses)
        else:
            if before is not None and before[0] != step:
                slope = _bounded((excess - before[1]) / math.log(step / before[0]), rises)
            before = (step, excess)
            jump = max(-_LARGEST_JUMP, min(_LARGEST_JUMP, (_AIM - excess) / slope))
            if (step <= least and jump < 0) or (step >= most and jump > 0):
                break
            step = min(most, max(least, step * math.exp(jump)))
    best = meets or misses
    assert best is not None, "something was measured"
    return best[0]


def _bounded(slope: float, rises: bool) -> float:
    """The slope, in logarithms, given the right sign and kept within bounds that prevent absurd jumps."""
    size = min(_STEEPEST, max(_FLATTEST, slope if rises else -slope))
    return size if rises else -size


def _between(meets: tuple[float, float], misses: tuple[float, float]) -> float:
    """A step between the two, linear in logarithms, but not so near to either that measuring it tells nothing."""
    share = (_AIM - meets[1]) / (misses[1] - meets[1])
    return meets[0] * (misses[0] / meets[0]) ** min(0.9, max(0.1, share))
