"""The `push` command."""

from __future__ import annotations

from typing import Any

import click

from ..pipelines.publish.config import PushConfig
from . import options
from .fields import options_from


@click.command()
@options_from(PushConfig)
def push(**config: Any) -> None:  # noqa: ANN401 - one keyword a field of PushConfig
    """Publish a cache: send it to a dataset repository of a Hugging Face hub.

    Log in first, with `hf auth login` or HF_TOKEN. What makes the folder a cache is sent last, with a card for the
    repository's page. The same command continues a push that was stopped, or sends what has changed.

    Example:

    \b
        atcache push in1k.zarr hf://datasets/ORG/NAME --create private
        atcache push in1k.zarr hf://datasets/ORG/NAME/vit-l/in1k.zarr
    """
    from ..pipelines.publish.push import push as run_push

    summary = run_push(PushConfig(**config))
    if summary.card == "left alone":
        click.echo("The repository's README.md is not atcache's and was left as it is.", err=True)
    options.print_json(summary.to_json())
