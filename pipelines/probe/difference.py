"""How far students with the teacher's attention are ahead of those without, how sure that is, and the answer in words.

Each pair of students shares its seed, so that what a seed decides for both of them cancels in their difference. The
interval is Student's for the mean of these differences. It says how other seeds would differ; it does not say how
other validation images would.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np

from atcache.fields import JsonFields

CONFIDENCE = 0.95
_MOST_SEEDS = 50
"""Where more pairs than this would be needed, other means are better."""
_NEAR_CHANCE = 0.1
"""Students that are less than this share of the way from chance to 100% have learnt next to nothing."""

Answer = Literal["works", "fails", "undecided"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Difference(JsonFields):
    """The mean difference of pairs, in percentage points of top-1 accuracy, and how sure it is."""

    mean: float
    """Above 0 if the students with the teacher's attention are better."""
    standard_error: float
    """Of the mean."""
    low: float
    """Lower end of the interval that holds the mean over all seeds with 95% confidence."""
    high: float
    """Its upper end."""
    num_pairs: int

    @property
    def answer(self) -> Answer:
        """Whether transfer works: yes or no where the whole interval is on one side of 0."""
        return "works" if self.low > 0 else "fails" if self.high < 0 else "undecided"


def paired_difference(transfer: Sequence[float], scratch: Sequence[float], num_images: int) -> Difference:
    """The mean of the differences between pairs, with Student's interval.

    Args:
        transfer: top-1 of students with the teacher's attention, in percent; two or more.
        scratch: top-1 of students without, of the same seeds.
        num_images: validation images. Their number is the finest step of a top-1, so no variance is taken to be
            smaller than what rounding to such steps gives: few pairs that happen to be equal do not make a certainty.

    >>> paired_difference([60.0, 62.0, 64.0], [58.0, 58.0, 58.0], 1000).mean
    4.0
    """
    differences = [ours - theirs for ours, theirs in zip(transfer, scratch, strict=True)]
    mean = statistics.fmean(differences)
    rounding = 2 * (100 / num_images) ** 2 / 12  # of two numbers, each rounded to a step
    error = math.sqrt(max(statistics.variance(differences), rounding) / len(differences))
    reach = student_t(len(differences) - 1) * error
    return Difference(mean=mean, standard_error=error, low=mean - reach, high=mean + reach, num_pairs=len(differences))


@lru_cache
def student_t(degrees: int, confidence: float = CONFIDENCE) -> float:
    """The t within which Student's distribution has `confidence` of its mass, on both sides of 0.

    With t = sqrt(degrees) tan(angle), the mass within t is the integral of cos(angle)^(degrees - 1), as a share of the
    whole integral up to a right angle (Abramowitz and Stegun 26.7).

    >>> round(student_t(2), 3)
    4.303
    """
    # Near a right angle t grows without limit, so the angles there lie closer together.
    angles_N = math.pi / 2 * (1 - (1 - np.linspace(0, 1, 20_001)) ** 2)
    heights_N = np.cos(angles_N) ** (degrees - 1)
    mass_N = np.concatenate([[0], np.cumsum(np.diff(angles_N) * (heights_N[1:] + heights_N[:-1]) / 2)])
    return math.sqrt(degrees) * math.tan(float(np.interp(confidence, mass_N / mass_N[-1], angles_N)))


def in_words(found: Difference, mode: str, seeds: int) -> str:
    """The answer as a sentence for a person, with what to do if there is none yet.

    Args:
        found: the difference.
        mode: of the students with attention.
        seeds: the pairs that were asked for; there may have been no time for all.
    """
    place = "ahead of" if found.mean >= 0 else "behind"
    pairs = f"{found.num_pairs} pairs"
    size = f"{abs(found.mean):.1f} ± {found.standard_error:.1f} points"
    interval = f"95% interval {found.low:+.1f} to {found.high:+.1f}"
    ahead = f"{mode} is {place} scratch by {size} ({interval}, {pairs})"
    if found.answer == "works":
        return f"{ahead}: transfer works on your data."
    if found.answer == "fails":
        return f"{ahead}: transfer does not work on your data with this student."
    if found.num_pairs < seeds:
        more = f"The same command again adds pairs, up to {seeds}."
    elif needed := seeds_needed(found):
        more = f"Give about --seeds {needed}."
    else:
        more = "So small a difference needs too many seeds: give another --out, and more --steps or --samples."
    return f"undecided: {ahead}, and 0 is within the interval. {more}"


def seeds_needed(found: Difference) -> int | None:
    """How many pairs would decide, if mean and spread stay as they are; None if that is more than 50."""
    spread = found.standard_error * math.sqrt(found.num_pairs)
    for number in range(found.num_pairs + 1, _MOST_SEEDS + 1):
        if student_t(number - 1) * spread / math.sqrt(number) < abs(found.mean):
            return number
    return None


def is_near_chance(transfer: Sequence[float], scratch: Sequence[float], num_classes: int) -> bool:
    """Whether neither kind of student has learnt much, so that their difference says little."""
    chance = 100 / num_classes
    best = max(statistics.fmean(transfer), statistics.fmean(scratch))
    return best - chance < _NEAR_CHANCE * (100 - chance)
