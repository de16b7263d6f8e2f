"""Everything that a build does before its tasks: it opens or plans the cache, loads the teacher, and calibrates.

Nothing is written here, except by `Prepared.begin`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from atcache.cache.record import CacheRecord
from atcache.codecs.base import Codec, State
from atcache.errors import ConfigError, DiskFullError
from atcache.files.durable import check_can_write
from atcache.files.location import Location, Url
from atcache.files.ranges import file_exists
from atcache.files.remote.putting import patiently
from atcache.files.sizes import size_text
from atcache.files.spool import spool_free_nbytes, sweep_spools
from atcache.files.writers import sweep_partials
from atcache.images.class_names import same_classes
from atcache.images.source import SampleIndex
from atcache.images.tar_samples import Problem
from atcache.store.bucket import check_can_begin, obeyed_conditions, sweep_probes
from atcache.store.layout import StoreLayout, Task
from atcache.store.manifest import delete_commits
from atcache.store.reader import CacheReader
from atcache.store.writer import create_cache
from atcache.teachers.run import TeacherRun

from ..running.stages import StageProgress
from .calibrate import Calibration, calibrate, render_calibration_views
from .config import BuildConfig
from .given_codec import GivenCodec
from .given_views import GivenViews
from .growth import Growth, arrange_samples, check_same_choice, check_tars, choice_of, plan_growth
from .plan import BuildPlan, check_same_cache, committed_tasks, describe_cache, plan_build, plan_layout
from .samples import index_samples
from .wanted import Wanted, load_teacher

_MOST_PUT_NBYTES = 5 * 2**30  # what S3, the strictest, takes in one request
_SAMPLES_TO_CONTINUE = 8  # an existing cache is calibrated only to check that the teacher still runs as it did


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Prepared:
    """A build that is ready to begin, or to go on. It holds no teacher, so it can be sent to another process."""

    config: BuildConfig
    """As given, but a cache that grows keeps the views it has."""
    index: SampleIndex
    """All samples of the cache."""
    existing: CacheReader | None
    """The cache as it is; None if there is none yet."""
    growth: Growth | None
    """What it is to become, if it grows."""
    record: dict[str, Any] | None
    """What `create_cache` is to write about a new cache; None if none is to be created."""
    state: dict[str, np.ndarray]
    """The codec's fitted arrays."""
    bias_LHQK: np.ndarray | None
    """The teacher's bias, if it has one."""
    layout: StoreLayout
    """Of the cache as it will be."""
    to_do: tuple[int, ...]
    """Numbers of the tasks that are still to be done."""
    damaged: frozenset[str]
    """Names of those among them that have a commit record, which does not hold."""
    plan: BuildPlan

    def check_disk(self, num_spools: int) -> None:
        """Refuse a build that the disk cannot hold, or whose tasks it cannot hold on their way to an object store.

        Args:
            num_spools: processes of this machine that do tasks.

        Raises:
            ConfigError: a task is too large for an object store.
            DiskFullError: less is free than is still to be written.
        """
        plan = self.plan
        if plan.free_nbytes is None:
            self._check_spool(num_spools)
        elif plan.remaining_nbytes + plan.state_nbytes > plan.free_nbytes:
            raise DiskFullError(
                f"{self.config.out}: {size_text(plan.remaining_nbytes)} are still to be written, "
                f"{size_text(plan.free_nbytes)} are free. Free some space, or choose a smaller --budget or "
                "--codec, or fewer --layers."
            )

    def _check_spool(self, num_spools: int) -> None:
        place, free_nbytes = spool_free_nbytes()
        num_samples = min(self.layout.samples_per_shard, self.layout.num_samples)
        shard_nbytes = self.plan.nbytes_per_view * num_samples
        if shard_nbytes > _MOST_PUT_NBYTES:
            raise ConfigError(
                f"a task of {num_samples} samples has about {size_text(shard_nbytes)}, and an object store takes "
                f"at most {size_text(_MOST_PUT_NBYTES)} in one request. Lower --samples-per-shard."
            )
        # One task is written while another is put. Before, the codec's state is there.
        needed_nbytes = max(2 * num_spools * self.plan.nbytes_per_view * num_samples, self.plan.state_nbytes)
        if needed_nbytes > free_nbytes:
            raise DiskFullError(
                f"{place}: up to {size_text(needed_nbytes)} lie there on their way to {self.config.out}, but only "
                f"{size_text(free_nbytes)} are free. Set TMPDIR to a folder with more space, or lower "
                "--samples-per-shard."
            )

    def create(self) -> None:
        """Create the cache without tasks, if there is none."""
        if self.record is None:
            return
        create_cache(self.config.out, self.layout, self.record, self.index, self.state, self.bias_LHQK)

    def begin(self) -> CacheReader:
        """The cache, ready for its tasks. The caller is its only writer."""
        if self.existing is not None and self.growth is not None:
            self.growth.begin(self.existing)
        if isinstance(self.config.out, Path):
            self._check_unchanged()
            sweep_partials(self.config.out)
            # Here and not by those who do the tasks, who would split the same joined file at once.
            delete_commits(self.config.out, [task.name for task in numbered_tasks(self.layout, self.to_do)])
        else:
            # Here and not when their tasks are done: by then the record may be a new one, of another build.
            delete_commits(self.config.out, self.damaged)
            sweep_probes(self.config.out)
            sweep_spools()
        return _grown(self.existing, self.growth) or CacheReader(self.config.out)

    def _check_unchanged(self) -> None:
        """Refuse to do again what another process has done since this build looked: it may be read by now."""
        is_to_do = {task.name for task in numbered_tasks(self.layout, self.to_do)} - self.damaged
        if done := CacheReader(self.config.out).committed_tasks() & is_to_do:
            raise ConfigError(
                f"another process has built {len(done)} tasks of {self.config.out} since this build began. Run the "
                "same command again to continue."
            )


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Complete:
    """A cache that is complete already, and is what the options ask for."""

    cache: CacheReader


