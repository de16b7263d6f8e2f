"""`benchmarks/any_teacher.py` measures codecs on images they were not fitted to, and says which targets are missed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from atcache.teachers.run import TeacherRun

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def any_teacher(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import any_teacher

    return any_teacher


def test_the_kl_is_that_of_images_that_the_codec_has_not_seen(any_teacher, tiny_vit, digits_tars, capsys):
    data = ["--data", str(digits_tars[0].parent), "--teacher", tiny_vit, "--device", "cpu"]
    any_teacher.main([*data, "--views", "24", "--measure", "12", "--target-kl", "0.005"])
    row = capsys.readouterr().out.splitlines()[-1].split(" | ")
    assert row[:3] == [f"| {tiny_vit}", "17", "0.005"]
    assert 0.0005 < float(row[3]) < 0.0075
    with pytest.raises(SystemExit, match="only 48 images can be read, and --views 40 --measure 9 need 49"):
        any_teacher.main([*data, "--views", "40", "--measure", "9"])


def test_views_are_measured_that_lie_between_those_fitted_to(any_teacher):
    fitted_N, measured_N = any_teacher.split(torch.arange(20), 5)
    assert measured_N.tolist() == [0, 5, 10, 14, 19]
    assert sorted([*fitted_N.tolist(), *measured_N.tolist()]) == list(range(20))


def test_a_target_that_other_images_miss_is_said(any_teacher, tiny_vit, tiny_weights):
    run = TeacherRun.load(tiny_vit, tiny_weights, device="cpu", precision="fp32")
    numbers = torch.Generator().manual_seed(0)
    noise_NHWC = torch.randint(0, 256, (28, 8, 8, 3), dtype=torch.uint8, generator=numbers)
    # What is fitted to images without contrast meets its target on those alone.
    grey_NHWC = 120 + noise_NHWC // 32
    for measured_NHWC, is_missed in ((grey_NHWC[16:], False), (noise_NHWC[16:], True)):
        row = any_teacher.row("tiny", run, grey_NHWC[:16], measured_NHWC, 0.005)
        assert ("missed" in row) == is_missed, row
