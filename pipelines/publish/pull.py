"""Pull: fetch a cache, or some of its views and tars, from a hub, a server or another disk.

The copy is made like a build whose tasks are downloads: metadata and tables first, then each task's shards, checked
against their commit record, then that record. So the copy is not complete before all is there, and a pull that was
stopped continues.
"""

from __future__ import annotations

import errno
import shutil
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from atcache.cache.differences import name_differences
from atcache.cache.record import CacheRecord
from atcache.errors import CacheMismatchError, CorruptCacheError, DiskFullError
from atcache.fields import JsonFields
from atcache.files.durable import check_can_write, disk_errors_explained, existing_folder, make_folder
from atcache.files.location import Location
from atcache.files.remote.download import download
from atcache.files.sizes import size_text
from atcache.files.writers import only_writer, sweep_partials
from atcache.store.layout import StoreLayout, Task
from atcache.store.manifest import Commit, check_seal, parse_commit, write_commit
from atcache.store.metadata import refuse_damaged_root
from atcache.store.parts import count_samples
from atcache.store.reader import CacheReader
from atcache.store.records import Record, read_record, read_records
from atcache.store.writer import RESERVED_ATTRIBUTES, create_cache, finish_cache
from atcache.views.rendering import STORED, stored_mix

from ..running.progress import Progress
from .chosen import Chosen, choose
from .compare import have_same_arrays, recorded
from .config import PullConfig

_NUM_AT_ONCE = 8
"""Tasks that are fetched at the same time: each waits for its server most of the time."""
_DAMAGED_THERE = "It is damaged where it is. Ask who published it."


@dataclass(frozen=True, kw_only=True, slots=True)
class PullSummary(JsonFields):
    """What a pull has fetched."""

    cache: str
    """Where it came from; on a hub with the commit."""
    out: str
    num_samples: int
    num_views: int
    num_left_out: int
    """Samples of the chosen tars that were not fetched, because they share shards with other tars."""
    complete: dict[str, Any]
    """The totals of the copy."""
    pulled_nbytes: int
    """Bytes of shards that this call fetched."""
    needs_tars: bool
    """Whether its images are replayed from the tars, which a pull does not fetch."""
    seconds: float


def pull(config: PullConfig) -> PullSummary:
    """Fetch a cache, or a part of it. The same call continues one that was stopped.

    Returns:
        What was fetched.

    Raises:
        CacheMissError: there is no cache at that place.
        CacheMismatchError: it is not complete, or `out` holds something else.
        CorruptCacheError: a file on the server is not what its commit record says, or its metadata or a commit record
            are not what their own checksum says.
        RemoteError: the server cannot be read.
        DiskFullError: the copy does not fit.
    """
    start_s = time.monotonic()
    reader = CacheReader(config.cache)
    if not reader.is_complete:
        raise CacheMismatchError(f"{reader.path} is not complete: some tasks are missing. Finish its build, then pull.")
    check_can_write(config.out)
    chosen = choose(reader.layout, reader.samples, num_views=config.views, tar_names=config.tar_names)
    _begin(config.out, reader, chosen)
    with only_writer(config.out):
        sweep_partials(config.out)
        pulled_nbytes = _fetch_tasks(config.out, reader, chosen)
        complete = finish_cache(config.out)
    return PullSummary(
        cache=str(reader.path),
        out=str(config.out),
        num_samples=chosen.layout.num_real_samples,
        num_views=chosen.layout.num_views,
        num_left_out=chosen.num_left_out,
        complete=complete,
        pulled_nbytes=pulled_nbytes,
        needs_tars=chosen.layout.pixels is None,
        seconds=time.monotonic() - start_s,
    )


def _begin(out: Path, reader: CacheReader, chosen: Chosen) -> None:
    """Create the copy, or check that `out` is one that was begun."""
    CacheRecord.of(reader)  # refuses what is missing or contradicts itself
    refuse_damaged_root(reader.path, reader.attributes, _DAMAGED_THERE)
    attributes = _attributes(reader, chosen)
    with disk_errors_explained(out):
        if out.is_dir() and not any(out.iterdir()):
            _make_room(out)
    if not out.exists():
        create_cache(out, chosen.layout, attributes, chosen.samples, reader.state, reader.bias_LHQK)
        return
    if not (out / "zarr.json").exists():
        raise CacheMismatchError(f"{out} exists and is not a cache. Give another folder, or remove it.")
    begun = CacheReader(out)
    asked = recorded(attributes, chosen.layout)
    differences = name_differences(recorded(begun.attributes, begun.layout), asked, ("in it", f"in {reader.path}"))
    if not differences and not have_same_arrays(begun, reader):
        differences = ["its codec was fitted on other images"]
    if differences:
        raise CacheMismatchError(
            f"{out} exists and is another cache, or another part of this one: {'; '.join(differences)}. Give another "
            "folder, or the same options as before."
        )


