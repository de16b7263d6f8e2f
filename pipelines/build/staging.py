"""Stages of a pipeline that overlap: one prepares ahead, one keeps the device busy, one finishes what it has done."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Prepared = TypeVar("Prepared")
Working = TypeVar("Working")
Result = TypeVar("Result")


def overlapped(
    items: Iterable[Item],
    *,
    prepare: Callable[[Item], Prepared],
    queue: Callable[[Prepared], Working],
    finish: Callable[[Working], Result],
    most_in_flight: int,
) -> Generator[Result]:
    """What the three stages make of each item, in order.

    `prepare` and `queue` are called in this thread, so they should only ask the device to work, and not wait for it.
    The next item is prepared as soon as one is queued, before anything is waited for. `finish` is called in a thread of
    its own, in order, and waits for the device.

    Args:
        items: taken one by one, as they are needed.
        prepare: copies an item to the device, for instance.
        queue: begins the work on it.
        finish: waits until the work is done, and returns its result.
        most_in_flight: items that are queued and not finished; one more is prepared.

    Raises:
        Exception: what taking an item or a stage raised, when it is that item's turn: results before it come first.
    """
    pending: deque[Future[Result]] = deque()
    prepared = map(prepare, items)
    failure: Exception | None = None
    finisher = ThreadPoolExecutor(max_workers=1, thread_name_prefix="finish")
    try:
        while failure is None:
            try:
                item = next(prepared)
            except StopIteration:
                break
            except Exception as error:
                failure = error
                break
            if len(pending) == most_in_flight:
                yield pending.popleft().result()
            try:
                pending.append(finisher.submit(finish, queue(item)))
            except Exception as error:
                failure = error
            del item  # its memory on the device is free as soon as it is finished
        while pending:
            yield pending.popleft().result()
        if failure is not None:
            raise failure
    finally:
        finisher.shutdown(wait=True, cancel_futures=True)
