"""The result of an evaluation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from atcache.fields import JsonFields, Omitted

from ..train.scores import PairScore, Score


@dataclass(frozen=True, kw_only=True, slots=True)
class SetScores(JsonFields):
    """The scores on one set of images."""

    name: str
    runs: tuple[Score, ...]
    """One a run."""
    mean_probabilities: Score | None
    """Of the mean of the runs' probabilities; None for one run."""
    mean_logits: Score | None
    """Of the mean of their logits; None for one run."""
    pairs: tuple[PairScore, ...]
    """Of each two runs."""
    num_left_out: int
    """Samples that were left out because their class is not one of `classes_of`."""
    corrupt: Annotated[str | None, Omitted] = None
    """How the images of the first set were corrupted, such as "fog:3"; None for other images, or if they were not."""

    @property
    def score(self) -> Score:
        """Of the run, or of the mean of the probabilities if there are several."""
        return self.mean_probabilities or self.runs[0]


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluateSummary(JsonFields):
    """The result of an evaluation."""

    runs: tuple[str, ...]
    modes: tuple[str, ...]
    sets: tuple[SetScores, ...]
    """The main set first."""
    seconds: float

    @property
    def score(self) -> Score:
        """On the first set: of the run, or of the mean of the probabilities if there are several."""
        return self.sets[0].score
