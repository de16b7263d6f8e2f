"""Views of other views, corrupted: the same samples, crop and resize, then a common corruption."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple

from atcache.errors import ConfigError
from atcache.feed.sample_views import DerivedViews, SampleView, Views
from atcache.images.source import SampleIndex
from atcache.views.corrupt import Corruption
from atcache.views.policy import ViewPolicy


class Drawn(NamedTuple):
    """How a part of the views was drawn, and of which samples."""

    policy: ViewPolicy
    samples: SampleIndex
    where: str
    """The cache or the tars, for messages."""


class CorruptedViews(DerivedViews):
    """Evaluation views with a corruption: the pixels that `build --policy eval --corrupt` would store. No codes.

    The codes of the clean views would be those of another image.

    Args:
        views: the clean views.
        corruption: what is done to them.
        parts: how they were drawn, in the order of their rows.

    Raises:
        ConfigError: they are corrupted already, or not those of policy `eval`.
    """

    def __init__(self, views: Views, corruption: Corruption, parts: Sequence[Drawn]) -> None:
        for policy, _, where in parts:
            if policy.corrupt is not None:
                raise ConfigError(
                    f"the views of {where} are corrupted by {policy.corrupt} already. Name a clean set to corrupt."
                )
            if policy.name != "eval":
                raise ConfigError(
                    f"the views of {where} are of policy {policy.name}: only those of policy eval are corrupted."
                )
        super().__init__(views)
        self._corruption, self._parts = corruption, tuple(parts)
        self._starts = [0, *accumulate(part.samples.num_samples for part in parts)]

    @property
    def identity(self) -> dict[str, Any]:
        """See `Views.identity`."""
        return {"clean": self._views.identity, "corrupt": str(self._corruption)}

    def read(self, sample: int, epoch: int) -> SampleView:
        """See `Views.read`."""
        part = bisect_right(self._starts, sample) - 1
        policy, samples, _ = self._parts[part]
        draw_seed = self._corruption.draw_seed(policy.seed, samples.sample_key(sample - self._starts[part]))
        return SampleView(self._corruption.apply(self._views.read(sample, epoch).pixels_HWC, draw_seed), None)
