"""Ctrl-C and SIGTERM save what was trained, and the same command goes on there; a failed validation loses nothing."""

from __future__ import annotations

import io
import os
import pickle
import re
import signal
import subprocess
import sys
import tarfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial

import pytest
import torch
from safetensors.torch import load_file
from training_runs import take_first_steps

from atcache.errors import BadImageError
from atcache.pipelines.pretrain.config import PretrainConfig
from atcache.pipelines.pretrain.run import pretrain
from atcache.pipelines.running.interrupts import Interrupts
from atcache.pipelines.running.metrics import read_metrics
from atcache.pipelines.train.config import TrainConfig
from atcache.pipelines.train.run import train, train_sweep

STARTED = """
import pickle, sys
from atcache.cli.main import LazyGroup
from atcache.pipelines.pretrain.run import pretrain
from atcache.pipelines.train.run import train, train_sweep

function, given = pickle.load(sys.stdin.buffer)
LazyGroup(lazy_commands={}, invoke_without_command=True, callback=lambda: globals()[function](given))(args=[])
"""
"""A command's process, but for its parsing of options."""
VERY_LONG = 1_000_000


@pytest.fixture
def config_for(tiny_cache, tmp_path):
    """A function: folder's name and fields -> the config of a run."""

    def config_for(name, **fields) -> TrainConfig:
        common = {"mode": "copy", "cache": tiny_cache(), "out": tmp_path / name, "batch_size": 24, "validate_every": 0}
        recipe = {"base_lr": 2e-2, "warmup_epochs": 1.0, "drop_path": 0.2, "device": "cpu", "precision": "fp32"}
        return TrainConfig(**{**common, **recipe, **fields})

    return config_for


def stop_with(number, function, given, folder, until="step") -> tuple[int, str]:
    """Start it in a process, send it a signal when its metrics say so; its exit code and what it wrote to stderr."""
    with subprocess.Popen(
        [sys.executable, "-c", STARTED],
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    ) as process:
        process.stdin.write(pickle.dumps((function, given)))
        process.stdin.flush()
        metrics = folder / "metrics.jsonl"
        give_up_s = time.monotonic() + 120
        while not (metrics.exists() and until in metrics.read_text()):
            assert process.poll() is None, process.stderr.read().decode()
            assert time.monotonic() < give_up_s
            time.sleep(0.005)
        os.killpg(process.pid, number)  # as a terminal does: workers get it too
        said = process.communicate(timeout=120)[1].decode()
    return process.returncode, said


def saved_step(said) -> int:
    """The step that a run says it was saved after."""
    found = re.search(r"^stopped after step (\d+), which is saved$", said, re.MULTILINE)
    assert found, said
    return int(found[1])


def assert_same_weights(config, other):
    ours, theirs = (load_file(c.out / "model.safetensors") for c in (config, other))
    assert [name for name in theirs if not theirs[name].equal(ours[name])] == []


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_that_was_stopped_is_saved_and_goes_on_there(workers, config_for, capsys):
    whole = config_for("whole", steps=600)
    stopped = replace(whole, out=whole.out.with_name("stopped"), workers=workers)
    status, said = stop_with(signal.SIGINT, "train", stopped, stopped.out)
    assert status == 130
    lines, step = said.splitlines(), saved_step(said)
    assert "Stopping after this step. Ctrl-C again stops at once, without saving it." in lines
    assert lines[-1] == "Stopped. What was stored stays; type the same command again to continue."
    assert "Traceback" not in said
    assert 10 <= step < 600
    train(whole)
    capsys.readouterr()
    train(stopped)
    assert f"continuing after step {step} of 600\n" in capsys.readouterr().err
    assert_same_weights(stopped, whole)
    losses, expected = ([row["loss"] for row in read_metrics(config.out, "train")] for config in (stopped, whole))
    assert losses == expected


def test_sigterm_to_all_processes_saves_too(config_for):
    config = config_for("evicted", steps=VERY_LONG, workers=2)
    status, said = stop_with(signal.SIGTERM, "train", config, config.out)
    assert status == 143
    assert "which is saved" in said
    assert (config.out / "checkpoint.pt").exists()


def test_a_run_that_ends_in_its_last_validation_goes_on_there(config_for, digits_tars, tmp_path):
    last = str(digits_tars[2])
    many = [tmp_path / f"copy-{number:04d}.tar" for number in range(1000)]  # the same samples under other names
    for link in many:
        link.symlink_to(last)
    config = config_for("run", steps=20, mode="scratch", val_data=tuple(map(str, many)))
    status, said = stop_with(signal.SIGINT, "train", config, config.out, until='"step": 20')
    assert (status, saved_step(said)) == (130, 20)
    summary = train(replace(config, val_data=last))
    assert summary.validation.num_samples == 16
    assert summary.img_per_s > 0


def test_a_sweep_saves_all_its_students(config_for):
    configs = [config_for(f"seed-{seed}", seed=seed, order_seed=0, steps=VERY_LONG) for seed in range(2)]
    status, said = stop_with(signal.SIGINT, "train_sweep", configs, configs[0].out)
    assert status == 130
    saved = [line for line in said.splitlines() if line.endswith("which is saved")]
    assert [line.partition(":")[0] for line in saved] == ["seed-0", "seed-1"]
    assert len({line.partition(":")[2] for line in saved}) == 1
    assert all((config.out / "checkpoint.pt").exists() for config in configs)


