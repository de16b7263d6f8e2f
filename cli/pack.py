"""The `pack` command."""

from __future__ import annotations

from typing import Any

import click

from ..pipelines.pack.config import PackConfig
from . import options
from .fields import options_from


@click.command()
@options_from(PackConfig)
def pack(**config: Any) -> None:  # noqa: ANN401 - one keyword a field of PackConfig
    """Pack folders of images into WebDataset tars.

    Also packs Hugging Face image datasets: parquet and arrow files, or hf:ORG/NAME. Image bytes are copied unchanged.
    Files that are not images, and links that lead out of the folder, are left out and counted in the result. Existing
    tars are never overwritten.

    Example:

    \b
        atcache pack --data imagenet/train --out tars
        atcache pack --data imagenet/val --classes tars --out val-tars
        atcache build --teacher mae-vit-l --data tars --out train.zarr
    """
    from ..pipelines.pack.run import pack as run_pack

    options.print_json(run_pack(PackConfig(**config)).to_json())
