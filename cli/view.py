"""The `view` command."""

from __future__ import annotations

from typing import Any

import click

from ..pipelines.view.config import ViewConfig
from . import options
from .fields import options_from


@click.command()
@options_from(ViewConfig)
def view(**config: Any) -> None:  # noqa: ANN401 - one keyword a field of ViewConfig
    """Look at maps in the browser, without model and GPU.

    Serves a page on this machine, which reads the cache itself, part by part, and prints its address. Ctrl-C ends it.
    With two caches it shows them side by side. --export writes page and samples as files instead.

    Example:

    \b
        atcache view in1k.zarr
        atcache view s3://bucket/in1k.zarr student.zarr
        atcache view in1k.zarr --export page.html --samples 0-7
    """
    settings = ViewConfig(**config)
    if settings.export is not None:
        from ..pipelines.view.export import export

        options.print_json(export(settings, lambda note: click.echo(note, err=True)).to_json())
        return
    from ..pipelines.view.run import view as run_view

    def tell(address: str) -> None:
        click.echo(f"Look at {address} in a browser. Ctrl-C ends this.", err=True)
        options.print_json({"address": address})

    run_view(settings, tell)
