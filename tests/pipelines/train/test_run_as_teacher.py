"""The teacher of one's own task: a fine-tuned run teaches, and its folder is taken wherever weights are."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from builds import files
from click.testing import CliRunner
from training_runs import take_first_steps

from atcache.cache.cache import Cache
from atcache.cli.main import cli
from atcache.errors import ConfigError, TeacherError
from atcache.pipelines.build.config import BuildConfig
from atcache.pipelines.build.run import build
from atcache.pipelines.train.config import TrainConfig
from atcache.pipelines.train.run import train

FAST = {"steps": 2, "batch_size": 16, "device": "cpu", "precision": "fp32"}


@pytest.fixture(scope="module")
def task(digits_tars, tiny_vit, tiny_weights, tmp_path_factory):
    """A fine-tuned run, and the cache of its attention: `--teacher RUN`."""
    folder = tmp_path_factory.mktemp("task")
    data = str(digits_tars[0])
    run = TrainConfig(
        mode="finetune", data=data, student=tiny_vit, weights=tiny_weights, out=folder / "finetune", **FAST
    )
    train(run)
    cache = BuildConfig(
        teacher=str(run.out),
        data=data,
        policy="eval",
        out=folder / "tuned.zarr",
        codec="exact",
        workers=0,
        device="cpu",
    )
    build(cache)
    return run, cache


def test_students_learn_from_a_fine_tuned_run_with_its_cache_or_live(task, tmp_path):
    run, cache = task
    for mode in ("copy", "distill"):
        cached = TrainConfig(mode=mode, cache=cache.out, out=tmp_path / mode, **FAST)
        live = replace(cached, live_teacher=True, weights=run.out, out=tmp_path / f"{mode}-live")
        assert train(live).loss == pytest.approx(train(cached).loss, abs=1e-3)


def test_fine_tuning_goes_on_from_a_run(task, tmp_path):
    run, cache = task
    train(TrainConfig(mode="finetune", cache=cache.out, weights=run.out, out=tmp_path / "on", **FAST))
    record = json.loads((tmp_path / "on" / "run.json").read_text())
    first = json.loads((run.out / "run.json").read_text())
    assert record["data"]["initial_weights_sha256"] != first["data"]["initial_weights_sha256"]


def test_info_says_whose_weights_and_whose_labels(task):
    run, cache = task
    begun = json.loads((run.out / "run.json").read_text())["data"]["initial_weights_sha256"]
    said = CliRunner().invoke(cli, ["info", str(cache.out)]).stdout
    assert f"trained    finetune from weights {begun[:12]} on labels of 10 classes, by the run finetune\n" in said


def test_a_run_as_weights_is_recorded_as_a_run_as_teacher(task, tiny_vit, tmp_path):
    run, cache = task
    named = replace(cache, teacher=tiny_vit, weights=run.out, out=tmp_path / "named.zarr")
    build(named)
    ours, theirs = (Cache(config.out).record for config in (named, cache))
    assert ours.trained == theirs.trained is not None
    assert (ours.weights_from, ours.identity) == (theirs.weights_from, theirs.identity)


def test_a_run_that_is_not_finished_is_refused_in_a_sentence(task, digits_tars, tiny_vit, tmp_path):
    run, cache = task
    begun = replace(run, out=tmp_path / "begun", weights=None, mode="scratch", steps=9)
    take_first_steps(begun, 1, saves=True)
    sentence = r"begun(: this run)? is not finished: model\.safetensors is missing\. Run its `atcache train` command"
    before = files(begun.out)
    with pytest.raises(ConfigError, match=sentence):
        build(replace(cache, teacher=str(begun.out), out=tmp_path / "a.zarr"))
    with pytest.raises(TeacherError, match=sentence):
        build(replace(cache, teacher=tiny_vit, weights=begun.out, out=tmp_path / "b.zarr"))
    with pytest.raises(TeacherError, match=sentence):
        train(replace(run, weights=begun.out, out=tmp_path / "on"))
    assert files(begun.out) == before
    assert not list(tmp_path.glob("*.zarr"))


def test_a_student_that_copies_is_no_teacher_and_no_beginning(task, tiny_vit, tmp_path):
    run, cache = task
    copied = TrainConfig(mode="copy", cache=cache.out, out=tmp_path / "copied", **FAST)
    train(copied)
    sentence = r"copied copies attention: what it attends to in its blocks 0-1 is its teacher's"
    for fields in ({"teacher": str(copied.out)}, {"teacher": tiny_vit, "weights": copied.out}):
        with pytest.raises(ConfigError, match=sentence):
            build(replace(cache, **fields, out=tmp_path / "no.zarr"))
    with pytest.raises(ConfigError, match=sentence):
        train(replace(run, weights=copied.out, out=tmp_path / "on"))
