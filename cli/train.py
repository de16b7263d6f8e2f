"""`atcache train`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from atcache.errors import ConfigError

from ..pipelines.train.config import TrainConfig
from . import options
from .fields import options_from
from .paths import EXISTING_FILE
from .sweep import read_sweep

if TYPE_CHECKING:
    from ..pipelines.train.summary import SweepResult


@click.command()
@options_from(TrainConfig, without=("recipe",), optional=("mode",))
@options.recipe
@click.option(
    "--sweep",
    type=EXISTING_FILE,
    help="TOML file: a list of students, [[student]], trained from one stream of batches.",
)
@click.pass_context
def train(ctx: click.Context, sweep: Path | None, **config: Any) -> None:  # noqa: ANN401 - TrainConfig's fields
    """Train a student from a cache, or from scratch.

    Typing the same command again continues a run that was stopped.

    Example:

    \b
        atcache train --mode copy --cache in1k.zarr --val-cache in1k-val.zarr --out runs/copy
        atcache train --recipe distill-vit-l --cache in1k.zarr --val-data 'val-{00..49}.tar' --out runs/distill
    """
    from ..pipelines.report.after_training import train as run_training
    from ..pipelines.running.ranks import Ranks

    # A recipe's epochs, or those of a file of defaults, give way to the steps that are typed.
    if all(ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE for name in ("epochs", "steps")):
        raise click.UsageError("--epochs and --steps both say how long to train. Leave one out.")
    drawn = _views_of_the_recipe(ctx, config["recipe"])
    if sweep is not None:
        _train_sweep(sweep, ctx.command, config, drawn)
    elif config["mode"] is None:
        raise click.UsageError("Missing option '--mode'. It is copy, distill, scratch or finetune; a recipe sets one.")
    else:
        ranks = Ranks.from_environment()
        chosen = config if config["cache"] else {**config, **drawn}
        summary = run_training(ranks.refused_once(lambda: TrainConfig(**chosen)))
        if ranks.leads:
            options.print_json(summary.to_json())


def _views_of_the_recipe(ctx: click.Context, recipe: str | None) -> dict[str, Any]:
    """How a run without a cache draws its views: as its recipe does, unless an option says otherwise."""
    if recipe is None:
        return {}
    from ..pipelines.train.recipes import views_to_draw

    return {
        name: value
        for name, value in views_to_draw(recipe).items()
        if ctx.get_parameter_source(name) is not ParameterSource.COMMANDLINE
    }


def _train_sweep(file: Path, command: click.Command, common: dict[str, Any], drawn: dict[str, Any]) -> None:
    """Train the students of a file; those without a cache draw their views as `drawn`."""
    from ..pipelines.report.after_training import train_sweep
    from ..pipelines.train.sweep import sweep_configs

    students = read_sweep(file, command)
    try:
        configs = sweep_configs(students, common, drawn)
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from error
    results = train_sweep(configs)
    for result in results:
        options.print_json(result.to_json())
    _print_table(results)
    if given_up := [result.name for result in results if result.summary is None]:
        raise click.ClickException(f"{len(given_up)} of {len(results)} students were given up: {', '.join(given_up)}.")


def _print_table(results: list[SweepResult]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table()
    for column in ("student", "label loss", "val loss", "top-1 %", "top-5 %"):
        table.add_column(column, justify="left" if column == "student" else "right")
    for result in results:
        if result.summary is None:
            table.add_row(result.name, "given up")
            continue
        score = result.summary.validation
        scores = () if score is None else (f"{score.loss:.4g}", f"{score.top1:.2f}", f"{score.top5:.2f}")
        label_loss = result.summary.label_loss
        table.add_row(result.name, "none" if label_loss is None else f"{label_loss:.4g}", *scores)
    Console(stderr=True).print(table)
