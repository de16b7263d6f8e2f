"""What all pieces of some work need to know, sent once to each worker, also to those that join later."""

from __future__ import annotations

from typing import Any

from distributed import WorkerPlugin, get_worker


class Given(WorkerPlugin):
    """Holds a value on a worker.

    It is no task that the work would depend on: dask gives work that needs a resource only to workers that have what it
    depends on, and so none to those that join later.
    """

    def __init__(self, value: Any, versions: tuple[str, str]) -> None:  # noqa: ANN401 - what pickles
        """Of what is given: the value, and the versions of atcache and Python of the process that gives it."""
        self.value, self.versions = value, versions

    def setup(self, worker: Any) -> None:  # noqa: ANN401 - dask's
        """Nothing to do: the worker keeps its plugins."""


def given_here(name: str) -> Given:
    """What was sent to this worker under a name."""
    plugins: Any = get_worker().plugins
    return plugins[name]
