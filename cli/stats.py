"""`atcache stats`."""

from __future__ import annotations

from typing import Any

import click

from ..pipelines.stats.config import StatsConfig
from . import options
from .fields import options_from


@click.command()
@options_from(StatsConfig)
def stats(**config: Any) -> None:  # noqa: ANN401 - one keyword a field of StatsConfig
    """Show what each layer and head attends to, in a few numbers.

    Prints tables with a row a layer and a column a head, such as the entropy of the attention, its share on prefix
    tokens, and how far patches look. They are means over some views; the JSON has their standard errors, too.

    Example:

    \b
        atcache stats in1k.zarr
        atcache stats in1k.zarr --all --sample 1000 --out stats.png --out stats.csv
        atcache stats in1k.zarr --sample 10000 --scheduler tcp://HOST:8786
    """
    from ..pipelines.stats.run import stats as run_stats
    from .tables import print_tables

    summary = run_stats(StatsConfig(**config))
    click.echo(f"{summary.path}: means over {summary.num_views} views", err=True)
    print_tables(summary.tables(), summary.layers, summary.heads)
    options.print_json(summary.to_json())
