"""Runs as processes that were killed leave them."""

from __future__ import annotations

import torch

from atcache.feed.loader import training_batches
from atcache.pipelines.running.metrics import MetricsLog, Speed
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
        for batch in training_batches(
            data.views, data.label_S, data.order, first_step=0, stop_step=num_steps, workers=0
        ):
            run.take(batch, speed, reports)
        if saves:
            run.save(speed)
        if validates:
            run.validate(reports)