def prepare(
    config: BuildConfig, load: Callable[[BuildConfig], TeacherRun] = load_teacher
) -> tuple[Wanted, Prepared | Complete]:
    """Find out all that a build needs to know.

    Args:
        config: what to build.
        load: gives the teacher.

    Returns:
        What is wanted, with the teacher, and what is to be done.

    Raises:
        AtcacheError: a child of it names what does not fit.
    """
    # First, so that a cache that cannot be continued is refused before the teacher is loaded.
    existing = _open_existing(config)
    if existing is not None and config.grow:
        config = replace(config, views=max(config.views, existing.layout.num_views))
        check_same_choice(existing, config)
    if not config.dry_run and not (existing is not None and existing.is_complete):
        _check_can_write(config.out, existing)
    given = _read_given_codec(config, existing)
    views = GivenViews.wanted_by(config)
    named = _named_samples(config, views)
    index = named if existing is None else arrange_samples(existing, named, grows=config.grow)
    wanted = Wanted.of(config, index, _known_codec(config, existing, given), load, views)
    if given is not None:
        given.check_teacher(wanted.identity)
    growth: Growth | None = None
    if existing is not None:
        check_same_cache(existing, wanted.identity, config.samples_per_shard, grows=config.grow)
        growth = plan_growth(existing, wanted.identity, index, grows=config.grow)
        same_classes([existing.samples.classes, named.classes])
        if growth is None and CacheRecord.of(existing).complete is not None and existing.is_complete:
            return wanted, Complete(cache=existing)
    calibration, new_layout, view_nbytes = _calibrate(config, named, wanted, existing, given)
    cache = _grown(existing, growth)
    layout = new_layout if cache is None else cache.layout
    if wanted.identity.policy.mixing is not None:
        _check_mixing(layout, index)
    done, damaged = set[str](), set[str]()
    if existing is not None:  # of a growth that was not begun, nothing can be done
        done, damaged = committed_tasks(config.out, layout if growth is None or growth.is_begun else existing.layout)
    to_do = tuple(number for number, task in enumerate(layout.tasks()) if task.name not in done)
    if growth is not None or (views is not None and not views.stores_pixels):
        check_tars(index, numbered_tasks(layout, to_do))
    record = None
    if existing is None and not config.dry_run:  # measured with forwards of the teacher for each layer
        choice = choice_of(config) if views is None else views.choice
        record = describe_cache(wanted.identity, wanted.run, calibration, choice).to_json()
    return wanted, Prepared(
        config=config,
        index=index,
        existing=existing,
        growth=growth,
        record=record,
        state={name: tensor.cpu().numpy() for name, tensor in calibration.state.items()},
        bias_LHQK=None if calibration.bias_LHQK is None else calibration.bias_LHQK.float().cpu().numpy(),
        layout=layout,
        to_do=to_do,
        damaged=frozenset(damaged),
        plan=plan_build(config.out, wanted.run.teacher, calibration, layout, view_nbytes, done=done),
    )


def _check_mixing(layout: StoreLayout, index: SampleIndex) -> None:
    """Refuse views that have nothing to be mixed with, or of which what to predict would be half unknown."""
    if layout.samples_per_shard == 1:
        raise ConfigError("a shard holds one sample only, so there is none to mix it with: raise samples_per_shard.")
    has_label_S = index.label_S[index.problem_S == Problem.NONE] >= 0
    if has_label_S.any() and not has_label_S.all():
        raise ConfigError(
            f"{np.count_nonzero(~has_label_S)} of {len(has_label_S)} samples have no label, and views that are mixed "
            "with theirs would have half a label. Leave --mixup and --cutmix out, give --labels required for samples "
            "with labels only, or --labels none to learn from maps alone."
        )


