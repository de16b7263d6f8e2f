"""Train, and then write the reports: what `atcache train` does."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from ..running.ranks import Ranks
from ..train.config import TrainConfig
from ..train.run import train as run_train, train_sweep as run_train_sweep
from ..train.summary import SweepResult, TrainSummary
from .config import REPORT_FILE, ReportConfig
from .run import report


def train(config: TrainConfig) -> TrainSummary:
    """Train a student, or continue a run that was stopped; at the end, write its report.

    Raises:
        AtcacheError: see `pipelines.train.run.train`. A report that fails is no error: the run is whole without it.
    """
    summary = run_train(config)
    _report_on(config)
    return summary


def train_sweep(configs: Sequence[TrainConfig]) -> list[SweepResult]:
    """Train several students from one stream of batches; at the end, write a report of each that was finished.

    Raises:
        AtcacheError: see `pipelines.train.run.train_sweep`.
    """
    results = run_train_sweep(configs)
    for config, result in zip(configs, results, strict=True):
        if result.summary is not None:
            _report_on(config)
    return results


def _report_on(config: TrainConfig) -> None:
    """Write the report of a finished run, if it is wanted and not there yet; one process of several does."""
    ranks = Ranks.from_environment()
    if not (config.report and ranks.leads) or (config.out / REPORT_FILE).exists():
        return
    log = logging.getLogger(__name__)
    asked = ReportConfig(run=config.out, device=ranks.device_name(config.device), precision=config.precision)
    try:
        written = report(asked)
    except Exception as error:  # whatever it is: hours of training must not end with it
        log.warning(
            f"NOTE: the run is finished and whole, but its report was not written: {type(error).__name__}: {error} "
            f"Try `atcache report {config.out}`, or give --no-report."
        )
        return
    log.info(f"report: {written.out} ({written.seconds:.0f} s)")
