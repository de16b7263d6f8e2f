"""Calibration tells what it is doing and how far it is, and Ctrl-C ends it."""

from __future__ import annotations

import dataclasses
import itertools
import os
import pty
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch

from atcache.codecs.int8 import Int8Codec
from atcache.pipelines.build.calibrate import calibrate
from atcache.teachers.run import TeacherRun


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class LongFit(Int8Codec):
    """Looks at the batches twice, and tells of stages of its own."""

    def fit(self, geometry, batches, *, held_back=None, nbytes_per_view=None, recipe=None, progress=None):
        for _ in range(2):
            assert len(list(batches)) == 5
            progress("basis", 0.5)
            progress("basis", 1.0)
        return {}


@pytest.fixture(scope="module")
def run(tiny_vit, tiny_weights) -> TeacherRun:
    return TeacherRun.load(tiny_vit, tiny_weights, device="cpu", precision="fp32")


def stages(run, codec, **kwargs) -> Iterator[tuple[str, list[float]]]:
    """Each stage that is told of, with its shares."""
    told: list[tuple[str, float]] = []
    pixels_NHWC = torch.randint(0, 256, (16, 8, 8, 3), dtype=torch.uint8)
    common = {"layers": None, "heads": None, "batch_size": 3}
    calibrate(run, codec, pixels_NHWC, **common, **kwargs, progress=lambda stage, share: told.append((stage, share)))
    for stage, group in itertools.groupby(told, key=lambda one: one[0]):
        yield stage, [share for _, share in group]


def test_the_teachers_passes_and_the_codecs_stages_are_told(run):
    fifths = [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert list(stages(run, LongFit())) == [
        ("teacher", [0.0, *fifths]),
        ("basis", [0.5, 1.0]),
        ("teacher", fifths),
        ("basis", [0.5, 1.0]),
        ("measuring", [0.0, *fifths]),
    ]


def test_a_codec_that_is_not_fitted_is_measured(run):
    for kwargs in ({}, {"state": {}}):
        assert [stage for stage, _ in stages(run, Int8Codec(), **kwargs)] == ["teacher", "measuring"]


def test_nobody_need_be_told(run):
    pixels_NHWC = torch.zeros((2, 8, 8, 3), dtype=torch.uint8)
    assert calibrate(run, Int8Codec(), pixels_NHWC, layers=None, heads=None, batch_size=1).num_held_back == 1


def test_ctrl_c_while_the_codec_is_fitted_ends_with_one_sentence(digits_build, digits_tars, tmp_path):
    """On a terminal, where the bar tells that fitting has begun: with so many samples it takes long."""
    many = tmp_path / "many"
    many.mkdir()
    for number in range(200):
        (many / f"copy-{number:04d}.tar").symlink_to(digits_tars[0])
    arguments = [
        *("--teacher", digits_build.teacher, "--weights", str(digits_build.weights), "--data", str(many)),
        *("--out", str(digits_build.out), "--calibration-samples", "3200", "--batch-size", "1", "--workers", "0"),
        *("--device", "cpu", "--precision", "fp32"),
    ]
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "atcache.cli.main", "build", *arguments],
        stdout=subprocess.PIPE,
        stderr=theirs,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "120"},
        start_new_session=True,
        # Whoever runs the tests in the background may have had it ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    os.close(theirs)
    shown, has_been_stopped = b"", False
    # Linux ends the reading of a closed terminal with an error.
    try:
        while part := os.read(ours, 65536):
            shown += part
            if not has_been_stopped and b"calibrate: teacher" in shown:
                os.killpg(process.pid, signal.SIGINT)
                has_been_stopped = True
    except OSError:
        pass
    os.close(ours)
    stdout, _ = process.communicate(timeout=60)
    text = shown.decode()
    assert has_been_stopped, text
    assert (process.returncode, stdout) == (130, b""), text
    assert "Traceback" not in text
    assert text.rstrip().endswith("Stopped. What was stored stays; type the same command again to continue.")
    assert not digits_build.out.exists(), "it was stopped before the cache was begun"