def test_a_teacher_that_was_stopped_is_saved_and_goes_on_there(digits_tars, tiny_vit, tmp_path, capsys):
    common = {"model": tiny_vit, "data": str(digits_tars[0].parent), "batch_size": 16, "decoder_dim": 16}
    whole = PretrainConfig(**common, out=tmp_path / "whole", steps=500, decoder_depth=1, device="cpu", precision="fp32")
    stopped = replace(whole, out=tmp_path / "stopped")
    status, said = stop_with(signal.SIGINT, "pretrain", stopped, stopped.out)
    assert status == 130
    step = int(
        next(line for line in said.splitlines() if line.startswith("stopped after step ")).split()[3].rstrip(",")
    )
    pretrain(whole)
    capsys.readouterr()
    pretrain(stopped)
    assert f"continuing after step {step} of 500\n" in capsys.readouterr().err
    assert_same_weights(stopped, whole)
    losses, expected = ([row["loss"] for row in read_metrics(config.out)] for config in (stopped, whole))
    assert losses == expected


@pytest.fixture
def bad_tar(digits_tars, tmp_path):
    """Digits, of which one is no image."""
    path = tmp_path / "bad.tar"
    with tarfile.open(digits_tars[1]) as good, tarfile.open(path, "w") as bad:
        for member in good.getmembers():
            content = good.extractfile(member).read()
            content = b"x" * len(content) if member.name == "digit-00020.png" else content
            bad.addfile(member, io.BytesIO(content))
    return path


@pytest.mark.parametrize("replacement", ["other", "none"])
def test_a_bad_validation_image_loses_no_training(replacement, config_for, bad_tar, digits_tars, capsys):
    config = config_for("run", mode="scratch", steps=30, val_data=str(bad_tar))
    for _ in range(2):  # typed again it fails again, without another step
        with pytest.raises(BadImageError):
            train(config)
    assert "continuing after step 30 of 30" in capsys.readouterr().err
    data = str(digits_tars[2]) if replacement == "other" else None
    summary = train(replace(config, val_data=data))
    plain = config_for("plain", mode="scratch", steps=30)
    train(plain)
    assert_same_weights(config, plain)
    assert (summary.validation is None) == (replacement == "none")
    assert [row["step"] for row in read_metrics(config.out)] == [10, 20, 30, *([30] if data else [])]


def test_a_sweep_loses_no_step_of_others_to_a_failed_validation(config_for, bad_tar):
    common = {"mode": "scratch", "steps": 30, "val_data": str(bad_tar), "order_seed": 0}
    often, never = config_for("often", validate_every=5, **common), config_for("never", **common)
    with pytest.raises(BadImageError):
        train_sweep([often, never])
    steps = [torch.load(config.out / "checkpoint.pt")["step"] for config in (often, never)]
    assert steps == [10, 10]


def test_a_stopped_validation_is_done_again(config_for, bad_tar, digits_tars):
    config = config_for("run", mode="scratch", steps=30, validate_every=5, val_data=str(bad_tar))
    with pytest.raises(BadImageError):
        train(config)
    repaired = replace(config, val_data=str(digits_tars[2]))
    train(repaired)
    steps = [10, 10, 20, 20, 30, 30]
    assert [row["step"] for row in read_metrics(config.out)] == steps
    assert shown_steps(config, "validation/top1") == steps[::2]
    assert shown_steps(config, "train/loss") == steps[::2]


def shown_steps(config, name) -> list[int]:
    """The steps that TensorBoard shows."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(config.out))
    events.Reload()
    return [event.step for event in events.Scalars(name)]


def test_a_finished_validation_is_not_done_again(config_for, digits_tars, capsys):
    config = config_for("run", mode="scratch", steps=30, validate_every=5, val_data=str(digits_tars[2]))
    take_first_steps(config, 10, validates=True)
    before = (config.out / "metrics.jsonl").read_text()
    train(replace(config, validate_every=0))
    assert (config.out / "metrics.jsonl").read_text().startswith(before)
    assert "epoch 5:" not in capsys.readouterr().err


@pytest.fixture
def ctrl_c():
    """Python's own handler of Ctrl-C: whoever runs the tests in the background may have had it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield signal.default_int_handler
    signal.signal(signal.SIGINT, before)


def test_interrupts_are_received_only_meanwhile(ctrl_c):
    before = signal.getsignal(signal.SIGTERM)
    with Interrupts() as interrupts:
        signal.raise_signal(signal.SIGTERM)
        assert interrupts.came
        with pytest.raises(SystemExit, match="143"), interrupts.at_once():
            pytest.fail("ends before")
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)  # the second ends at once
    with Interrupts(heeded=False) as interrupts:
        signal.raise_signal(signal.SIGINT)
        assert not interrupts.came
    assert signal.getsignal(signal.SIGINT) is ctrl_c
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.usefixtures("ctrl_c")
def test_an_ignored_signal_stays_ignored():
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with Interrupts() as interrupts:
        signal.raise_signal(signal.SIGINT)
        assert not interrupts.came


def test_a_run_in_another_thread_trains_without_them(config_for):
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(train, config_for("short", steps=2)).result().steps == 2


def test_a_reader_of_stderr_that_has_gone_costs_nothing(config_for):
    config = config_for("run", steps=VERY_LONG)
    read, write = os.pipe()
    process = subprocess.Popen([sys.executable, "-c", STARTED], stdin=subprocess.PIPE, stderr=write)
    os.close(write)
    os.close(read)
    with process:
        process.stdin.write(pickle.dumps(("train", config)))
        process.stdin.flush()
        metrics = config.out / "metrics.jsonl"
        while not (metrics.exists() and metrics.read_text()):
            assert process.poll() is None
            time.sleep(0.005)
        process.send_signal(signal.SIGTERM)
        process.wait(60)
    assert (config.out / "checkpoint.pt").exists()
