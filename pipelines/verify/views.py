"""Compare the pixels of views, replayed from tars or stored, with the hashes of what the teacher saw."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from atcache.cache.cache import Cache
from atcache.errors import AtcacheError, CorruptCacheError
from atcache.files.ranges import open_file
from atcache.store.layout import Task
from atcache.views.apply import pixel_hash
from atcache.views.rendering import STORED

from ..cluster.mapping import Mapper
from ..running.progress import Progress
from .files import Report

_AT_ONCE = 8  # views that a worker of a cluster compares before it answers


class Place(NamedTuple):
    """One view of one sample."""

    view: int
    sample: int
    task: Task


def spread_views(tasks: Sequence[Task], num_views: int | None) -> Iterator[Place]:
    """This many views, spread evenly over the tasks, the same ones every time; all views for None."""
    ends = np.cumsum([task.num_samples for task in tasks], dtype=np.int64)
    total = sum(task.num_samples for task in tasks)
    count = total if num_views is None else min(total, num_views)
    for number in range(count):
        row = (2 * number + 1) * total // (2 * count)  # the middle of each of `count` equal parts
        position = int(np.searchsorted(ends, row, side="right"))
        task = tasks[position]
        yield Place(task.view, task.stop - int(ends[position]) + row, task)


def check_views(cache: Cache, tasks: Sequence[Task], num_views: int | None, mapper: Mapper, report: Report) -> int:
    """Compare pixels with their hashes.

    Args:
        cache: the cache, opened with the place of its tars.
        tasks: the tasks without damage.
        num_views: how many views; None for all.
        mapper: what replays them.
        report: receives what differs.

    Returns:
        How many views were compared.

    Raises:
        SourceError: the tars are not where the cache was told they are.
    """
    try:
        unusable_tars = _check_tars(cache, report)
    except CorruptCacheError:
        return 0  # the sample table is damaged, which was reported already
    total = sum(task.num_samples for task in tasks)
    num_checked = 0
    with Progress("pixels", total=total if num_views is None else min(total, num_views), unit="views") as progress:
        checks = mapper.map(_check_view, (cache, unusable_tars), spread_views(tasks, num_views), at_once=_AT_ONCE)
        for is_checked, message, task in checks:
            if message is not None:
                report.add(message, task)
            num_checked += is_checked
            progress.advance(1)
    return num_checked


def _check_tars(cache: Cache, report: Report) -> frozenset[int]:
    """Numbers of the tars that are missing or have another size; each is reported."""
    if cache.reader.layout.pixels is not None:
        return frozenset()
    index, unusable = cache.source.index, set[int]()
    for number, (tar, nbytes) in enumerate(zip(index.tars, index.tar_nbytes, strict=True)):
        try:
            found = open_file(tar).nbytes
        except OSError as error:
            advice = "If the tars were moved, give their place with --data."
            report.add(f"{tar} cannot be read: {error.strerror}. {advice}", is_of_tars=True)
        else:
            if found == nbytes:
                continue
            report.add(f"{tar} has {found} bytes, but had {nbytes} when it was indexed. Restore it.", is_of_tars=True)
        unusable.add(number)
    return frozenset(unusable)


def _check_view(given: tuple[Cache, frozenset[int]], place: Place) -> tuple[bool, str | None, str | None]:
    """Whether the pixels were compared, what is wrong with them, and the task that a build must redo to repair it."""
    cache, unusable_tars = given
    reader, (view, sample, task) = cache.reader, place
    if reader.status(view, sample) != STORED:
        return False, None, None
    if reader.layout.pixels is None:
        if int(reader.samples.tar_S[sample]) in unusable_tars:
            return False, None, None
        try:
            cache.image(sample, view)
        except AtcacheError as error:
            return True, f"view {view} of {error}", None
        return True, None, None
    if pixel_hash(reader.read_pixels(view, sample)) == reader.pixel_hash(view, sample):
        return True, None, None
    rgb = reader.layout.rgb
    assert rgb is not None, "pixels are stored"
    file = cache.path / rgb.shard_file(task)
    return True, f"{file}, sample {sample}: the stored image is not the one the teacher saw: hashes differ.", task.name
