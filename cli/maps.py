"""`atcache maps`."""

from __future__ import annotations

from typing import Any

import click

from ..pipelines.maps.config import MapsConfig
from . import options
from .fields import options_from


@click.command()
@options_from(MapsConfig)
def maps(**config: Any) -> None:  # noqa: ANN401 - one keyword a field of MapsConfig
    """Store the attention of a trained student in a cache of its own.

    By default the cache has the samples and views of the cache that the student was trained from, so that teacher and
    student can be compared view by view. A student that copies attention has none of its own.

    Example:

    \b
        atcache maps runs/distill --out distill.zarr
        atcache maps runs/distill --cache in1k-val.zarr --out distill-val.zarr
        atcache maps runs/scratch --data 'val-{00..49}.tar' --policy eval --out scratch-val.zarr
    """
    from ..pipelines.maps.run import maps as run_maps

    summary = run_maps(MapsConfig(**config), on_plan=options.tell_plan)
    options.tell_built(summary)
    options.print_json(summary.to_json())
