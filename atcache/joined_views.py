"""Views of several caches, or of several sources, as one set of samples."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import numpy as np

from atcache.errors import ConfigError
from atcache.sample_views import SampleView, Views


class JoinedViews:
    """Several views as one: the rows of each follow those of the one before.

    Each part keeps its own number of views, so epoch e takes view e modulo that, and its own codec: the codes in a
    batch come in one part a cache. Labels are joined the same way: `np.concatenate`.

    Args:
        parts: whose samples follow each other; none of them joined itself.

    Raises:
        ConfigError: there are no parts.
    """

    def __init__(self, parts: Sequence[Views]) -> None:
        if not parts:
            raise ConfigError("no views to join: give at least one.")
        self._parts = tuple(parts)
        self._stops = list(accumulate(part.num_samples for part in parts))
        self._starts = [0, *self._stops[:-1]]

    @property
    def identity(self) -> dict[str, Any]:
        """See `Views.identity`; the order of the parts counts, since rows follow from it."""
        return {"joined": {str(number): part.identity for number, part in enumerate(self._parts)}}

    @property
    def num_samples(self) -> int:
        """See `Views.num_samples`."""
        return self._stops[-1]

    def part_of(self, sample_B: np.ndarray) -> np.ndarray:
        """See `Views.part_of`."""
        return np.searchsorted(self._stops, sample_B, side="right")

    def read(self, sample: int, epoch: int) -> SampleView:
        """See `Views.read`."""
        part = bisect_right(self._stops, sample)
        return self._parts[part].read(sample - self._starts[part], epoch)

    @property
    def is_remote(self) -> bool:
        """See `Views.is_remote`."""
        return any(part.is_remote for part in self._parts)

    def expect(self, sample_S: np.ndarray, epoch: int) -> None:
        """See `Views.expect`; each part is told of its own."""
        part_S = self.part_of(sample_S)
        for part in np.unique(part_S).tolist():
            self._parts[part].expect(sample_S[part_S == part] - self._starts[part], epoch)

    @property
    def codes_may_narrow(self) -> bool:
        """See `Views.codes_may_narrow`."""
        return all(part.codes_may_narrow for part in self._parts)
