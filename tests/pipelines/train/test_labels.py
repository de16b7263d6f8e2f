"""Runs without labels, labels that must be wrong, and names of classes that must agree."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from builds import picture, write_tar
from click.testing import CliRunner
from safetensors.torch import load_file
from training_runs import CPU, assert_equal_weights, batches_of, images_of, losses_of, training_of

import atcache
from atcache.cli.main import cli
from atcache.errors import CacheMismatchError, ConfigError, SourceError
from atcache.feed.caches import open_caches
from atcache.feed.classes import count_classes
from atcache.images.source import index_source
from atcache.pipelines.evaluate.config import EvaluateConfig
from atcache.pipelines.evaluate.run import evaluate
from atcache.pipelines.train.config import TrainConfig
from atcache.pipelines.train.data import open_training_data
from atcache.pipelines.train.run import train, train_sweep
from atcache.store.reader import CacheReader

STUDENT = "vit_tiny_patch16_224:img_size=8,patch_size=2,embed_dim=32,depth=2,num_heads=2"


@pytest.fixture(scope="module")
def unlabelled(tiny_cache) -> Path:
    """The digits, without their labels."""
    return tiny_cache(labels="none")


@pytest.fixture(scope="module")
def half_labelled(tiny_cache, tmp_path_factory) -> Path:
    """Twelve images, of which every second one has a label."""
    samples = [{"jpg": picture(seed), **({"cls": b"%d" % (seed % 3)} if seed % 2 else {})} for seed in range(12)]
    tar = write_tar(tmp_path_factory.mktemp("half") / "half.tar", samples)
    return tiny_cache(data=str(tar), labels="optional")


@pytest.fixture(scope="module")
def named(tiny_cache, digits_tars, tmp_path_factory):
    """A function: names of the ten digits -> a cache of the first two tars with these names beside them."""

    def named(*names: str, tar: int = 0) -> Path:
        folder = tmp_path_factory.mktemp("named")
        shutil.copy(digits_tars[tar], folder)
        (folder / "classes.txt").write_text("".join(f"{name}\n" for name in names))
        return tiny_cache(data=str(folder), policy="eval")

    return named


DIGITS = [f"digit {label}" for label in range(10)]


def test_a_student_of_maps_alone_needs_no_labels_and_has_no_head(unlabelled, config_for):
    config = config_for("distill", cache=unlabelled, attention_only=True)
    summary = train(config)
    assert (summary.label_loss, summary.validation, summary.num_samples) == (None, None, 48)
    losses = losses_of(config)
    assert losses[-1] < losses[0]
    assert not [name for name in load_file(config.out / "model.safetensors") if name.startswith("head")]
    with pytest.raises(ConfigError, match=r"was trained with --attention-only: it has no head.*--mode finetune"):
        evaluate(EvaluateConfig(runs=(config.out,), cache=unlabelled, device="cpu"))
    assert train(config) == summary  # the run is finished


def test_the_loss_of_maps_alone_is_the_attention_loss_of_a_distilled_student(tiny_cache, config_for):
    run = training_of(config_for("distill", attention_only=True))
    (batch,) = batches_of(run)
    assert run.data.teacher is not None
    given = run.data.teacher.factors(run.data.teacher.looked_at(batch))
    labelled = training_of(config_for("distill"))
    labelled.student.model.load_state_dict(run.student.model.state_dict(), strict=False)
    _, expected = labelled.student.train_step(images_of(run, batch), torch.zeros(24, dtype=torch.int64), given, 0.0)
    found = run._losses(run.student, batch)
    assert expected is not None
    assert found.keys() == {"loss", "attention_loss"}
    torch.testing.assert_close(found["loss"], expected)


def test_weights_of_maps_alone_can_be_finetuned(unlabelled, config_for, digits_tars):
    config = config_for("distill", cache=unlabelled, attention_only=True, steps=2)
    train(config)
    tuned = config_for(
        "finetune",
        cache=None,
        data=str(digits_tars[0]),
        student=STUDENT,
        weights=config.out / "model.safetensors",
        steps=1,
        base_lr=1e-9,
        optimizer="sgd",
    )
    train(tuned)
    before, after = (load_file(each.out / "model.safetensors") for each in (config, tuned))
    for name, weight in before.items():
        torch.testing.assert_close(after[name], weight, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", ["copy", "distill", "scratch"])
def test_losses_that_need_labels_say_so(mode, unlabelled, config_for):
    expected = r"has no labels: none of its 48 stored samples has one\. .*--mode distill --attention-only"
    with pytest.raises(SourceError, match=expected):
        train(config_for(mode, cache=unlabelled))
    with pytest.raises(SourceError, match=expected):
        atcache.batches(unlabelled, device="cpu")


def test_samples_without_a_label_are_left_out_with_a_note_or_taken(half_labelled, config_for):
    (data,) = open_training_data([config_for("copy", cache=half_labelled)], CPU)
    assert data.order.sample_S.tolist() == [1, 3, 5, 7, 9, 11]
    assert "NOTE: 6 of 12 samples have no label and are left out." in "\n".join(data.notes)
    (alone,) = open_training_data([config_for("distill", cache=half_labelled, attention_only=True)], CPU)
    assert alone.order.sample_S.tolist() == list(range(12))
    assert "have no label" not in "\n".join(alone.notes)


def test_a_loop_takes_samples_without_labels_if_it_says_so(half_labelled, unlabelled):
    settings = {"batch_size": 12, "device": "cpu", "steps": 1}
    (batch,) = atcache.batches(half_labelled, labels="optional", **settings)
    order = batch.sample.argsort()
    assert batch.labels[order].tolist() == [-1, 1, -1, 0, -1, 2, -1, 1, -1, 0, -1, 2]
    none = atcache.batches(half_labelled, labels="none", **settings)
    (batch,) = none
    assert (set(batch.labels.tolist()), none.num_classes) == ({-1}, 0)
    (batch,) = atcache.batches(half_labelled, **settings)
    assert set((batch.sample % 2).tolist()) == {1}
    student = atcache.make_student(unlabelled, "distill")
    (batch,) = atcache.batches(unlabelled, labels="none", **settings)
    features, loss = student(batch.images, batch.attention)
    assert features.shape == (12, 32)
    assert loss.requires_grad
    with pytest.raises(ConfigError, match="labels='some': expected one of required, optional, none"):
        atcache.batches(unlabelled, labels="some", **settings)


def test_students_with_and_without_labels_share_a_sweep_if_they_see_the_same(tiny_cache, half_labelled, config_for):
    stream = {"order_seed": 0, "steps": 3}
    configs = [config_for("distill", **stream), config_for("distill", attention_only=True, **stream)]
    results = train_sweep(configs)
    assert [result.summary.label_loss is None for result in results if result.summary] == [False, True]
    for config in configs:
        alone = replace(config, out=config.out.with_name(config.out.name + "-alone"))
        train(alone)
        assert_equal_weights(config, alone)
    with pytest.raises(ConfigError, match=r"6 of 12 samples have no label: .* Train them in two sweeps"):
        train_sweep([replace(config, cache=half_labelled, batch_size=6) for config in configs])


@pytest.mark.parametrize(
    ("mode", "fields", "message"),
    [
        ("copy", {}, "mode copy learns from labels"),
        ("distill", {"val_data": "x.tar"}, "no accuracy to measure. Leave --val-cache and --val-data out"),
        ("distill", {"label_smoothing": 0.1}, "label_smoothing=0.1: with attention_only"),
        ("distill", {"num_classes": 3}, "num_classes=3: with attention_only"),
        ("distill", {"attention_weight": 1.0}, "attention_weight=1.0: with attention_only"),
    ],
)
def test_options_that_maps_alone_cannot_use_are_refused(mode, fields, message, config_for):
    with pytest.raises(ConfigError, match=message):
        config_for(mode, attention_only=True, **fields)


def test_runs_from_before_these_options_continue(config_for):
    config = config_for("distill")
    assert not {"attention_only", "num_classes", "label_key"} & config.settings().keys()
    assert replace(config, num_classes=12).settings()["num_classes"] == 12


def test_two_parts_that_share_a_sample_are_refused(tiny_cache, digits_tars, tmp_path):
    tars, parts = str(digits_tars[0].parent), []
    for number, keys in enumerate(("digit-00001\ndigit-00020", "digit-00020\ndigit-00002", "digit-00003")):
        (tmp_path / f"{number}.txt").write_text(keys)
        parts.append(tiny_cache(data=tars, keys=tmp_path / f"{number}.txt"))
    with pytest.raises(CacheMismatchError, match=r"both hold samples of digits-0001\.tar, which would count twice"):
        open_caches(parts[:2])
    assert len(open_caches(parts[1:])) == 2


# The number of classes


def test_the_number_of_classes_can_be_given(config_for, tiny_cache):
    assert training_of(config_for("copy", num_classes=12)).student.num_classes == 12
    for mode, message in (("copy", "digit-.* has the label 9, but num_classes=9"), ("scratch", "num_classes=9")):
        with pytest.raises(ConfigError, match=message):
            train(config_for(mode, num_classes=9))
    with pytest.raises(ConfigError, match="has the label 9, but num_classes=9"):
        atcache.batches(tiny_cache(), num_classes=9, device="cpu")


def labelled(tmp_path, *labels: int):
    samples = [{"jpg": picture(seed), "cls": str(label).encode()} for seed, label in enumerate(labels)]
    index = index_source(write_tar(tmp_path / "t.tar", samples))
    return [index], np.arange(len(labels))


def test_a_label_far_outside_is_named_and_not_a_head_of_a_million(tmp_path):
    expected = (
        r"t\.tar/sample-001 has the label 999999, and the next lower label is 2\. If it is a typing error, correct "
        r"it in the tar and build again; if there are so many classes, give num_classes=1000000 \(--num-classes\)"
    )
    with pytest.raises(ConfigError, match=expected):
        count_classes(*labelled(tmp_path, 2, 999999, 0))
    assert count_classes(*labelled(tmp_path, 2, 999999, 0), 1_000_000) == 1_000_000
    with pytest.raises(ConfigError, match="sample-000 has the label 5000, and that is the lowest"):
        count_classes(*labelled(tmp_path, 5000))
    # Few of many classes, as in a part of ImageNet-21k, are no error; nor is a gap.
    assert count_classes(*labelled(tmp_path, 700, 3000, 9000, 21840)) == 21841
    assert count_classes(*labelled(tmp_path, 0, 999)) == 1000


def test_training_refuses_a_label_far_outside_before_any_work(tiny_cache, config_for, tmp_path):
    samples = [{"jpg": picture(seed), "cls": b"71234" if seed == 4 else b"1"} for seed in range(12)]
    tar = write_tar(tmp_path / "typing.tar", samples)
    for fields in ({"cache": tiny_cache(data=str(tar))}, {"cache": None, "data": str(tar), "student": STUDENT}):
        config = config_for("scratch", **fields)
        with pytest.raises(ConfigError, match=r"typing\.tar/sample-004 has the label 71234"):
            train(config)
        assert not config.out.exists()


# Names of classes


def test_names_of_classes_are_in_the_run_and_give_the_number_of_classes(named, config_for, digits_tars):
    cache = named(*DIGITS, "ten")
    config = config_for("scratch", cache=cache, batch_size=16, steps=2, val_data=str(digits_tars[2]))
    train(config)
    record = json.loads((config.out / "run.json").read_text())["record"]
    assert (record["num_classes"], record["classes"]) == (11, [*DIGITS, "ten"])
    same_fewer = named(*DIGITS, tar=1)
    found = CliRunner().invoke(
        cli, ["eval", str(config.out), "--cache", str(same_fewer), "--by-class", "--device", "cpu"]
    )
    assert found.exit_code == 0, found.output
    score = json.loads(found.stdout)["sets"][0]["runs"][0]
    labels = CacheReader(same_fewer).labels_S.tolist()
    assert [(one["label"], one["name"], one["num_samples"]) for one in score["classes"]] == [
        (label, DIGITS[label], labels.count(label)) for label in sorted(set(labels))
    ]
    correct = sum(one["top1"] * one["num_samples"] for one in score["classes"])
    assert correct / score["num_samples"] == pytest.approx(score["top1"])
    assert "digit 3" in found.stderr
    assert "classes" not in evaluate(EvaluateConfig(runs=(config.out,), cache=same_fewer, device="cpu")).score.to_json()


def test_classes_of_other_names_are_refused_wherever_two_lists_meet(named, config_for):
    cache, other = named(*DIGITS), named("zero", *DIGITS[1:], tar=1)
    expected = r"class 0 is '(zero|digit 0)' in .* and '(zero|digit 0)' in .*, so one label would mean two classes"
    with pytest.raises(CacheMismatchError, match=expected):
        train(config_for("scratch", cache=cache, val_cache=other))
    with pytest.raises(CacheMismatchError, match=expected):
        train(config_for("scratch", cache=(cache, other)))
    config = config_for("scratch", cache=cache, batch_size=16, steps=1)
    train(config)
    with pytest.raises(CacheMismatchError, match=expected.replace("in .*, so", "in (the run )?.*, so")):
        evaluate(EvaluateConfig(runs=(config.out,), cache=other, device="cpu"))
    tars = CacheReader(other).samples.tars[0].parent
    with pytest.raises(CacheMismatchError, match=expected):
        evaluate(EvaluateConfig(runs=(config.out,), data=str(tars), device="cpu"))


def test_validation_labels_may_be_in_json(config_for, tmp_path):
    samples = [{"jpg": picture(seed), "json": json.dumps({"id": seed % 3}).encode()} for seed in range(6)]
    tar = str(write_tar(tmp_path / "json.tar", samples))
    config = config_for("scratch", steps=1, val_data=tar, label_key="id")
    assert train(config).validation.num_samples == 6
    assert evaluate(EvaluateConfig(runs=(config.out,), data=tar, label_key="id", device="cpu")).score.num_samples == 6
    for make in (
        lambda: TrainConfig(mode="scratch", out=tmp_path, cache=Path("x"), label_key="id"),
        lambda: EvaluateConfig(runs=(config.out,), cache=Path("x"), label_key="id"),
    ):
        with pytest.raises(ConfigError, match="label_key=id: labels come from the cache"):
            make()
