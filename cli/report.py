"""`atcache report`."""

from __future__ import annotations

from typing import Any

import click

from ..pipelines.report.config import ReportConfig
from . import options
from .fields import options_from


@click.command()
@options_from(ReportConfig)
def report(**config: Any) -> None:  # noqa: ANN401 - one keyword a field of ReportConfig
    """Write a page about a finished run: curves, accuracy, maps and mistakes.

    The page is one file that needs no server. `atcache train` writes one at its end.

    Example:

    \b
        atcache report runs/distill
        atcache report runs/distill --val-cache in1k-val.zarr --out distill.html
    """
    from ..pipelines.report.run import report as run_report

    summary = run_report(ReportConfig(**config))
    for note in summary.notes:
        click.echo(note, err=True)
    options.print_json(summary.to_json())
