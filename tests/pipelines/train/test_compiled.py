"""A student compiled for its training: one graph for all batches, the same losses, and the same files."""

from __future__ import annotations

import math
import shutil
from dataclasses import replace

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from training_runs import weights_of

from atcache.attention.flash import availability, comparing, copying
from atcache.feed.loader import BatchStream
from atcache.pipelines.running.metrics import Speed, read_metrics
from atcache.pipelines.running.ranks import Ranks
from atcache.pipelines.train.compiled import compiles
from atcache.pipelines.train.data import open_training_data
from atcache.pipelines.train.run import train
from atcache.pipelines.train.student_run import Reports, TrainingRun

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


class Said:
    """Stands where a progress bar would, and keeps what the user is told."""

    def __init__(self):
        self.lines: list[str] = []

    def say(self, line):
        self.lines.append(line)


def losses_of_steps(config, num_steps=3, backend=None):
    """The losses of the first steps, the run, and what the user is told."""
    (data,) = open_training_data([config], CPU)
    run, said, losses = TrainingRun(config, data, CPU), Said(), []
    if backend is not None:
        run.backend = backend
    for batch in BatchStream(data.views, data.label_S, data.order, num_steps=num_steps):
        run.take(batch, Speed(), Reports(progress=said))
        losses.append(float(run._losses(run.student, run.on_device(batch))["loss"].detach()))
    return losses, run, said.lines


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("mode", ["scratch", "copy", "distill"])
def test_a_compiled_run_is_one_graph_and_computes_the_same(config_for, tiny_cache, mode, precision):
    # Traced, with the backward pass, but not made machine code: that takes minutes on a busy machine.
    config = config_for(mode, cache=tiny_cache(codec="transform"), precision=precision, ema=0.5, clip_grad=1.0)
    counter = CompileCounterWithBackend("aot_eager")
    losses, run, _ = losses_of_steps(replace(config, compile=True, accumulate=2), backend=counter)
    assert run.problem is None
    assert counter.frame_count == 1
    expected, plain, _ = losses_of_steps(replace(config, compile=False, accumulate=2))
    assert losses == pytest.approx(expected, rel=1e-4 if precision == "fp32" else 0.02)
    assert run.student.module.state_dict().keys() == plain.student.module.state_dict().keys()
    assert run.ema.module.state_dict().keys() == plain.ema.module.state_dict().keys()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of parts of a tile that no token fills
@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("mode", ["copy", "distill"])
def test_a_run_with_the_kernels_for_gpus_computes_the_same(config_for, tiny_cache, mode, compile, monkeypatch):
    config = config_for(mode, cache=tiny_cache(codec="transform"), precision="fp32", compile=compile, batch_size=2)
    expected = losses_of_steps(replace(config, compile=False), num_steps=1)[0]
    launched = []

    def launch(kernel, *arguments):
        launched.append(kernel.fn.__name__)
        start(kernel, *arguments)

    start = copying.launch
    for module in (copying, comparing):
        monkeypatch.setattr(module, "launch", launch)
    monkeypatch.setattr(availability, "serves", lambda *_: True)  # this machine's GPU is Triton's interpreter
    counter = CompileCounterWithBackend("aot_eager")
    losses, run, _ = losses_of_steps(config, num_steps=1, backend=counter)
    assert (run.problem, counter.frame_count) == (None, int(compile))
    assert {"attend_kernel" if mode == "copy" else "compare_kernel"} <= set(launched)
    assert losses == pytest.approx(expected, rel=1e-4)


def test_a_student_that_cannot_be_compiled_is_trained_as_it_is(config_for):
    def broken(*_):
        raise RuntimeError("no compiler here")

    config = config_for("copy")
    losses, run, said = losses_of_steps(replace(config, compile=True), backend=broken)
    assert "no compiler here" in (run.problem or "")
    assert said[0].startswith("compiling the student")
    assert said[1].endswith("It is trained uncompiled, which is slower.")
    assert losses == losses_of_steps(replace(config, compile=False))[0]


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_a_run_compiled_for_a_cpu_learns_the_same_and_goes_on_uncompiled(config_for):
    config = config_for("copy", steps=20, compile=True)
    train(config)
    plain = replace(config, out=config.out.with_name("plain"), compile=False)
    train(plain)
    assert weights_of(config).keys() == weights_of(plain).keys()
    rows = [read_metrics(each.out, "train")[-1]["loss"] for each in (config, plain)]
    assert rows[0] == pytest.approx(rows[1], rel=1e-3)
    assert train(replace(config, compile=None)).steps == 20  # the same run


@pytest.mark.parametrize(
    ("wanted", "device", "num_ranks", "num_steps", "expected"),
    [
        (None, "cpu", 1, 1000, False),
        (True, "cpu", 1, 10, True),
        (False, "cuda", 1, 1000, False),
        (None, "cuda", 1, 1000, True),
        (None, "cuda", 1, 100, False),
        (None, "cuda", 2, 1000, False),
        (True, "cuda", 2, 100, True),
    ],
)
def test_only_long_runs_of_one_process_on_a_gpu_compile_unasked(wanted, device, num_ranks, num_steps, expected):
    assert compiles(wanted, torch.device(device), Ranks(world_size=num_ranks), num_steps) is expected


def test_the_trial_changes_neither_weights_nor_the_course_of_a_run(config_for):
    config = config_for("distill", drop_path=0.2)
    first, _, _ = losses_of_steps(replace(config, compile=True), backend="eager")
    second, run, _ = losses_of_steps(replace(config, compile=False))
    assert first == pytest.approx(second, rel=1e-5)
    assert not any(math.isnan(loss) for loss in first)
    assert run.step == 3
