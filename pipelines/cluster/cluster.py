"""Give work to the workers of a dask cluster in waves, and say in a sentence why there is none to do it."""

from __future__ import annotations

import logging
import math
import time
import uuid
from asyncio import CancelledError
from collections import Counter
from collections.abc import Callable, Generator, Iterable
from contextlib import closing, contextmanager, suppress
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeVar, cast

from atcache import __version__
from atcache.errors import WorkerLostError

from .local import GPU
from .worker import Answer, answer, check_versions, other_atcache, versions

if TYPE_CHECKING:
    from distributed import Client, Future

Given = TypeVar("Given")
Item = TypeVar("Item")
Result = TypeVar("Result")

_log = logging.getLogger(__name__)
_PATIENCE_S = 60.0
_LOOK_S = 0.05
_COUNT_EVERY_S = 1.0
_ANSWER_S = 10.0  # to fetch an answer, which is small; dask itself would wait for ever for one that is lost
_RETRIES = 2  # after an error that is not meant for the user: a network or a GPU that failed once
_GO_ON = "What was stored stays; the same command continues."


class Cluster:
    """The workers of a cluster. Only the thread that made it may use it."""

    def __init__(self, client: Client, *, is_local: bool, patience_s: float = _PATIENCE_S) -> None:
        self._client, self._is_local, self.patience_s = client, is_local, patience_s
        self._address: str = cast("Any", client).scheduler.address

    @classmethod
    def checked(cls, client: Client, *, is_local: bool, patience_s: float = _PATIENCE_S) -> Cluster:
        """A cluster that has a worker, all of whose workers have this atcache.

        Raises:
            WorkerLostError: no worker comes.
            ConfigError: a worker has no atcache, or another one.
        """
        cluster = cls(client, is_local=is_local, patience_s=patience_s)
        cluster._wait_for_a_worker()
        cluster._check_versions()
        return cluster

    @property
    def workers(self) -> dict[str, dict[str, Any]]:
        """What the scheduler says about each worker, by address."""
        if self._client.status != "running":
            raise self._scheduler_gone()
        info: Any = cast("Any", self._client).scheduler_info(n_workers=-1)
        return dict(info["workers"])

    def has_gpus(self) -> bool:
        """Whether a worker declares the resource GPU."""
        return any(_has_gpu(worker) for worker in self.workers.values())

    def most_on_a_machine(self) -> int:
        """Workers on the machine that has most of them."""
        return max(Counter(worker["host"] for worker in self.workers.values()).values(), default=1)

    def call(self, work: Callable[[Given, None], Result], given: Given, *, name: str, needs_gpu: bool) -> Result:
        """What `work(given, None)` returns on one of the workers."""
        ((_, result),) = self.waves(work, given, [None], name_of=lambda _: name, needs_gpu=needs_gpu)
        return result

    def on_all(self, function: Callable[[], None]) -> None:
        """Call a function on all workers of a cluster that is not ours, as far as they answer."""
        if not self._is_local:
            self._at_the_end(lambda: cast("Any", self._client).run(function, on_error="ignore"))

    def in_order(
        self, work: Callable[[Given, Item], Result], given: Given, items: Iterable[Item], *, name: str
    ) -> Generator[Result]:
        """What `work(given, item)` returns for each of `items`, in their order. Work is short, and needs no GPU."""
        early: dict[int, Result] = {}
        next_number = 0
        numbered = enumerate(items)
        calls = self.waves(_keep_number, (work, given), numbered, name_of=lambda _: name, fills_threads=True)
        with closing(calls):
            for (number, _), result in calls:
                early[number] = result
                while next_number in early:
                    yield early.pop(next_number)
                    next_number += 1

    def waves(
        self,
        work: Callable[[Given, Item], Result],
        given: Given,
        items: Iterable[Item],
        *,
        name_of: Callable[[Item], str],
        needs_gpu: bool = False,
        fills_threads: bool = False,
        each_look: Callable[[], None] = lambda: None,
    ) -> Generator[tuple[Item, Result]]:
        """Do `work(given, item)` for all items, and yield each item with its result as soon as it is done.

        Each worker is given two pieces of work at a time. So workers that join later get some, which dask itself does
        not see to where work needs a resource (dask/distributed #3264, dask/dask #9587).

        Args:
            work: a function of a module; may be called twice for an item, if a worker is lost.
            given: what all calls need; sent once to each worker.
            items: what the calls are for.
            name_of: what an item is called in error messages.
            needs_gpu: only workers with the resource GPU may do it, one piece at a time.
            fills_threads: two pieces for each thread of a worker, instead of two for the worker.
            each_look: called often while this waits.

        Raises:
            AtcacheError: what a call raised.
            WorkerLostError: all workers were lost, or one item has cost several workers.
        """
        from distributed import as_completed

        client, left = self._client, iter(items)
        settings: dict[str, Any] = {"pure": False, "retries": _RETRIES, "resources": {GPU: 1} if needs_gpu else None}
        asked: dict[Future[Any], Item] = {}
        done = cast("Any", as_completed)(loop=client.loop, raise_errors=False)
        with self.giving(given) as given_name:
            watch = _Watch(self, needs_gpu=needs_gpu, fills_threads=fills_threads)
            try:
                while True:
                    # One piece also without workers: an adaptive cluster starts some when there is work.
                    for item in islice(left, max(0, max(1, 2 * watch.size()) - len(asked))):
                        key = f"atcache-{name_of(item)}-{uuid.uuid4().hex}"
                        future = client.submit(answer, work, given_name, item, key=key, **settings)
                        asked[future] = item
                        done.add(future)
                    if not asked:
                        return
                    for future in done.next_batch(block=False):
                        answered = self._answer_of(future, name_of(asked[future]))
                        if answered is None:
                            done.add(future)
                        else:
                            yield asked.pop(future), self._result_of(answered)
                    each_look()
                    time.sleep(_LOOK_S)
            finally:
                self._at_the_end(lambda: cast("Any", client).cancel([*asked]))

    @contextmanager
    def giving(self, given: Any) -> Generator[str]:  # noqa: ANN401 - what pickles
        """The name under which all workers have `given` during the block, for `answer`."""
        from .given import Given

        client: Any = self._client
        name = f"atcache-{uuid.uuid4().hex}"
        client.register_plugin(Given(given, versions()), name=name)
        try:
            yield name
        finally:
            self._at_the_end(lambda: client.unregister_worker_plugin(name))

    @contextmanager
    def listening(self, topic: str, handle: Callable[[Any], None]) -> Generator[None]:
        """Call `handle`, in another thread, with each message that a worker sends by `log_event` during the block."""
        client: Any = self._client

        def heard(event: tuple[float, Any]) -> None:
            handle(event[1])

        client.subscribe_topic(topic, heard)
        try:
            yield
        finally:
            self._at_the_end(lambda: client.unsubscribe_topic(topic))

    @contextmanager
    def forwarding_notes(self) -> Generator[None]:
        """During the block, what atcache logs on the workers is logged here."""
        client: Any = self._client
        # Workers that are threads of this process log here anyway, and each note would be forwarded again and again.
        if any(address.startswith("inproc://") for address in client.scheduler_info(n_workers=-1)["workers"]):
            yield
            return
        client.forward_logging("atcache", logging.INFO)
        try:
            yield
        finally:
            self._at_the_end(lambda: client.unforward_logging("atcache"))

    def _at_the_end(self, call: Callable[[], object]) -> None:
        """Tidy up, if the scheduler still answers: what is left there hurts nobody."""
        if self._client.status == "running":
            with suppress(Exception):
                call()

    def _answer_of(self, future: Any, name: str) -> Answer[Any] | None:  # noqa: ANN401 - a Future
        """What the worker answered; None if it was lost with its answer, so that the work is done again."""
        from distributed import KilledWorker

        if future.status in ("pending", "lost"):
            return None
        if future.status == "finished":
            try:
                return future.result(timeout=_ANSWER_S)
            except (Exception, CancelledError) as error:  # the latter is no Exception
                if future.status == "finished" and not isinstance(error, TimeoutError):
                    raise
                return None  # the worker was lost just now
        if future.status != "error":
            raise self._scheduler_gone()
        error = future.exception()
        if isinstance(error, KilledWorker):
            raise WorkerLostError(
                f"{name} ended {error.allowed_failures + 1} workers, one after the other: each was killed while it did "
                "it, perhaps for want of memory. See the workers' logs; give them more memory, or use fewer --workers "
                f"or a smaller --batch-size. {_GO_ON}"
            ) from error
        if isinstance(error, ImportError) and "atcache" in str(error):
            raise other_atcache("a worker", "none, or another one", __version__) from error
        raise error

    def _result_of(self, answered: Answer[Any]) -> Any:  # noqa: ANN401 - what the work returned
        if answered.error is None:
            return answered.result
        if not self._is_local:  # paths are those of the worker's machine
            answered.error.args = (f"{answered.error} (This was on the worker {answered.address}.)",)
        raise answered.error

    def _wait_for_a_worker(self) -> None:
        """Wait until there is a worker. A piece of work makes an adaptive cluster start one."""
        work, watch = self._client.submit(int, pure=False), _Watch(self)
        while not watch.size():
            time.sleep(_LOOK_S)
        del work

    def _check_versions(self) -> None:
        all_found: dict[str, Any] = cast("Any", self._client).run(versions, on_error="return")
        for address, answered in all_found.items():
            if isinstance(answered, OSError):  # it was lost meanwhile
                continue
            if isinstance(answered, Exception):
                found = f"none, or another one ({answered})"
                raise other_atcache(f"the worker {address}", found, __version__) from answered
            check_versions(f"the worker {address}", answered, versions())

    def _scheduler_gone(self) -> WorkerLostError:
        return WorkerLostError(f"the scheduler at {self._address} has ended or does not answer. {_GO_ON}")


