"""What `atcache plan` measures with models: sizes and fidelity as a build measures them, and speeds of a few calls."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from atcache.attention.capture import FactorCapture
from atcache.attention.geometry import AttentionKind, FactorGeometry
from atcache.codecs.registry import CODECS, parse_codec
from atcache.feed.classes import count_classes
from atcache.files.durable import free_nbytes
from atcache.images.source import SampleIndex
from atcache.machine import num_processors
from atcache.store.chunks import decompress_into
from atcache.store.layout import ZSTD, StoreLayout
from atcache.store.writer import encode_pixels, encode_view
from atcache.students.pairing import TeacherFactors
from atcache.students.teacher_side import CachedFactors, LiveFactors
from atcache.teachers.names import parse_model_name
from atcache.teachers.run import TeacherRun
from atcache.teachers.verdict import TeacherVerdict, judge
from atcache.views.mixing import mix_policy
from atcache.views.policy import ViewPolicy

from ..build.calibrate import Calibration, CalibrationViews, calibrate, render_calibration_views
from ..build.codec import check_can_store
from ..build.plan import plan_layout
from ..running.run_teacher import run_teacher
from ..running.stages import StageProgress
from .config import PlanConfig
from .images import ImageCost, measure_images
from .steps import StudentSteps, seconds_a_call
from .verdict import UNLIMITED, CodecCost, Machine

_PACKED_VIEWS = 8

_OF_MAPS = ("logmap",)
DEFAULT_CODECS: dict[AttentionKind, tuple[str, ...]] = {
    "factors": tuple(name for name in CODECS if name not in _OF_MAPS),
    "maps": _OF_MAPS,
}
"""The codecs to compare if none is named, each at its defaults, by what the teacher hands over (factors or maps)."""

Say = Callable[[str], None]


class Measures(NamedTuple):
    """What was assumed or measured of this machine and of each codec setting. A speed is unlimited until measured."""

    machine: Machine
    costs: tuple[CodecCost, ...]
    """One for each codec setting."""
    device: str | None = None
    """Where speeds were measured; None if no model was run."""
    scratch_img_per_s: float | None = None
    """The same student without a teacher; None if it was not measured."""
    images: ImageCost | None = None
    """What a view costs one core; None if it was not measured."""
    verdict: TeacherVerdict | None = None
    """What is known of the teacher; None if no model was run."""


def what_is_assumed(config: PlanConfig) -> Measures:
    """The machine and one codec setting, as far as they are assumed."""
    assumed = config.assumed
    machine = Machine(
        teacher_img_per_s=assumed.teacher_img_per_s or UNLIMITED,
        student_img_per_s=assumed.student_img_per_s or UNLIMITED,
        load_img_per_s=assumed.load_img_per_s,
        write_nbytes_per_s=assumed.write_nbytes_per_s or UNLIMITED,
        free_nbytes=assumed.free_nbytes or free_nbytes(config.out),
    )
    cost = CodecCost(
        codec=config.codec[0] if config.codec else None,
        nbytes_per_view=assumed.nbytes_per_view or 0,
        read_nbytes_per_s=assumed.read_nbytes_per_s or UNLIMITED,
        student_img_per_s=machine.student_img_per_s,
        encode_img_per_s=assumed.encode_img_per_s,
    )
    return Measures(machine, (cost,))


def measure(config: PlanConfig, index: SampleIndex, num_samples: int, known: Measures, say: Say) -> Measures:
    """Load the teacher and measure what is not assumed, except for the disk.

    The speeds of loading, encoding and compressing are measured only if the teacher's is measured too. If it is
    assumed, it may be that of another machine, of which this one's speeds would say nothing.

    Args:
        config: names teacher and data.
        index: the samples of the data.
        num_samples: samples of the dataset to plan for.
        known: what is assumed.
        say: called with a line on what is being done.

    Raises:
        AtcacheError: a child of it names what does not fit, as for a build.
    """
    say(f"loading teacher {config.teacher}")
    bench = _set_up(config, index)
    run, geometry, machine = bench.run, bench.capture.geometry, known.machine
    timed = config.assumed.teacher_img_per_s is None
    if timed:
        say("timing the teacher")
        forward_s = seconds_a_call(lambda: run.factors(bench.capture, bench.pixels_BHWC), run.device)
        threads = torch.get_num_threads() + config.num_workers
        machine = replace(
            machine,
            teacher_img_per_s=len(bench.pixels_BHWC) / forward_s,
            shares_processors=run.device.type == "cpu" and threads > num_processors(),
        )
    steps = scratch_img_per_s = images = None
    if known.machine.load_img_per_s is None and timed:
        say("timing images")
        images = measure_images(index, bench.policy, config.num_workers)
        machine = replace(machine, load_img_per_s=config.num_workers * 1e3 / images.view_ms)
    if config.assumed.student_img_per_s is None:
        say(f"timing a student in mode {config.mode}")
        num_classes = max(1, count_classes([index], np.flatnonzero(index.label_S >= 0)))
        steps = StudentSteps(config, run, geometry, num_classes, bench.pixels_BHWC)
        layers = run.factors(bench.capture, bench.pixels_BHWC)
        live = LiveFactors(dict(zip(geometry.layers, layers, strict=True)))
        machine = replace(machine, student_img_per_s=steps.img_per_s(config.mode, lambda: live))
        scratch_img_per_s = steps.img_per_s("scratch", lambda: None)
    costs: list[CodecCost] = []
    for text in _codecs_to_measure(config, geometry):
        say(f"calibrating codec {text}")
        costs.append(_measure_codec(config, text, bench, num_samples, known.costs[0], steps, timed=timed))
    student = None if config.student is None else parse_model_name(config.student)
    verdict = judge(str(run.teacher.name), student, run.teacher.trained)
    return Measures(machine, tuple(costs), str(run.device), scratch_img_per_s, images, verdict)


class _Bench(NamedTuple):
    """The teacher, and the views that it is measured with."""

    run: TeacherRun
    capture: FactorCapture
    """Has run once, so that its geometry is known."""
    policy: ViewPolicy
    views: CalibrationViews
    pixels_BHWC: Tensor
    """One batch of the views."""


def _set_up(config: PlanConfig, index: SampleIndex) -> _Bench:
    assert config.teacher is not None, "checked by PlanConfig"
    run = run_teacher(config.teacher, config.weights, device=config.device, precision=config.precision)
    mixing = mix_policy(config.mixup, config.cutmix, config.mix_prob)
    policy = run.teacher.input.view_policy(config.policy, 0, mixing, config.decoding)
    if config.store is not None:
        check_can_store(run.teacher.model, config.store)
    layers, heads = run.select(config.layers, config.heads)
    capture = FactorCapture(
        run.teacher.model,
        layers,
        heads,
        queries=config.queries,
        with_values=config.store == "v",
        with_block_inputs=config.store == "x",
    )
    views = render_calibration_views(index, policy, config.calibration_samples, skip_bad=True)
    pixels_BHWC = _to_length(views.pixels_NHWC, config.batch_size)
    run.factors(capture, pixels_BHWC[:1])
    return _Bench(run, capture, policy, views, pixels_BHWC)


def _to_length(rows_N: Tensor, length: int) -> Tensor:
    """`length` rows: the first ones, or all of them repeatedly if there are fewer."""
    return rows_N[torch.arange(length) % len(rows_N)]


def _codecs_to_measure(config: PlanConfig, geometry: FactorGeometry) -> tuple[str, ...]:
    """The codec settings to measure; only one if the size is assumed."""
    if config.codec:
        return config.codec
    defaults = DEFAULT_CODECS[geometry.kind] if geometry.keeps_all_queries else _OF_MAPS
    if config.store is not None:
        defaults = tuple(name for name in defaults if CODECS[name].keeps_values)
    return defaults if config.assumed.nbytes_per_view is None else defaults[:1]


def _measure_codec(
    config: PlanConfig,
    text: str,
    bench: _Bench,
    num_samples: int,
    known: CodecCost,
    steps: StudentSteps | None,
    *,
    timed: bool,
) -> CodecCost:
    """Calibrate one codec as a build does, and time it. Numbers that are `known` replace the measured ones."""
    run, geometry = bench.run, bench.capture.geometry
    with StageProgress("calibrate") as progress:
        calibration = calibrate(
            run,
            parse_codec(text),
            bench.views.pixels_NHWC,
            layers=geometry.layers,
            heads=geometry.heads,
            batch_size=config.batch_size,
            queries=config.queries,
            with_values=config.store == "v",
            with_block_inputs=config.store == "x",
            name_of=bench.views.names.__getitem__,
            progress=progress.show,
        )
    layout, nbytes_per_view = plan_layout(
        calibration, bench.views, num_samples, config.views, None, stores_pixels=config.pixels == "store"
    )
    coder = calibration.coder
    encode_img_per_s = compress_img_per_s = unpack_img_per_s = None
    if timed:
        layers = run.factors(run.capture(coder.geometry, coder.input_calls), bench.pixels_BHWC)
        encode_img_per_s = len(bench.pixels_BHWC) / seconds_a_call(lambda: coder.encode(layers), run.device)
        compress_img_per_s, unpack_img_per_s = _packing_img_per_s(config, layout, calibration)
    student_img_per_s = known.student_img_per_s
    if steps is not None:
        codes_BLTC = _to_length(calibration.codes_BLTC, config.batch_size)
        if run.device.type == "cuda":
            codes_BLTC = codes_BLTC.pin_memory()  # as the batches in training are

        def decoded() -> TeacherFactors:
            return CachedFactors(coder, codes_BLTC.to(run.device, non_blocking=True))

        student_img_per_s = steps.img_per_s(steps.mode, decoded)
    return replace(
        known,
        codec=text,
        nbytes_per_view=known.nbytes_per_view or nbytes_per_view,
        student_img_per_s=student_img_per_s,
        encode_img_per_s=known.encode_img_per_s or encode_img_per_s,
        compress_img_per_s=compress_img_per_s,
        unpack_img_per_s=unpack_img_per_s,
        decode_operations=calibration.decode_cost.operations,
        decode_seconds=calibration.decode_cost.seconds,
        state_nbytes=calibration.state_nbytes,
        map_nbytes_per_view=geometry.map_nbytes,
        row_kl_nats=calibration.row_kl_nats,
        injected_error=calibration.injected_error,
    )


def _packing_img_per_s(config: PlanConfig, layout: StoreLayout, calibration: Calibration) -> tuple[float, float]:
    """Views per second that all threads of a build compress, and that all workers in training decompress."""
    few = slice(0, _PACKED_VIEWS)
    compress_s: list[float] = []
    unpack_s: list[float] = []
    for codes, pixels in zip(calibration.codes_BLTC[few], calibration.pixels_BHWC[few], strict=True):
        codes_LTC, pixels_HWC = codes.numpy(), pixels.numpy()
        start_s = time.perf_counter()
        chunks = encode_view(layout, codes_LTC)
        pixels_chunk = None if layout.pixels is None else encode_pixels(layout, pixels_HWC)
        middle_s = time.perf_counter()
        for chunk in chunks:
            decompress_into(chunk, layout.compressor, np.empty(codes_LTC.nbytes // len(chunks), np.uint8))
        if pixels_chunk is not None:
            decompress_into(pixels_chunk, ZSTD, np.empty(pixels_HWC.nbytes, np.uint8))
        compress_s.append(middle_s - start_s)
        unpack_s.append(time.perf_counter() - middle_s)
    return num_processors() / statistics.median(compress_s), config.num_workers / statistics.median(unpack_s)
