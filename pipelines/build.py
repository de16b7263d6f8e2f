"""Build: run the teacher once over a dataset and keep its attention.

index -> calibrate -> plan -> create the cache -> run the tasks -> declare it complete. Typing the same command again
continues where an earlier run stopped; typing another one for the same cache is refused.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from atcache.cache import stored_coder
from atcache.codecs import Codec
from atcache.errors import ConfigError, DiskFullError
from atcache.mixing import mix_policy
from atcache.source import Source, index_source
from atcache.store.durable import only_writer, sweep_partials
from atcache.store.reader import CacheReader
from atcache.store.writer import create_cache, finish_cache
from atcache.views import PolicyName

from .build_plan import BuildPlan, check_same_cache, committed_tasks, describe_cache, identify, plan_build, plan_layout
from .build_tasks import TaskRunner
from .calibrate import TeacherRun, calibrate
from .calibration_views import render_calibration_views
from .choose_codec import CodecTarget, choose_codec
from .fidelity_limits import Expectation

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
    """How attention becomes integers; None takes transform, or logmap where the teacher hands over maps."""
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
    def target(self) -> CodecTarget:
        """What the codec is to meet."""
        return CodecTarget(kl=self.target_kl, mb_per_view=self.target_mb_per_view, budget=self.budget)


@dataclass(frozen=True, kw_only=True, slots=True)
class BuildSummary:
    """What a build did."""

    out: str
    plan: BuildPlan | None
    """None when the cache was complete already."""
    complete: dict[str, Any] | None
    """The totals of the finished cache; None after a dry run."""
    num_built_views: int
    """Views this run stored."""
    row_kl_nats: float | None
    """Mean row KL of decoded maps on some views of each task; None after a dry run."""
    warning: str | None
    """What is wrong with that, in a sentence; None where it is as it should be."""
    seconds: float
    """From the first look at the data to the end."""

    def to_json(self) -> dict[str, Any]:
        """The fields as a JSON object."""
        return asdict(self)


def build(config: BuildConfig, on_plan: Callable[[BuildPlan], None] = lambda _: None) -> BuildSummary:
    """Build a cache, or continue one.

    Args:
        config: what to build.
        on_plan: told the plan before anything is written.

    Returns:
        What was planned and done. After a dry run nothing has been written.

    Raises:
        AtcacheError: one of its children for each thing that does not fit; whatever was committed stays.
    """
    start_s = time.monotonic()
    index = index_source(config.data, on_bad=config.on_bad_image)
    run = TeacherRun.load(config.teacher, config.weights, device=config.device, precision=config.precision)
    mixing = mix_policy(config.mixup, config.cutmix, config.mix_prob)
    policy = run.teacher.input.view_policy(config.policy, config.seed, mixing)
    codec = choose_codec(config.codec, config.target, run.teacher.model, index.num_samples * config.views)
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
    )
    existing = _open_existing(config.out)
    if existing is not None:
        check_same_cache(existing, identity, config.samples_per_shard)
        if existing.is_complete:
            return _summarise(
                config, None, existing.attributes["complete"], _expectation(existing, codec, run), 0, start_s
            )
    num_samples = config.calibration_samples if existing is None else _SAMPLES_TO_CONTINUE
    views = render_calibration_views(index, policy, num_samples, skip_bad=config.on_bad_image == "skip")
    calibration = calibrate(
        run,
        codec,
        views.pixels_NHWC,
        layers=layers,
        heads=heads,
        batch_size=config.batch_size,
        # A cache is continued with the state it has, so that all of it is coded alike.
        state=None if existing is None else {name: torch.from_numpy(array) for name, array in existing.state.items()},
    )
    pixel_shape = (policy.image_height, policy.image_width) if config.pixels == "store" else None
    new_layout, view_nbytes = plan_layout(
        calibration, views, index.num_samples, config.views, pixel_shape, config.samples_per_shard
    )
    layout = new_layout if existing is None else existing.layout
    if mixing is not None and layout.samples_per_shard == 1:
        raise ConfigError("a shard takes one sample only, so there is nobody to mix it with: raise samples_per_shard.")
    done = committed_tasks(config.out, layout) if existing is not None else set[str]()
    plan = plan_build(config.out, run.teacher, calibration, layout, view_nbytes, num_done_tasks=len(done))
    on_plan(plan)
    if config.dry_run:
        return _summarise(config, plan, None, None, 0, start_s)
    if plan.remaining_nbytes + plan.state_nbytes > plan.free_nbytes:
        raise DiskFullError(
            f"{config.out}: {plan.remaining_nbytes / 2**20:.0f} MiB are still to be written, "
            f"{plan.free_nbytes / 2**20:.0f} MiB are free. Free some, or choose a smaller --budget or --codec, or "
            "fewer --layers."
        )
    if existing is None:
        state = {name: tensor.cpu().numpy() for name, tensor in calibration.state.items()}
        bias_LHQK = None if calibration.bias_LHQK is None else calibration.bias_LHQK.float().cpu().numpy()
        create_cache(config.out, layout, describe_cache(identity, run, calibration), index, state, bias_LHQK)
    with only_writer(config.out):
        sweep_partials(config.out)
        created = CacheReader(config.out)
        expectation = _expectation(created, codec, run)
        runner = TaskRunner(
            out=config.out,
            layout=layout,
            source=Source(index),
            policy=policy,
            run=run,
            coder=stored_coder(created, codec, calibration.geometry, str(run.device)),
            batch_size=config.batch_size,
            workers=config.workers,
            skip_bad=config.on_bad_image == "skip",
            expectation=expectation,
        )
        num_built = runner.run_tasks([task for task in layout.tasks() if task.name not in done])
        complete = finish_cache(config.out)
    return _summarise(config, plan, complete, expectation, num_built, start_s)


def _expectation(cache: CacheReader, codec: Codec, run: TeacherRun) -> Expectation:
    """What the cache's views should have, by what was measured when it was begun."""
    return Expectation.of(codec, float(cache.attributes["calibration"]["row_kl_nats"]), run.dtype)


def _summarise(
    config: BuildConfig,
    plan: BuildPlan | None,
    complete: dict[str, Any] | None,
    expectation: Expectation | None,
    num_built_views: int,
    start_s: float,
) -> BuildSummary:
    row_kl_nats = None if complete is None else complete["quality"].get("row_kl_nats", {}).get("mean")
    warning = None
    if complete is not None and expectation is not None and row_kl_nats is not None:
        warning = expectation.warn(row_kl_nats, complete.get("num_checked", complete["num_stored"]))
    return BuildSummary(
        out=str(config.out),
        plan=plan,
        complete=complete,
        num_built_views=num_built_views,
        row_kl_nats=row_kl_nats,
        warning=warning,
        seconds=time.monotonic() - start_s,
    )


def _open_existing(out: Path) -> CacheReader | None:
    """The cache that is to be continued, or None where there is none yet."""
    if not out.exists():
        return None
    if not (out / "zarr.json").exists():
        raise ConfigError(f"{out} exists and is no cache. Give another --out, or remove it.")
    return CacheReader(out)
