"""`atcache eval`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ..pipelines.evaluate.config import EvaluateConfig
from . import options
from .fields import options_from
from .paths import PATH


@click.command("eval")
@options_from(EvaluateConfig)
@click.option("--ensemble", multiple=True, type=PATH, metavar="RUN", help="Another run to average; repeat for more.")
def evaluate(runs: tuple[Path, ...], ensemble: tuple[Path, ...], **config: Any) -> None:  # noqa: ANN401 - EvaluateConfig's
    """Measure a student's accuracy.

    Example:

    \b
        atcache eval runs/copy --cache in1k-val.zarr
        atcache eval runs/distill --ensemble runs/finetune --data 'val-{00..49}.tar'
    """
    from ..pipelines.evaluate.run import evaluate as run_evaluation

    options.print_json(run_evaluation(EvaluateConfig(runs=(*runs, *ensemble), **config)).to_json())
