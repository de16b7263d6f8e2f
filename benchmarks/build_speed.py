"""How fast a build is beside what limits it: the teacher's plain fused forward pass, and what processors can render."""

from __future__ import annotations

import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset

from atcache.attention.capture import FactorCapture
from atcache.attention.factors import LayerAttention
from atcache.cache.stacking import Stack
from atcache.codecs.base import Coder, Queued
from atcache.codecs.registry import parse_codec
from atcache.feed.workers import read_ahead
from atcache.images.source import Source, index_source
from atcache.pipelines.build.board import Board
from atcache.pipelines.build.calibrate import Calibration, calibrate, render_calibration_views
from atcache.pipelines.build.plan import plan_layout
from atcache.pipelines.build.rendered import RenderedBatch, RenderedBatches
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


@dataclass(frozen=True, kw_only=True)
class SpeedOptions:
    """What is built, and how often."""

    teacher: str
    data: str
    weights: Path | None = None
    """None for random ones."""
    codec: Sequence[str] = ("int8", "transform")
    samples: int = 256
    views: int = 1
    rounds: int = 3
    """After one that warms up."""
    limit_s: float = float("inf")
    """No round begins after this."""
    batch_size: int = 32
    samples_per_shard: int = 128
    workers: int = max(0, (os.cpu_count() or 1) - 1)
    device: str = "auto"
    precision: str = "auto"


class Setup(NamedTuple):
    """What all measurements of one codec have in common."""

    run: TeacherRun
    source: Source
    policy: ViewPolicy
    calibration: Calibration
    layout: StoreLayout
    batch_size: int
    workers: int


def measure_speed(options: SpeedOptions) -> list[dict[str, object]]:
    """Rows with views/s of builds and of what limits them, in turns; their ratios; and milliseconds of each stage."""
    rows: list[dict[str, object]] = []
    start_s = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        setups = {name: _setup(options, name, Path(folder)) for name in options.codec}
        plain = next(iter(setups.values()))
        busy: dict[str, list[float]] = {name: [] for name in setups}
        ways: dict[str, Callable[[], object]] = {
            "forward": _ready_forward(plain),
            "render": lambda: _run_rendering(plain),
            "loader": lambda: _run_loader(plain),
            "plain": lambda: _run_plain(plain),
        }
        times: dict[str, list[_Time]] = {name: [] for name in (*ways, *setups)}
        for number in range(options.rounds + 1):
            if number > 1 and time.monotonic() - start_s > options.limit_s:
                break
            took = {name: _time(work) for name, work in ways.items()}
            for name, setup in setups.items():
                meter = _Meter(setup.run.device)
                out = Path(folder) / f"{name}-{number}.zarr"
                took[name] = _time(lambda s=setup, o=out, m=meter: _run_build(s, o, m))
                if number:
                    busy[name].append(meter.busy_s() / took[name].clock_s)
            if number:  # the first round warms up
                for name, value in took.items():
                    times[name].append(value)
        num_views = plain.layout.num_views * plain.layout.num_samples
        for name, values in times.items():
            row: dict[str, object] = {"what": name}
            row["views_per_s"] = round(num_views / statistics.median(time.clock_s for time in values), 2)
            if name in setups:
                row["device_busy"] = round(statistics.median(busy[name]), 3)
                shares = [_share(times[limit], values) for limit in ("forward", "render")]
                row["share_of_forward"], row["share_of_render"] = shares
                # The slower one limits: a share of it is the larger of both.
                row["share_of_limit"] = max(shares)
            if name in ("plain", *setups):
                pairs = list(zip(times["plain"], values, strict=True))
                row["share_of_plain"] = _share(times["plain"], values)
                row["in_processor_time"] = round(statistics.median(p.processor_s / b.processor_s for p, b in pairs), 3)
            rows.append(row)
        rows += [{"codec": name, "ms_a_view": _stages(setup, Path(folder))} for name, setup in setups.items()]
    return rows


class _Copies(Dataset[torch.Tensor]):
    """Batches of one image: making them is next to nothing."""

    def __init__(self, batch_size: int) -> None:
        self._batch_size = batch_size
        self._pixels_HWC = np.random.default_rng(0).integers(0, 256, (224, 224, 3), np.uint8)

    def __getitem__(self, number: int) -> torch.Tensor:
        stack = Stack(self._batch_size)
        for _ in range(self._batch_size):
            stack.add(self._pixels_HWC)
        assert stack.tensor is not None
        return stack.tensor


