"""What the processes of a build tell each other, over the key-value store that torchrun gives them.

They exchange little, but may wait hours for each other: for a long calibration, or for the last task of the slowest
process. So nothing here waits inside a collective call, whose timeout is fixed. Every second each process reports that
it is alive and what it has done. A process that is silent for two minutes counts as lost, and then all end.
"""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from types import FrameType
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from atcache.errors import AtcacheError

from ..running.ranks import ProcessLostError, Ranks

if TYPE_CHECKING:
    from torch.distributed import Store  # pyright: ignore[reportPrivateImportUsage] - documented, but not exported

Result = TypeVar("Result")

_BEAT_S = 1.0
_LOOK_S = 0.1
_SILENCE_S = 120.0
"""Reports come from a separate thread, so a process that is silent for this long has stopped or is out of reach."""
_FAREWELL_S = 10.0
"""How long a leader that ends waits until the others have read why. They may be loading a teacher."""
_GO_ON = "What was stored stays; type the same command again to continue."


@dataclass(frozen=True, kw_only=True, slots=True)
class Counts:
    """What a process has done."""

    num_views: int = 0
    """Views it has processed."""
    num_stored: int = 0
    """Views of these that have codes."""
    nbytes: int = 0
    """Bytes of the tasks it has committed."""
    sum_nats: float = 0.0
    """Sum of the row KL of the views it has checked."""
    num_checked: int = 0
    """Views it has checked."""

    def __add__(self, other: Counts) -> Counts:
        names = type(self).__slots__
        return Counts(**{name: getattr(self, name) + getattr(other, name) for name in names})


class TaskBoard(Protocol):
    """What running tasks needs to know of others."""

    @property
    def leads(self) -> bool:
        """Whether this process shows what all have done."""
        ...

    def claims(self, num_tasks: int) -> Iterator[int]:
        """Numbers of the tasks to do."""
        ...

    def look(self) -> None:
        """Called often; raises if this process is to end."""
        ...

    def report(self, counts: Counts) -> None:
        """Take what was done so far."""
        ...

    def finish(self, each_look: Callable[[], None]) -> None:
        """Wait for the others, if this process leads."""
        ...

    def total(self) -> Counts:
        """What all have done."""
        ...


