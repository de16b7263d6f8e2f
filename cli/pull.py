"""The `pull` command."""

from __future__ import annotations

from typing import Any

import click

from ..pipelines.publish.config import PullConfig
from . import options
from .fields import options_from


@click.command()
@options_from(PullConfig)
def pull(**config: Any) -> None:  # noqa: ANN401 - one keyword a field of PullConfig
    """Fetch a cache from a hub or another server, or a part of it.

    Every file is checked against its commit record. The same command continues a pull that was stopped. Shards are
    fetched whole: of chosen tars, samples that share a shard with other tars are left out, and counted.

    Example:

    \b
        atcache pull hf://datasets/ORG/NAME in1k.zarr
        atcache pull hf://datasets/ORG/NAME in1k.zarr --views 1 --tars 'train-{000000..000099}.tar'
    """
    from ..pipelines.publish.pull import pull as run_pull

    summary = run_pull(PullConfig(**config))
    if summary.num_left_out:
        click.echo(
            f"{summary.num_left_out} samples of these tars were left out: they share shards with other tars.", err=True
        )
    if summary.needs_tars:
        click.echo(
            "Its images are made from the tars, which were not fetched. Commands that read images need --data.",
            err=True,
        )
    options.print_json(summary.to_json())