def measure_loader(workers: int, *, batch_size: int = 64, num_batches: int = 400, rounds: int = 3) -> dict[str, object]:
    """What handing over a view costs, in microseconds by the clock and of all processors: copies of one image.

    Args:
        workers: processes that make batches.
        batch_size: views of 224 x 224 pixels in a batch.
        num_batches: batches in a round.
        rounds: measurements; their median counts. As many are made and thrown away, in turns, for comparison.
    """
    copies, pins = _Copies(batch_size), torch.cuda.is_available()
    made: list[_Time] = []
    loaded: list[_Time] = []

    def run(batches: Dataset[Any]) -> None:
        for _ in read_ahead(batches, range(num_batches), workers=workers, pin_memory=pins):
            pass

    for _ in range(rounds):
        made.append(_time(lambda: run(_ThrownAway(copies))))
        loaded.append(_time(lambda: run(copies)))
    num_views = num_batches * batch_size
    row: dict[str, object] = {"workers": workers, "batch_size": batch_size}
    for name, times in (("made", made), ("loaded", loaded)):
        row[f"{name}_us_a_view"] = round(1e6 * statistics.median(time.clock_s for time in times) / num_views, 1)
        processor_s = statistics.median(time.processor_s for time in times)
        row[f"{name}_processor_us_a_view"] = round(1e6 * processor_s / num_views, 1)
    return row


def _share(limits: list[_Time], values: list[_Time]) -> float:
    return round(statistics.median(p.clock_s / b.clock_s for p, b in zip(limits, values, strict=True)), 3)


def _setup(options: SpeedOptions, codec_name: str, folder: Path) -> Setup:
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
    clock_s = _seconds(work)  # the clock of os.times has ticks of 10 ms
    stop = os.times()
    return _Time(clock_s, sum(stop[:4]) - sum(start[:4]))


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


class _ThrownAway(Dataset[int]):
    """Renders batches, and keeps nothing of them."""

    def __init__(self, batches: Dataset[Any]) -> None:
        self._batches = batches

    def __getitem__(self, number: int) -> int:
        self._batches[number]
        return number


def _run_rendering(setup: Setup) -> None:
    """What the processors can render: nothing is handed over."""
    batches = _batches(setup)
    for _ in read_ahead(_ThrownAway(batches), range(len(batches)), workers=setup.workers):
        pass


def _loaded(setup: Setup) -> Iterator[RenderedBatch]:
    batches = _batches(setup)
    pins = setup.run.device.type == "cuda"
    return read_ahead(batches, range(len(batches)), workers=setup.workers, pin_memory=pins)


def _run_loader(setup: Setup) -> None:
    for _ in _loaded(setup):
        pass


def _ready_forward(setup: Setup) -> Callable[[], None]:
    """The plain forward pass on images that are on the device already, as many as a build has."""
    batches = _batches(setup)
    pixels_BHWC = batches[0].pixels_BHWC.to(setup.run.device)

    def run() -> None:
        for number in range(len(batches)):
            _plain_forward(setup, pixels_BHWC[: batches.size_of(number)])

    return run


def _run_plain(setup: Setup) -> None:
    for batch in _loaded(setup):
        _plain_forward(setup, batch.pixels_BHWC)


class _Meter:
    """How long a device was at work on batches: between the first and the last that each batch asks of it."""

    def __init__(self, device: torch.device) -> None:
        self._is_cuda = device.type == "cuda"
        self._marks: list[Any] = []

    def mark(self) -> None:
        """Note the time, as the device gets there."""
        if self._is_cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append(event)
        else:
            self._marks.append(time.perf_counter())

    def busy_s(self) -> float:
        """The sum over batches; call it once all work is done."""
        pairs = zip(self._marks[::2], self._marks[1::2], strict=True)
        if self._is_cuda:
            return sum(start.elapsed_time(stop) for start, stop in pairs) / 1e3
        return sum(stop - start for start, stop in pairs)


class _MeteredRun(TeacherRun):
    """Marks where a batch's forward pass begins."""

    meter: _Meter

    def factors(self, capture: FactorCapture, pixels_BHWC: torch.Tensor) -> list[LayerAttention]:
        self.meter.mark()
        return super().factors(capture, pixels_BHWC)


@contextmanager
def _metered(setup: Setup, meter: _Meter) -> Iterator[tuple[TeacherRun, Coder]]:
    """The teacher and the coder of a build; forward passes and encodings are marked."""
    run = _MeteredRun(teacher=setup.run.teacher, device=setup.run.device, dtype=setup.run.dtype)
    object.__setattr__(run, "meter", meter)
    coder = setup.calibration.coder

    def queue(layers: Sequence[LayerAttention]) -> Queued:
        queued = type(coder).queue(coder, layers)
        meter.mark()
        return queued

    coder.queue = queue
    try:
        yield run, coder
    finally:
        del coder.queue


def _run_build(setup: Setup, out: Path, meter: _Meter) -> None:
    state = {name: tensor.cpu().numpy() for name, tensor in setup.calibration.state.items()}
    create_cache(out, setup.layout, {}, setup.source.index, state)
    with _metered(setup, meter) as (run, coder), Board.opened(Ranks()) as board:
        TaskRunner(
            out=out,
            layout=setup.layout,
            source=setup.source,
            policy=setup.policy,
            run=run,
            coder=coder,
            batch_size=setup.batch_size,
            workers=setup.workers,
            threads=os.cpu_count() or 1,
            skip_bad=False,
            expectation=Expectation(row_kl_nats=1.0, is_target=True, limit_nats=float("inf")),
        ).run_tasks(setup.layout.tasks(), board)


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
