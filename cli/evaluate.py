"""`atcache eval`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from ..pipelines.evaluate.config import EvaluateConfig
from . import options
from .fields import options_from

if TYPE_CHECKING:
    from ..pipelines.evaluate.summary import EvaluateSummary


@click.command("eval")
@options_from(EvaluateConfig)
def evaluate(**config: Any) -> None:  # noqa: ANN401 - one keyword a field of EvaluateConfig
    """Measure the accuracy and calibration of finished runs.

    Several runs are scored alone, averaged, and in pairs. The scores go to standard output as one line of JSON, and
    tables of them to standard error.

    Example:

    \b
        atcache eval runs/copy --cache in1k-val.zarr
        atcache eval runs/distill runs/finetune --data 'val-{00..49}.tar'
        atcache eval runs/distill runs/finetune --data tars/val --val-data sketch=tars/sketch --report shift.md
    """
    from ..pipelines.evaluate.run import score_runs, write_report

    asked = EvaluateConfig(**config)
    summary = score_runs(asked)
    # Before the report, which may fail: a full disk must not cost the scores.
    options.print_json(summary.to_json())
    _print_scores(summary)
    _print_classes(summary)
    write_report(asked, summary)


def _print_scores(summary: EvaluateSummary) -> None:
    """What the JSON holds, for people; nothing for one run on one set, whose line of JSON is short."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from ..pipelines.evaluate.corrupted import corruption_rows
    from ..pipelines.evaluate.report import predictors, run_names

    if len(summary.runs) == len(summary.sets) == 1:
        return
    console, names = Console(stderr=True), run_names(summary)
    table = Table()
    for column in ("set", "prediction", "samples", "top-1 %", "loss", "ECE %"):
        is_text = column in ("set", "prediction")
        # A long name goes on in the next line; numbers never do.
        table.add_column(column, justify="left" if is_text else "right", no_wrap=not is_text, overflow="fold")
    for each in summary.sets:
        for name, score in predictors(each, names):
            top1 = f"{score.top1:.2f} ± {score.top1_error:.2f}"
            numbers = str(score.num_samples), top1, f"{score.loss:.4g}", f"{score.ece:.2f}"
            table.add_row(each.name, escape(name), *numbers)
    console.print(table)
    rows = list(corruption_rows(summary))
    for text, severities, top1s in rows[-1:]:
        predictions = (name for name, _ in predictors(summary.sets[0], names))
        means = ", ".join(f"{name} {top1:.2f} %" for name, top1 in zip(predictions, top1s, strict=True))
        of_which = f"{text} corruptions" if len(rows) > 1 else f"{text} (severity {severities})"
        console.print(f"{of_which}: {means}", markup=False, soft_wrap=True)
    for each in summary.sets:
        for pair in each.pairs:
            both = " and ".join(names[run] for run in pair.runs)
            shared = (
                "none is wrong" if pair.shared_errors is None else f"{pair.shared_errors:.1f} % of the errors shared"
            )
            console.print(
                f"{each.name}: {both} predict alike for {pair.agreement:.1f} %; {shared}", markup=False, soft_wrap=True
            )


def _print_classes(summary: EvaluateSummary) -> None:
    """The classes of each set, a column a prediction; by the name of the set if there are several."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from ..pipelines.evaluate.report import class_rows, predictors, run_names

    names = run_names(summary)
    for each in summary.sets:
        if each.score.classes is None:
            continue
        table = Table(title=each.name if len(summary.sets) > 1 else None)
        for column in ("label", "class", "samples"):
            table.add_column(column, justify="left" if column == "class" else "right")
        for name, _ in predictors(each, names):
            table.add_column("top-1 %" if len(names) == 1 else escape(name), justify="right", overflow="fold")
        for row in class_rows(each, names):
            table.add_row(*map(escape, row))
        Console(stderr=True).print(table)
