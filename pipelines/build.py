"""Build: run the teacher once over a dataset and keep its attention.

index -> calibrate -> plan -> create the cache -> run the tasks -> declare it complete. Typing the same command again
continues where an earlier run stopped; typing another one for the same cache is refused.

Of several processes one leads: it does all of this, and the others join it for the tasks, as if each continued the
cache that it has created.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from atcache.attention.factors import FactorGeometry
from atcache.cache import stored_coder
from atcache.codecs import Codec
from atcache.errors import ConfigError, DiskFullError
from atcache.mixing import mix_policy
from atcache.source import SampleIndex, Source, index_source, relocate
from atcache.store.durable import only_writer, sweep_partials
from atcache.store.layout import StoreLayout, Task
from atcache.store.reader import CacheReader
from atcache.store.writer import create_cache, finish_cache
from atcache.views import PolicyName, ViewPolicy

from .board import Board
from .build_plan import BuildPlan, check_same_cache, committed_tasks, describe_cache, identify, plan_build, plan_layout
from .build_summary import BuildSummary
from .build_tasks import TaskRunner
from .calibrate import TeacherRun, calibrate
from .calibration_views import render_calibration_views
from .choose_codec import CodecTarget, choose_codec
from .distributed import Ranks
from .fidelity_limits import Expectation
from .shared_folder import check_mark, marked, wait_for_commits

_SAMPLES_TO_CONTINUE = 8  # calibration of a cache that exists only checks that the teacher still runs as it did


@dataclass(frozen=True, kw_only=True, slots=True)
class BuildConfig:
    """What `atcache build` was asked for."""

    teacher: str
    """An alias such as "mae-vit-l", or a timm name with arguments."""
    data: str
    """The images: see `atcache.source.expand_tars`."""
    out: Path
    """The cache, a folder; an unfinished one is continued."""
    weights: Path | None = None
    """The teacher's weights; None takes timm's."""
    policy: PolicyName = "crop-flip"
    """How views are drawn. `eval` is for validation caches."""
    mixup: float = 0.0
    """Mixup: each view is blended with that of another sample of its block, by a share of Beta(mixup, mixup)."""
    cutmix: float = 0.0
    """CutMix: a box of the other view, its area by Beta(cutmix, cutmix). With mixup too, either for half the views."""
    mix_prob: float = 1.0
    """Share of the views that are mixed, where mixup or cutmix is given."""
    views: int = 1
    """Views of each sample."""
    seed: int = 0
    """Seed of the views."""
    codec: str | None = None
    """How attention becomes integers; None takes transform, int8 where v is stored too, or logmap where the teacher
    hands over maps."""
    target_kl: float | None = None
    """Mean row KL, in nats, that codec transform is to meet; None for its default."""
    target_mb_per_view: float | None = None
    """Megabytes a view's codes may take, instead of a KL."""
    budget: str | None = None
    """Bytes that all codes may take, such as "2TB", instead of a KL."""
    layers: str | None = None
    """Block indices, such as "0-17"; None for all."""
    heads: str | None = None
    """Head indices, such as "0,3"; None for all."""
    store: Literal["v"] | None = None
    """`v` keeps the teacher's values beside q and k, for students that are given them; None keeps what maps need."""
    pixels: Literal["replay", "store"] = "replay"
    """`store` keeps the augmented images too: exact on any machine, and no JPEG decoding in training."""
    on_bad_image: Literal["raise", "skip"] = "raise"
    """`skip` records a bad sample in the cache and goes on."""
    batch_size: int = 32
    """Views a forward."""
    workers: int | None = None
    """Processes that decode and augment; None takes one less than there are processors. 0 works in this one."""
    samples_per_shard: int | None = None
    """Samples a task; None makes shards of about 256 MiB."""
    calibration_samples: int = 256
    """Samples the codec is fitted and measured on, spread over the dataset."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    precision: str = "auto"
    """auto, fp32 or bf16: what the teacher computes in."""
    dry_run: bool = False
    """Plan and stop before anything is written."""

    def __post_init__(self) -> None:
        for name in ("views", "batch_size", "calibration_samples", "samples_per_shard"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name}={value}: expected at least 1.")
        if self.workers is not None and self.workers < 0:
            raise ConfigError(f"workers={self.workers}: expected 0 or more.")
        if self.policy == "eval" and self.views > 1:
            raise ConfigError(f"views={self.views}: policy eval is the same every time; use --policy crop-flip.")
        if mix_policy(self.mixup, self.cutmix, self.mix_prob) is not None and self.policy == "eval":
            raise ConfigError("views of policy eval are never mixed: leave mixup and cutmix out, or use crop-flip.")
        self.target  # noqa: B018 - checks what it is made of

    @property
    def with_values(self) -> bool:
        """Whether v is stored too."""
        return self.store == "v"

    @property
    def target(self) -> CodecTarget:
        """What the codec is to meet."""
        return CodecTarget(kl=self.target_kl, mb_per_view=self.target_mb_per_view, budget=self.budget)


def build(config: BuildConfig, on_plan: Callable[[BuildPlan], None] = lambda _: None) -> BuildSummary:
    """Build a cache, or continue one; under torchrun together with the other processes.

    Args:
        config: what to build.
        on_plan: told the plan before anything is written, in the process that leads.

    Returns:
        What was planned and done. After a dry run nothing has been written.

    Raises:
        AtcacheError: one of its children for each thing that does not fit; whatever was committed stays.
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
    summarise = partial(BuildSummary.of, str(config.out))
    index = index_source(config.data, on_bad=config.on_bad_image)
    wanted = _Wanted.of(config, index)
    run, policy = wanted.run, wanted.policy
    existing = _open_existing(config.out)
    if existing is not None:
        check_same_cache(existing, wanted.identity, config.samples_per_shard)
        if existing.is_complete:
            return summarise(
                seconds=time.monotonic() - start_s,
                complete=existing.attributes["complete"],
                expectation=wanted.expectation(existing),
            )
    num_samples = config.calibration_samples if existing is None else _SAMPLES_TO_CONTINUE
    views = render_calibration_views(index, policy, num_samples, skip_bad=config.on_bad_image == "skip")
    calibration = calibrate(
        run,
        wanted.codec,
        views.pixels_NHWC,
        layers=wanted.layers,
        heads=wanted.heads,
        batch_size=config.batch_size,
        # A cache is continued with the state it has, so that all of it is coded alike.
        state=None if existing is None else {name: torch.from_numpy(array) for name, array in existing.state.items()},
        with_values=config.with_values,
    )
    pixel_shape = (policy.image_height, policy.image_width) if config.pixels == "store" else None
    new_layout, view_nbytes = plan_layout(
        calibration, views, index.num_samples, config.views, pixel_shape, config.samples_per_shard
    )
    layout = new_layout if existing is None else existing.layout
    if policy.mixing is not None and layout.samples_per_shard == 1:
        raise ConfigError("a shard takes one sample only, so there is nobody to mix it with: raise samples_per_shard.")
    done = committed_tasks(config.out, layout) if existing is not None else set[str]()
    plan = plan_build(config.out, run.teacher, calibration, layout, view_nbytes, num_done_tasks=len(done))
    on_plan(plan)
    if config.dry_run:
        return summarise(seconds=time.monotonic() - start_s, plan=plan)
    if plan.remaining_nbytes + plan.state_nbytes > plan.free_nbytes:
        raise DiskFullError(
            f"{config.out}: {plan.remaining_nbytes / 2**20:.0f} MiB are still to be written, "
            f"{plan.free_nbytes / 2**20:.0f} MiB are free. Free some, or choose a smaller --budget or --codec, or "
            "fewer --layers."
        )
    if existing is None:
        state = {name: tensor.cpu().numpy() for name, tensor in calibration.state.items()}
        bias_LHQK = None if calibration.bias_LHQK is None else calibration.bias_LHQK.float().cpu().numpy()
        create_cache(config.out, layout, describe_cache(wanted.identity, run, calibration), index, state, bias_LHQK)
    with only_writer(config.out):
        sweep_partials(config.out)
        cache = CacheReader(config.out)
        to_do = [number for number, task in enumerate(layout.tasks()) if task.name not in done]
        with marked(config.out) as mark:
            board.publish("job", {"mark": mark, "to_do": to_do})
            _runner(config, ranks, wanted, cache, index).run_tasks(_tasks(layout, to_do), board)
        wait_for_commits(config.out, layout)
        complete = finish_cache(config.out)
    return summarise(
        seconds=time.monotonic() - start_s,
        plan=plan,
        complete=complete,
        expectation=wanted.expectation(cache),
        num_built_views=board.total().num_stored,
    )


