"""Build a cache whose teacher is a trained student: its own attention, in the form in which a teacher's is stored."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from atcache.cache.record import CacheRecord
from atcache.errors import CacheMismatchError, CacheMissError, ConfigError
from atcache.files.location import Location, parse_location
from atcache.store.reader import CacheReader

from ..build.config import BuildConfig
from ..build.plan import BuildPlan
from ..build.run import build
from ..build.summary import BuildSummary
from ..running.run_record import RunFile, read_run
from ..running.run_teacher import check_has_own_attention
from .config import MapsConfig


def maps(config: MapsConfig, on_plan: Callable[[BuildPlan], None] = lambda _: None) -> BuildSummary:
    """Store a trained student's own attention.

    Args:
        config: whose, and of which images.
        on_plan: called with the plan before anything is written.

    Raises:
        AtcacheError: a child of it names what does not fit. What was committed before stays.
    """
    run = read_run(config.run)
    check_has_own_attention(config.run, run)
    options = {
        name: getattr(config, name)
        for name in (
            "out",
            "data",
            "max_samples",
            "layers",
            "codec",
            "target_kl",
            "batch_size",
            "workers",
            "calibration_samples",
            "device",
            "precision",
            "scheduler",
            "client",
            "dry_run",
        )
    }
    # With a path from the root, no name of a model can be meant.
    return build(BuildConfig(teacher=str(config.run.absolute()), **options, **_views(config, run)), on_plan)


def _views(config: MapsConfig, run: RunFile) -> dict[str, Any]:
    """The options of a build that say which views it makes."""
    if config.policy is None and (config.cache is not None or run.was_trained_from_caches):
        cache = config.cache or _trained_from(config, run)
        return {"views_from": cache, "views": config.views or CacheReader(cache).layout.num_views}
    if config.data is None:
        raise ConfigError(
            f"{config.run} was trained without a cache, so no views are known: give --data, the images, or --cache, "
            "whose views are to be taken."
        )
    # Labels are kept where there are any, but a student's attention does not need them.
    return {"policy": config.policy or "eval", "views": config.views or 1, "labels": "optional"}


def _trained_from(config: MapsConfig, run: RunFile) -> Location:
    """The cache that the student was trained from.

    Raises:
        ConfigError: there are several, or the run does not say where it was.
        CacheMissError: it is not there any more.
        CacheMismatchError: another cache is there.
    """
    if len(run.caches) != 1:
        many = f"was trained from {len(run.caches)} caches: {', '.join(run.caches)}"
        raise ConfigError(
            f"{config.run} {many if run.caches else 'does not say where the cache is that it was trained from'}. Give "
            "--cache, the one whose samples and views are to be taken."
        )
    place = parse_location(run.caches[0])
    try:
        record = CacheRecord.of(CacheReader(place))
    except CacheMissError as error:
        raise CacheMissError(
            f"the cache that {config.run} was trained from is not at {place} any more. Give --cache, where it is now."
        ) from error
    there = {"source": record.identity.fingerprint, "policy": record.policy.to_json()}
    if [{name: part.get(name) for name in there} for part in run.views_of_parts] != [there]:
        raise CacheMismatchError(
            f"the cache at {place} is not the one that {config.run} was trained from, or has grown: its samples or "
            "views differ. Give --cache: the one that is meant, or this one."
        )
    return place
