"""One training step (forward, backward and AdamW) in every mode: from a cache, with a live teacher, from scratch.

    python benchmarks/train_step.py [--geometry vit-b] [--batch-size 16] [--rounds 5] [--precision auto]
    python benchmarks/train_step.py --geometry vit-l --transform-components 700 --compile
    python benchmarks/train_step.py --memory [--tokens 197 577 1370]

Each step is `TrainingRun.train_step`, as `atcache train` runs it, including the decoding of codes. There are two live
teachers: "usual" forms maps in teacher and student, projects all of q, k and v, and leaves the rest to autograd; "ours"
takes q and k from the teacher's fused forward pass. Teacher and students have random weights, and the codes come from
the teacher's factors. transform is fitted on the batch itself, to --target-kl; or it is made up, with as many
components as --transform-components says, since a random teacher needs others than a real one. Half the width is the
other student of the table. With --compile, students are compiled as `atcache train --compile` does it.

Ways take turns in each round; times are medians over the rounds. GFLOP counts matrix products and convolutions, as
torch counts them. If nothing else took time, speed would be proportional to 1 / GFLOP. Memory is the most that tensors
take during a step, beyond what exists before it. It is CUDA's count, or on a CPU what torch's profiler records. With
--memory, the weights' gradients, which are the same for all ways, exist before the step.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from made_transform import made_coder
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from usual_way import UsualStudent, UsualTeacher

from atcache.attention.blocks import token_layout
from atcache.attention.capture import FactorCapture, check_capture
from atcache.choices import PRECISIONS, Mode
from atcache.codecs.base import Coder
from atcache.codecs.registry import parse_codec
from atcache.codecs.transform.coder import TransformCoder
from atcache.feed.batch import Batch, Codes
from atcache.pipelines.train.config import TrainConfig
from atcache.pipelines.train.student_run import TrainingRun
from atcache.students.student import Student, new_student
from atcache.students.teacher_side import CachedFactors, LiveTeacher
from atcache.teachers.devices import autocast, resolve_device, resolve_precision
from atcache.teachers.inputs import input_config
from atcache.teachers.load import Teacher, create_student
from atcache.teachers.names import parse_model_name
from atcache.teachers.run import TeacherRun

# timm name, width, depth, heads.
GEOMETRIES = {
    "vit-b": ("vit_base_patch16_224", 768, 12, 12),
    "vit-l": ("vit_large_patch16_224", 1024, 24, 16),
    "vit-b-2": ("vit_base_patch16_224", 768, 2, 12),
    "tiny": ("vit_tiny_patch16_224", 64, 2, 2),
}
IMAGE_SIZES = {197: 224, 577: 384, 1370: 592}
"""The image size in pixels that gives this many tokens, with patches of 16 pixels."""
NUM_CLASSES = 1000


class CodesTeacher:
    """`CacheTeacher` without a cache on disk: it decodes a batch's codes."""

    def __init__(self, coder: Coder, device: torch.device) -> None:
        self._coder, self._device = coder, device

    def factors(self, batch: Batch) -> CachedFactors:
        (codes,) = batch.codes
        codes_BLTC = codes.codes_BLTC.to(self._device, non_blocking=True)
        return CachedFactors(self._coder, codes_BLTC, extent=codes.extent)

    def looked_at(self, batch: Batch) -> Batch:
        (codes,) = batch.codes
        return batch._replace(codes=(codes._replace(extent=self._coder.extent(codes.codes_BLTC)),))


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Way:
    """One line of the table."""

    name: str
    width: int
    """The student's width; 0 for only the teacher's forward pass."""
    step: Callable[[], object]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Measured:
    """Time, memory and operations of one way."""

    seconds: float
    """Median over the rounds."""
    peak_mib: float
    gflop: float
    """Operations of matrix products and convolutions."""


