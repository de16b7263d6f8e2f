"""`atcache show`."""

from __future__ import annotations

from typing import Any

import click

from ..pipelines.options import options_of
from ..pipelines.show.config import ShowConfig
from . import options
from .fields import options_from
from .paths import OUT


@click.command()
@options_from(ShowConfig, without=("out",))
@click.option("-o", "--out", type=OUT, required=True, help=options_of(ShowConfig)["out"][1].help)
def show(**config: Any) -> None:  # noqa: ANN401 - one keyword a field of ShowConfig
    """Draw the maps of one view: over it, carried back to the clean image, side by side.

    The picture has the view that the teacher saw, the clean image with the view's box drawn in, the map over both, and
    each head, or all layers and heads, side by side. All maps of a picture have the same scale.

    Example:

    \b
        atcache show in1k.zarr 0 --query 5,7 -o maps.png
        atcache show in1k.zarr train-000000.tar/n01440764_18 --layer all -o wall.pdf
    """
    from ..pipelines.show.run import show as run_show

    summary = run_show(ShowConfig(**config))
    for note in summary.notes:
        click.echo(f"NOTE: {note}", err=True)
    options.print_json(summary.to_json())
