"""`atcache eval`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ..pipelines.evaluate.config import EvaluateConfig
from . import options
from .fields import options_from

_PATH = click.Path(path_type=Path)


@click.command("eval")
@click.argument("run", required=False, type=_PATH)
@click.option("--ensemble", multiple=True, type=_PATH, metavar="RUN", help="Another run, averaged in; repeat for more.")
@options_from(EvaluateConfig, without=("runs",))
def evaluate(run: Path | None, ensemble: tuple[Path, ...], **config: Any) -> None:  # noqa: ANN401 - EvaluateConfig's
    """Measure a student's accuracy.

    Example:

    \b
        atcache eval runs/copy --cache in1k-val.zarr
        atcache eval runs/distill --ensemble runs/finetune --data 'val-{00..49}.tar'
    """
    from ..pipelines.evaluate.run import evaluate as run_evaluation

    runs = (*(() if run is None else (run,)), *ensemble)
    options.print_json(run_evaluation(EvaluateConfig(runs=runs, **config)).to_json())
