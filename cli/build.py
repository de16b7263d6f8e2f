"""`atcache build`."""

from __future__ import annotations

from typing import Any

import click

from ..pipelines.build.config import BuildConfig
from . import options
from .fields import options_from


@click.command()
@options.recipe
@options_from(BuildConfig, without=("recipe",))
def build(**config: Any) -> None:  # noqa: ANN401 - one keyword a field of BuildConfig
    """Run the teacher once over a dataset and keep its attention in a cache.

    Typing the same command again continues a build that was stopped.

    Example:

    \b
        atcache build --teacher mae-vit-l --data 'train-{000000..001281}.tar' --out in1k.zarr
    """
    from ..pipelines.build.run import build as run_build
    from ..pipelines.running.ranks import Ranks

    ranks = Ranks.from_environment()
    summary = run_build(ranks.refused_once(lambda: BuildConfig(**config)), on_plan=options.tell_plan)
    if not ranks.leads:
        return
    options.tell_built(summary)
    options.print_json(summary.to_json())
