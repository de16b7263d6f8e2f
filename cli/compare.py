"""`atcache compare`."""

from __future__ import annotations

from typing import Any

import click

from ..pipelines.compare.config import CompareConfig
from . import options
from .fields import options_from


@click.command()
@options_from(CompareConfig)
def compare(**config: Any) -> None:  # noqa: ANN401 - one keyword a field of CompareConfig
    """Say how near the maps of two caches are to each other.

    For two teachers, two codecs, or a teacher and its student. Compares the views that both caches have, which must
    show the same images, and prints tables with a row a layer and a column a head of A.

    Example:

    \b
        atcache compare teacher.zarr student.zarr
        atcache compare dino.zarr mae.zarr --match-heads --out compare.png
    """
    from ..pipelines.compare.run import compare as run_compare
    from .tables import print_tables, table_lines

    summary = run_compare(CompareConfig(**config))
    click.echo(f"A = {summary.a}, B = {summary.b}: means over {summary.num_views} views", err=True)
    if config["match_heads"]:
        for line in table_lines("head of B", summary.layers, summary.heads, summary.heads_b):
            click.echo(line, err=True)
    print_tables(summary.tables(), summary.layers, summary.heads)
    if summary.worst:
        click.echo("\nviews with the largest KL, mean over layers and heads, nats", err=True)
    for far in summary.worst:
        click.echo(f"{far.kl_nats:>8.3g}  {far.sample_key}, view {far.view}", err=True)
    click.echo("\nmean over layers and heads", err=True)
    for table in summary.tables():
        click.echo(f"{summary.mean[table.name]:>8.3g}  {table.title}", err=True)
    for note in summary.notes:
        click.echo(note, err=True)
    options.print_json(summary.to_json())