def _make_room(out: Path) -> None:
    """Remove an empty folder, in whose place the copy is put as a whole."""
    try:
        out.rmdir()
    except OSError as error:
        if error.errno not in (errno.ENOTDIR, errno.EINVAL, errno.EBUSY):
            raise
        raise CacheMismatchError(
            f"{out} is a link, a mount point or the working folder, so no cache can be put in its place. Give a folder "
            f"in it, such as {out / 'cache.zarr'}."
        ) from error


def _attributes(reader: CacheReader, chosen: Chosen) -> dict[str, Any]:
    """What the copy records about itself: what the whole cache does, except for how much there is of it."""
    kept = {name: value for name, value in reader.attributes.items() if name not in RESERVED_ATTRIBUTES}
    source = {"fingerprint": chosen.samples.fingerprint, "num_samples": count_samples(chosen.samples)}
    views = {**kept["views"], "num_views": chosen.layout.num_views}
    return {**kept, "source": {**kept["source"], **source}, "views": views}


def _fetch_tasks(out: Path, reader: CacheReader, chosen: Chosen) -> int:
    """Fetch what is missing, several tasks at once. Returns the bytes of the shards."""
    copy, layout = CacheReader(out), chosen.layout
    done = copy.committed_tasks()
    missing = {task: whole for task, whole in chosen.tasks(reader.layout).items() if task.name not in done}
    stop = threading.Event()
    with ThreadPoolExecutor(_NUM_AT_ONCE) as pool:
        try:
            records = dict(zip(missing, _read_records(reader, list(missing.values()), pool), strict=True))
            nbytes = sum(record.nbytes for record in records.values())
            _check_space(out, nbytes)
            with Progress("pull", total=layout.num_tasks, unit="tasks", done=layout.num_tasks - len(missing)) as shown:
                futures = [
                    pool.submit(_fetch_task, copy, layout, task, reader, record, stop)
                    for task, record in records.items()
                ]
                for future in as_completed(futures):
                    future.result()
                    shown.advance(1)
        except BaseException:
            stop.set()  # or it would wait for the end of long downloads
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    return nbytes


def _read_records(reader: CacheReader, tasks: Sequence[Task], pool: ThreadPoolExecutor) -> list[Commit]:
    """The commit records of tasks of the whole cache, in order."""
    path, layout = reader.path, reader.layout

    def read(task: Task) -> Record:
        return read_record(path, task.name, layout)

    if layout.records_per_file == 1:
        records = list(pool.map(read, tasks))
    else:  # many are in one file
        found = {record.task: record for record in read_records(path, layout)}
        records = [found[task.name] for task in tasks]
    commits = list(map(parse_commit, records))
    for record, commit, task in zip(records, commits, tasks, strict=True):
        if problems := check_seal(record):  # the copy's record would get a checksum of its own
            raise CorruptCacheError(f"{problems[0]} {_DAMAGED_THERE}")
        if commit.task != task or set(commit.files) != {spec.shard_file(task) for spec in layout.arrays()}:
            raise CorruptCacheError(
                f"{path}: the commit record of {task.name} is not that of its shards. {_DAMAGED_THERE}"
            )
    return commits


def _check_space(out: Path, nbytes: int) -> None:
    free_nbytes = shutil.disk_usage(existing_folder(out)).free
    if nbytes > free_nbytes:
        raise DiskFullError(
            f"{out}: {size_text(nbytes)} are to be fetched, {size_text(free_nbytes)} are free. Free some "
            "space, or fetch fewer --views or --tars."
        )


def _fetch_task(
    copy: CacheReader, layout: StoreLayout, task: Task, reader: CacheReader, record: Commit, stop: threading.Event
) -> None:
    """Fetch the shards of one task, then commit it."""
    out = copy.path
    assert isinstance(out, Path), "a copy is on a disk"
    files = {}
    for spec in layout.arrays():  # `views/status` is last, as in a build
        old, new = spec.shard_file(record.task), spec.shard_file(task)
        files[new] = about = record.files[old]
        make_folder((out / new).parent)
        download(reader.path / old, out / new, about.nbytes, about.crc32, stop)
    _check_partners(copy, task, reader.path)
    write_commit(out, replace(record, task=task, files=files))


def _check_partners(copy: CacheReader, task: Task, path: Location) -> None:
    """Refuse a task with views that are mixed with samples of another one, whose rows mean others in a part."""
    policy = CacheRecord.of(copy).policy
    if policy.mixing is None:
        return
    row_S = np.arange(task.start, task.stop)
    row_S = row_S[copy.statuses(task.view, row_S) == STORED]
    for row, parameters_P in zip(row_S.tolist(), copy.parameters_of(task.view, row_S), strict=True):
        partner = row + stored_mix(policy, parameters_P).partner
        if not task.start <= partner < task.stop:
            raise CacheMismatchError(
                f"{path}: a view of {copy.samples.sample_key(row)} is mixed with a sample of another shard, so no part "
                "of this cache can be used. It was made with --views-from by an earlier version: build it again with "
                "another --out, or copy its whole folder."
            )
