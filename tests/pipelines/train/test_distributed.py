"""Two processes under torchrun train what one process trains; one that dies takes the other along."""

from __future__ import annotations

import json
import os
import signal
import time
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from processes import in_two_processes, rank_of, start, workers_of
from safetensors.torch import load_file

from atcache.cli.main import cli
from atcache.errors import ConfigError
from atcache.feed.loader import BatchStream
from atcache.feed.order import SampleOrder
from atcache.pipelines.running.metrics import read_metrics
from atcache.pipelines.running.ranks import Ranks
from atcache.pipelines.train.config import TrainConfig
from atcache.pipelines.train.data import open_training_data
from atcache.pipelines.train.run import train, train_sweep
from atcache.pipelines.train.student_run import TrainingRun


@pytest.fixture
def config_for(tiny_cache, digits_tars, tmp_path):
    """A function: folder, mode and fields -> the config of a short run, validated at its end."""

    def config_for(name, mode, **fields) -> TrainConfig:
        cache = tiny_cache(views=2)
        val = {"val_cache": tiny_cache(policy="eval")} if mode == "copy" else {"val_data": str(digits_tars[2])}
        common = {"cache": cache, "steps": 20, "batch_size": 24, "validate_every": 0, "warmup_epochs": 0.0}
        place = {"device": "cpu", "precision": "fp32"}
        return TrainConfig(mode=mode, out=tmp_path / name, **{**common, **val, **place, **fields})

    return config_for


def options_of(config) -> list[str]:
    """The command line, after the program, of what differs from the defaults."""
    default = TrainConfig(mode=config.mode, out=config.out, cache=config.cache)
    names = ["mode", "out", "cache"] + [
        name
        for name in TrainConfig.__dataclass_fields__
        if getattr(config, name) != getattr(default, name) and name not in ("mode", "out", "cache")
    ]
    pairs = [(f"--{name.replace('_', '-')}", str(getattr(config, name))) for name in names]
    return ["train", *(word for pair in pairs for word in pair)]


def losses_of(config, kind="train"):
    return [row["loss"] for row in read_metrics(config.out, kind)]


def assert_close_weights(config, other):
    ours, theirs = (load_file(c.out / "model.safetensors") for c in (config, other))
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-3, atol=1e-4)


CLI_THAT_LOOKS_AT_ITS_THREADS = """
import sys
from pathlib import Path
from atcache.cli.main import cli

cli(standalone_mode=False)
names = [file.read_text() for file in Path("/proc/self/task").glob("*/comm")]
sys.exit(f"threads are left: {names}" if any("gloo" in name for name in names) else 0)
"""
"""One that is left may be at work when the interpreter ends, which then aborts the process, once in a dozen runs."""
WHOLE_RECIPE = {"accumulate": 2, "clip_grad": 1.0, "ema": 0.9, "layer_decay": 0.75, "student_jitter": 0.4}


def test_torchrun_trains_what_one_process_trains(config_for, tmp_path):
    one, two = (config_for(name, "copy", **WHOLE_RECIPE) for name in ("one", "two"))
    expected = train(one)
    script = tmp_path / "cli.py"
    script.write_text(CLI_THAT_LOOKS_AT_ITS_THREADS)
    process = start([str(script), *options_of(two)])
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 0, stderr
    (line,) = stdout.splitlines()
    summary = json.loads(line)
    assert_same_run(two, one)
    assert summary["validation"]["num_samples"] == expected.validation.num_samples
    assert summary["validation"]["loss"] == pytest.approx(expected.validation.loss, rel=1e-4)
    assert summary["validation"]["top1"] == pytest.approx(expected.validation.top1, abs=100 / 24)
    assert stderr.count("20/20 steps") == 1
    # What two have ended is ended for one too: it is the same run.
    assert train(two).to_json() == summary


def assert_same_run(config, other):
    assert len(losses_of(config)) == config.steps // 10
    assert losses_of(config) == pytest.approx(losses_of(other), rel=1e-5)
    assert_close_weights(config, other)


