"""Training runs for tests: stopped as killed processes leave them, and compared by their weights."""

from __future__ import annotations

import pickle
import signal
import subprocess
import sys

import torch
from safetensors.torch import load_file

from atcache.feed.loader import BatchStream
from atcache.pipelines.running.metrics import MetricsLog, Speed, read_metrics
from atcache.pipelines.train.data import open_training_data
from atcache.pipelines.train.run import begin_run
from atcache.pipelines.train.student_run import Reports, TrainingRun


def take_first_steps(config, num_steps, *, saves=False, validates=False) -> None:
    """The first steps of a run; then at will a checkpoint beside those the run saves itself, and a validation."""
    device = torch.device("cpu")
    (data,) = open_training_data([config], device)
    run, speed = TrainingRun(config, data, device), Speed()
    config.out.mkdir(parents=True, exist_ok=True)
    begin_run(config, data)
    with MetricsLog(config.out, first_step=0) as metrics:
        reports = Reports(metrics=metrics)
        for batch in BatchStream(data.views, data.label_S, data.order, num_steps=num_steps):
            run.take(batch, speed, reports)
        if saves:
            run.save(speed)
        if validates:
            run.validate(reports)


KILLED = """
import os, pickle, signal, sys, threading, time

def kill_this_process_when(checkpoint, metrics):
    while not (checkpoint.exists() and '"step": 20' in metrics.read_text()):
        time.sleep(0.0005)
    os.kill(os.getpid(), signal.SIGKILL)

config = pickle.load(sys.stdin.buffer)
files = (config.out / "checkpoint.pt", config.out / "metrics.jsonl")
threading.Thread(target=kill_this_process_when, args=files, daemon=True).start()
from atcache.pipelines.train.run import train
train(config)
"""


def run_until_killed(config):
    """Start the run in a process that kills itself between the first checkpoint and the end."""
    done = subprocess.run([sys.executable, "-c", KILLED], input=pickle.dumps(config), capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    assert (config.out / "checkpoint.pt").exists()
    assert not (config.out / "model.safetensors").exists()


def weights_of(config) -> dict[str, torch.Tensor]:
    return load_file(config.out / "model.safetensors")


def assert_equal_weights(config, other):
    ours, theirs = weights_of(config), weights_of(other)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


CPU = torch.device("cpu")


def losses_of(config) -> list[float]:
    return [row["loss"] for row in read_metrics(config.out, "train")]


def training_of(config) -> TrainingRun:
    """The state of a run before its first step."""
    (data,) = open_training_data([config], CPU)
    return TrainingRun(config, data, CPU)


def batches_of(run, stop_step=1):
    """The first batches of a run's stream."""
    data = run.data
    return iter(BatchStream(data.views, data.label_S, data.order, num_steps=stop_step))


def images_of(run, batch) -> torch.Tensor:
    """The student's input, normalised by hand."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (run.student.input.mean, run.student.input.std))
    return (batch.pixels_BHWC.permute(0, 3, 1, 2) / 255 - mean) / std
