"""What a build did, as it is printed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Self

from ..fidelity import Expectation
from .plan import BuildPlan


@dataclass(frozen=True, kw_only=True, slots=True)
class BuildSummary:
    """What a build did, all its processes together."""

    out: str
    plan: BuildPlan | None = None
    """None when the cache was complete already."""
    complete: dict[str, Any] | None = None
    """The totals of the finished cache; None after a dry run."""
    num_built_views: int = 0
    """Views this run stored."""
    row_kl_nats: float | None = None
    """Mean row KL of decoded maps on some views of each task; None after a dry run."""
    warning: str | None = None
    """What is wrong with that, in a sentence; None where it is as it should be."""
    seconds: float
    """From the first look at the data to the end."""

    def judged(self, expectation: Expectation) -> Self:
        """The same for a finished cache, with its row KL and what `expectation` says of it."""
        totals = self.complete or {"quality": {}}
        row_kl_nats = totals["quality"].get("row_kl_nats", {}).get("mean")
        if row_kl_nats is None:
            return self
        warning = expectation.warn(row_kl_nats, totals.get("num_checked", totals["num_stored"]))
        return replace(self, row_kl_nats=row_kl_nats, warning=warning)

    def to_json(self) -> dict[str, Any]:
        """The fields as a JSON object."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """The summary `to_json` came from."""
        plan = values["plan"]
        fields: dict[str, Any] = {**values, "plan": None if plan is None else BuildPlan(**plan)}
        return cls(**fields)
