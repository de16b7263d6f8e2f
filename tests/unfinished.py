"""Runs as processes that were killed leave them."""

from __future__ import annotations

import torch

from atcache.loader import training_batches
from atcache.pipelines.metrics import MetricsLog
from atcache.pipelines.speed import Speed
from atcache.pipelines.train import begin_run
from atcache.pipelines.training_data import open_training_data
from atcache.pipelines.training_run import Reports, TrainingRun


def take_first_steps(config, num_steps, *, saves=False, validates=False) -> None:
    """The first steps of a run; then at will a checkpoint beside those the run saves itself, and a validation."""
    device = torch.device("cpu")
    (data,) = open_training_data([config], device)
    run, speed = TrainingRun(config, data, device), Speed()
    config.out.mkdir(parents=True, exist_ok=True)
    begin_run(config, data)
    with MetricsLog(config.out, first_step=0) as metrics:
        reports = Reports(metrics=metrics)
        for batch in training_batches(
            data.views, data.label_S, data.order, first_step=0, stop_step=num_steps, workers=0
        ):
            run.take(batch, speed, reports)
        if saves:
            run.save(speed)
        if validates:
            run.validate(reports)
