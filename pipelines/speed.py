"""How fast training goes, and how much of the time it waits."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager

from atcache.loader import Batch


class Speed:
    """Images per second of training, over all ranks, and the share of its time that went into waiting for batches.

    Args:
        num_ranks: processes that train together. Each is as fast as this one: they wait for each other.
    """

    def __init__(self, num_ranks: int = 1) -> None:
        self._num_ranks = num_ranks
        self._start_s = time.monotonic()
        self._waited_s = self._paused_s = 0.0
        self.num_images = 0
        """That were trained on."""

    @property
    def seconds(self) -> float:
        """Since the start, with all that was not training."""
        return max(1e-9, time.monotonic() - self._start_s)

    def timed(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The same batches; the time each takes to come counts as waiting, and its images as trained on."""
        while True:
            start_s = time.monotonic()
            batch = next(batches, None)
            self._waited_s += time.monotonic() - start_s
            if batch is None:
                return
            self.num_images += len(batch.label_B) * self._num_ranks
            yield batch

    @contextmanager
    def paused(self) -> Generator[None]:
        """Something else than training, such as validation."""
        start_s = time.monotonic()
        try:
            yield
        finally:
            self._paused_s += time.monotonic() - start_s

    def values(self) -> dict[str, float]:
        """Both numbers by name."""
        training_s = max(1e-9, self.seconds - self._paused_s)
        return {"img_per_s": self.num_images / training_s, "waited_for_data": self._waited_s / training_s}

    def __str__(self) -> str:
        values = self.values()
        return f"{values['img_per_s']:.4g} img/s  waited {values['waited_for_data']:.0%}"