def test_distilling_in_two_processes_is_distilling_in_one(config_for):
    one, two = (config_for(name, "distill", workers=1) for name in ("one", "two"))
    train(one)
    assert in_two_processes(partial(train, two)) == [0, 0]
    assert_same_run(two, one)


def _train_traced(config):
    TrainingRun.backend = "aot_eager"  # machine code would take a minute
    train(config)


def test_compiled_students_in_two_processes_are_one_students(config_for):
    one, two = (config_for(name, "copy", accumulate=2) for name in ("one", "two"))
    train(one)
    assert in_two_processes(partial(_train_traced, replace(two, compile=True))) == [0, 0]
    assert_same_run(two, one)


@pytest.mark.parametrize("mode", ["copy", "distill"])
def test_gradients_of_a_block_are_there_before_those_of_the_block_below(config_for, mode):
    """So they are averaged while others are still computed."""
    config = config_for("run", mode)
    (data,) = open_training_data([config], torch.device("cpu"))
    run, told = TrainingRun(config, data, torch.device("cpu")), []
    for name, weight in run.student.model.named_parameters():
        weight.register_post_accumulate_grad_hook(lambda _, name=name: told.append(name.split(".")))
    run.train_step(next(iter(BatchStream(data.views, data.label_S, data.order, num_steps=1))))
    blocks = [int(parts[1]) for parts in told if parts[0] == "blocks"]
    assert blocks == sorted(blocks, reverse=True)
    assert set(blocks) == {0, 1}


def test_copying_values_too_in_two_processes_is_copying_them_in_one(config_for, tiny_cache):
    # What comes before the first layer's projection gets no gradient then, and must not be waited for.
    caches = {"cache": tiny_cache(views=2, store="v"), "val_cache": tiny_cache(policy="eval", store="v")}
    one, two = (config_for(name, "copy", what="qkv", **caches) for name in ("one", "two"))
    train(one)
    assert in_two_processes(partial(train, two)) == [0, 0]
    assert_same_run(two, one)


def test_two_processes_learn_from_several_caches_what_one_learns(config_for, tiny_cache, digits_tars):
    parts = (str(digits_tars[0].parent / "digits-{0000..0001}.tar"), str(digits_tars[2]))
    paths = tuple(tiny_cache(codec=codec, data=data) for codec, data in zip(("exact", "int8"), parts, strict=True))
    one, two = (config_for(name, "copy", cache=paths, workers=1, shuffle="block") for name in ("one", "two"))
    train(one)
    assert in_two_processes(partial(train, two)) == [0, 0]
    assert_same_run(two, one)


def test_each_rank_drops_paths_of_its_own_and_the_same_ones_again(config_for):
    first, again, one = (config_for(name, "scratch", drop_path=0.5) for name in ("first", "again", "one"))
    for config in (first, again):
        assert in_two_processes(partial(train, config)) == [0, 0]
    train(one)
    assert losses_of(first) == losses_of(again)
    assert losses_of(first) != pytest.approx(losses_of(one), rel=1e-5)


def test_weights_that_get_no_gradient_are_not_waited_for(config_for, tiny_vit):
    config = config_for("run", "scratch", student=f"{tiny_vit},class_token=True", steps=2)
    (data,) = open_training_data([config], torch.device("cpu"))
    run = TrainingRun(config, data, torch.device("cpu"), Ranks())
    run.student.model.register_parameter("unused", torch.nn.Parameter(torch.zeros(3)))
    (batch,) = BatchStream(data.views, data.label_S, data.order, num_steps=1)
    run._freeze_what_is_unused(batch)
    assert [name for name, weight in run.student.model.named_parameters() if not weight.requires_grad] == ["unused"]


def test_a_killed_process_ends_the_run_and_the_next_continues_it(config_for):
    whole, killed = (config_for(name, "copy", steps=200, checkpoint_every=40) for name in ("whole", "killed"))
    train(whole)
    process = start(["-m", "atcache.cli.main", *options_of(killed)])
    wait_for(killed.out / "checkpoint.pt", process)
    (victim,) = [pid for pid in workers_of(process.pid) if rank_of(pid) == 1]
    os.kill(victim, signal.SIGKILL)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "SIGKILL" in stderr
    assert not (killed.out / "model.safetensors").exists()
    assert in_two_processes(partial(train, killed)) == [0, 0]
    assert losses_of(killed) == pytest.approx(losses_of(whole), rel=1e-3)