class Bench:
    """Teachers, codes and one batch of random images, for one geometry and number of tokens."""

    def __init__(self, options: argparse.Namespace, num_tokens: int) -> None:
        self.timm_name, self.width, self.depth, self.heads = GEOMETRIES[options.geometry]
        self.size = IMAGE_SIZES[num_tokens]
        self.batch_size, self.precision = options.batch_size, options.precision
        self.keeps_gradients, self.compile = options.memory, options.compile
        self.device = resolve_device(options.device)
        self.dtype = resolve_precision(options.precision, self.device)
        torch.manual_seed(0)
        self._pixels = torch.randint(0, 256, (self.batch_size, self.size, self.size, 3), dtype=torch.uint8)
        self.fused = self._teacher_run()
        model = self.fused.teacher.model
        with autocast(self.device, self.dtype):
            check = check_capture(model, self.fused.images(self._pixels[:2]), with_inputs=True)
        capture = FactorCapture(model, input_calls=check.input_calls)
        layers = self.fused.factors(capture, self._pixels)
        self.geometry = capture.geometry
        self.live_teacher = LiveTeacher(self.fused, self.geometry.heads, self.geometry.layers)
        self.usual_teacher = UsualTeacher(self._teacher_run())
        self.batch = self._batch(None)
        self._cached: dict[str, tuple[CodesTeacher, Batch]] = {}
        for name in ("int8", f"transform:target_kl={options.target_kl}"):
            if name != "int8" and options.transform_components is not None:
                assert check.recipe is not None, "found for all of timm's ViTs"
                coder, codes_BLTC = made_coder(
                    self.geometry, check.recipe, options.transform_components, self.batch_size, str(self.device)
                )
            else:
                codec = parse_codec(name)
                state = codec.fit(self.geometry, [layers], recipe=check.recipe)
                coder = codec.coder(self.geometry, state, device=str(self.device))
                codes_BLTC = coder.encode(layers)
            self._cached[name.partition(":")[0]] = CodesTeacher(coder, self.device), self._batch(codes_BLTC.cpu())
            if isinstance(coder, TransformCoder):
                self.num_components = coder.packing.num_components

    def ways(self, width: int, modes: Sequence[Mode]) -> Iterator[Way]:
        """All ways to train a student of this width in these modes. In a mode, our ways share weights and optimiser."""
        for mode in modes:
            ours = self._run(self._student(mode, width))
            if mode == "scratch":
                yield Way(name="scratch", width=width, step=self._step(ours, None, self.batch))
                continue
            for codec, (teacher, batch) in self._cached.items():
                yield Way(name=f"{mode}, cache {codec}", width=width, step=self._step(ours, teacher, batch))
            yield Way(name=f"{mode}, live ours", width=width, step=self._step(ours, self.live_teacher, self.batch))
            usual = self._run(self._usual_student(mode, width))
            yield Way(name=f"{mode}, live usual", width=width, step=self._step(usual, self.usual_teacher, self.batch))

    def teacher_ways(self) -> Iterator[Way]:
        """Only the forward passes of the teachers."""
        for name, teacher in (("usual", self.usual_teacher), ("ours", self.live_teacher)):
            yield Way(name=f"teacher forward {name}", width=0, step=lambda teacher=teacher: teacher.factors(self.batch))

    def _model_name(self, width: int) -> str:
        return (
            f"{self.timm_name}:img_size={self.size},embed_dim={width},depth={self.depth},num_heads={self.heads},"
            "mean=(0.5,0.5,0.5),std=(0.5,0.5,0.5)"
        )

    def _teacher_run(self) -> TeacherRun:
        torch.manual_seed(1)
        name = parse_model_name(self._model_name(self.width))
        model = create_student(name, 1).to(self.device).eval().requires_grad_(False)
        teacher = Teacher(
            model=model,
            name=name,
            source="random",
            weights_sha256="",
            licence=None,
            input=input_config(model),
            tokens=token_layout(model),
            depth=self.depth,
        )
        return TeacherRun(teacher=teacher, device=self.device, dtype=self.dtype)

    def _student(self, mode: Mode, width: int) -> Student:
        torch.manual_seed(2)
        return new_student(mode, parse_model_name(self._model_name(width)), NUM_CLASSES, geometry=self.geometry)

    def _usual_student(self, mode: Mode, width: int) -> Student:
        torch.manual_seed(2)
        plain = new_student("scratch", parse_model_name(self._model_name(width)), NUM_CLASSES, geometry=None)
        module = UsualStudent(plain.model, mode)
        return Student(mode=mode, module=module, model=plain.model, input=plain.input, num_classes=NUM_CLASSES)

    def _run(self, student: Student) -> TrainingRun:
        config = TrainConfig(
            mode=student.mode,
            out=Path("unused"),
            cache=Path("unused"),
            batch_size=self.batch_size,
            steps=10**6,
            precision=self.precision,
            compile=self.compile,
        )
        # These are the only parts of the data that a step uses.
        data = SimpleNamespace(student=student, teacher=None, order=SimpleNamespace(sample_S=range(10**6)))
        run = TrainingRun(config, data, self.device)
        if self.keeps_gradients:
            run.optimizer.zero_grad = lambda **_: None
        return run

    def _batch(self, codes_BLTC: Tensor | None) -> Batch:
        labels = torch.arange(self.batch_size) % NUM_CLASSES
        codes = () if codes_BLTC is None else (Codes(0, np.arange(self.batch_size), codes_BLTC),)
        batch = Batch(labels, self._pixels, labels, labels, torch.ones(self.batch_size), codes, is_mixed=False)
        return batch.pin_memory() if self.device.type == "cuda" else batch

    def _step(self, run: TrainingRun, teacher: object, batch: Batch) -> Callable[[], object]:
        def step() -> object:
            run.data.teacher = teacher
            return run.train_step(batch)

        return step


