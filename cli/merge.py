"""`atcache merge`."""

from __future__ import annotations

from typing import Any

import click

from ..pipelines.merge.config import MergeConfig
from . import options
from .fields import options_from


@click.command()
@options_from(MergeConfig)
def merge(**config: Any) -> None:  # noqa: ANN401 - one keyword a field of MergeConfig
    """Join caches of parts of a dataset, made on different machines.

    All parts have the same options, --samples-per-shard included, and all but the first --codec-from the first. Their
    shards are linked where the disk allows it, else copied; the parts stay as they are.

    Example:

    \b
        atcache merge part-0.zarr part-1.zarr part-2.zarr --out in1k.zarr
    """
    from ..pipelines.merge.run import merge as run_merge

    summary = run_merge(MergeConfig(**config))
    for note in summary.notes:
        click.echo(note, err=True)
    options.print_json(summary.to_json())
