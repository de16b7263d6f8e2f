"""`atcache train` from end to end beside its own training step, by the clock: what else takes time, and how much.

    python benchmarks/train_run.py --cache C.zarr [--cache STORED.zarr] [--mode copy] [--batch-size 256] [--workers 15]

For each cache and mode it trains twice: first the step alone, on batches that are there already, then `atcache train`
with the same options. A cache of `atcache build --pixels store` shows what a run does without rendering images. Without
a cache, `--mode scratch --data TARS --student NAME` draws new views.

Both leave the start out: the first steps, for which workers start and kernels are chosen, and compiling. The columns
are images per second of the step and of the run, the run's share of the step's speed, and how each of its steps' time
is spent: "waiting" is the time until a batch arrives, "else" is what neither the step nor waiting explains, such as
logging. A GPU works on while the host waits, so these three may add up to more than the time: "else" is then below 0.
"busy" is the share of the time in which a GPU ran any kernel, in a second, profiled run; a CPU has none.

The runs are cut so that each takes about --limit-s seconds.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from atcache.choices import MODES, PRECISIONS
from atcache.feed.loader import BatchStream
from atcache.pipelines.running.metrics import read_metrics
from atcache.pipelines.train.config import TrainConfig
from atcache.pipelines.train.data import open_training_data
from atcache.pipelines.train.run import train
from atcache.pipelines.train.student_run import LOG_EVERY, TrainingRun
from atcache.teachers.devices import resolve_device

_WARM_STEPS = 2 * LOG_EVERY
"""Left out of a run's time: its first steps, up to a line of metrics."""
_LEAST_STEPS = 3 * LOG_EVERY
_NUM_BATCHES = 3
_COLUMNS = "| mode | cache | step img/s | run img/s | share | waiting | else | busy |"


@dataclass(frozen=True, kw_only=True, slots=True)
class RunSpeed:
    """How fast a run is, and how fast its steps alone."""

    step_img_per_s: float
    run_img_per_s: float
    waiting: float
    """Share of the run's time until batches arrived."""
    busy: float | None
    """Share of the time in which a GPU was at work; None on a CPU."""
    num_steps: int
    """Steps of the run, of which the first were left out."""

    @property
    def share(self) -> float:
        """The run's speed as a share of its steps' own."""
        return self.run_img_per_s / self.step_img_per_s

    @property
    def other(self) -> float:
        """Share of the run's time that neither steps nor waiting explain."""
        return 1 - self.share - self.waiting


def measure_step(config: TrainConfig, limit_s: float) -> float:
    """Images per second of the training step alone, on batches that are there already."""
    device = resolve_device(config.device)
    (data,) = open_training_data([config], device)
    run = TrainingRun(config, data, device)
    stream = BatchStream(data.views, data.label_S, data.order, num_steps=_NUM_BATCHES, workers=config.workers)
    batches = list(stream)
    for batch in batches:
        run.train_step(batch)
    _synchronise(device)
    num_steps, start_s = 0, time.perf_counter()
    while True:
        for batch in batches:
            run.train_step(batch)
        _synchronise(device)
        num_steps += len(batches)
        if (seconds := time.perf_counter() - start_s) > limit_s:
            return num_steps * config.batch_size / seconds


def measure_run(config: TrainConfig, limit_s: float = 60.0) -> RunSpeed:
    """The speed of `train` with this config, in a new folder each time, beside that of its step.

    Args:
        config: the run; its steps are chosen here, and its `out` is the folder that the runs' folders are made in.
        limit_s: about how long the step, the run and on a GPU the profiled run each take, after their starts.
    """
    config = replace(config, validate_every=0, checkpoint_every=10**9)
    step_img_per_s = measure_step(replace(config, steps=10**6), limit_s / 2)
    num_steps = _WARM_STEPS + max(_LEAST_STEPS, round(limit_s * step_img_per_s / config.batch_size))
    num_steps -= num_steps % LOG_EVERY
    timed = replace(config, out=config.out / "timed", steps=num_steps)
    train(timed)
    busy = None
    if resolve_device(config.device).type == "cuda":
        short = replace(config, out=config.out / "profiled", steps=_WARM_STEPS + _LEAST_STEPS)
        with profile(activities=[ProfilerActivity.CUDA]) as recorded:
            train(short)
        busy = _busy_share(recorded)
    return finished_speed(timed, step_img_per_s, busy)


