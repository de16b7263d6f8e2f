"""`atcache eval`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from . import options

_PATH = click.Path(path_type=Path)


@click.command("eval")
@click.argument("run", required=False, type=_PATH)
@click.option("--ensemble", multiple=True, type=_PATH, metavar="RUN", help="Another run, averaged in; repeat for more.")
@options.several(
    "--cache",
    type=options.LOCATION,
    help="A validation cache, or several as one; copying students take their maps from it.",
)
@options.several(
    "--data",
    metavar="TARS",
    help="Validation images, or where the caches' tars now are; may be given more than once.",
)
@click.option("--live-teacher", is_flag=True, help="Run the teacher for copying students instead of reading its maps.")
@click.option("--weights", type=_PATH, help="The live teacher's weights; without it, timm's.")
@click.option("--batch-size", default=256, show_default=True, help="Samples a forward.")
@click.option("--workers", default=0, show_default=True, help="Processes that read ahead.")
@options.device
@options.precision
def evaluate(run: Path | None, ensemble: tuple[Path, ...], **config: Any) -> None:  # noqa: ANN401 - EvaluateConfig's
    """Measure a student's accuracy.

    Example:

    \b
        atcache eval runs/copy --cache in1k-val.zarr
        atcache eval runs/distill --ensemble runs/finetune --data 'val-{00..49}.tar'
    """
    from ..pipelines.train.evaluate import EvaluateConfig
    from ..pipelines.train.evaluate import evaluate as run_evaluation

    runs = (*(() if run is None else (run,)), *ensemble)
    options.print_json(run_evaluation(EvaluateConfig(runs=runs, **config)).to_json())
