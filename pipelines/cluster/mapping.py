"""Apply a function to many items: in threads of this process, or on the workers of a cluster."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Protocol, TypeVar

from .cluster import Cluster

Given = TypeVar("Given")
Item = TypeVar("Item")
Result = TypeVar("Result")


class Mapper(Protocol):
    """What applies functions."""

    def map(
        self, work: Callable[[Given, Item], Result], given: Given, items: Iterable[Item], *, at_once: int = 1
    ) -> Iterator[Result]:
        """`work(given, item)` for each item, in the items' order.

        Args:
            work: a function of a module.
            given: what all calls need.
            items: what they are for.
            at_once: how many a worker of a cluster gets at once. A thread gets one.
        """
        ...


@dataclass(frozen=True, slots=True)
class InThreads:
    """Threads of this process."""

    num_threads: int

    def map(
        self, work: Callable[[Given, Item], Result], given: Given, items: Iterable[Item], *, at_once: int = 1
    ) -> Iterator[Result]:
        """See `Mapper`."""
        del at_once
        return in_threads(partial(work, given), items, self.num_threads)


@dataclass(frozen=True, slots=True)
class OnCluster:
    """Workers of a cluster. What is given, and the results, are pickled."""

    cluster: Cluster

    def map(
        self, work: Callable[[Given, Item], Result], given: Given, items: Iterable[Item], *, at_once: int = 1
    ) -> Iterator[Result]:
        """See `Mapper`."""
        rest = iter(items)
        pieces = iter(lambda: list(islice(rest, at_once)), [])
        with closing(self.cluster.in_order(_do_piece, (work, given), pieces, name="a check")) as results:
            for result in results:
                yield from result


def _do_piece(given: tuple[Callable[[Given, Item], Result], Given], items: Sequence[Item]) -> list[Result]:
    work, own = given
    return [work(own, item) for item in items]


def in_threads(work: Callable[[Item], Result], items: Iterable[Item], num_threads: int) -> Iterator[Result]:
    """The results in the items' order. Only a few are made ahead, so memory does not grow with their number."""
    waiting: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(num_threads) as pool:
        try:
            for item in items:
                waiting.append(pool.submit(work, item))
                if len(waiting) > 2 * num_threads:  # enough that no thread runs out of work
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BaseException:  # also when the caller stops early: work that has not begun is dropped
            pool.shutdown(wait=False, cancel_futures=True)
            raise