class _Watch:
    """Counts workers, and gives up if there are none for a while."""

    def __init__(self, cluster: Cluster, *, needs_gpu: bool = False, fills_threads: bool = False) -> None:
        self._cluster, self._needs_gpu, self._fills_threads = cluster, needs_gpu, fills_threads
        self._size, self._has_told = 0, False
        self._seen_s = time.monotonic()
        self._counted_s = -math.inf

    def size(self) -> int:
        """How many workers may do the work, or threads of them; counted at most once a second.

        Raises:
            WorkerLostError: there were none for too long.
        """
        now_s = time.monotonic()
        if now_s - self._counted_s < _COUNT_EVERY_S:
            return self._size
        self._counted_s = now_s
        workers = self._cluster.workers
        fit = [worker for worker in workers.values() if _has_gpu(worker) or not self._needs_gpu]
        self._size = sum(worker["nthreads"] for worker in fit) if self._fills_threads else len(fit)
        if fit:
            self._seen_s, self._has_told = now_s, False
        elif now_s - self._seen_s > self._cluster.patience_s:
            raise WorkerLostError(f"{self._lacking(len(workers))} {_GO_ON}")
        elif not self._has_told:
            self._has_told = True
            kind = "a worker with the resource GPU" if self._needs_gpu else "a worker"
            _log.warning("waiting up to %.0f s for %s", self._cluster.patience_s, kind)
        return self._size

    def _lacking(self, num_workers: int) -> str:
        if num_workers:
            return (
                f"none of the cluster's {num_workers} workers has the resource GPU: start workers with `--resources "
                f"GPU=1`, each with a GPU of its own, or give --device cpu."
            )
        return (
            f"the cluster has had no worker for {self._cluster.patience_s:.0f} s. Start some, and look at their logs."
        )


def _has_gpu(worker: dict[str, Any]) -> bool:
    return worker["resources"].get(GPU, 0) >= 1


def _keep_number(given: tuple[Callable[[Given, Item], Result], Given], item: tuple[int, Item]) -> Result:
    work, own = given
    return work(own, item[1])
