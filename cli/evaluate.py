"""`atcache eval`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from ..pipelines.evaluate.config import EvaluateConfig
from . import options
from .fields import options_from

if TYPE_CHECKING:
    from ..pipelines.evaluate.summary import EvaluateSummary, SetScores


@click.command("eval")
@options_from(EvaluateConfig)
def evaluate(**config: Any) -> None:  # noqa: ANN401 - one keyword a field of EvaluateConfig
    """Measure the accuracy of students, alone and together.

    Example:

    \b
        atcache eval runs/copy --cache in1k-val.zarr
        atcache eval runs/distill runs/finetune --data 'val-{00..49}.tar'
        atcache eval runs/distill runs/finetune --data val --val-data sketch=sketch --report shift.md
    """
    from ..pipelines.evaluate.run import evaluate as run_evaluation

    summary = run_evaluation(EvaluateConfig(**config))
    options.print_json(summary.to_json())
    _print_scores(summary)
    for each in summary.sets:
        _print_classes(each, is_named=len(summary.sets) > 1)


def _print_scores(summary: EvaluateSummary) -> None:
    """What the JSON holds, for people; nothing for one run on one set, whose line of JSON is short."""
    from rich.console import Console
    from rich.table import Table

    from ..pipelines.evaluate.corrupted import corruption_rows
    from ..pipelines.evaluate.report import predictors, run_names

    if len(summary.runs) == len(summary.sets) == 1:
        return
    console, names = Console(stderr=True), run_names(summary)
    table = Table()
    for column in ("set", "prediction", "samples", "top-1 %", "loss", "ECE %"):
        table.add_column(column, justify="left" if column in ("set", "prediction") else "right", no_wrap=True)
    for each in summary.sets:
        for name, score in predictors(each, names):
            top1 = f"{score.top1:.2f} ± {score.top1_error:.2f}"
            numbers = str(score.num_samples), top1, f"{score.loss:.4g}", f"{score.ece:.2f}"
            table.add_row(each.name, name, *numbers)
    console.print(table)
    for text, _, top1s in list(corruption_rows(summary))[-1:]:
        predictions = (name for name, _ in predictors(summary.sets[0], names))
        means = ", ".join(f"{name} {top1:.2f} %" for name, top1 in zip(predictions, top1s, strict=True))
        console.print(f"{text} corruptions: {means}", markup=False, soft_wrap=True)
    for each in summary.sets:
        for pair in each.pairs:
            both = " and ".join(names[run] for run in pair.runs)
            shared = (
                "none is wrong" if pair.shared_errors is None else f"{pair.shared_errors:.1f} % of the errors shared"
            )
            console.print(
                f"{each.name}: {both} predict alike for {pair.agreement:.1f} %; {shared}", markup=False, soft_wrap=True
            )


def _print_classes(each: SetScores, *, is_named: bool) -> None:
    """The classes of one prediction on one set, worst first; by the name of the set if there are several."""
    from rich.console import Console
    from rich.table import Table

    if each.score.classes is None:
        return
    titles = [each.name] * is_named + ["mean of probabilities"] * (each.mean_probabilities is not None)
    table = Table(title=": ".join(titles) or None)
    for column in ("label", "class", "samples", "top-1 %"):
        table.add_column(column, justify="left" if column == "class" else "right")
    for one in sorted(each.score.classes, key=lambda score: score.top1):
        table.add_row(str(one.label), one.name, str(one.num_samples), f"{one.top1:.2f}")
    Console(stderr=True).print(table)
