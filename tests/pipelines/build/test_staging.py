"""Stages overlap, keep the order, hold few items, and end with the first error. Shown with made stages, which sleep."""

from __future__ import annotations

import threading
import time
from typing import NamedTuple

import pytest
import torch

from atcache.pipelines.build.staging import overlapped
from atcache.pipelines.build.transfers import Transfers

STAGE_S = 0.02


class Event(NamedTuple):
    what: str
    item: int
    time_s: float


class Stages:
    """Stages that note when they begin and end. A made device works in a thread of its own, on one item at a time."""

    def __init__(self, *, device_s=STAGE_S, finish_s=STAGE_S, fails=None) -> None:
        self.events: list[Event] = []
        self._device_s, self._finish_s = device_s, finish_s
        self._fails = fails
        self._last: threading.Event | None = None

    def note(self, what, item):
        self.events.append(Event(what, item, time.monotonic()))
        if self._fails == (what, item):
            raise ValueError(f"{what} {item}")

    def taken(self, count):
        for item in range(count):
            self.note("take", item)
            yield item

    def prepare(self, item):
        self.note("prepare", item)
        return item

    def queue(self, item):
        self.note("queue", item)
        before, done = self._last, threading.Event()
        self._last = done

        def work():
            if before is not None:
                before.wait()
            self.note("begin", item)
            time.sleep(self._device_s)
            self.note("end", item)
            done.set()

        threading.Thread(target=work).start()
        return item, done

    def finish(self, given):
        item, done = given
        done.wait()
        self.note("finish", item)
        time.sleep(self._finish_s)
        self.note("finished", item)
        return item

    def run(self, count, most_in_flight=3):
        given = {"prepare": self.prepare, "queue": self.queue, "finish": self.finish}
        return overlapped(self.taken(count), **given, most_in_flight=most_in_flight)

    def when(self, what, item) -> float:
        (event,) = (event for event in self.events if event[:2] == (what, item))
        return event.time_s


def test_the_device_begins_the_next_item_while_the_host_still_finishes_the_last():
    """Each finish waits until the device is at the next item: one after the other, they would wait for ever."""
    stages, began = Stages(), [threading.Event() for _ in range(7)]
    began[6].set()

    def note(what, item):
        Stages.note(stages, what, item)
        if what == "begin":
            began[item].set()

    stages.note = note
    finish = stages.finish

    def finish_beside_the_next(given):
        assert began[given[0] + 1].wait(60)
        return finish(given)

    stages.finish = finish_beside_the_next
    assert list(stages.run(6)) == list(range(6))
    for item in range(5):
        assert stages.when("prepare", item + 1) < stages.when("finish", item), "copied ahead"


def test_no_more_are_in_flight_than_allowed_however_slow_the_host():
    stages = Stages(device_s=0.001)
    assert list(stages.run(8, most_in_flight=2)) == list(range(8))
    queued = finished = most = 0
    for event in sorted(stages.events, key=lambda event: event.time_s):
        queued += event.what == "queue"
        finished += event.what == "finished"
        most = max(most, queued - finished)
    assert most == 2


def test_items_are_taken_only_as_they_are_needed():
    stages = Stages(device_s=0.001, finish_s=0.001)
    results = stages.run(100, most_in_flight=2)
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    assert sum(event.what == "take" for event in stages.events) <= 3 + 2 + 1
    results.close()


@pytest.mark.parametrize("what", ["take", "prepare", "queue", "finish"])
def test_an_error_ends_it_behind_the_results_before_it(what):
    results = Stages(fails=(what, 3)).run(8)
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ValueError, match=f"{what} 3"):
        next(results)


def test_closing_early_leaves_no_thread():
    stages = Stages()
    results = stages.run(8)
    next(results)
    results.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("finish")]


def test_on_a_cpu_nothing_is_copied():
    transfers, tensor = Transfers(torch.device("cpu")), torch.arange(6)
    used = transfers.use(transfers.send(tensor))
    assert used is tensor
    (fetched,) = transfers.fetch([used]).wait()
    assert fetched.data_ptr() == tensor.data_ptr()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="streams take a GPU")
def test_on_a_gpu_tensors_come_back_as_they_were_computed_and_pinned():
    device = torch.device("cuda")
    transfers = Transfers(device)
    numbers = torch.Generator().manual_seed(0)
    with transfers.on_device():
        given = [torch.randint(0, 256, (64, 50_000), dtype=torch.uint8, generator=numbers) for _ in range(20)]

        def queue(sent):
            computed = transfers.use(sent).float()
            for _ in range(20):
                computed = computed * 1.0 + 1
            return transfers.fetch([computed, computed[:, -1]])

        results = overlapped(
            given, prepare=transfers.send, queue=queue, finish=lambda fetched: fetched.wait(), most_in_flight=3
        )
        for tensor, (whole, last) in zip(given, results, strict=True):
            assert whole.is_pinned()
            assert torch.equal(whole, tensor.float() + 20)
            assert torch.equal(last, tensor[:, -1].float() + 20)
    with transfers.aside():
        assert torch.cuda.current_stream() != torch.cuda.default_stream()
