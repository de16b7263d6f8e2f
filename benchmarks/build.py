"""What a build costs: compared with the teacher's plain forward pass, per view as datasets grow, and to open the cache.

    python benchmarks/build.py speed --teacher NAME --data TARS [--weights FILE] [--codec int8 --codec transform]
    python benchmarks/build.py growth
    python benchmarks/build.py opening

`speed` runs a build's tasks, and the same teacher's plain fused forward pass on the same loader, in turns. It prints
their views/s, by the clock and in the processor time of all processes; then the time a view takes in each stage, with
nothing else running. Without --weights the weights are random. This is right for speed, but not for fidelity.

`growth` is the store's part of a build, with random codes instead of a teacher, for 1,000 to 100,000 samples. `opening`
opens a cache of 1.3 million samples and 24 layers, in new processes. Seconds vary with the load of the machine; compare
ratios.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from build_growth import measure_growth, measure_opening

from atcache.codecs.registry import parse_codec
from atcache.feed.workers import read_ahead
from atcache.images.source import Source, index_source
from atcache.pipelines.build.board import Board
from atcache.pipelines.build.calibrate import Calibration, calibrate, render_calibration_views
from atcache.pipelines.build.plan import plan_layout
from atcache.pipelines.build.rendered import RenderedBatches
from atcache.pipelines.build.tasks import TaskRunner
from atcache.pipelines.fidelity import Expectation, layer_row_kl
from atcache.pipelines.running.ranks import Ranks
from atcache.store.layout import StoreLayout
from atcache.store.writer import TaskWriter, create_cache, encode_view
from atcache.teachers.devices import autocast
from atcache.teachers.load import create_student
from atcache.teachers.names import parse_model_name
from atcache.teachers.run import TeacherRun
from atcache.views.policy import ViewPolicy


class Setup(NamedTuple):
    """What all measurements of one codec have in common."""

    run: TeacherRun
    source: Source
    policy: ViewPolicy
    calibration: Calibration
    layout: StoreLayout
    batch_size: int
    workers: int


def main() -> None:
    """Run the chosen measurement and print its rows."""
    options = _parse()
    if options.what == "growth":
        print_rows(measure_growth(options.samples))
    elif options.what == "opening":
        print_rows([measure_opening(options.num_samples)])
    else:
        print_rows(measure_speed(options))


def print_rows(rows: list[dict[str, object]]) -> None:
    """Print each row as a line of JSON."""
    for row in rows:
        print(json.dumps(row))


def measure_speed(options: argparse.Namespace) -> list[dict[str, object]]:
    """Rows with views/s of the plain forward pass and of builds, their ratios, and milliseconds of each stage."""
    rows: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as folder:
        setups = {name: _setup(options, name, Path(folder)) for name in options.codec}
        plain = next(iter(setups.values()))
        times: dict[str, list[_Time]] = {name: [] for name in ("plain", *setups)}
        for number in range(options.rounds + 1):
            took = {"plain": _time(lambda: _run_plain(plain))}
            for name, setup in setups.items():
                took[name] = _time(lambda s=setup, o=Path(folder) / f"{name}-{number}.zarr": _run_build(s, o))
            if number:  # the first round warms up
                for name, value in took.items():
                    times[name].append(value)
        num_views = plain.layout.num_views * plain.layout.num_samples
        for name, values in times.items():
            pairs = list(zip(times["plain"], values, strict=True))
            row: dict[str, object] = {"what": name}
            row["views_per_s"] = round(num_views / statistics.median(time.clock_s for time in values), 2)
            row["share_of_plain"] = round(statistics.median(p.clock_s / b.clock_s for p, b in pairs), 3)
            row["in_processor_time"] = round(statistics.median(p.processor_s / b.processor_s for p, b in pairs), 3)
            rows.append(row)
        rows += [{"codec": name, "ms_a_view": _stages(setup, Path(folder))} for name, setup in setups.items()]
    return rows


def _setup(options: argparse.Namespace, codec_name: str, folder: Path) -> Setup:
    weights = options.weights
    if weights is None:
        weights = folder / "random.pth"
        if not weights.exists():
            random = create_student(parse_model_name(options.teacher), num_classes=10).state_dict()
            # Times 6, so that maps are far from uniform. With nearly uniform ones, codes would be almost all 0.
            torch.save({name: w * 6 if "qkv.weight" in name else w for name, w in random.items()}, weights)
    run = TeacherRun.load(options.teacher, weights, device=options.device, precision=options.precision)
    index = index_source(options.data)
    stop = min(index.num_samples, options.samples)
    columns = {f"{name}_S": getattr(index, f"{name}_S")[:stop] for name in _COLUMNS}
    source = Source(replace(index, **columns))
    policy = run.teacher.input.view_policy("crop-flip", 0)
    views = render_calibration_views(source.index, policy, 64 if options.weights else 16, skip_bad=False)
    codec = parse_codec(codec_name)
    calibration = calibrate(
        run,
        codec,
        views.pixels_NHWC,
        layers=None,
        heads=None,
        batch_size=options.batch_size,
    )
    layout, _ = plan_layout(calibration, views, stop, options.views, options.samples_per_shard, stores_pixels=False)
    return Setup(run, source, policy, calibration, layout, options.batch_size, options.workers)


_COLUMNS = ("keys", "tar", "offset", "nbytes", "label", "problem")


class _Time(NamedTuple):
    clock_s: float
    processor_s: float
    """Time of this process, and of the processes it has started and waited for."""


def _time(work: Callable[[], object]) -> _Time:
    start = os.times()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    stop = os.times()
    return _Time(stop.elapsed - start.elapsed, sum(stop[:4]) - sum(start[:4]))


def _seconds(work: Callable[[], object]) -> float:
    start_s = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start_s


def _batches(setup: Setup) -> RenderedBatches:
    return RenderedBatches(setup.source, setup.policy, setup.layout.tasks(), setup.batch_size, skip_bad=False)


def _plain_forward(setup: Setup, pixels_BHWC: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode(), autocast(setup.run.device, setup.run.dtype):
        return setup.run.teacher.model.forward_features(setup.run.images(pixels_BHWC))


def _run_plain(setup: Setup) -> None:
    batches = _batches(setup)
    for batch in read_ahead(batches, range(len(batches)), workers=setup.workers):
        _plain_forward(setup, batch.pixels_BHWC)


def _run_build(setup: Setup, out: Path) -> None:
    state = {name: tensor.cpu().numpy() for name, tensor in setup.calibration.state.items()}
    create_cache(out, setup.layout, {}, setup.source.index, state)
    runner = TaskRunner(
        out=out,
        layout=setup.layout,
        source=setup.source,
        policy=setup.policy,
        run=setup.run,
        coder=setup.calibration.coder,
        batch_size=setup.batch_size,
        workers=setup.workers,
        threads=os.cpu_count() or 1,
        skip_bad=False,
        expectation=Expectation(row_kl_nats=1.0, is_target=True, limit_nats=float("inf")),
    )
    with Board.opened(Ranks()) as board:
        runner.run_tasks(setup.layout.tasks(), board)


def _stages(setup: Setup, folder: Path) -> dict[str, float]:
    """Milliseconds per view of each stage, one after the other. Rendering and compressing use one core."""
    out = folder / "stages.zarr"
    if out.exists():
        shutil.rmtree(out)
    state = {name: tensor.cpu().numpy() for name, tensor in setup.calibration.state.items()}
    create_cache(out, setup.layout, {}, setup.source.index, state)
    batches, coder = _batches(setup), setup.calibration.coder
    capture = setup.run.capture(coder.geometry, coder.input_calls)
    total: dict[str, float] = {}
    num_views = 0

    def timed(stage: str, work: Callable[[], object]) -> object:
        result: list[object] = []
        total[stage] = total.get(stage, 0.0) + _seconds(lambda: result.append(work()))
        return result[0]

    writer: TaskWriter | None = None
    for number in range(len(batches)):
        batch = timed("render images", lambda n=number: batches[n])
        timed("plain forward (for comparison)", lambda b=batch: _plain_forward(setup, b.pixels_BHWC))
        layers = timed("forward with capture", lambda b=batch: setup.run.factors(capture, b.pixels_BHWC))
        codes_BLTC = timed("encode", lambda a=layers: coder.encode(a))
        if batch.start == batch.task.start:
            few = [layer.select(slice(0, 2)) for layer in layers]
            timed("KL check", lambda a=few, c=codes_BLTC[:2]: layer_row_kl(coder, a, c))
            writer = timed("open, write, commit", lambda t=batch.task: TaskWriter(out, setup.layout, t))
        codes = timed("copy to host", lambda c=codes_BLTC: c.cpu().numpy())
        chunks = timed("compress", lambda c=codes: [encode_view(setup.layout, codes_LTC) for codes_LTC in c])
        timed("open, write, commit", lambda b=batch, c=chunks, w=writer: _write(w, b, c))
        num_views += len(codes)
    return {stage: round(1e3 * value / num_views, 3) for stage, value in total.items()}


def _write(writer: TaskWriter, batch, chunks: list[list[bytes]]) -> None:
    for row, status in enumerate(batch.status_B):
        writer.add(
            batch.start + row,
            status=int(status),
            parameters_P=batch.parameters_BP[row],
            pixel_hash=batch.pixel_hashes[row],
            chunks=chunks[row],
        )
    if batch.start + len(batch.status_B) == batch.task.stop:
        writer.commit({})


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="what", required=True)
    speed = commands.add_parser("speed")
    speed.add_argument("--teacher", required=True)
    speed.add_argument("--data", required=True)
    speed.add_argument("--weights", type=Path)
    speed.add_argument("--codec", action="append")
    speed.add_argument("--samples", type=int, default=256)
    speed.add_argument("--views", type=int, default=1, help="views of each sample (default 1)")
    speed.add_argument("--rounds", type=int, default=3)
    speed.add_argument("--batch-size", type=int, default=32)
    speed.add_argument("--samples-per-shard", type=int, default=128)
    speed.add_argument("--workers", type=int, default=max(0, (os.cpu_count() or 1) - 1))
    speed.add_argument("--device", default="auto")
    speed.add_argument("--precision", default="auto")
    growth = commands.add_parser("growth")
    growth.add_argument("--samples", type=int, nargs="+", default=[1_000, 10_000, 100_000])
    opening = commands.add_parser("opening")
    opening.add_argument("--num-samples", type=int, default=1_300_000)
    options = parser.parse_args()
    if options.what == "speed" and options.codec is None:
        options.codec = ["int8", "transform"]
    return options


if __name__ == "__main__":
    main()
