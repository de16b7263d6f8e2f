"""The results of a demo."""

from __future__ import annotations

from dataclasses import dataclass

from atcache.fields import JsonFields

AVERAGED = "distill + finetune, averaged"
"""The result of these two students together, beside those of the modes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModeResult:
    """The results of one mode's students, over the seeds."""

    top1: float
    """Mean validation accuracy, percent."""
    top1_per_seed: tuple[float, ...]
    gap_closed: float | None
    """(top1 - scratch) / (finetune - scratch) of the means; None if finetune is not better than scratch."""
    seconds: float
    """Mean time to train one student."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoSummary(JsonFields):
    """The results of the demo."""

    out: str
    modes: dict[str, ModeResult]
    """Results by mode, and of the averaged probabilities of the distilled and the fine-tuned student."""
    cache_nbytes_per_view: float
    """Size of the training cache per view, with all its files."""
    map_nbytes_per_view: int
    """Size of the same maps as float16."""
    num_views: int
    """Number of views in both caches together."""
    seconds: float
    commands: tuple[str, ...]
    """The commands that were run; they can be typed again in the same working folder."""
    page: str
    """The page that shows all this."""