def test_a_run_that_is_told_to_end_is_saved_by_its_leader(config_for):
    config = config_for("evicted", "copy", steps=1_000_000)
    process = start(["-m", "atcache.cli.main", *options_of(config)])
    wait_for(config.out / "metrics.jsonl", process)
    process.send_signal(signal.SIGTERM)  # torchrun hands it to its workers
    _, stderr = process.communicate(timeout=60)
    assert process.returncode != 0
    saved = torch.load(config.out / "checkpoint.pt")["step"]
    assert saved > 0
    assert stderr.count("stopped after step") == stderr.count(f"stopped after step {saved}, which is saved") == 1


def wait_for(path, process):
    """Until a process has written something there."""
    stop_s = time.monotonic() + 90
    while not (path.exists() and path.stat().st_size):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < stop_s
        time.sleep(0.005)


def test_an_error_in_the_folder_is_told_once_by_the_leader(config_for, capfd):
    config = config_for("run", "copy")
    config.out.mkdir()
    (config.out / "run.json").write_text("{")
    assert in_two_processes(partial(train, config)) == [3, 1]
    error = capfd.readouterr().err
    assert error.count("told:") == error.count("run.json is damaged") == 1


def _fails_on_rank_1():
    if Ranks.from_environment().rank == 1:
        raise ConfigError("here is no cache.")


def _all_try_and_one_fails():
    ranks = Ranks.from_environment()
    with ranks.connected(torch.device("cpu")):
        ranks.on_all(_fails_on_rank_1)


def _rank_1_leaves():
    ranks = Ranks.from_environment()
    with ranks.connected(torch.device("cpu")):
        ranks.sum(torch.ones(1))
        if ranks.rank == 1:
            os._exit(7)
        ranks.sum(torch.ones(1))


def test_an_error_of_any_rank_is_told_by_the_leader(capfd):
    assert in_two_processes(_all_try_and_one_fails) == [3, 1]
    assert capfd.readouterr().err.count("told: here is no cache.") == 1


def test_who_loses_the_other_process_says_so(capfd):
    assert in_two_processes(_rank_1_leaves) == [3, 7]
    assert "told: another process of this run has ended or does not answer" in capfd.readouterr().err


@pytest.fixture
def as_leader_of_two(monkeypatch, tiny_cache):
    tiny_cache()  # built before, or building would look for the second process
    for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)


@pytest.mark.usefixtures("as_leader_of_two")
def test_a_batch_that_ranks_cannot_share_is_refused(config_for):
    with pytest.raises(ConfigError, match=r"batch_size=25 cannot be cut into equal parts for 2 processes\. Give a"):
        train(config_for("odd", "copy", batch_size=25))
    with pytest.raises(ConfigError, match=r"batch_size=9 .* 2 processes x accumulate=3\. Give a multiple of 6"):
        train(config_for("nine", "copy", batch_size=9, accumulate=3))


@pytest.mark.usefixtures("as_leader_of_two")
def test_what_runs_in_one_process_is_refused_in_several(config_for, tmp_path):
    done = CliRunner().invoke(cli, ["info", str(tmp_path)])
    assert done.exit_code == 1
    assert "`atcache info` runs in one process but was started in 2: call it without torchrun." in done.stderr
    with pytest.raises(ConfigError, match="`atcache train --sweep` runs in one process"):
        train_sweep([config_for("run", "copy")])
    with pytest.raises(ConfigError, match="device 'cuda:1' would be used by every process: give auto, cpu or cuda"):
        Ranks.from_environment().device_name("cuda:1")


def test_the_ranks_parts_are_the_batch_of_one_process():
    order = SampleOrder(sample_S=np.arange(10, 31), seed=3, batch_size=6)
    parts = [replace(order, rank=rank, num_ranks=3) for rank in range(3)]
    for step in range(9):
        assert [pair for part in parts for pair in part.batch(step)] == order.batch(step)
        assert [len(part.batch(step)) for part in parts] == [2, 2, 2]
