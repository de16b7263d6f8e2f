"""How many pairs of students, and how many steps for each, fit into the time."""

from __future__ import annotations

from dataclasses import dataclass

from atcache.errors import ConfigError
from atcache.fields import JsonFields

_FEW_SEEDS = 3
"""Steps are cut before there are fewer pairs than this: the interval of two pairs is three times as wide."""
_FEWEST_STEPS = 50
"""Runs are never cut to fewer steps."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PairSpeed(JsonFields):
    """How long a pair of runs takes: one with the teacher's attention, and one without."""

    step_s: float
    """One step of both."""
    rest_s: float
    """All else: opening the caches, validation."""

    def seconds(self, steps: int) -> float:
        """The time of a pair with so many steps."""
        return self.rest_s + steps * self.step_s


@dataclass(frozen=True, kw_only=True, slots=True)
class Schedule(JsonFields):
    """What is trained."""

    steps: int
    seeds: int


def fit_schedule(speed: PairSpeed, *, steps: int, seeds: int, minutes: float) -> Schedule:
    """All that was asked for, if there is time; else fewer pairs, down to three; then fewer steps; then two pairs.

    Args:
        speed: as measured.
        steps: wanted steps of a run.
        seeds: wanted pairs, at least two.
        minutes: time for all of them.

    Raises:
        ConfigError: there is no time for two pairs of short runs; the message says how many minutes they take.
    """
    budget_s = 60 * minutes
    few = min(seeds, _FEW_SEEDS)
    for number in range(seeds, few - 1, -1):
        if number * speed.seconds(steps) <= budget_s:
            return Schedule(steps=steps, seeds=number)
    fewest = min(steps, _FEWEST_STEPS)
    for number in range(few, 1, -1):
        possible = int((budget_s / number - speed.rest_s) / speed.step_s)
        if possible >= fewest:
            return Schedule(steps=min(steps, possible), seeds=number)
    needed = 2 * speed.seconds(fewest) / 60
    raise ConfigError(
        f"minutes={minutes:g} is too short: two pairs of {fewest} steps take about {needed:.2g} minutes here. Give "
        f"--minutes {needed * 1.1:.2g}, a smaller --batch-size or fewer validation images."
    )


def fit_seeds(speed: PairSpeed, *, steps: int, seeds: int, num_done: int, minutes: float) -> int:
    """How many pairs there are after this call, if `num_done` are trained already and the steps are settled.

    At least one more pair is trained, if more are asked for, and at least two in all.
    """
    time_for = int(60 * minutes / speed.seconds(steps))
    return min(seeds, max(2, num_done + max(1, time_for)))
