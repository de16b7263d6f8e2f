"""Build: run the teacher once over a dataset and keep its attention.

index -> calibrate -> plan -> create the cache -> run the tasks -> declare it complete. Typing the same command again
continues where an earlier run stopped; other options for the same cache are refused, unless it is to grow.

If there are several processes, one leads and does all of this. The others join it for the tasks, as if each continued
the cache that the leader has created.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from atcache.cache.coders import stored_coder
from atcache.cache.identity import CacheIdentity, Selection
from atcache.cache.record import CacheRecord
from atcache.codecs.base import Codec, State
from atcache.errors import ConfigError, DiskFullError
from atcache.files.durable import check_can_write, only_writer, sweep_partials
from atcache.images.class_names import same_classes
from atcache.images.source import SampleIndex, Source, relocate
from atcache.machine import num_processors
from atcache.store.layout import StoreLayout, Task
from atcache.store.parts import count_samples
from atcache.store.reader import CacheReader
from atcache.store.writer import create_cache, finish_cache
from atcache.teachers.run import TeacherRun
from atcache.views.mixing import mix_policy

from ..fidelity import Expectation
from ..running.ranks import Ranks
from ..running.stages import StageProgress
from .board import Board
from .calibrate import calibrate, render_calibration_views
from .codec import choose_codec
from .config import BuildConfig
from .given_codec import GivenCodec
from .growth import Growth, arrange_samples, check_tars, place_tars, plan_growth
from .plan import BuildPlan, check_same_cache, committed_tasks, describe_cache, plan_build, plan_layout
from .samples import index_samples
from .shared_folder import check_mark, marked, wait_for_commits
from .summary import BuildSummary
from .tasks import TaskRunner

_SAMPLES_TO_CONTINUE = 8  # an existing cache is calibrated only to check that the teacher still runs as it did


def build(config: BuildConfig, on_plan: Callable[[BuildPlan], None] = lambda _: None) -> BuildSummary:
    """Build a cache, or continue one; under torchrun, together with the other processes.

    Args:
        config: what to build.
        on_plan: called with the plan before anything is written, in the process that leads.

    Returns:
        What was planned and done. A dry run writes nothing.

    Raises:
        AtcacheError: a child of it names what does not fit. What was committed before stays.
    """
    ranks = Ranks.from_environment()
    with Board.opened(ranks) as board:
        config = replace(config, device=ranks.device_name(config.device))
        if ranks.leads:
            summary = _lead(config, ranks, board, on_plan)
            board.publish("end", summary.to_json())
            return summary
        _join(config, ranks, board)
        return BuildSummary.from_json(board.receive("end"))


def _lead(config: BuildConfig, ranks: Ranks, board: Board, on_plan: Callable[[BuildPlan], None]) -> BuildSummary:
    start_s = time.monotonic()
    # First, so that a cache that cannot be continued is refused before the teacher is loaded.
    existing = _open_existing(config)
    if existing is not None and config.grow:
        config = replace(config, views=max(config.views, existing.layout.num_views))
    if not config.dry_run and not (existing is not None and existing.is_complete):
        check_can_write(config.out)
    given = _read_given_codec(config, existing)
    named = index_samples(config.data, config, on_bad=config.on_bad_image)
    index = named if existing is None else arrange_samples(existing, named, grows=config.grow)
    wanted = _Wanted.of(config, index, _known_codec(config, existing, given))
    run, identity = wanted.run, wanted.identity
    if given is not None:
        given.check_teacher(identity)
    growth: Growth | None = None
    if existing is not None:
        check_same_cache(existing, identity, config.samples_per_shard, grows=config.grow)
        growth = plan_growth(existing, identity, index, grows=config.grow)
        same_classes([existing.samples.classes, named.classes])
        record = CacheRecord.of(existing)
        if growth is None and record.complete is not None and existing.is_complete:
            complete, seconds = record.complete.to_json(), time.monotonic() - start_s
            summary = BuildSummary(out=str(config.out), complete=complete, seconds=seconds)
            return summary.judged(wanted.expectation(record))
    num_samples = config.calibration_samples if existing is None else _SAMPLES_TO_CONTINUE
    views = render_calibration_views(named, identity.policy, num_samples, skip_bad=config.on_bad_image == "skip")
    with StageProgress("calibrate") as progress:
        calibration = calibrate(
            run,
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
    new_layout, view_nbytes = plan_layout(
        calibration,
        views,
        named.num_samples,
        config.views,
        config.samples_per_shard,
        stores_pixels=config.pixels == "store",
        compressor=None if given is None else given.compressor,
    )
    # The cache as it will be, if it is there.
    cache = existing if existing is None or growth is None else CacheReader(existing.path, growth.attributes)
    layout = new_layout if cache is None else cache.layout
    if identity.policy.mixing is not None and layout.samples_per_shard == 1:
        raise ConfigError("a shard holds one sample only, so there is none to mix it with: raise samples_per_shard.")
    done = set[str]()
    if existing is not None:  # of a growth that was not begun, nothing can be done
        done = committed_tasks(config.out, layout if growth is None or growth.is_begun else existing.layout)
    to_do = [number for number, task in enumerate(layout.tasks()) if task.name not in done]
    if growth is not None:
        check_tars(index, _tasks(layout, to_do))
    plan = plan_build(config.out, run.teacher, calibration, layout, view_nbytes, done=done)
    on_plan(plan)
    if config.dry_run:
        return BuildSummary(out=str(config.out), plan=plan, seconds=time.monotonic() - start_s)
    if plan.remaining_nbytes + plan.state_nbytes > plan.free_nbytes:
        raise DiskFullError(
            f"{config.out}: {plan.remaining_nbytes / 2**20:.0f} MiB are still to be written, "
            f"{plan.free_nbytes / 2**20:.0f} MiB are free. Free some space, or choose a smaller --budget or --codec, "
            "or fewer --layers."
        )
    if existing is None:
        state = {name: tensor.cpu().numpy() for name, tensor in calibration.state.items()}
        bias_LHQK = None if calibration.bias_LHQK is None else calibration.bias_LHQK.float().cpu().numpy()
        record = describe_cache(identity, run, calibration)
        create_cache(config.out, layout, record.to_json(), index, state, bias_LHQK)
    with only_writer(config.out):
        if existing is not None and growth is not None:
            growth.begin(existing)
        sweep_partials(config.out)
        cache = cache or CacheReader(config.out)
        with marked(config.out) as mark:
            board.publish("job", {"mark": mark, "to_do": to_do, "attributes": cache.attributes})
            _runner(config, ranks, wanted, cache, index).run_tasks(_tasks(layout, to_do), board)
        wait_for_commits(config.out, layout)
        complete = finish_cache(config.out, grows=growth is not None)
    return BuildSummary(
        out=str(config.out),
        plan=plan,
        complete=complete,
        num_built_views=board.total().num_stored,
        seconds=time.monotonic() - start_s,
    ).judged(wanted.expectation(CacheRecord.of(cache)))


def _join(config: BuildConfig, ranks: Ranks, board: Board) -> None:
    """Do some of the tasks, if there are any. The leader has created the cache, or has opened and checked it."""
    if board.wait_for("job", "end") == "end":
        return
    job = board.receive("job")
    check_mark(config.out, job["mark"], board.look)
    cache = CacheReader(config.out, job["attributes"])
    if config.grow:
        config = replace(config, views=cache.layout.num_views)
    index = place_tars(cache.samples, config.data) if config.grow else relocate(cache.samples, config.data)
    takes_codec = config.codec_from is not None or (config.grow and not config.chooses_codec)
    codec = CacheRecord.of(cache).make_codec(cache.path) if takes_codec else None
    wanted = _Wanted.of(config, index, codec)
    check_same_cache(cache, wanted.identity, config.samples_per_shard, grows=config.grow)
    _runner(config, ranks, wanted, cache, index).run_tasks(_tasks(cache.layout, job["to_do"]), board)


def _tasks(layout: StoreLayout, numbers: list[int]) -> list[Task]:
    tasks = layout.tasks()
    return [tasks[number] for number in numbers]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Wanted:
    """What a config asks for, with the teacher loaded."""

    run: TeacherRun
    codec: Codec
    layers: tuple[int, ...]
    heads: tuple[int, ...] | None
    identity: CacheIdentity

    @classmethod
    def of(cls, config: BuildConfig, index: SampleIndex, codec: Codec | None) -> _Wanted:
        """Load the teacher, and choose everything that does not depend on calibration; also the codec if it is None."""
        run = TeacherRun.load(config.teacher, config.weights, device=config.device, precision=config.precision)
        mixing = mix_policy(config.mixup, config.cutmix, config.mix_prob)
        policy = run.teacher.input.view_policy(config.policy, config.seed, mixing, config.decoding)
        if codec is None:
            codec = choose_codec(
                config.codec,
                config.target,
                run.teacher.model,
                count_samples(index) * config.views,
                queries=config.queries,
                store=config.store,
            )
        layers, heads = run.select(config.layers, config.heads)
        identity = CacheIdentity(
            teacher=str(run.teacher.name),
            weights_sha256=run.teacher.weights_sha256,
            input=run.teacher.input,
            precision="bfloat16" if run.dtype == torch.bfloat16 else "float32",
            fingerprint=index.fingerprint,
            num_samples=count_samples(index),
            policy=policy,
            num_views=config.views,
            pixels=config.pixels,
            selection=Selection(layers=layers, heads=heads, store=config.store, queries=config.queries),
            codec=codec.to_json(),
        )
        return cls(run=run, codec=codec, layers=layers, heads=heads, identity=identity)

    def expectation(self, record: CacheRecord) -> Expectation:
        """The row KL that the cache's views should have, by what was measured when it was begun."""
        return Expectation.of(self.codec, record.calibration.row_kl_nats, self.run.dtype)


def _runner(config: BuildConfig, ranks: Ranks, wanted: _Wanted, cache: CacheReader, index: SampleIndex) -> TaskRunner:
    own_processors = max(1, num_processors() // ranks.local_world_size)
    record = CacheRecord.of(cache)
    return TaskRunner(
        out=config.out,
        layout=cache.layout,
        source=Source(index),
        policy=wanted.identity.policy,
        run=wanted.run,
        coder=stored_coder(cache, wanted.codec, record.geometry, str(wanted.run.device)),
        batch_size=config.batch_size,
        workers=own_processors - 1 if config.workers is None else config.workers,
        threads=own_processors,
        skip_bad=config.on_bad_image == "skip",
        expectation=wanted.expectation(record),
    )


def _open_existing(config: BuildConfig) -> CacheReader | None:
    """The cache to continue; None if there is none yet."""
    out = config.out
    if not out.exists():
        if config.grow:
            raise ConfigError(f"{out} does not exist, so it cannot grow. Check --out, or leave out --grow to begin it.")
        return None
    if not (out / "zarr.json").exists():
        raise ConfigError(f"{out} exists and is not a cache. Give another --out, or remove it.")
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
