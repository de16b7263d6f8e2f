"""Join a build that another process leads: open the cache that it has created, load the teacher, and run tasks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from atcache.cache.record import CacheRecord
from atcache.fields import JsonFields
from atcache.files.location import Url
from atcache.files.spool import sweep_spools
from atcache.images.source import SampleIndex, relocate
from atcache.store.reader import CacheReader
from atcache.teachers.run import TeacherRun

from .config import BuildConfig
from .given_views import GivenViews
from .growth import place_tars
from .plan import check_same_cache
from .shared_folder import check_mark
from .tasks import TaskRunner
from .wanted import Wanted, load_teacher


@dataclass(frozen=True, kw_only=True, slots=True)
class Job(JsonFields):
    """What the leading process tells those that join it."""

    mark: str
    """A file that is in the cache as long as the leader works; see `shared_folder`."""
    attributes: dict[str, Any]
    """Of the cache, also if it grows."""
    to_do: tuple[int, ...]
    """Numbers of the tasks that are to be done."""


def join(
    config: BuildConfig,
    job: Job,
    own_processors: int,
    *,
    load: Callable[[BuildConfig], TeacherRun] = load_teacher,
    each_look: Callable[[], None] = lambda: None,
) -> TaskRunner:
    """What runs tasks of the build in this process.

    Args:
        config: as the leader has it.
        job: as the leader tells it.
        own_processors: how many this process may use.
        load: gives the teacher.
        each_look: as in `check_mark`.

    Raises:
        ConfigError: this process does not see the leader's folder.
        CacheMismatchError: this process finds other images or another teacher.
    """
    check_mark(config.out, job.mark, each_look)
    if isinstance(config.out, Url):
        sweep_spools()
    cache = CacheReader(config.out, job.attributes)
    if config.grow:
        config = replace(config, views=cache.layout.num_views)
    given = GivenViews.wanted_by(config)
    index = _placed(cache.samples, config)
    takes_codec = config.codec_from is not None or (config.grow and not config.chooses_codec)
    codec = CacheRecord.of(cache).make_codec(cache.path) if takes_codec else None
    wanted = Wanted.of(config, index, codec, load, given)
    check_same_cache(cache, wanted.identity, config.samples_per_shard, grows=config.grow)
    return wanted.runner(config, own_processors, cache, index)


def _placed(index: SampleIndex, config: BuildConfig) -> SampleIndex:
    """The samples of the cache, with the places where this process finds their tars."""
    if config.data is None:  # the leader has looked where another cache says that they are
        return index
    return place_tars(index, config.data) if config.grow else relocate(index, config.data)
