"""What several commands share: the option `--recipe`, and how plans and results are printed."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, cast

import click

from atcache.errors import ConfigError
from atcache.files.sizes import size_text

from ..pipelines.options import options_of
from ..pipelines.train.config import TrainConfig
from .defaults import read_defaults

if TYPE_CHECKING:
    from ..pipelines.build.plan import BuildPlan
    from ..pipelines.build.summary import BuildSummary


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


def tell_plan(plan: BuildPlan) -> None:
    """Say what a build will do and cost."""
    from ..pipelines.build.decode_cost import DecodeCost

    ratio = plan.map_nbytes_per_view / plan.nbytes_per_view
    click.echo(
        f"teacher {plan.teacher}; licence of its weights: {plan.licence or 'not known'}\n"
        f"{plan.num_samples} samples x {plan.num_views} views, {plan.num_layers} layers x {plan.num_heads} heads x "
        f"{name_tokens(plan.num_tokens, plan.num_queries)}\n"
        f"{plan.nbytes_per_view} bytes a view ({compare_sizes(ratio)} than float16 maps) and "
        f"{size_text(plan.state_nbytes)} once; {size_text(plan.remaining_nbytes)} to write"
        f"{'' if plan.free_nbytes is None else f', {size_text(plan.free_nbytes)} free'}\n"
        f"row KL {plan.row_kl_nats:.2g} nats, features off by {plan.injected_error:.2g} with decoded maps"
        f"{'' if plan.v_error is None else f'; decoded v off by {plan.v_error:.2g}'}"
        f"{'' if plan.x_error is None else f'; decoded x off by {plan.x_error:.2g}'}\n"
        f"{DecodeCost(operations=plan.decode_operations, seconds=plan.decode_seconds)}\n"
        f"teacher: {plan.teacher_views_per_s:.1f} views/s; "
        f"{plan.num_tasks - plan.num_done_tasks} of {plan.num_tasks} tasks to do"
        f"{'' if plan.note is None else f'{chr(10)}note: {plan.note}'}",
        err=True,
    )


def tell_built(summary: BuildSummary) -> None:
    """Say in words what a build did."""
    if summary.complete is not None:
        click.echo(
            f"{summary.out} is complete: {summary.complete['num_stored']} views stored, "
            f"{summary.complete['num_bad']} bad, {size_text(summary.complete['nbytes'])}; "
            f"{summary.num_built_views} views in {summary.seconds:.1f} s now",
            err=True,
        )
    if summary.warning is not None:
        click.echo(summary.warning, err=True)
