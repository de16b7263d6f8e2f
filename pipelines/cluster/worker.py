"""What is done on a worker. Only this module, and what it is asked to call, must be importable there."""

from __future__ import annotations

import multiprocessing
import os
import platform
import signal
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from atcache import __version__
from atcache.errors import AtcacheError, ConfigError, WorkerLostError
from atcache.machine import num_processors

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Answer(Generic[Result]):
    """What some work returned, or its error that is meant for the user.

    An error that were raised would be tried again by dask, though it comes again.
    """

    result: Result | None = None
    error: AtcacheError | None = None
    address: str = ""
    """Of the worker."""


def answer(work: Callable[[Any, Item], Result], given_name: str, item: Item) -> Answer[Result]:
    """Do some work here, with what was given to all workers under a name.

    Raises:
        WorkerLostError: a process that this one started was killed, perhaps for want of memory. Worth another try.
    """
    from distributed import get_worker

    from .given import given_here

    # A worker that a nanny started may have no processes of its own, since those could outlive it. Ours, which decode
    # images, end when it does: they read from a pipe that breaks.
    multiprocessing.current_process().daemon = False
    try:
        given = given_here(given_name)
        check_versions("a worker", versions(), given.versions)  # it may have joined after all others were checked
        return Answer(result=work(given.value, item))
    except WorkerLostError:
        raise
    except AtcacheError as error:
        return Answer(error=error, address=get_worker().address)


def dask_setup(_: object) -> None:
    """What dask calls in the workers of a local cluster: Ctrl-C reaches all processes, and the client decides."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def versions() -> tuple[str, str]:
    """Versions of atcache and of Python."""
    return __version__, platform.python_version()


def check_versions(whose: str, found: tuple[str, str], wanted: tuple[str, str]) -> None:
    """Refuse a worker with other versions than the process that gives it work.

    Raises:
        ConfigError: it has another atcache, or another Python, up to the number that says what was mended.
    """
    if found[0] != wanted[0]:
        raise other_atcache(whose, found[0], wanted[0])
    if found[1].rpartition(".")[0] != wanted[1].rpartition(".")[0]:
        raise ConfigError(
            f"{whose} runs Python {found[1]}, and this is Python {wanted[1]}: objects cannot be sent between them. Use "
            "the same on both."
        )


def other_atcache(whose: str, found: str, wanted: str) -> ConfigError:
    """The error for a worker with another atcache."""
    return ConfigError(f"{whose} has another atcache than {wanted}: {found}. Install the same one on all workers.")


def own_processors(num_on_machine: int) -> int:
    """Processors that this worker may use.

    Args:
        num_on_machine: workers on this machine.
    """
    from distributed import get_worker

    # A worker with several threads was given so many processors. One thread, which is usual with a GPU, says nothing.
    num_threads = int(get_worker().state.nthreads)
    if num_threads > 1:
        return num_threads
    return max(1, min(num_processors(), (os.cpu_count() or 1) // num_on_machine))


def log_event(topic: str, message: Any) -> None:  # noqa: ANN401 - what msgpack can write
    """Tell the client something while work is being done."""
    from distributed import get_worker

    get_worker().log_event(topic, message)
