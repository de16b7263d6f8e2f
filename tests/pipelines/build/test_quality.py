"""The quality that is planned is the quality that is stored, or the build warns."""

from __future__ import annotations

import io
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from builds import picture, run_cli, write_tar
from PIL import Image

from atcache.codecs.int8 import Int8Codec
from atcache.codecs.registry import parse_codec
from atcache.codecs.transform.codec import TransformCodec
from atcache.pipelines.build.run import build
from atcache.pipelines.fidelity import Expectation


@pytest.mark.parametrize(("codec", "most_kl"), [("transform", 0.005), ("int8", 1e-3)])
def test_the_quality_that_was_planned_is_the_quality_that_is_recorded(config, codec, most_kl, capsys):
    summary = build(replace(config, codec=codec))
    assert summary.plan is not None
    assert summary.complete is not None
    assert 0 < summary.plan.row_kl_nats < most_kl
    assert 0 < summary.plan.injected_error < 0.05
    recorded = summary.complete["quality"]["row_kl_nats"]
    assert recorded["mean"] == pytest.approx(summary.plan.row_kl_nats, rel=0.5)
    assert recorded["mean"] <= recorded["max"]
    assert summary.complete["num_checked"] == 6 * (2 + 2), "of the first and of the last batch of each task"
    assert (summary.row_kl_nats, summary.warning) == (recorded["mean"], None)
    assert "Warning" not in capsys.readouterr().err


def flat_then_textured(path: Path, num_flat: int, num_samples: int) -> Path:
    """A tar whose first images are of one colour each and whose others are noise."""
    samples = []
    for number in range(num_samples):
        png = io.BytesIO()
        Image.new("RGB", (8, 8), (number, 100, 200)).save(png, format="PNG")
        data = png.getvalue() if number < num_flat else picture(number, kind="PNG")
        samples.append({"png": data, "cls": b"0"})
    return write_tar(path, samples)


WARNING = (
    r"Warning: decoded maps have a row KL of [\d.e-]+ nats on average, over 1.5 times the 0.005 of the codec's target"
)


@pytest.mark.parametrize("samples_per_shard", [8, 48], ids=["many tasks", "one task"])
def test_images_unlike_those_of_calibration_are_warned_of(config, tmp_path, samples_per_shard):
    """One calibration sample is the first one, which is flat."""
    tar = flat_then_textured(tmp_path / "unlike.tar", 12, 48)
    config = replace(config, data=str(tar), samples_per_shard=samples_per_shard)
    result = run_cli(config, calibration_samples="1")
    assert result.exit_code == 0, result.output
    record = json.loads(result.stdout)
    assert record["plan"]["row_kl_nats"] <= 0.005
    assert record["row_kl_nats"] > 1.5 * 0.005
    assert re.match(WARNING, record["warning"])
    warnings = [line for line in result.stderr.splitlines() if line.startswith("Warning")]
    assert len(warnings) == 2, "once as soon as it shows, once at the end"
    assert warnings[1] == record["warning"]
    # Asked again, the finished cache is no better.
    again = run_cli(config, calibration_samples="1")
    assert json.loads(again.stdout)["warning"] == record["warning"]
    assert [line for line in again.stderr.splitlines() if line.startswith("Warning")] == [record["warning"]]


def test_calibration_that_saw_both_kinds_of_images_is_not_warned_of(config, tmp_path):
    tar = flat_then_textured(tmp_path / "both.tar", 24, 48)
    result = run_cli(replace(config, data=str(tar)))
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["warning"] is None
    assert "Warning" not in result.stderr


@pytest.mark.parametrize(
    ("codec", "row_kl_nats", "num_views", "sentence"),
    [
        (TransformCodec(target_kl=0.02), 0.031, 12, "KL of 0.031 nats on average, over 1.5 times the 0.02 of"),
        (TransformCodec(target_kl=0.02), 0.029, 12, None),
        (TransformCodec(target_kl=0.02), 0.031, 11, None),
        (TransformCodec(target_nbytes=1000), 0.016, 12, "over 1.5 times the 0.01 measured in calibration"),
        (Int8Codec(), 0.016, 12, "over 1.5 times the 0.01 measured in calibration"),
        (Int8Codec(), 0.014, 12, None),
        (Int8Codec(), float("nan"), 12, "KL of nan nats"),
    ],
)
def test_the_limit_is_that_of_the_target_where_there_is_one(codec, row_kl_nats, num_views, sentence):
    warning = Expectation.of(codec, 0.01, torch.float32).warn(row_kl_nats, num_views)
    assert (warning is None) == (sentence is None)
    assert warning is None or sentence in warning


def test_next_to_nothing_is_no_reason_to_warn():
    exact = parse_codec("exact")
    assert Expectation.of(exact, 1e-9, torch.float32).warn(9e-7, 12) is None
    assert Expectation.of(exact, 1e-9, torch.bfloat16).warn(1.9e-4, 12) is None
    assert Expectation.of(exact, 1e-9, torch.float32).warn(2e-6, 12) is not None
