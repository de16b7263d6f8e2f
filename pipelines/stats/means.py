"""Means over views, and their standard errors."""

from __future__ import annotations

import numpy as np

from .tables import Table


class Means:
    """Running means of numbers that come for one view after the other, by Welford's method."""

    def __init__(self) -> None:
        self.num_views = 0
        self._mean_KLH: np.ndarray = np.zeros(())
        self._squares_KLH: np.ndarray = np.zeros(())
        """Sums of squared distances from the mean."""

    def add(self, of_view_KLH: np.ndarray) -> None:
        """Count one view, float64, axes (kind, layer, head)."""
        self.num_views += 1
        from_old_KLH = of_view_KLH - self._mean_KLH
        self._mean_KLH = self._mean_KLH + from_old_KLH / self.num_views
        self._squares_KLH = self._squares_KLH + from_old_KLH * (of_view_KLH - self._mean_KLH)

    @property
    def mean_KLH(self) -> np.ndarray:
        """The means."""
        return self._mean_KLH

    @property
    def standard_error_KLH(self) -> np.ndarray | None:
        """Standard errors of the means, as if views were drawn independently; None for a single view."""
        if self.num_views < 2:
            return None
        return np.sqrt(self._squares_KLH / (self.num_views - 1) / self.num_views)


def as_table(numbers_LH: np.ndarray) -> Table:
    """An array as plain numbers."""
    return tuple(tuple(float(number) for number in numbers_H) for numbers_H in numbers_LH)