def peak_nbytes(step: Callable[[], object], device: torch.device) -> int:
    """The most bytes that tensors take during a step, beyond those that exist before it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        step()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        step()
    taken = most = 0
    changes = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(changes, key=lambda event: event.start_ns()):
        taken += event.nbytes()
        most = max(most, taken)
    return most


def count_products(step: Callable[[], object]) -> int:
    """Floating-point operations of a step's matrix products and convolutions."""
    # Products within a compiled graph would not be seen.
    with torch.compiler.set_stance("force_eager"), FlopCounterMode(display=False) as counted:
        step()
    return counted.get_total_flops()


def measure(
    ways: Sequence[Way], rounds: int, device: torch.device, limit_s: float = float("inf")
) -> dict[tuple[str, int], Measured]:
    """Measure all ways, by (name, width). They take turns, after a step each to warm up, for memory and for GFLOP.

    After `limit_s` seconds of rounds no other begins.
    """
    for way in ways:
        way.step()
    peaks = [peak_nbytes(way.step, device) for way in ways]
    products = [count_products(way.step) for way in ways]
    seconds: list[list[float]] = [[] for _ in ways]
    begin_s = time.perf_counter()
    for number in range(rounds):
        if number and time.perf_counter() - begin_s > limit_s:
            break
        for way, times in zip(ways, seconds, strict=True):
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            start = time.perf_counter()
            way.step()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times.append(time.perf_counter() - start)
    return {
        (way.name, way.width): Measured(seconds=statistics.median(times), peak_mib=peak / 2**20, gflop=flop / 1e9)
        for way, times, peak, flop in zip(ways, seconds, peaks, products, strict=True)
    }


