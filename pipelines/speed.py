"""How fast training goes, and how much of the time it waits."""

from __future__ import annotations

import time
from collections.abc import Iterator

from atcache.loader import Batch


class Speed:
    """Images per second, and the share of the time that went into waiting for batches."""

    def __init__(self) -> None:
        self._start_s = time.monotonic()
        self._waited_s = 0.0
        self.num_images = 0

    @property
    def seconds(self) -> float:
        """Since the start."""
        return max(1e-9, time.monotonic() - self._start_s)

    def timed(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The same batches; the time each takes to come counts as waiting, and its images as trained on."""
        while True:
            start_s = time.monotonic()
            batch = next(batches, None)
            self._waited_s += time.monotonic() - start_s
            if batch is None:
                return
            self.num_images += len(batch.label_B)
            yield batch

    def values(self) -> dict[str, float]:
        """Both numbers by name."""
        return {"img_per_s": self.num_images / self.seconds, "waited_for_data": self._waited_s / self.seconds}

    def __str__(self) -> str:
        values = self.values()
        return f"{values['img_per_s']:.4g} img/s  waited {values['waited_for_data']:.0%}"
