"""Options that several commands share, so that one word means one thing in all of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

import click

from atcache.errors import ConfigError
from atcache.files.location import Location, looks_like_url, parse_location

from .defaults import read_defaults

_Command = TypeVar("_Command", bound=Callable[..., Any] | click.Command)


class LocationType(click.ParamType[Location]):
    """A path, or a URL of a server that is read."""

    name = "path or URL"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Location:  # noqa: ANN401 - click's
        try:
            return parse_location(value)
        except ConfigError as error:
            self.fail(str(error), param, ctx)


class OutType(click.Path):
    """A path to write to; URLs are refused, since a server's files are only read."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:  # noqa: ANN401 - click's
        if isinstance(value, str) and looks_like_url(value):
            self.fail(
                f"{value!r} is a URL, and servers are only read. Write to a folder and copy it there.", param, ctx
            )
        return super().convert(value, param, ctx)


def several(name: str, **settings: Any) -> Callable[[_Command], _Command]:  # noqa: ANN401 - click's
    """An option that may be given any number of times; in a config it is None, the one value, or a tuple."""

    def one_or_several(_ctx: click.Context, _param: click.Parameter, values: tuple[Any, ...]) -> Any:  # noqa: ANN401
        return values if len(values) > 1 else next(iter(values), None)

    return click.option(name, multiple=True, callback=one_or_several, **settings)


LOCATION = LocationType()
OUT = OutType(path_type=Path)

data = click.option(
    "--data",
    required=True,
    metavar="TARS",
    help="The images: WebDataset tars, as a brace pattern ('train-{0000..0099}.tar'), a folder of tars, or one tar; "
    "or URLs of any of these (http, https, s3, gs, az).",
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


policy = click.option(
    "--policy",
    type=click.Choice(["eval", "crop-flip", "randaug"]),
    default="crop-flip",
    show_default=True,
    help="How views are drawn; eval is for validation caches.",
)

mixup = click.option(
    "--mixup", default=0.0, help="Blend each view with another sample's; alpha of its share, such as 0.8."
)

cutmix = click.option(
    "--cutmix", default=0.0, help="Paste a box of another sample's view; alpha of its area, such as 1.0."
)

mix_prob = click.option("--mix-prob", default=1.0, show_default=True, help="Share of the views that are mixed, if any.")

views = click.option("--views", default=1, show_default=True, help="Views of each sample.")

layers = click.option("--layers", help="Blocks to keep, such as 0-17; all without it.")

heads = click.option("--heads", help="Heads to keep, such as 0,3; all without it.")

store = click.option(
    "--store",
    type=click.Choice(["v"]),
    help="v keeps the teacher's values too, for `train --what v`; codecs int8 (then the default) and exact.",
)

pixels = click.option(
    "--pixels",
    type=click.Choice(["replay", "store"]),
    default="replay",
    show_default=True,
    help="store keeps the augmented images in the cache too.",
)


def _use_recipe(ctx: click.Context, _: click.Parameter, name: str | None) -> str | None:
    """Make a recipe's settings the defaults of the command's other options, which are looked up after this one."""
    if name is not None and ctx.info_name is not None:
        from ..pipelines.train.recipes import TABLES, recipe_path

        commands = cast(click.Group, ctx.find_root().command)
        # Both tables: a run without a cache draws its views as [build] says.
        settings = {
            table: read_defaults(recipe_path(name), table, command, all_commands=TABLES)
            for table in TABLES
            if (command := commands.get_command(ctx, table)) is not None
        }
        if not settings[ctx.info_name] and not (ctx.info_name == "train" and settings["build"]):
            raise ConfigError(f"recipe {name}: it has no table [{ctx.info_name}], so it sets nothing here.")
        ctx.default_map = {**(ctx.default_map or {}), **settings[ctx.info_name]}
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