class Board:
    """Messages between the processes of a build. A process that runs alone reads its own.

    A problem is printed once: the first process that has one raises it, and the others end with `SystemExit(1)` at
    their next `look`. Only the main thread may use it.
    """

    def __init__(self, store: Store, ranks: Ranks, *, silence_s: float = _SILENCE_S) -> None:
        self._store, self._ranks, self._silence_s = store, ranks, silence_s
        self._counts, self._is_done = Counts(), False
        self._beat = 0
        self._last_look_s = now_s = time.monotonic()
        # The leader watches all others, and they watch the leader, so the loss of one process ends all.
        minded = range(1, ranks.world_size) if ranks.leads else range(1)
        self._others = {rank: _Seen(now_s) for rank in minded if rank != ranks.rank}

    @classmethod
    @contextmanager
    def opened(cls, ranks: Ranks) -> Generator[Board]:
        """The board of this run's processes. All of them open it, and leave it together.

        Raises:
            ProcessLostError: another process has ended, or this one was told to end.
        """
        board = cls(_open_store(ranks), ranks)
        stop = threading.Event()
        beating = threading.Thread(target=board._keep_beating, args=(stop,), name="beat", daemon=True)
        with _ended_by_sigterm(ranks):
            try:
                if not ranks.is_alone:
                    beating.start()
                yield board
            except (AtcacheError, KeyboardInterrupt) as error:
                if ranks.is_alone or board._is_first_to_tell():
                    raise
                raise SystemExit(1) from error
            finally:
                stop.set()
                board._leave()

    @property
    def leads(self) -> bool:
        """Whether this process leads. Only the leader prints."""
        return self._ranks.leads

    def publish(self, key: str, value: Any) -> None:  # noqa: ANN401 - JSON
        """Tell the others a JSON value. Each key is used once."""
        self._ask(lambda: self._store.set(key, json.dumps(value)))

    def receive(self, key: str) -> Any:  # noqa: ANN401 - JSON
        """The value that was published under `key`; waits until there is one."""
        self.wait_for(key)
        return json.loads(self._ask(lambda: self._store.get(key)))

    def wait_for(self, *keys: str) -> str:
        """The first of `keys` under which something was published; waits until there is one."""
        while True:
            for key in keys:
                if self._has(key):
                    return key
            self.look()
            time.sleep(_LOOK_S)

    def claims(self, num_tasks: int) -> Iterator[int]:
        """Task numbers below `num_tasks` for this process to do; each goes to the first process that asks."""
        while (number := self._add("claimed", 1) - 1) < num_tasks:
            self.look()
            yield number

    def report(self, counts: Counts) -> None:
        """Set what this process has done in total. The others learn of it within a second or two."""
        self._counts = counts

    def finish(self, each_look: Callable[[], None]) -> None:
        """Report that this process has no more tasks. The leader waits for the others, and calls `each_look` often."""
        self._is_done = True
        self._say_beat()
        while not all(seen.is_done for seen in self._others.values()) and self._ranks.leads:
            self.look()
            each_look()
            time.sleep(_LOOK_S)

    def total(self) -> Counts:
        """What all processes have done, as far as the leader knows. It is complete once `finish` has returned."""
        total = self._counts
        for seen in self._others.values():
            total += seen.counts
        return total

    def look(self) -> None:
        """Check, at most once a second, that no process is lost and none has reported a problem.

        Raises:
            ProcessLostError: a process is lost.
            SystemExit: another process has reported a problem.
        """
        now_s = time.monotonic()
        if self._ranks.is_alone or now_s - self._last_look_s < _BEAT_S:
            return
        self._last_look_s = now_s
        if self._add("told", 0):
            raise SystemExit(1)
        for rank, seen in self._others.items():
            if self._has(key := f"rank/{rank}"):
                seen.update(json.loads(self._ask(lambda key=key: self._store.get(key))), now_s)
            if now_s - seen.last_news_s > self._silence_s and not seen.is_done:
                raise ProcessLostError(
                    f"process {rank} of {self._ranks.world_size} has not reported for {self._silence_s:.0f} s, so "
                    f"this one ends too. {_GO_ON}"
                )

    def _keep_beating(self, stop: threading.Event) -> None:
        with suppress(ProcessLostError):  # the main thread will see it too
            while not stop.is_set():
                self._say_beat()
                stop.wait(_BEAT_S)

    def _say_beat(self) -> None:
        if self._ranks.is_alone:
            return
        self._beat += 1
        # is_done is read before the counts: if it is True, the counts are final.
        record = {"beat": self._beat, "is_done": self._is_done, "counts": asdict(self._counts)}
        self.publish(f"rank/{self._ranks.rank}", record)

    def _is_first_to_tell(self) -> bool:
        try:
            return self._add("told", 1) == 1
        except ProcessLostError:
            return True  # nobody can be asked: rather print the problem twice than never

    def _leave(self) -> None:
        """Leave the board. The leader holds the store, so it waits a while until the others have read it."""
        if self._ranks.is_alone:
            return
        with suppress(ProcessLostError):
            num_left = self._add("left", 1)
            stop_s = time.monotonic() + _FAREWELL_S
            while self._ranks.leads and num_left < self._ranks.world_size and time.monotonic() < stop_s:
                time.sleep(_LOOK_S)
                num_left = self._add("left", 0)

    def _add(self, key: str, amount: int) -> int:
        return self._ask(lambda: self._store.add(key, amount))

    def _has(self, key: str) -> bool:
        return self._ask(lambda: self._store.check([key]))

    def _ask(self, question: Callable[[], Result]) -> Result:
        import torch.distributed as dist

        try:
            return question()
        except dist.DistError as error:
            raise ProcessLostError(
                f"the process that leads this run has ended or does not answer, so this one ends too. {_GO_ON}"
            ) from error


class _Seen:
    """The last report of another process."""

    def __init__(self, now_s: float) -> None:
        self.last_news_s = now_s
        self.counts, self.is_done = Counts(), False
        self._beat = 0

    def update(self, record: dict[str, Any], now_s: float) -> None:
        """Take in a record of `Board._say_beat`."""
        if record["beat"] != self._beat:
            self._beat, self.last_news_s = record["beat"], now_s
            self.counts, self.is_done = Counts(**record["counts"]), record["is_done"]


def _open_store(ranks: Ranks) -> Store:
    import torch.distributed as dist
    from torch.distributed.rendezvous import rendezvous  # pyright: ignore[reportUnknownVariableType]

    if ranks.is_alone:
        return dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
    store, _, _ = next(rendezvous("env://", ranks.rank, ranks.world_size))
    return store


@contextmanager
def _ended_by_sigterm(ranks: Ranks) -> Generator[None]:
    """Turn SIGTERM, which torchrun sends to the others when a process dies, into an error, so that temp files go."""
    if ranks.is_alone or threading.current_thread() is not threading.main_thread():
        yield
        return
    owner = os.getpid()

    def end(_number: int, _frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN if os.getpid() == owner else signal.SIG_DFL)
        # Forked workers inherit this handler, and ignore the first SIGTERM: this process ends them in order.
        if os.getpid() == owner:
            raise ProcessLostError(
                f"this process got SIGTERM, which torchrun sends when another process of the run has ended. {_GO_ON}"
            )

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
