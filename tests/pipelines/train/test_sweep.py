"""Students trained from one stream of batches are, bit for bit, those that are trained alone."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file
from training_runs import take_first_steps

from atcache.cli.main import cli
from atcache.errors import ConfigError
from atcache.feed.loader import BatchStream
from atcache.pipelines.running.metrics import read_metrics
from atcache.pipelines.train.config import TrainConfig
from atcache.pipelines.train.data import open_training_data
from atcache.pipelines.train.run import train, train_sweep
from atcache.pipelines.train.student_run import TrainingRun
from atcache.students.teacher_side import CacheTeacher


@pytest.fixture
def config_for(tiny_cache, tmp_path):
    """A function: folder, mode and fields -> the config of a short run of the sweep in `tmp_path / "sweep"`."""

    def config_for(name, mode, **fields) -> TrainConfig:
        common = {"cache": tiny_cache(views=2), "steps": 20, "batch_size": 24, "validate_every": 0, "order_seed": 0}
        place = {"device": "cpu", "precision": "fp32", "warmup_epochs": 0.0}
        return TrainConfig(mode=mode, out=tmp_path / "sweep" / name, **{**common, **place, **fields})

    return config_for


@pytest.fixture
def several(config_for):
    """Students that differ in most of what they may differ in."""
    return [
        config_for("copy", "copy", drop_path=0.3, ema=0.9),
        config_for("copy-1", "copy", seed=1, layers="1", base_lr=2e-2, accumulate=2),
        config_for("distill", "distill", seed=2, label_smoothing=0.1, clip_grad=1.0, steps=14),
        config_for("scratch", "scratch", seed=3, optimizer="sgd"),
    ]


def weights_of(config):
    return load_file(config.out / "model.safetensors")


def assert_same_run(config, other):
    ours, theirs = weights_of(config), weights_of(other)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    timeless = [
        [{key: row[key] for key in row if key not in ("img_per_s", "waited_for_data")} for row in read_metrics(c.out)]
        for c in (config, other)
    ]
    assert timeless[0] == timeless[1]
    assert timeless[0]


def test_each_student_of_a_sweep_is_the_one_that_is_trained_alone(several, tmp_path):
    results = train_sweep(several)
    assert [result.name for result in results] == ["copy", "copy-1", "distill", "scratch"]
    for config, result in zip(several, results, strict=True):
        alone = replace(config, out=tmp_path / "alone" / config.out.name)
        summary = train(alone)
        assert_same_run(config, alone)
        assert (result.summary.loss, result.summary.steps) == (summary.loss, summary.steps)
        # The very same run by every record: the command for one continues or repeats the other.
        assert train(replace(alone, out=config.out)) == result.summary


def test_a_sweep_that_was_stopped_goes_on_with_each_student_from_its_own_checkpoint(several, config_for, tmp_path):
    # Stopped as a kill between two saves would: checkpoints of different steps, one student done, one not begun.
    begun = [replace(config, checkpoint_every=5) for config in several]
    stopped = begun[1]
    late = replace(begun[3], out=begun[3].out.with_name("late"))
    train(begun[2])
    take_first_steps(stopped, 13)
    assert torch.load(stopped.out / "checkpoint.pt")["step"] == 10
    results = train_sweep([*begun, late])
    assert [result.problem for result in results] == 5 * [None]
    for config in begun:
        alone = replace(config, out=tmp_path / "alone" / config.out.name)
        train(alone)
        assert_same_run(config, alone)
    assert not list((tmp_path / "sweep").rglob("checkpoint.pt"))


def test_what_concerns_all_students_is_said_once(config_for, tiny_vit, capsys):
    averaged = [config_for(name, "scratch", seed=seed, ema=0.999) for seed, name in enumerate("ab")]
    other = config_for("c", "distill", student=f"{tiny_vit},init_values=0.1", ema=0.999)
    train_sweep(averaged)
    assert capsys.readouterr().err.count("NOTE: --ema 0.999") == 1
    train_sweep([*[replace(config, out=config.out.with_name(f"{config.out.name}2")) for config in averaged], other])
    lines = capsys.readouterr().err.splitlines()
    assert [line[:20] for line in lines if "NOTE" in line or "WARNING" in line] == [
        "NOTE: --ema 0.999 av",
        "c: WARNING: the stud",
    ]


def test_a_student_that_diverges_is_given_up_and_the_others_go_on(config_for, tmp_path, capsys):
    wild = config_for("wild", "scratch", base_lr=1e30)
    tame = config_for("tame", "scratch")
    first, second = train_sweep([wild, tame])
    assert first.summary is None
    assert "step 10: the loss is" in first.problem
    assert second.summary.steps == 20
    assert "wild: given up: step 10" in capsys.readouterr().err
    before = (tmp_path / "sweep" / "tame" / "model.safetensors").stat().st_mtime_ns
    assert train_sweep([wild, tame]) == [first, second]
    assert (tmp_path / "sweep" / "tame" / "model.safetensors").stat().st_mtime_ns == before
    with pytest.raises(ConfigError, match=r"wild was given up by a sweep: step 10: .* Delete it to train it again"):
        train(wild)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"batch_size": 12}, "batch_size is 24 for one student of the sweep and 12 for another"),
        ({"order_seed": None, "seed": 7}, "order_seed is 0 for one student of the sweep and 7 for another"),
        ({"subset": 5}, "subset is None for one student of the sweep and 5 for another"),
    ],
)
def test_students_that_need_another_stream_are_refused(fields, message, config_for):
    with pytest.raises(ConfigError, match=message):
        train_sweep([config_for("a", "copy"), config_for("b", "copy", **fields)])


def test_one_live_teacher_has_one_file_of_weights(config_for, tiny_weights):
    live = {"live_teacher": True, "weights": tiny_weights}
    students = [config_for("a", "copy", **live), config_for("b", "copy", **{**live, "weights": Path("other.pth")})]
    with pytest.raises(
        ConfigError, match=r"weights is .*tiny\.safetensors'\) for one student of the sweep and .*other"
    ):
        train_sweep(students)


def test_students_without_a_cache_share_views_of_one_size(config_for, digits_tars, tiny_vit, tmp_path):
    fresh = {"cache": None, "data": str(digits_tars[0].parent), "student": tiny_vit, "steps": 3}
    students = [config_for(name, "scratch", seed=seed, **fresh) for seed, name in enumerate("ab")]
    train_sweep(students)
    for config in students:
        alone = replace(config, out=tmp_path / "alone" / config.out.name)
        train(alone)
        assert_same_run(config, alone)
    larger = tiny_vit.replace("img_size=8", "img_size=16")
    expected = (
        r"take different views \(8 x 8, bicubic; 16 x 16, bicubic\)\. Without a cache the students of a sweep share"
    )
    with pytest.raises(ConfigError, match=expected):
        train_sweep([students[0], config_for("c", "scratch", **{**fresh, "student": larger})])


def test_two_students_in_one_folder_and_none_at_all_are_refused(config_for):
    with pytest.raises(ConfigError, match=r"two students of the sweep would be written to .*/a"):
        train_sweep([config_for("a", "copy"), config_for("a", "copy", seed=1)])
    with pytest.raises(ConfigError, match="the sweep has no students"):
        train_sweep([])


@pytest.fixture
def sweep_of(tiny_cache, tmp_path):
    """A function: the text of a sweep's file and more arguments -> what the command came to."""

    def sweep_of(text, *arguments):
        file = tmp_path / "sweep.toml"
        file.write_text(text)
        common = ["--cache", str(tiny_cache()), "--out", str(tmp_path / "runs"), "--steps", "4", "--batch-size", "24"]
        place = ["--device", "cpu", "--precision", "fp32"]
        return CliRunner().invoke(cli, ["train", "--sweep", str(file), *common, *place, *arguments])

    return sweep_of


