"""`atcache eval`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..pipelines.evaluate.config import EvaluateConfig
from . import options
from .fields import options_from
from .paths import PATH

if TYPE_CHECKING:
    from ..pipelines.train.validation import ClassScore


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

    summary = run_evaluation(EvaluateConfig(runs=(*runs, *ensemble), **config))
    options.print_json(summary.to_json())
    if summary.score.classes is not None:
        _print_table(summary.score.classes)


def _print_table(classes: tuple[ClassScore, ...]) -> None:
    """The classes, worst first."""
    from rich.console import Console
    from rich.table import Table

    table = Table()
    for column in ("label", "class", "samples", "top-1 %"):
        table.add_column(column, justify="left" if column == "class" else "right")
    for one in sorted(classes, key=lambda score: score.top1):
        table.add_row(str(one.label), one.name, str(one.num_samples), f"{one.top1:.2f}")
    Console(stderr=True).print(table)