def _join(config: BuildConfig, ranks: Ranks, board: Board) -> None:
    """Do some of the tasks, if there are any: in a cache that the leader has created or opened, and so checked."""
    if board.wait_for("job", "end") == "end":
        return
    job = board.receive("job")
    check_mark(config.out, job["mark"], board.look)
    cache = CacheReader(config.out)
    index = relocate(cache.samples, config.data)
    wanted = _Wanted.of(config, index)
    check_same_cache(cache, wanted.identity, config.samples_per_shard)
    _runner(config, ranks, wanted, cache, index).run_tasks(_tasks(cache.layout, job["to_do"]), board)


def _tasks(layout: StoreLayout, numbers: list[int]) -> list[Task]:
    tasks = layout.tasks()
    return [tasks[number] for number in numbers]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Wanted:
    """What a config means, with its teacher loaded."""

    run: TeacherRun
    policy: ViewPolicy
    codec: Codec
    layers: tuple[int, ...]
    heads: tuple[int, ...] | None
    identity: dict[str, Any]

    @classmethod
    def of(cls, config: BuildConfig, index: SampleIndex) -> _Wanted:
        """Load the teacher, and choose all that does not need calibration."""
        run = TeacherRun.load(config.teacher, config.weights, device=config.device, precision=config.precision)
        mixing = mix_policy(config.mixup, config.cutmix, config.mix_prob)
        policy = run.teacher.input.view_policy(config.policy, config.seed, mixing)
        codec = choose_codec(
            config.codec,
            config.target,
            run.teacher.model,
            index.num_samples * config.views,
            with_values=config.with_values,
        )
        layers, heads = run.select(config.layers, config.heads)
        identity = identify(
            run,
            index,
            policy,
            num_views=config.views,
            pixels=config.pixels,
            layers=layers,
            heads=heads,
            codec=codec,
            with_values=config.with_values,
        )
        return cls(run=run, policy=policy, codec=codec, layers=layers, heads=heads, identity=identity)

    def expectation(self, cache: CacheReader) -> Expectation:
        """What the cache's views should have, by what was measured when it was begun."""
        calibrated_nats = float(cache.attributes["calibration"]["row_kl_nats"])
        return Expectation.of(self.codec, calibrated_nats, self.run.dtype)


def _runner(config: BuildConfig, ranks: Ranks, wanted: _Wanted, cache: CacheReader, index: SampleIndex) -> TaskRunner:
    num_processors = max(1, (os.cpu_count() or 1) // ranks.local_world_size)
    geometry = FactorGeometry.from_json(cache.attributes["geometry"])
    return TaskRunner(
        out=config.out,
        layout=cache.layout,
        source=Source(index),
        policy=wanted.policy,
        run=wanted.run,
        coder=stored_coder(cache, wanted.codec, geometry, str(wanted.run.device)),
        batch_size=config.batch_size,
        workers=num_processors - 1 if config.workers is None else config.workers,
        threads=num_processors,
        skip_bad=config.on_bad_image == "skip",
        expectation=wanted.expectation(cache),
    )


def _open_existing(out: Path) -> CacheReader | None:
    """The cache that is to be continued, or None where there is none yet."""
    if not out.exists():
        return None
    if not (out / "zarr.json").exists():
        raise ConfigError(f"{out} exists and is no cache. Give another --out, or remove it.")
    return CacheReader(out)
