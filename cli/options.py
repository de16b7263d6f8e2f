"""What several commands share: the option `--recipe`, and how results are printed."""

from __future__ import annotations

import json
from typing import Any, cast

import click

from atcache.errors import ConfigError

from ..pipelines.options import options_of
from ..pipelines.train.config import TrainConfig
from .defaults import read_defaults


def _use_recipe(ctx: click.Context, _: click.Parameter, name: str | None) -> str | None:
    """Make a recipe's settings the defaults of the command's other options, which click reads after this eager one."""
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
            raise ConfigError(
                f"recipe {name}: it has no table [{ctx.info_name}], so it sets nothing here. Leave --recipe out."
            )
        ctx.default_map = {**(ctx.default_map or {}), **settings[ctx.info_name]}
    return name


recipe = click.option(
    "--recipe",
    default=None,
    is_eager=True,
    callback=_use_recipe,
    metavar="NAME",
    help=options_of(TrainConfig)["recipe"][1].help,
)


def compare_sizes(times_smaller: float) -> str:
    """The size of codes against that of the same maps in float16. With few tokens, factors are larger than maps."""
    return f"{times_smaller:.1f}x smaller" if times_smaller >= 1 else f"{1 / times_smaller:.1f}x larger"


def name_tokens(num_tokens: int, num_queries: int) -> str:
    """The size of a map: its tokens, or how many rows of it are kept."""
    return f"{num_tokens} tokens" if num_queries == num_tokens else f"{num_queries} of {num_tokens} rows"


def print_json(record: dict[str, Any]) -> None:
    """Print one result, as one line of JSON on stdout."""
    click.echo(json.dumps(record))