def print_speeds(measured: dict[tuple[str, int], Measured], batch_size: int, modes: Sequence[Mode]) -> None:
    """Print the table, then each ratio with its bound."""
    print("| student's width | way | img/s | ms | GFLOP | peak MiB |\n|---|---|---|---|---|---|")
    for (name, width), row in measured.items():
        img_per_s = batch_size / row.seconds
        ms = f"{1e3 * row.seconds:.0f}"
        print(f"| {width or '-'} | {name} | {img_per_s:.2f} | {ms} | {row.gflop:.4g} | {row.peak_mib:.0f} |")
    print("\nAgainst live, the bound is live / (live - teacher forward): the speed if reading the cache took no time.")
    print("Against scratch, it is the ratio of the GFLOP.\n")
    print("| student's width | cache | against | times as fast | bound |\n|---|---|---|---|---|")
    widths = sorted({width for _, width in measured if width}, reverse=True)
    for width in widths:
        for mode in [mode for mode in modes if mode != "scratch"]:
            for codec in ("int8", "transform"):
                cached_s = measured[f"{mode}, cache {codec}", width].seconds
                for kind in ("usual", "ours"):
                    live_s = measured[f"{mode}, live {kind}", width].seconds
                    rest_s = live_s - measured[f"teacher forward {kind}", 0].seconds
                    bound = f"{live_s / rest_s:.2f}" if rest_s > 0 else "-"
                    print(f"| {width} | {mode}, {codec} | live {kind} | {live_s / cached_s:.2f} | {bound} |")
                if ("scratch", width) in measured:
                    scratch = measured["scratch", width]
                    bound = scratch.gflop / measured[f"{mode}, cache {codec}", width].gflop
                    print(f"| {width} | {mode}, {codec} | scratch | {scratch.seconds / cached_s:.2f} | {bound:.2f} |")


def print_memory(options: argparse.Namespace) -> None:
    """Print the memory of distillation for several numbers of tokens: from a cache, and in the usual way."""
    print("| tokens | usual MiB | cache int8 MiB | share | ms usual | ms cache |\n|---|---|---|---|---|---|")
    for num_tokens in options.tokens:
        bench = Bench(options, num_tokens)
        found = measure(list(bench.ways(bench.width, ["distill"])), options.rounds, bench.device)
        usual, cached = (found[f"distill, {way}", bench.width] for way in ("live usual", "cache int8"))
        print(
            f"| {num_tokens} | {usual.peak_mib:.0f} | {cached.peak_mib:.0f} | {cached.peak_mib / usual.peak_mib:.2f} | "
            f"{1e3 * usual.seconds:.0f} | {1e3 * cached.seconds:.0f} |",
            flush=True,
        )


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The parsed options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--geometry", choices=GEOMETRIES, default="vit-b")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--precision", choices=PRECISIONS, default="auto")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--modes", nargs="+", choices=("scratch", "copy", "distill"), default=[])
    parser.add_argument("--tokens", type=int, nargs="+", choices=IMAGE_SIZES, default=[197, 577, 1370])
    parser.add_argument("--memory", action="store_true", help="print distillation's memory at each of --tokens instead")
    parser.add_argument("--target-kl", type=float, default=0.005, help="of codec transform (default 0.005)")
    parser.add_argument(
        "--transform-components", type=int, help="components of each layer in codec transform, instead of a fit"
    )
    parser.add_argument("--compile", action="store_true", help="compile the students")
    parser.add_argument(
        "--widths", type=int, nargs="+", help="of the students (default: the teacher's, and half of it)"
    )
    parser.add_argument("--limit-s", type=float, default=float("inf"), help="begin no round after so many seconds")
    options = parser.parse_args(arguments)
    options.modes = options.modes or ["scratch", "copy", "distill"]
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    options = parse(arguments)
    device = resolve_device(options.device)
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    dtype = str(resolve_precision(options.precision, device)).removeprefix("torch.")
    print(f"{options.geometry}, batch of {options.batch_size}, {dtype}, {where}, torch {torch.__version__}\n")
    if options.memory:
        print_memory(options)
        return
    bench = Bench(options, 197)
    print(f"codec transform: {sum(bench.num_components)} components, at most {max(bench.num_components)} a layer\n")
    widths = options.widths or (bench.width, bench.width // 2)
    ways = [*bench.teacher_ways(), *(way for width in widths for way in bench.ways(width, options.modes))]
    print_speeds(measure(ways, options.rounds, device, options.limit_s), options.batch_size, options.modes)


if __name__ == "__main__":
    main()
