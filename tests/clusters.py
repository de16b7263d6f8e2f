"""Small dask clusters for tests, and work for them. Their workers import this module."""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
from collections.abc import Generator
from contextlib import contextmanager

import dask
from builds import CHILDREN
from distributed import Client, LocalCluster, get_worker

from atcache.pipelines.cluster import worker


@contextmanager
def processes(num_workers: int = 4) -> Generator[Client]:
    """A client of a cluster whose workers are processes, which start in no time, as all have one thread each."""
    warm = CHILDREN.Process(target=int)  # starts the server with what the tests of builds import, before dask does
    warm.start()
    warm.join()
    logging.getLogger("distributed").setLevel(logging.CRITICAL)
    settings = {
        "distributed.worker.multiprocessing-method": "forkserver",
        "distributed.worker.memory.terminate": False,
        "distributed.comm.timeouts.connect": "60s",
    }
    with (
        dask.config.set(settings),
        LocalCluster(
            n_workers=num_workers,
            threads_per_worker=1,
            memory_limit=None,
            dashboard_address="127.0.0.1:0",
            silence_logs=False,
        ) as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        yield client


@contextmanager
def threads(num_workers: int, **options) -> Generator[tuple[LocalCluster, Client]]:
    """A cluster within this process."""
    logging.getLogger("distributed").setLevel(logging.CRITICAL)
    with (
        LocalCluster(
            n_workers=num_workers,
            threads_per_worker=1,
            processes=False,
            memory_limit=None,
            dashboard_address="127.0.0.1:0",
            silence_logs=False,
            **options,
        ) as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        yield cluster, client


def place(seconds, item):
    """Where it was done, after so many seconds; None for a few."""
    time.sleep(seconds or 0.05)
    return get_worker().address


def die(given, item):
    """End the worker, as the kernel does when memory is short."""
    os.kill(os.getpid(), signal.SIGKILL)


def pretend(version: str | None):
    """Make this worker one with another atcache; None for one without."""
    if version is None:
        sys.modules[worker.__name__] = None
    else:
        worker.__version__ = version


def be_honest(version: str):
    """Undo `pretend`."""
    worker.__version__ = version
    sys.modules[worker.__name__] = worker


def note_once() -> None:
    """Log a note, as a worker does."""
    logging.getLogger("atcache").info("a note")
