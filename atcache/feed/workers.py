"""Batches made in advance by worker processes. Errors arrive as they were raised, not as text with two tracebacks."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterable, Sized
from typing import TypeVar, cast

import torch
from torch.utils.data import DataLoader, Dataset

from atcache.errors import AtcacheError

Batch = TypeVar("Batch")


class _ErrorsAsValues(Dataset[Batch | AtcacheError]):
    """Returns an `AtcacheError` if the dataset raises one.

    torch raises a worker's error again with the worker's whole traceback as its message, which no user should read.
    """

    def __init__(self, batches: Dataset[Batch]) -> None:
        self._batches = batches

    def __getitem__(self, number: int) -> Batch | AtcacheError:
        try:
            return self._batches[number]
        except AtcacheError as error:
            return error


def read_ahead(
    batches: Dataset[Batch], numbers: Iterable[int], *, workers: int, pin_memory: bool = False
) -> Generator[Batch]:
    """The batches of these numbers, in order.

    Args:
        batches: number -> batch; forked or pickled to the workers.
        numbers: which batches, in order; each number is taken only when it is needed.
        workers: processes that read ahead, two batches each; 0 makes each batch in this process when it is needed.
        pin_memory: put the batches in pinned memory, from which a GPU copies without waiting.

    Raises:
        AtcacheError: making a batch raised it; raised here when it is that batch's turn.
    """
    loader = DataLoader(
        _ErrorsAsValues(batches),
        batch_size=None,
        sampler=numbers,
        num_workers=min(workers, len(numbers)) if isinstance(numbers, Sized) else workers,
        collate_fn=_as_it_is,
        generator=torch.Generator(),  # else each start would draw from the global one, and change a run's numbers
        pin_memory=pin_memory,
        worker_init_fn=_leave_the_process_group,
    )
    for batch in loader:
        if isinstance(batch, AtcacheError):
            raise batch
        yield cast("Batch", batch)


def _leave_the_process_group(_worker: int) -> None:
    """Ctrl-C and a scheduler's SIGTERM reach whole process groups. Only the main process decides what they mean, and
    it may need batches until then.
    """
    os.setpgid(0, 0)


def _as_it_is(batch: object) -> object:
    return batch
