"""The `pack` command."""

from __future__ import annotations

from pathlib import Path

import click

from ..pipelines.pack import PackConfig
from ..pipelines.pack import pack as run_pack
from . import options


@click.command()
@click.option(
    "--data",
    required=True,
    type=click.Path(path_type=Path),
    help="Image folder with one folder a class; the classes are numbered in the order of their names.",
)
@click.option(
    "--out",
    required=True,
    type=options.OUT,
    help="Folder for the tars and classes.txt.",
)
@click.option("--name", help="What the tars are called: NAME-000000.tar.  [default: the image folder's name]")
@click.option(
    "--samples-per-tar", type=click.IntRange(min=1), default=1000, show_default=True, help="Images in each tar."
)
@click.option(
    "--shuffle-seed",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Seed of the order of the images in the tars.",
)
@click.option("--in-order", is_flag=True, help="Keep the images in the order of their names instead of shuffling.")
def pack(data: Path, out: Path, name: str | None, samples_per_tar: int, shuffle_seed: int, in_order: bool) -> None:
    """Pack folders of images into WebDataset tars.

    Image bytes are copied unchanged. Files that are no images, and links that lead out of the folder, are left out and
    counted in the result. Existing tars are never overwritten.

    Example:

    \b
        atcache pack --data imagenet/train --out tars
        atcache build --teacher mae-vit-l --data tars --out train.zarr
    """
    config = PackConfig(
        data=data,
        out=out,
        name=name,
        samples_per_tar=samples_per_tar,
        shuffle_seed=None if in_order else shuffle_seed,
    )
    options.print_json(run_pack(config).to_json())
