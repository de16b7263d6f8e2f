"""Training on mixed views: targets are timm's, the teacher sees the same pixels, and what leaks labels is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from builds import MIXED, picture, write_tar
from timm.data.mixup import mixup_target
from timm.loss import SoftTargetCrossEntropy

from atcache.errors import ConfigError
from atcache.feed.batch import Batch
from atcache.feed.loader import BatchStream
from atcache.feed.sample_views import FreshViews
from atcache.pipelines.build.run import build
from atcache.pipelines.evaluate.config import EvaluateConfig
from atcache.pipelines.evaluate.run import evaluate
from atcache.pipelines.running.metrics import read_metrics
from atcache.pipelines.train.config import TrainConfig
from atcache.pipelines.train.data import open_training_data
from atcache.pipelines.train.run import train
from atcache.pipelines.train.student_run import TrainingRun
from atcache.teachers.inputs import normalise_images

CPU = torch.device("cpu")


@pytest.fixture
def config_for(tmp_path):
    """A function: mode and fields -> the config of a short run, in a folder of its own."""
    numbers = iter(range(100))

    def config_for(mode, **fields) -> TrainConfig:
        short = {"out": tmp_path / f"run-{next(numbers)}", "steps": 20, "batch_size": 24, "base_lr": 2e-2}
        quiet = {"warmup_epochs": 1.0, "device": "cpu", "precision": "fp32", "validate_every": 0}
        return TrainConfig(mode=mode, **{**short, **quiet, **fields})

    return config_for


def losses_of(config) -> list[float]:
    return [row["loss"] for row in read_metrics(config.out, "train")]


def batch_of(label_B, mix_label_B, mix_share_B) -> Batch:
    size = len(label_B)
    return Batch(
        sample_B=torch.arange(size),
        pixels_BHWC=torch.zeros(size, 8, 8, 3, dtype=torch.uint8),
        label_B=torch.tensor(label_B),
        mix_label_B=torch.tensor(mix_label_B),
        mix_share_B=torch.tensor(mix_share_B),
    )


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_targets_and_loss_are_timms(smoothing):
    torch.manual_seed(0)
    label_B, share_B, logits_BC = torch.tensor([3, 0, 2, 2]), torch.tensor([0.7, 1.0, 0.25, 0.5]), torch.randn(4, 5)
    # timm mixes a batch with itself from behind.
    batch = batch_of(label_B.tolist(), label_B.flip(0).tolist(), share_B.tolist())
    found = torch.nn.functional.cross_entropy(logits_BC, batch.targets(5), label_smoothing=smoothing)
    theirs = mixup_target(label_B, 5, share_B.unsqueeze(1), smoothing)
    torch.testing.assert_close(found, SoftTargetCrossEntropy()(logits_BC, theirs))


def test_unmixed_batches_keep_their_classes():
    batch = batch_of([3, 1], [3, 1], [1.0, 1.0])
    assert batch.targets(5) is batch.label_B
    assert batch_of([3, 1], [3, 4], [1.0, 0.25]).targets(5).tolist() == [[0, 0, 0, 1, 0], [0, 0.25, 0, 0, 0.75]]


@pytest.mark.parametrize("mode", ["copy", "distill"])
def test_a_mixed_cache_trains_the_student_that_the_live_teacher_trains(mode, config_for, tiny_cache, tiny_weights):
    cache = tiny_cache(codec="exact:dtype=float32", views=2, **MIXED)
    live = config_for(mode, cache=cache, live_teacher=True, weights=tiny_weights, label_smoothing=0.1)
    cached = config_for(mode, cache=cache, label_smoothing=0.1, accumulate=2)
    train(live)
    train(cached)
    assert losses_of(cached) == pytest.approx(losses_of(live), rel=1e-4)


def test_mixed_labels_reach_the_loss(config_for, tiny_cache):
    config = config_for("scratch", cache=tiny_cache(views=2, **MIXED), label_smoothing=0.1)
    (data,) = open_training_data([config], CPU)
    run = TrainingRun(config, data, CPU)
    (batch,) = BatchStream(data.views, data.label_S, data.order, num_steps=1)
    images = normalise_images(batch.pixels_BHWC, run.student.input.mean, run.student.input.std, CPU)
    logits_BC = run.student.predict(images, None).detach()
    share_B1 = batch.mix_share_B.unsqueeze(1)
    smooth = [mixup_target(label_B, 10, smoothing=0.1) for label_B in (batch.label_B, batch.mix_label_B)]
    expected = SoftTargetCrossEntropy()(logits_BC, share_B1 * smooth[0] + (1 - share_B1) * smooth[1])
    torch.testing.assert_close(run.train_step(batch)["label_loss"], expected)
    of_own_labels = torch.nn.functional.cross_entropy(logits_BC, batch.label_B, label_smoothing=0.1)
    assert abs(of_own_labels - expected) > 1e-3


def test_runs_without_a_cache_mix_the_samples_they_train_on(config_for, tiny_vit, digits_tars):
    source = {"data": str(digits_tars[0].parent), "student": tiny_vit}
    config = config_for("scratch", **source, **MIXED, subset=16)
    (data,) = open_training_data([config], CPU)
    assert isinstance(data.views, FreshViews)
    subset, partners = set(data.order.sample_S.tolist()), set()
    for sample in subset:
        for epoch in range(6):
            partners.add(sample + data.views.read(sample, epoch).mix.partner)
    assert partners == subset
    (batch,) = BatchStream(data.views, data.label_S, data.order, num_steps=1)
    assert batch.mix_share_B.min() < 0.9
    train(config)
    plain = config_for("scratch", **source, subset=16)
    train(plain)
    assert losses_of(config) != losses_of(plain)


def test_who_reads_and_what_is_kept_changes_no_mixed_run(config_for, tiny_vit, digits_tars):
    fields = {"data": str(digits_tars[0].parent), "student": tiny_vit, **MIXED}
    here, there = config_for("scratch", **fields), config_for("scratch", **fields, workers=1, keep_mib=0)
    train(here)
    train(there)
    assert losses_of(there) == losses_of(here)


def test_a_subset_of_a_mixed_cache_is_refused(config_for, tiny_cache):
    with pytest.raises(ConfigError, match=r"subset=20: the views of .* are mixed with those of other samples"):
        train(config_for("copy", cache=tiny_cache(**MIXED), subset=20))


def test_a_mixed_cache_is_no_validation_cache(config_for, tiny_cache):
    mixed = tiny_cache(**MIXED)
    with pytest.raises(ConfigError, match="are mixed with each other, so they have no single label to predict"):
        train(config_for("copy", cache=mixed, val_cache=mixed))
    config = config_for("copy", cache=mixed)
    train(config)
    with pytest.raises(ConfigError, match="Build a validation cache with --policy eval"):
        evaluate(EvaluateConfig(runs=(config.out,), cache=mixed, device="cpu"))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"cache": "some.zarr"}, r"mixup=0\.8, cutmix=1\.0, mix_prob=1\.0: the views of some.zarr are drawn already"),
        ({"data": "tars", "student": "vit", "policy": "eval"}, "views of policy eval are never mixed"),
        ({"data": "tars", "student": "vit", "mixup": -0.5}, r"mixup=-0\.5: expected at least 0"),
    ],
)
def test_mixing_that_cannot_be_is_refused_before_anything_is_read(config_for, fields, message):
    with pytest.raises(ConfigError, match=message):
        config_for("scratch", **{**MIXED, **fields})


@pytest.mark.parametrize("mode", ["copy", "scratch"])
def test_views_mixed_with_unlabelled_samples_are_refused(mode, config_for, digits_build, monkeypatch, tmp_path):
    """A build of an earlier version made such caches."""
    samples = [{"jpg": picture(seed), **({"cls": seed % 4} if seed % 2 else {})} for seed in range(16)]
    tar = write_tar(tmp_path / "x.tar", samples)
    monkeypatch.setattr("atcache.pipelines.build.prepare._check_mixing", lambda *_: None)
    build(replace(digits_build, data=str(tar), labels="optional", samples_per_shard=8, **MIXED))
    config = config_for(mode, cache=digits_build.out, batch_size=8, steps=2)
    with pytest.raises(ConfigError, match=r"are mixed with each other, and 8 of its samples have no label. Build"):
        train(config)
    train(config_for("distill", cache=digits_build.out, batch_size=8, steps=2, attention_only=True))