def _named_samples(config: BuildConfig, views: GivenViews | None) -> SampleIndex:
    """The samples that the user names, in tars or by another cache."""
    if views is not None:
        return views.samples
    assert config.data is not None, "checked by BuildConfig"
    return index_samples(config.data, config, on_bad=config.on_bad_image)


def numbered_tasks(layout: StoreLayout, numbers: Sequence[int]) -> list[Task]:
    """The tasks that have these numbers."""
    tasks = layout.tasks()
    return [tasks[number] for number in numbers]


def _grown(existing: CacheReader | None, growth: Growth | None) -> CacheReader | None:
    """The cache as it will be, if it is there."""
    if existing is None or growth is None:
        return existing
    return CacheReader(existing.path, growth.attributes)


def _calibrate(
    config: BuildConfig,
    named: SampleIndex,
    wanted: Wanted,
    existing: CacheReader | None,
    given: GivenCodec | None,
) -> tuple[Calibration, StoreLayout, int]:
    """Fit and measure the codec. Returns also the layout of a new cache of these samples, and the bytes of a view."""
    num_samples = config.calibration_samples if existing is None else _SAMPLES_TO_CONTINUE
    skips_bad = config.on_bad_image == "skip"
    replayed = None if wanted.given is None else wanted.given.replayed(named)
    views = render_calibration_views(named, wanted.identity.policy, num_samples, skip_bad=skips_bad, replayed=replayed)
    with StageProgress("calibrate") as progress:
        calibration = calibrate(
            wanted.run,
            wanted.codec,
            views.pixels_NHWC,
            layers=wanted.layers,
            heads=wanted.heads,
            batch_size=config.batch_size,
            state=_fitted_state(existing, given),
            queries=config.queries,
            with_values=config.with_values,
            with_block_inputs=config.with_block_inputs,
            name_of=views.names.__getitem__,
            progress=progress.show,
        )
    layout, view_nbytes = plan_layout(
        calibration,
        views,
        named.num_samples,
        config.views,
        config.samples_per_shard if wanted.given is None else wanted.given.shard_size(config.samples_per_shard),
        stores_pixels=config.pixels == "store",
        compressor=None if given is None else given.compressor,
        part_stops=() if wanted.given is None else wanted.given.part_stops,
    )
    return calibration, layout, view_nbytes


def _open_existing(config: BuildConfig) -> CacheReader | None:
    """The cache to continue; None if there is none yet."""
    out = config.out
    if isinstance(out, Url):
        is_there = patiently(lambda: file_exists(out / "zarr.json"), patience_s=0.0)
        return _open_checked(out) if is_there else None
    if not out.exists():
        if config.grow:
            raise ConfigError(f"{out} does not exist, so it cannot grow. Check --out, or leave out --grow to begin it.")
        return None
    if not (out / "zarr.json").exists():
        raise ConfigError(f"{out} exists and is not a cache. Give another --out, or remove it.")
    return _open_checked(out)


def _check_can_write(out: Location, existing: CacheReader | None) -> None:
    if isinstance(out, Path):
        check_can_write(out)
    elif existing is None:
        check_can_begin(out)
    else:
        obeyed_conditions(out)  # asks by putting something


def _open_checked(out: Location) -> CacheReader:
    cache = CacheReader(out)
    CacheRecord.of(cache).make_codec(cache.path)
    return cache


def _read_given_codec(config: BuildConfig, existing: CacheReader | None) -> GivenCodec | None:
    """The codec of another cache, if one is to be taken, checked as far as that goes without the teacher."""
    if config.codec_from is None:
        return None
    given = GivenCodec.read(config.codec_from)
    given.check_options(config)
    if existing is not None:
        given.check_continues(existing)
    return given


def _known_codec(config: BuildConfig, existing: CacheReader | None, given: GivenCodec | None) -> Codec | None:
    """The codec, if it is not to be chosen by the config: a cache that grows keeps its own."""
    if given is not None:
        return given.codec
    if existing is None or not config.grow or config.chooses_codec:
        return None
    return CacheRecord.of(existing).make_codec(existing.path)


def _fitted_state(existing: CacheReader | None, given: GivenCodec | None) -> State | None:
    """The codec's fitted arrays; None if they are to be fitted now.

    An existing cache keeps its own, so that all of it is encoded alike.
    """
    if existing is not None:
        return {name: torch.from_numpy(array) for name, array in existing.state.items()}
    return None if given is None else given.state
