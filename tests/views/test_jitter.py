"""The student's jitter is torchvision's, image by image; it moves no token, and a stopped run draws it again."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from torchvision.transforms.v2 import functional
from training_runs import take_first_steps

from atcache.errors import ConfigError
from atcache.feed.loader import BatchStream
from atcache.pipelines.running.metrics import read_metrics
from atcache.pipelines.train.config import TrainConfig
from atcache.pipelines.train.data import open_training_data
from atcache.pipelines.train.run import train
from atcache.pipelines.train.student_run import TrainingRun
from atcache.views.jitter import draw_jitter, jitter_pixels

CPU = torch.device("cpu")


@pytest.fixture
def pixels_BHWC():
    return torch.randint(0, 256, (5, 6, 7, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


@pytest.fixture
def config_for(tiny_cache, tmp_path):
    numbers = iter(range(100))

    def config_for(mode, **fields) -> TrainConfig:
        common = {"cache": tiny_cache(), "out": tmp_path / f"run-{next(numbers)}", "steps": 20, "batch_size": 24}
        place = {"device": "cpu", "precision": "fp32", "validate_every": 0, "student_jitter": 0.5}
        return TrainConfig(mode=mode, **{**common, **place, **fields})

    return config_for


def test_each_image_is_jittered_as_torchvision_would(pixels_BHWC):
    torch.manual_seed(0)
    factors_B3 = draw_jitter(0.8, 5)
    jittered_BHWC = jitter_pixels(pixels_BHWC, factors_B3)
    for image_HWC, factors, ours_HWC in zip(pixels_BHWC, factors_B3.tolist(), jittered_BHWC, strict=True):
        image = image_HWC.permute(2, 0, 1) / 255
        image = functional.adjust_brightness(image, factors[0])
        image = functional.adjust_contrast(image, factors[1])
        image = functional.adjust_saturation(image, factors[2])
        torch.testing.assert_close(ours_HWC / 255, image.permute(1, 2, 0), rtol=1e-4, atol=1e-4)


def test_factors_of_one_change_nothing(pixels_BHWC):
    torch.testing.assert_close(jitter_pixels(pixels_BHWC, torch.ones(5, 3)), pixels_BHWC.float())


def test_factors_fill_their_range_and_differ_between_images():
    torch.manual_seed(0)
    factors_B3 = draw_jitter(0.4, 1000)
    assert 0.6 <= float(factors_B3.min()) < 0.61
    assert 1.39 < float(factors_B3.max()) <= 1.4
    torch.testing.assert_close(factors_B3.mean(0), torch.ones(3), rtol=0.03, atol=0)
    assert len(factors_B3.unique(dim=0)) == 1000


def losses_of_first_step(config):
    (data,) = open_training_data([config], CPU)
    run = TrainingRun(config, data, CPU)
    return {name: float(loss) for name, loss in run.train_step(next(stream(data))).items()}


def stream(data):
    return iter(BatchStream(data.views, data.label_S, data.order, num_steps=1))


def test_the_student_sees_it_and_the_teacher_does_not(config_for, tiny_cache, tiny_weights):
    # The live teacher gives the maps of the cache, which were made without jitter.
    exact = tiny_cache(codec="exact:dtype=float32")
    cached = losses_of_first_step(config_for("distill", cache=exact))
    live = losses_of_first_step(config_for("distill", cache=exact, live_teacher=True, weights=tiny_weights))
    plain = losses_of_first_step(config_for("distill", cache=exact, student_jitter=0.0))
    assert live == pytest.approx(cached, rel=1e-5)
    assert abs(plain["loss"] - cached["loss"]) > 1e-5


def test_cutting_the_batch_changes_nothing(config_for):
    whole, parts = (losses_of_first_step(config_for("copy", accumulate=accumulate)) for accumulate in (1, 4))
    assert parts == pytest.approx(whole, rel=1e-5)


def test_a_continued_run_draws_what_the_whole_run_drew(config_for):
    whole, stopped = config_for("copy", drop_path=0.2), config_for("copy", drop_path=0.2)
    train(whole)
    take_first_steps(stopped, 8, saves=True)
    train(stopped)
    ours, theirs = (load_file(config.out / "model.safetensors") for config in (stopped, whole))
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    rows = [{row["step"]: row["loss"] for row in read_metrics(config.out)} for config in (stopped, whole)]
    assert rows[0] == rows[1]


def test_a_strength_out_of_range_is_refused(config_for):
    with pytest.raises(ConfigError, match=r"student_jitter=1\.5: expected 0 to 1"):
        config_for("copy", student_jitter=1.5)
