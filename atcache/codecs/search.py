"""Finding the step that meets a target."""

from __future__ import annotations

import math
from collections.abc import Callable

from atcache.errors import CodecError

_CLOSE_ENOUGH = 0.96
"""Share of the target that is accepted: a step is measured on a few views, so more digits would say nothing."""
_MAX_TRIES = 24
_AIM = math.log(_CLOSE_ENOUGH) / 2
_LARGEST_JUMP = math.log(8)
_STEEPEST, _FLATTEST = 2.0, 0.1


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
        measure: a number above or at 0 that rises with the step (a divergence) or falls with it (bytes).
        target: above 0.
        start: the step tried first.
        rises: whether `measure` rises.
        least: no step below this is tried.
        most: no step above this is tried.

    Returns:
        The best step seen that meets the target; the one that came nearest where none does.

    Raises:
        CodecError: `measure` gives no number.
    """
    meets: tuple[float, float] | None = None
    misses: tuple[float, float] | None = None
    before: tuple[float, float] | None = None
    slope = _STEEPEST if rises else -_STEEPEST / 4  # a divergence goes with the step's square, bytes fall slowly
    step = min(most, max(least, start))
    for _ in range(_MAX_TRIES):
        value = measure(step)
        if math.isnan(value):
            raise CodecError(f"the codec's fidelity or size is no number at step {step:.3g}.")
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
    """A slope in logarithms that has the right sign and leads to no absurd jump."""
    size = min(_STEEPEST, max(_FLATTEST, slope if rises else -slope))
    return size if rises else -size


def _between(meets: tuple[float, float], misses: tuple[float, float]) -> float:
    """Linear between the two in logarithms, but never so near to an end that nothing is learnt."""
    share = (_AIM - meets[1]) / (misses[1] - meets[1])
    return meets[0] * (misses[0] / meets[0]) ** min(0.9, max(0.1, share))
