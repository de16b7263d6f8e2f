"""Options that several commands share, so that one word means one thing in all of them."""

from __future__ import annotations

import json
from typing import Any

import click

from .defaults import read_defaults

data = click.option(
    "--data",
    required=True,
    metavar="TARS",
    help="The images: WebDataset tars, as a brace pattern ('train-{0000..0099}.tar'), a folder of tars, or one tar.",
)

device = click.option(
    "--device",
    default="auto",
    show_default=True,
    help="Where the models run: auto (a GPU if there is one), cpu, cuda or cuda:N.",
)

precision = click.option(
    "--precision",
    type=click.Choice(["auto", "fp32", "bf16"]),
    default="auto",
    show_default=True,
    help="What matrix products are computed in; auto takes bf16 where the device is fast at it.",
)

seed = click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Seed of all randomness.")


def _use_recipe(ctx: click.Context, _: click.Parameter, name: str | None) -> str | None:
    """Make a recipe's settings the defaults of the command's other options, which are looked up after this one."""
    if name is not None and ctx.info_name is not None:
        from ..pipelines.recipes import TABLES, recipe_path

        settings = read_defaults(recipe_path(name), ctx.info_name, ctx.command, all_commands=TABLES)
        ctx.default_map = {**(ctx.default_map or {}), **settings}
    return name


recipe = click.option(
    "--recipe",
    is_eager=True,
    callback=_use_recipe,
    metavar="NAME",
    help="Settings of a paper (copy-vit-l, distill-vit-l, finetune-vit-l, scratch-vit-l), or a file of your own. "
    "Other options win over it.",
)


def size_against_maps(times_smaller: float) -> str:
    """How codes compare with the same maps as float16; with few tokens factors are larger than maps."""
    if times_smaller >= 1:
        return f"{times_smaller:.1f}x smaller than float16 maps"
    return f"{1 / times_smaller:.1f}x larger than float16 maps"


def print_json(record: dict[str, Any]) -> None:
    """Print one result, as one line of JSON on stdout."""
    click.echo(json.dumps(record))