def test_options_of_some_modes_are_for_the_students_that_can_have_them(sweep_of, tmp_path, tiny_weights):
    text = "".join(f'[[student]]\nmode = "{mode}"\n' for mode in ("copy", "distill", "scratch", "finetune"))
    done = sweep_of(text, "--layers", "0", "--attention-weight", "2", "--weights", str(tiny_weights))
    assert done.exit_code == 0, done.output
    modes = ("copy", "distill", "scratch", "finetune")
    settings = [json.loads((tmp_path / "runs" / mode / "run.json").read_text())["settings"] for mode in modes]
    assert [s["layers"] for s in settings] == ["0", "0", None, None]
    assert [s["attention_weight"] for s in settings] == [3.0, 2.0, 3.0, 3.0]


def test_an_option_that_no_student_can_have_is_refused_and_the_student_named(sweep_of):
    text = '[[student]]\nmode = "copy"\n[[student]]\nmode = "scratch"\nname = "plain"\n'
    refused = sweep_of(text, "--attention-weight", "2")
    assert "sweep.toml: student copy: attention_weight=2.0: mode copy has no attention loss" in refused.stderr
    refused = sweep_of('[[student]]\nmode = "copy"\n[[student]]\nmode = "copy"\nname = "high"\nlayers = "7"\n')
    assert "Error: high: layer 7 is not in the cache" in refused.stderr


