"""Rendered views in batches, which worker processes make."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset

from atcache.cache.stacking import Stack
from atcache.images.source import Source
from atcache.store.layout import Task
from atcache.views.policy import ViewPolicy
from atcache.views.rendering import Rendered, Renderer

from .given_views import ReplayedViews

_KEPT_NBYTES = 64 * 2**20  # in each worker, for views that are mixed into others: about 450 at 224 pixels
_NO_PIXELS = np.empty((0, 0, 3), np.uint8)


class RenderedBatch(NamedTuple):
    """Consecutive samples of one task, rendered."""

    task: Task
    start: int
    status_B: np.ndarray
    parameters_BP: np.ndarray
    pixel_hashes: list[int]
    pixels_BHWC: Tensor


class RenderedBatches(Dataset[RenderedBatch]):
    """Batch number -> rendered views. Batches never cross tasks, so a continued build forms the same ones.

    Views are drawn by the policy, unless those of another cache are given.
    """

    def __init__(
        self,
        source: Source,
        policy: ViewPolicy,
        tasks: Iterable[Task],
        batch_size: int,
        *,
        skip_bad: bool,
        replayed: ReplayedViews | None = None,
    ) -> None:
        self._renderer = replayed or Renderer(source, policy, skip_bad=skip_bad, keep_nbytes=_KEPT_NBYTES)
        self._batches: list[tuple[Task, int, int]] = []
        self._numbers_of_tasks: list[range] = []
        for task in tasks:
            starts = range(task.start, task.stop, batch_size)
            self._numbers_of_tasks.append(range(len(self._batches), len(self._batches) + len(starts)))
            self._batches += [(task, start, min(start + batch_size, task.stop)) for start in starts]

    def __len__(self) -> int:
        return len(self._batches)

    def numbers_of(self, task_number: int) -> range:
        """The batch numbers of the task at this place in `tasks`."""
        return self._numbers_of_tasks[task_number]

    def size_of(self, number: int) -> int:
        """How many samples a batch has."""
        _, start, stop = self._batches[number]
        return stop - start

    def __getitem__(self, number: int) -> RenderedBatch:
        task, start, stop = self._batches[number]
        block = range(task.start, task.stop)
        views: list[Rendered] = []
        pixels = Stack(stop - start)
        for sample in range(start, stop):
            view = self._renderer.render(sample, task.view, block)
            pixels.add(view.pixels_HWC)
            views.append(view._replace(pixels_HWC=_NO_PIXELS))
        pixels_BHWC = pixels.tensor
        assert pixels_BHWC is not None, "a batch has samples"
        return RenderedBatch(
            task=task,
            start=start,
            status_B=np.array([view.status for view in views], np.uint8),
            parameters_BP=np.stack([view.parameters_P for view in views]),
            pixel_hashes=[view.pixel_hash for view in views],
            pixels_BHWC=pixels_BHWC,
        )
