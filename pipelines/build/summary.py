"""What a build did, as it is printed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

from atcache.fields import JsonFields

from ..fidelity import Expectation
from .plan import BuildPlan


@dataclass(frozen=True, kw_only=True, slots=True)
class BuildSummary(JsonFields):
    """What a build did, all its processes together."""

    out: str
    plan: BuildPlan | None
    """None if the cache was complete already."""
    complete: dict[str, Any] | None
    """The totals of the finished cache; None after a dry run."""
    num_built_views: int
    """Views this run stored."""
    row_kl_nats: float | None
    """Mean row KL of decoded maps on some views of each task; None after a dry run."""
    warning: str | None
    """A sentence if the row KL is higher than expected, else None."""
    seconds: float
    """From the first look at the data to the end."""

    @classmethod
    def of(
        cls,
        out: str,
        *,
        seconds: float,
        plan: BuildPlan | None = None,
        complete: dict[str, Any] | None = None,
        expectation: Expectation | None = None,
        num_built_views: int = 0,
    ) -> Self:
        """The summary of a cache with these totals; `expectation` judges its row KL."""
        row_kl_nats = None if complete is None else complete["quality"].get("row_kl_nats", {}).get("mean")
        warning = None
        if complete is not None and expectation is not None and row_kl_nats is not None:
            warning = expectation.warn(row_kl_nats, complete.get("num_checked", complete["num_stored"]))
        return cls(
            out=out,
            plan=plan,
            complete=complete,
            num_built_views=num_built_views,
            row_kl_nats=row_kl_nats,
            warning=warning,
            seconds=seconds,
        )