def finished_speed(config: TrainConfig, step_img_per_s: float, busy: float | None = None) -> RunSpeed:
    """The speed of a finished run, from its metrics: seconds of training and of waiting are those behind its start."""
    rows = {row["step"]: row for row in read_metrics(config.out, "train")}

    def mark(step: int) -> tuple[float, float]:
        # Both numbers are of all steps so far.
        seconds = step * config.batch_size / rows[step]["img_per_s"]
        return seconds, seconds * rows[step]["waited_for_data"]

    num_steps = max(rows)
    (first_s, first_waited_s), (last_s, last_waited_s) = mark(_WARM_STEPS), mark(num_steps)
    return RunSpeed(
        step_img_per_s=step_img_per_s,
        run_img_per_s=config.batch_size * (num_steps - _WARM_STEPS) / (last_s - first_s),
        waiting=(last_waited_s - first_waited_s) / (last_s - first_s),
        busy=busy,
        num_steps=num_steps,
    )


def _busy_share(recorded: profile) -> float:
    """The share of the second half of a profile in which some kernel ran."""
    spans = sorted(
        (event.start_ns(), event.start_ns() + event.duration_ns())
        for event in recorded.profiler.kineto_results.events()
        if event.device_type() == torch.autograd.DeviceType.CUDA and not event.name().startswith("Mem")
    )
    end = max(stop for _, stop in spans)
    begin = (spans[0][0] + end) // 2
    busy, done = 0, begin
    for start, stop in spans:
        if stop > done:
            busy += stop - max(start, done)
            done = stop
    return busy / (end - begin)


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def rows(configs: Sequence[TrainConfig], limit_s: float) -> Iterator[str]:
    """The table, line by line as it is measured."""
    yield _COLUMNS
    yield "|---|---|--:|--:|--:|--:|--:|--:|"
    for config in configs:
        with tempfile.TemporaryDirectory() as folder:
            found = measure_run(replace(config, out=Path(folder)), limit_s)
        place = "-" if not config.caches else ", ".join(Path(str(cache)).name for cache in config.caches)
        busy = "-" if found.busy is None else f"{found.busy:.0%}"
        speeds = f"{found.step_img_per_s:.4g} | {found.run_img_per_s:.4g} | {found.share:.0%}"
        yield f"| {config.mode} | {place} | {speeds} | {found.waiting:.0%} | {found.other:.0%} | {busy} |"


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The parsed options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", action="append", type=Path, default=[])
    parser.add_argument("--mode", action="append", choices=MODES, default=[], help="(default copy)")
    parser.add_argument("--data", help="where the caches' tars are now, or without a cache the tars")
    parser.add_argument("--student", help="(default: the teacher's architecture)")
    parser.add_argument("--weights", type=Path, help="the teacher's, for finetune and --live-teacher")
    parser.add_argument("--live-teacher", action="store_true")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--precision", choices=PRECISIONS, default="auto")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction)
    parser.add_argument("--limit-s", type=float, default=60.0)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    options = vars(parse(arguments))
    limit_s, caches, modes = options.pop("limit_s"), options.pop("cache"), options.pop("mode")
    configs = [
        TrainConfig(mode=mode, cache=cache, out=Path("unused"), **options)
        for cache in caches or [None]
        for mode in modes or ["copy"]
    ]
    for line in rows(configs, limit_s):
        print(line, flush=True)


if __name__ == "__main__":
    main()
