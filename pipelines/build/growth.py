"""More views, or the samples of more tars, for a cache that exists: what it will be, and which samples it will hold."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from atcache.cache.differences import find_differences
from atcache.cache.identity import CacheIdentity
from atcache.cache.record import CacheRecord, SampleChoice
from atcache.errors import CacheMismatchError, ConfigError, SourceError
from atcache.files.durable import encode_json
from atcache.files.location import Location
from atcache.files.ranges import open_file
from atcache.images.source import SampleIndex
from atcache.images.tars import expand_tars
from atcache.store.growth import GROWTH, begin_growth, read_growth
from atcache.store.layout import StoreLayout, Task
from atcache.store.metadata import SEAL, read_root
from atcache.store.parts import append_part, find_changed_tar, take_tars
from atcache.store.reader import CacheReader

from .samples import Choice


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Growth:
    """What a cache is to become."""

    attributes: dict[str, Any]
    """Its `attributes["atcache"]` to be, as `begin_growth` takes them."""
    index: SampleIndex
    """All its samples to be."""
    is_begun: bool
    """Whether an earlier run has begun it, so that tasks may be done."""

    def begin(self, existing: CacheReader) -> None:
        """Begin to grow, unless that was done. The caller is the cache's only writer.

        Raises:
            ConfigError: another process has changed the cache since it was opened.
        """
        path = existing.path
        assert isinstance(path, Path), "only local caches grow"
        now, _ = read_root(path)
        if not _are_same(now, existing.attributes) or (read_growth(path) is not None) != self.is_begun:
            raise ConfigError(f"another process has changed {path} meanwhile. Type the same command again.")
        if not self.is_begun:
            begin_growth(path, self.attributes, self.index)


def plan_growth(existing: CacheReader, identity: CacheIdentity, index: SampleIndex, *, grows: bool) -> Growth | None:
    """What a cache becomes by growing; None if there is nothing to add.

    Args:
        existing: the cache as it is; it differs from what is wanted in views and samples only.
        identity: of the cache that is wanted.
        index: from `arrange_samples`.
        grows: whether the user wants it to grow.

    Raises:
        CacheMismatchError: it was begun to grow in another way.
    """
    path, layout = existing.path, existing.layout
    begun = read_growth(path) if isinstance(path, Path) else None
    target = replace(layout, num_views=identity.num_views)
    if num_added := identity.num_samples - layout.num_real_samples:
        target = target.with_part((num_added,))
    if target != layout and begun is None:
        target = target.with_joined_records()
    elif begun is not None and grows:  # begun perhaps by a version that did not join records
        target = replace(target, records_per_file=begun[1].records_per_file)
    attributes: dict[str, Any] = {
        **existing.attributes,
        "layout": target.to_json(),
        "complete": None,
        "source": {
            **existing.attributes["source"],
            "fingerprint": identity.fingerprint,
            "num_samples": identity.num_samples,
        },
        "views": {**existing.attributes["views"], "num_views": identity.num_views},
    }
    if begun is not None and grows and not _are_same(begun[0], attributes):
        raise CacheMismatchError(
            f"{path} is growing to {_size(begun[1])}, and this command asks for {_size(target)}, or for other tars. "
            f"Type the command that it was begun with, or delete {path / GROWTH} to give that up."
        )
    if target == layout:
        return None
    return Growth(attributes=attributes, index=index, is_begun=begun is not None)


def _are_same(first: dict[str, Any], second: dict[str, Any]) -> bool:
    without = [{name: value for name, value in each.items() if name != SEAL} for each in (first, second)]
    return encode_json(without[0]) == encode_json(without[1])


def _size(layout: StoreLayout) -> str:
    return f"{layout.num_real_samples} samples x {layout.num_views} view{'s' if layout.num_views > 1 else ''}"


def choice_of(config: Choice) -> SampleChoice:
    """What a cache records of how its samples were chosen."""
    return SampleChoice(labels=config.labels, label_key=config.label_key, max_samples=config.max_samples)


def check_same_choice(existing: CacheReader, config: Choice) -> None:
    """Refuse to add samples that are chosen or labelled in another way than those of the cache.

    Raises:
        CacheMismatchError: names each option that differs, with both values.
    """
    stored, asked = CacheRecord.of(existing).choice, choice_of(config)
    if stored is None or stored == asked:
        return
    differences = [
        f"--{name.replace('_', '-')} was {_shown(there)} and is {_shown(here)} here"
        for name, (there, here) in find_differences(stored.to_json(), asked.to_json()).items()
    ]
    raise CacheMismatchError(
        f"{existing.path} cannot grow by samples that are chosen in another way: {'; '.join(differences)}. Give the "
        "options that it was begun with, or another --out."
    )


def _shown(value: object) -> str:
    return "not given" if value is None else str(value)


def arrange_samples(existing: CacheReader, named: SampleIndex, *, grows: bool) -> SampleIndex:
    """The samples of a cache in its order, with the places of the tars that were named.

    If it grows, the samples of tars that it does not hold follow as a part of their own, and the cache keeps those of
    tars that are not named.

    Args:
        existing: the cache.
        named: the samples of the tars that the user has named.
        grows: whether samples may be added.

    Returns:
        The samples; if they are not the cache's and it does not grow, those that were named, as they are.

    Raises:
        CacheMismatchError: the cache would grow, but a tar that it holds has changed, or other samples of it are named.
    """
    stored = existing.samples
    numbers = {tar.name: number for number, tar in enumerate(stored.tars)}
    known = [number for number, tar in enumerate(named.tars) if tar.name in numbers]
    new = [number for number, tar in enumerate(named.tars) if tar.name not in numbers]
    if not grows and (new or len(known) < len(stored.tars)):
        return named
    held = take_tars(stored, [numbers[named.tars[number].name] for number in known])
    if changed := find_changed_tar(held, take_tars(named, known)):
        if not grows:
            return named
        raise CacheMismatchError(
            f"{existing.path} holds {changed} with other samples than are named now. Either the tar has changed: give "
            "the one that the cache was built from or, if this is another one, rename it. Or --keys, --labels, "
            "--label-key or --max-samples are others than those it was begun with."
        )
    versions = named.tar_versions or ("",) * len(named.tars)
    index = _placed(stored, {named.tars[number].name: (named.tars[number], versions[number]) for number in known})
    return append_part(index, take_tars(named, new), existing.layout.samples_per_shard) if new else index


def place_tars(index: SampleIndex, data: str) -> SampleIndex:
    """The same samples, with the places of those tars that `data` names; the others are where they were."""
    return _placed(index, {tar.name: (tar, "") for tar in expand_tars(data)})


def _placed(index: SampleIndex, places: dict[str, tuple[Location, str]]) -> SampleIndex:
    placed = [places.get(tar.name, (tar, "")) for tar in index.tars]
    return replace(index, tars=tuple(tar for tar, _ in placed), tar_versions=tuple(version for _, version in placed))


def check_tars(index: SampleIndex, tasks: Iterable[Task]) -> None:
    """Refuse tasks whose tars are not there, before the long run.

    Raises:
        SourceError: names the first of them.
    """
    numbers = {int(number) for task in tasks for number in np.unique(index.tar_S[task.start : task.stop])}
    for number in sorted(numbers):
        tar = index.tars[number]
        try:
            nbytes = open_file(tar).nbytes
        except OSError as error:
            raise SourceError(
                f"{tar} cannot be opened ({error.strerror}), but views of its samples are to be added. If it was "
                "moved, name its place in --data too."
            ) from error
        if nbytes != index.tar_nbytes[number]:
            raise SourceError(
                f"{tar} has {nbytes} bytes, but had {index.tar_nbytes[number]} when the cache was built. Restore it."
            )
