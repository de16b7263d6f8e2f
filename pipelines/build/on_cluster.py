"""A build whose work is done by the workers of a dask cluster: what the client does, which leads."""

from __future__ import annotations

import uuid
from collections.abc import Generator
from contextlib import closing, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from atcache.cache.record import CacheRecord
from atcache.errors import ConfigError
from atcache.files.location import expand_home
from atcache.files.writers import sweep_partials
from atcache.images.tars import as_typed_in
from atcache.store.reader import CacheReader
from atcache.teachers.foreign.own import OwnTeacher

from ..cluster.cluster import Cluster
from ..cluster.connect import connected
from ..fidelity import Expectation
from ..running.run_teacher import run_folder_of
from .board import Counts
from .config import BuildConfig
from .joining import Job
from .on_worker import ClusterJob, forget, prepare_here, run_task
from .prepare import Complete, Prepared, numbered_tasks
from .telling import telling


class ClusterCrew:
    """The workers, as a build's leader sees them."""

    def __init__(self, cluster: Cluster, config: BuildConfig) -> None:
        self._cluster, self._id = cluster, uuid.uuid4().hex
        self._needs_gpu = config.device == "cuda" or (config.device == "auto" and cluster.has_gpus())

    @classmethod
    @contextmanager
    def of(cls, config: BuildConfig) -> Generator[ClusterCrew]:
        """The workers of the cluster that the config names."""
        with connected(config.scheduler, config.client, device=config.device) as cluster:
            crew = cls(cluster, config)
            try:
                yield crew
            finally:
                cluster.on_all(partial(forget, crew._id))

    @property
    def num_spools(self) -> int:
        """See `Crew`. Those of the workers are on other machines, as far as the client knows."""
        return 0

    def prepare(self, config: BuildConfig) -> Prepared | Complete:
        """What `prepare` finds on a worker, which has the device that the teacher is to run on."""
        device = "cuda" if self._needs_gpu else config.device
        config = replace(config_as_sent(config), device=device)
        with self._cluster.forwarding_notes():
            return self._cluster.call(
                prepare_here, (self._id, config), name="the preparation", needs_gpu=self._needs_gpu
            )

    def run_tasks(self, prepared: Prepared, cache: CacheReader, mark: str) -> Counts:
        """Have all tasks done, and show how far they are.

        Returns:
            What was done.

        Raises:
            AtcacheError: what a task raised.
            WorkerLostError: all workers were lost, or a task has cost several.
        """
        tasks = numbered_tasks(prepared.layout, prepared.to_do)
        names = dict(zip(prepared.to_do, (task.name for task in tasks), strict=True))
        job = ClusterJob(
            id=self._id,
            config=prepared.config,
            job=Job(mark=mark, attributes=cache.attributes, to_do=prepared.to_do),
            workers_on_machine=self._cluster.most_on_a_machine(),
        )
        tally, expectation = _Tally(), Expectation.of_cache(cache.path, CacheRecord.of(cache))
        with (
            self._cluster.listening(self._id, tally.hear),
            telling(prepared.config.out, cache.layout, expectation, tasks, tally.total) as tell,
        ):
            calls = self._cluster.waves(
                run_task,
                job,
                prepared.to_do,
                name_of=lambda number: f"task {names[number]}",
                needs_gpu=self._needs_gpu,
                each_look=tell,
            )
            with closing(calls):
                for number, counts in calls:
                    tally.finish(number, counts)
            tell()
        if isinstance(cache.path, Path):  # all shards are in place: temp files are those of workers that were killed
            sweep_partials(cache.path)
        return tally.total()


def config_as_sent(config: BuildConfig) -> BuildConfig:
    """The config with paths that mean the same in another working folder, and without what stays here.

    Raises:
        ConfigError: the teacher is a folder that is named from here, and the cache would record another name.
    """
    _check_teacher(config.teacher)
    folder = run_folder_of(config.teacher)
    return replace(
        config,
        scheduler=None,
        client=None,
        teacher=config.teacher if folder is None else str(folder.absolute()),
        data=None if config.data is None else as_typed_in(Path.cwd(), config.data),
        **{
            name: path.absolute()
            for name in ("out", "keys", "weights", "codec_from", "views_from")
            if (path := getattr(config, name)) is not None
        },
    )


def _check_teacher(teacher: str | OwnTeacher) -> None:
    # A worker would look in its own working folder and, for a model of transformers, then on the hub.
    kind, _, place = teacher.partition(":") if isinstance(teacher, str) else ("", "", "")
    is_folder = kind == "local-dir" or (kind == "transformers" and expand_home(Path(place)).is_dir())
    if is_folder and not place.startswith("/"):
        raise ConfigError(f"teacher={teacher!r}: on a cluster, name the folder from the root, as {kind}:/...")


class _Tally:
    """What was done: by tasks that have ended, and by those that workers are at. Messages come in another thread."""

    def __init__(self) -> None:
        self._done, self._ended = Counts(), set[int]()
        self._running: dict[int, Counts] = {}

    def hear(self, message: dict[str, Any]) -> None:
        """Take a message of `run_task`."""
        number = message["number"]
        self._running[number] = Counts(**message["counts"])
        if number in self._ended:  # looked up last, since `finish` may run at the same time
            self._running.pop(number, None)

    def finish(self, number: int, counts: Counts) -> None:
        """Take the result of a task, once."""
        self._ended.add(number)
        self._running.pop(number, None)
        self._done += counts

    def total(self) -> Counts:
        """What was done in all. Asked at every look, so it adds up only the tasks that run."""
        return sum(list(self._running.values()), self._done)
