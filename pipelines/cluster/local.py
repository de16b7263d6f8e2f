"""A dask cluster of this machine: one worker a GPU, or a few that share the processors."""

from __future__ import annotations

import logging
import os
from collections.abc import Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

from atcache.machine import num_processors

from . import worker

if TYPE_CHECKING:
    from distributed import Client

GPU = "GPU"
"""The resource that workers with a GPU of their own declare, as dask's documentation has it."""
_NUM_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
_PROCESSORS_A_WORKER = 8  # a teacher gains little from more


@contextmanager
def local_client(*, uses_gpus: bool) -> Generator[Client]:
    """A client of a cluster that ends with the block.

    Args:
        uses_gpus: one worker for each GPU, if there are any. Else the workers see no GPU.
    """
    from dask import config as dask_config
    from distributed import Client, Nanny, Scheduler, SpecCluster

    gpus = visible_gpus() if uses_gpus else []
    num_workers = len(gpus) or max(1, num_processors() // _PROCESSORS_A_WORKER)
    share = max(1, num_processors() // num_workers)
    threads = os.environ.get("OMP_NUM_THREADS", str(share))  # dask would set 1

    def options(number: int) -> dict[str, Any]:
        return {
            "nthreads": share,
            "resources": {GPU: 1} if gpus else None,
            "env": {"CUDA_VISIBLE_DEVICES": gpus[number] if gpus else ""},
            "memory_limit": None,  # dask would stop or kill a worker that uses much; what we use is bounded
            "dashboard": False,
            "host": "127.0.0.1",
            "preload": [worker.__name__],
        }

    workers = {number: {"cls": Nanny, "options": options(number)} for number in range(num_workers)}
    at = {"host": "127.0.0.1", "port": 0, "dashboard": False, "dashboard_address": "127.0.0.1:0"}
    environment = {**dict.fromkeys(_NUM_THREADS, threads), "DASK_LOGGING__DISTRIBUTED": "error"}
    with (
        _quiet(),
        dask_config.set({"distributed.nanny.pre-spawn-environ": environment}),
        cast("Any", SpecCluster)(workers=workers, scheduler={"cls": Scheduler, "options": at}) as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        yield client


@contextmanager
def _quiet() -> Generator[None]:
    """Leave out what dask says about its daily work. Its own `silence_logs` would silence our notes, too."""
    log = logging.getLogger("distributed")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(before)


def visible_gpus() -> list[str]:
    """The GPUs that this process may use, each as a value of CUDA_VISIBLE_DEVICES."""
    import torch

    number = torch.cuda.device_count()  # does not begin to use them
    named = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return named[:number] or [str(gpu) for gpu in range(number)]
