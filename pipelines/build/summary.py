"""What a build did, as it is printed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Self

from atcache.fields import JsonFields

from ..fidelity import Expectation
from .plan import BuildPlan


@dataclass(frozen=True, kw_only=True, slots=True)
class BuildSummary(JsonFields):
    """What a build did, all its processes together."""

    out: str
    plan: BuildPlan | None = None
    """None if the cache was complete already."""
    complete: dict[str, Any] | None = None
    """The totals of the finished cache; None after a dry run."""
    num_built_views: int = 0
    """Views this run stored."""
    row_kl_nats: float | None = None
    """Mean row KL of decoded maps on some views of each task; None after a dry run."""
    warning: str | None = None
    """A sentence if the row KL is higher than expected, else None."""
    seconds: float
    """From the first look at the data to the end."""

    def judged(self, expectation: Expectation) -> Self:
        """The same for a finished cache, with its row KL, which `expectation` judges."""
        totals = self.complete or {"quality": {}}
        row_kl_nats = totals["quality"].get("row_kl_nats", {}).get("mean")
        if row_kl_nats is None:
            return self
        warning = expectation.warn(row_kl_nats, totals.get("num_checked", totals["num_stored"]))
        return replace(self, row_kl_nats=row_kl_nats, warning=warning)
