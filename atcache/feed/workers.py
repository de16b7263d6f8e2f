"""Batches made in advance by worker processes. Errors arrive as they were raised, not as text with two tracebacks."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import traceback
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence, Sized
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from multiprocessing.connection import Connection
from multiprocessing.context import DefaultContext, ForkServerContext
from multiprocessing.reduction import recv_handle, send_handle
from threading import Event
from typing import Any, TypeVar

import torch
from torch.utils.data import Dataset

from atcache.cache.slots import Slot, filling
from atcache.errors import AtcacheError, WorkerLostError
from atcache.feed.messages import Message, pack, pinned, unpack

Batch = TypeVar("Batch")

_BATCHES_A_WORKER = 2
_ARRIVING = 2  # batches that are copied out of the workers' memory before they are needed
_LOOK_EVERY_S = 0.2
_PATIENCE_S = 5  # for a worker to finish its batch at the end


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
        WorkerLostError: a worker was killed.
    """
    workers = min(workers, len(numbers)) if isinstance(numbers, Sized) else workers
    if not workers:
        for number in numbers:
            yield pinned(batches[number]) if pin_memory else batches[number]
        return
    pool = _Pool(batches, workers, pin_memory=pin_memory)
    try:
        yield from pool.batches(iter(numbers))
    finally:
        pool.close()


class _Pool:
    """Worker processes, and the thread that takes their batches."""

    def __init__(self, batches: Dataset[Any], num_workers: int, *, pin_memory: bool) -> None:
        self._workers: list[_Worker] = []
        self._pin_memory = pin_memory
        self._device = torch.cuda.current_device() if pin_memory else 0
        self._stops = Event()
        self._receiver = ThreadPoolExecutor(max_workers=1, thread_name_prefix="receive")
        try:
            for _ in range(num_workers):
                self._workers.append(_Worker(batches, [worker.connection for worker in self._workers]))
        except BaseException:
            self.close()
            raise

    def batches(self, numbers: Iterator[int]) -> Generator[Any]:
        """The batches of these numbers. In turn, each worker is asked for two, and for another when one has come."""
        asked: deque[tuple[_Worker, int]] = deque()
        arriving: deque[tuple[_Worker, int, Future[Any]]] = deque()

        def ask(worker: _Worker, slot: int) -> None:
            if (number := next(numbers, None)) is not None:
                worker.ask(number, slot)
                asked.append((worker, slot))

        def arrive() -> None:
            while asked and len(arriving) < _ARRIVING:
                worker, slot = asked.popleft()
                arriving.append((worker, slot, self._receiver.submit(self._receive, worker, slot)))

        for slot in range(_BATCHES_A_WORKER):
            for worker in self._workers:
                ask(worker, slot)
        arrive()
        while arriving:
            worker, slot, future = arriving.popleft()
            batch = future.result()
            del future  # it would keep the batch
            ask(worker, slot)
            arrive()
            yield batch
            del batch

    def _receive(self, worker: _Worker, slot: int) -> Any:  # noqa: ANN401 - a batch of any kind
        if self._pin_memory:
            torch.cuda.set_device(self._device)
        return worker.receive(slot, self._stops, pin_memory=self._pin_memory)

    def close(self) -> None:
        """End the workers, once they have finished the batch that they are at."""
        self._stops.set()
        self._receiver.shutdown(wait=True, cancel_futures=True)
        for worker in self._workers:
            worker.connection.close()
        for worker in self._workers:
            worker.close()


class _Worker:
    """A process, as its parent sees it."""

    def __init__(self, batches: Dataset[Any], others: Sequence[Connection]) -> None:
        context = _context(type(batches).__module__)
        self.connection, theirs = context.Pipe()
        # A forked process has the parent's ends of all pipes. Left open, they would hide that the parent has ended.
        inherited = [*others, self.connection] if context.get_start_method() == "fork" else []
        self._process = context.Process(target=_work, args=(theirs, inherited, batches), daemon=True)
        self._process.start()
        theirs.close()
        self._slots: dict[int, Slot] = {}

    def ask(self, number: int, slot: int) -> None:
        """Ask for a batch, to be put in this slot."""
        with suppress(BrokenPipeError):  # that it has ended is said when its batch is wanted
            self.connection.send((number, slot))

    def receive(self, slot: int, stops: Event, *, pin_memory: bool) -> Any:  # noqa: ANN401 - a batch of any kind
        """The next batch that it was asked for; None if `stops` is set meanwhile."""
        try:
            while not self.connection.poll(_LOOK_EVERY_S):
                if stops.is_set():
                    return None
            answer: Message | Exception = self.connection.recv()
            if isinstance(answer, Exception):
                raise answer
            if answer.new_slot_nbytes is not None:
                if (old := self._slots.pop(slot, None)) is not None:
                    old.close()
                self._slots[slot] = Slot(recv_handle(self.connection), answer.new_slot_nbytes)
        except (EOFError, ConnectionResetError) as error:
            raise self._lost() from error
        return unpack(answer, self._slots.get(slot), pin_memory=pin_memory)

    def _lost(self) -> WorkerLostError:
        self._process.join(_PATIENCE_S)
        code = self._process.exitcode
        how = f"by signal {-code}" if code is not None and code < 0 else f"with exit code {code}"
        return WorkerLostError(
            f"a worker process that makes batches was ended {how}, perhaps for want of memory. Use fewer --workers, or "
            "a smaller --batch-size."
        )

    def close(self) -> None:
        """Wait for its end, but not for ever."""
        self._process.join(_PATIENCE_S)
        if self._process.is_alive():
            self._process.terminate()
            self._process.join()
        for slot in self._slots.values():
            slot.close()


def _context(module: str) -> DefaultContext | ForkServerContext:
    """How this process starts others, which need `module`.

    A process that was itself spawned, as dask's workers are, would spawn. That takes seconds for each, to import torch.
    A server that has imported it once, and forks, is as safe.
    """
    if multiprocessing.get_start_method() != "spawn":
        return multiprocessing.get_context()
    multiprocessing.set_forkserver_preload(["__main__", module])
    return multiprocessing.get_context("forkserver")


def _work(connection: Connection, inherited: Sequence[Connection], batches: Dataset[Any]) -> None:
    """Answer requests for batches until the parent closes the connection or ends."""
    _leave_the_process_group()
    torch.set_num_threads(1)
    for other in inherited:
        other.close()
    slots: dict[int, Slot] = {}
    with suppress(EOFError, BrokenPipeError, ConnectionResetError):
        while True:
            number, slot = connection.recv()
            _answer(connection, batches, number, slot, slots)


def _answer(connection: Connection, batches: Dataset[Any], number: int, slot: int, slots: dict[int, Slot]) -> None:
    old = slots.get(slot)
    try:
        with filling(old):
            message, new = pack(batches[number], old)
    except Exception as error:
        connection.send(_sendable(error))
        return
    connection.send(message)
    if new is not None and new is not old:
        send_handle(connection, new.file, os.getppid())
        slots[slot] = new
        if old is not None:
            old.close()


def _sendable(error: Exception) -> Exception:
    """The error, with where it was raised unless it is meant for the user."""
    if not isinstance(error, AtcacheError):
        error.add_note(f"In a worker process:\n{''.join(traceback.format_exception(error))}")
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError("".join(traceback.format_exception(error)))
    return error


def _leave_the_process_group() -> None:
    """Ctrl-C and a scheduler's SIGTERM reach whole process groups. Only the main process decides what they mean, and
    it may need batches until then.
    """
    os.setpgid(0, 0)
    # A forked process has its parent's handlers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
