"""The samples and views of another cache, for `atcache build --views-from`: the new cache shows the very same images.

Views are not drawn again but replayed as they are stored, and checked by their hashes. So they are the same whatever
version of a library draws, and a cache that stores its pixels needs no tars.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Self

import numpy as np

from atcache.cache.record import CacheRecord, SampleChoice
from atcache.errors import CacheMismatchError, ConfigError
from atcache.feed.sample_views import CachedViews
from atcache.files.location import Location
from atcache.images.source import SampleIndex, Source, relocate
from atcache.store.layout import Status
from atcache.store.reader import CacheReader
from atcache.store.shard_size import settle_samples_per_shard
from atcache.teachers.load import Teacher
from atcache.views.policy import ViewPolicy
from atcache.views.rendering import STORED, Rendered

from .config import BuildConfig
from .growth import place_tars
from .samples import choose_samples


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class GivenViews:
    """The views of another cache, and those of its samples that are wanted."""

    samples: SampleIndex
    """The samples that are wanted, with the places where their tars are now."""
    choice: SampleChoice | None
    """How that cache's samples were chosen; None if it does not say, or if only some are wanted."""
    _reader: CacheReader
    _record: CacheRecord
    _stored: SampleIndex
    """All samples of the other cache, with the same places."""

    @classmethod
    def wanted_by(cls, config: BuildConfig) -> Self | None:
        """What a config asks for; None if its views are to be drawn.

        Raises:
            ConfigError: the other cache is not complete, or has not so many views, or mixed ones of which only some
                are wanted.
            SourceError: tars of wanted samples are not in `config.data`.
            AtcacheError: there is no cache, or it cannot be used; what `CacheReader` raises.
        """
        if config.views_from is None:
            return None
        reader = CacheReader(config.views_from)
        record = CacheRecord.of(reader)
        chooses = config.keys is not None or config.max_samples is not None
        _check(config, reader, record, chooses=chooses)
        stored = reader.samples if config.data is None else place_tars(reader.samples, config.data)
        samples = stored
        if record.policy.mixing is None:
            # Rows between the parts of a cache that has grown have no sample. Mixed views keep them: see `part_stops`.
            real_S = np.flatnonzero(stored.problem_S != Status.NO_SAMPLE)
            samples = stored if len(real_S) == stored.num_samples else stored.select(real_S)
        samples = choose_samples(samples, config)
        if config.data is not None:
            samples = relocate(samples, config.data)
        choice = None if chooses else record.choice
        return cls(samples=samples, choice=choice, _reader=reader, _record=record, _stored=stored)

    @property
    def stores_pixels(self) -> bool:
        """Whether the cache has the images themselves, so that no tars are needed."""
        return self._reader.layout.pixels is not None

    @property
    def part_stops(self) -> tuple[int, ...]:
        """The parts of the new cache, as `StoreLayout` has them: those of this one where views are mixed, else one.

        A mixed view and its partner are in one shard. `atcache pull` takes whole shards, and relies on that. So the new
        cache has the same shards, which begin with each part.
        """
        return () if self._record.policy.mixing is None else self._reader.layout.part_stops

    def shard_size(self, asked: int | None) -> int | None:
        """The samples of a shard of the new cache: those of this one where views are mixed, else what is asked for.

        See `part_stops` for the reason.

        Raises:
            ConfigError: another number is asked for.
        """
        layout = self._reader.layout
        own = layout.samples_per_shard
        if self._record.policy.mixing is None:
            return asked
        if asked is not None and settle_samples_per_shard(asked, layout.parts()[0][1]) != own:
            raise ConfigError(
                f"samples_per_shard={asked}: the views of {self._reader.path} are mixed within its shards of {own} "
                "samples, so the new cache has such shards too. Leave --samples-per-shard out."
            )
        return own

    def policy_for(self, teacher: Teacher) -> ViewPolicy:
        """How the views were drawn.

        Raises:
            ConfigError: they are not of the size that the teacher takes.
        """
        policy, wanted = self._record.policy, teacher.input
        if (policy.image_height, policy.image_width) != (wanted.height, wanted.width):
            raise ConfigError(
                f"the views of {self._reader.path} are {policy.image_height} x {policy.image_width} pixels, the model "
                f"takes {wanted.height} x {wanted.width}. Name a cache with views of its size, or draw new ones."
            )
        return policy

    def replayed(self, index: SampleIndex) -> ReplayedViews:
        """The views of the samples of the new cache, of which `index` is the table.

        Raises:
            CacheMismatchError: the other cache does not have these samples.
        """
        stored = self._stored
        row_S = np.arange(stored.num_samples)
        if index.fingerprint != stored.fingerprint:
            row_S = _rows_of(index, stored, self._reader.path)
        return ReplayedViews(self._reader, self._record, Source(stored), row_S)


class ReplayedViews:
    """Stored views by the rows of another table. Stands for a `Renderer`; forked and pickled copies are independent."""

    def __init__(self, reader: CacheReader, record: CacheRecord, source: Source, row_S: np.ndarray) -> None:
        self._reader, self._policy, self._row_S = reader, record.policy, row_S
        self._views = CachedViews(reader, source, code_layers=None)

    def render(self, sample: int, view: int, block: range | None = None) -> Rendered:
        """One view of one sample; what a policy mixes is stored, so `block` changes nothing.

        Raises:
            CacheMismatchError: the replayed pixels are not those that the other cache's teacher saw.
            SourceError: the tar is missing or has changed.
        """
        del block
        row, policy = int(self._row_S[sample]), self._policy
        status = int(self._reader.status_VS[view, row])
        if status != STORED:
            no_pixels_HWC = np.zeros((policy.image_height, policy.image_width, 3), np.uint8)
            return Rendered(status, np.zeros(len(policy.parameter_names), np.float32), 0, no_pixels_HWC)
        pixels_HWC = self._views.read(row, view).pixels_HWC
        return Rendered(status, self._reader.parameters(view, row), self._reader.pixel_hash(view, row), pixels_HWC)


def _check(config: BuildConfig, reader: CacheReader, record: CacheRecord, *, chooses: bool) -> None:
    num_views = reader.layout.num_views
    if not reader.is_complete:
        raise ConfigError(f"views_from={reader.path} is not complete. Finish its build first.")
    if config.views > num_views:
        raise ConfigError(f"views={config.views}: {reader.path} has {num_views} of each sample. Give at most that.")
    if record.policy.mixing is not None and chooses:
        raise ConfigError(
            f"the views of {reader.path} are mixed with those of other samples, so all samples are needed. Leave out "
            "--max-samples and --keys."
        )


def _rows_of(index: SampleIndex, stored: SampleIndex, path: Location) -> np.ndarray:
    """The rows of `stored` that the samples of `index`, which has some of them in the same order, have there."""
    there = enumerate(_identities(stored))
    row_S = np.empty(index.num_samples, np.int64)
    for sample, wanted in enumerate(_identities(index)):
        row = next((row for row, found in there if found == wanted), None)
        if row is None:
            raise CacheMismatchError(
                f"{path} does not hold the sample {index.sample_key(sample)}. Give another --out, or the --views-from "
                "that it was begun with."
            )
        row_S[sample] = row
    return row_S


def _identities(index: SampleIndex) -> Iterator[tuple[str, bytes, int, int]]:
    """What tells the samples of a table apart: tar, key, and where its image is."""
    names = [tar.name for tar in index.tars]
    columns = (index.tar_S, index.keys_S, index.offset_S, index.nbytes_S)
    for tar, key, offset, nbytes in zip(*(column.tolist() for column in columns), strict=True):
        yield names[tar], key, offset, nbytes