def test_the_command_trains_the_students_of_the_file_and_ends_with_a_table(sweep_of, tmp_path):
    text = """
[[student]]
mode = "copy"

[[student]]
mode = "copy"
seed = 1
base-lr = 3e-4

[[student]]
name = "plain"
"""
    done = sweep_of(text, "--mode", "scratch", "--seed", "5")
    assert done.exit_code == 0, done.output
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    names = ["copy", "copy,seed=1,base-lr=0.0003", "plain"]
    assert [row["name"] for row in rows] == names
    assert [row["summary"]["mode"] for row in rows] == ["copy", "copy", "scratch"]
    settings = [json.loads((tmp_path / "runs" / name / "run.json").read_text())["settings"] for name in names]
    assert [(s["seed"], s["order_seed"], s["base_lr"]) for s in settings] == [
        (5, None, 1e-3),
        (1, 5, 3e-4),
        (5, None, 1e-3),
    ]
    table = done.stderr[done.stderr.index("student") :]
    assert all(name in table for name in names)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[[student]]\nmode = "copy"\nepoch = 3', r"sweep\.toml: student 0: epoch is not an option of 'atcache train'"),
        ('[[student]]\nmode = "copy"\nseed = "one"', r"student 0: seed = 'one', but --seed takes a whole number"),
        ('[[student]]\nmode = "copy"\nout = "x"', r"student 0: out is for all students; give it with --out"),
        ('[[student]]\nmode = "copy"\norder-seed = 1', r"student 0: order-seed is for all students; give it"),
        ('[[student]]\nmode = "copy"\nname = "../x"', r"student 0: name = '../x' cannot be a folder's name"),
        ('[[student]]\nmode = "copy"\n[[student]]\nmode = "copy"', r"student 1: there is already a student 'copy'"),
        ("[[student]]\nseed = 1", r"student seed=1 has no mode\. Give it one, or --mode for all"),
        ('[student]\nmode = "copy"', r"a sweep is a list of students, each a table of options that "),
        ("[[student]", r"sweep\.toml is not valid TOML"),
    ],
)  # fmt: skip
def test_files_that_cannot_be_used_are_refused_in_one_sentence(text, message, sweep_of):
    done = sweep_of(text)
    assert done.exit_code == 1
    (line,) = done.stderr.splitlines()
    assert re.search(message, line), line


def test_the_command_fails_when_a_student_was_given_up(sweep_of):
    done = sweep_of('[[student]]\nmode = "scratch"\nbase-lr = 1e30\nname = "wild"', "--warmup-epochs", "0")
    assert done.exit_code == 1
    assert json.loads(done.stdout)["summary"] is None
    assert "1 of 1 students were given up: wild." in done.stderr


def test_without_a_sweep_a_mode_is_needed(tmp_path):
    done = CliRunner().invoke(cli, ["train", "--out", str(tmp_path / "run")])
    assert done.exit_code == 2
    assert "Missing option '--mode'. It is copy, distill, scratch or finetune; a recipe sets one." in done.stderr


def test_what_a_batch_gives_students_that_copy_is_decoded_once(config_for):
    configs = [
        config_for("a", "copy"),
        config_for("b", "copy", layers="0"),
        config_for("c", "copy", accumulate=2),
        config_for("d", "distill"),
    ]
    opened = open_training_data(configs, torch.device("cpu"))
    first, second, in_parts, distilled = [data.teacher for data in opened]
    assert first is second
    assert in_parts is distilled is not first
    data = opened[0]
    stream = BatchStream(data.views, data.label_S, data.order, num_steps=2)
    one, other = stream
    assert first.factors(one).layer(0) is second.factors(one).layer(0)
    assert torch.equal(first.factors(one).layer(1).q_BHTD, distilled.factors(one).layer(1).q_BHTD)
    assert torch.equal(first.factors(other).layer(0).q_BHTD, distilled.factors(other).layer(0).q_BHTD)
    (alone,) = open_training_data(configs[:1], torch.device("cpu"))
    assert type(alone.teacher) is type(distilled)


def test_a_live_teacher_runs_once_a_batch_for_all_students(config_for, tiny_weights, tmp_path):
    live = {"live_teacher": True, "weights": tiny_weights, "cache": config_for("x", "copy").cache}
    configs = [config_for(mode, mode, **live) for mode in ("copy", "distill")]
    opened = open_training_data(configs, torch.device("cpu"))
    data, runs = (
        opened[0],
        [TrainingRun(config, one, torch.device("cpu")) for config, one in zip(configs, opened, strict=True)],
    )
    ran = []
    teacher = data.teacher._teacher._run.teacher.model
    teacher.patch_embed.register_forward_hook(lambda *_: ran.append(1))
    stream = BatchStream(data.views, data.label_S, data.order, num_steps=3)
    for batch in stream:
        for run in runs:
            run.train_step(batch)
    assert len(ran) == 3
    train_sweep(configs)
    for config in configs:
        alone = replace(config, out=tmp_path / "alone" / config.out.name)
        train(alone)
        assert_same_run(config, alone)


def test_codes_are_decoded_once_whichever_student_is_first(config_for, monkeypatch):
    decoded = 0
    own = CacheTeacher.factors

    def counted(self, batch):
        nonlocal decoded
        decoded += 1
        return own(self, batch)

    monkeypatch.setattr(CacheTeacher, "factors", counted)
    train_sweep([config_for("scratch", "scratch"), config_for("copy", "copy"), config_for("copy-1", "copy", seed=1)])
    assert decoded <= 20 + 2  # two are seen before the first step
