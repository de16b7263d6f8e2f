"""`atcache train`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from atcache.errors import ConfigError

from . import options
from .sweep import read_sweep

if TYPE_CHECKING:
    from atcache.students.student import Mode

    from ..pipelines.train.summary import SweepResult

_PATH = click.Path(path_type=Path)


@click.command()
@click.option("--mode", type=click.Choice(["copy", "distill", "scratch", "finetune"]), help="What to do.")
@options.recipe
@click.option(
    "--sweep",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="TOML file: a list of students, [[student]], trained from one stream of batches.",
)
@click.option("--out", required=True, type=options.OUT, help="The run's folder; an unfinished run is continued.")
@options.several(
    "--cache",
    type=options.LOCATION,
    help="The training cache or its URL; several are one set of samples. scratch and finetune can do without.",
)
@options.several(
    "--data",
    metavar="TARS",
    help="Where the caches' tars now are, or what to train on without a cache; may be given more than once.",
)
@options.several(
    "--val-cache",
    type=options.LOCATION,
    help="Validation views with maps, from one cache or several; copying students need one to be validated.",
)
@options.several(
    "--val-data",
    metavar="TARS",
    help="Validation images, or where the validation caches' tars now are; may be given more than once.",
)
@click.option("--student", help="A timm name with arguments; without it, the teacher's architecture.")
@click.option("--weights", type=_PATH, help="The teacher's weights, for finetune and --live-teacher.")
@click.option("--layers", help="Blocks whose attention is transferred, such as 0-17; all of the cache without it.")
@click.option("--heads", help="Heads of them, such as 0,3; all of the cache without it.")
@click.option("--layer-map", help="Pairs STUDENT:TEACHER of blocks, for a student of other depth, such as 0:0,1:2,2:4.")
@click.option("--head-map", help="The teacher's head of each of the student's, for one with fewer, such as 0,2,5.")
@click.option(
    "--what",
    type=click.Choice(["map", "qk", "q", "k", "v", "qkv"]),
    default="map",
    show_default=True,
    help="What is transferred; of q, k or v alone, the student has its own others. v needs build --store v.",
)
@click.option("--live-teacher", is_flag=True, help="Run the teacher in every step instead of reading its maps.")
@click.option(
    "--policy",
    type=click.Choice(["eval", "crop-flip", "randaug"]),
    help="How views are drawn without a cache; without it, crop-flip.",
)
@click.option("--mixup", default=0.0, help="Blend views without a cache; alpha of the share, such as 0.8.")
@click.option(
    "--cutmix", default=0.0, help="Paste boxes of other views without a cache; alpha of the area, such as 1.0."
)
@click.option("--mix-prob", default=1.0, show_default=True, help="Share of the views that are mixed, if any.")
@click.option("--epochs", type=float, default=100.0, show_default=True, help="Passes over the samples.")
@click.option("--steps", type=int, help="Optimiser steps, instead of epochs.")
@click.option("--batch-size", default=256, show_default=True, help="Samples an optimiser step.")
@click.option("--accumulate", default=1, show_default=True, help="Parts a batch is cut into, to save memory.")
@click.option("--subset", type=int, help="Train on so many samples only, drawn evenly over the classes.")
@click.option("--optimizer", default="adamw", show_default=True, help="Any of timm's.")
@click.option("--base-lr", type=float, default=1e-3, show_default=True, help="Learning rate for 256 samples a step.")
@click.option("--min-lr", type=float, default=0.0, show_default=True, help="Where the cosine ends.")
@click.option("--warmup-epochs", type=float, default=5.0, show_default=True, help="At most a tenth of the run.")
@click.option("--weight-decay", type=float, default=0.05, show_default=True, help="Not of biases and norms.")
@click.option("--beta2", type=float, help="Second of the optimiser's two betas; without it its own, AdamW's is 0.999.")
@click.option("--layer-decay", type=float, help="Learning rate of a block relative to the one above, such as 0.75.")
@click.option("--drop-path", type=float, default=0.0, show_default=True, help="Stochastic depth of the student.")
@click.option("--student-jitter", default=0.0, show_default=True, help="Vary the student's light and colours, to 1.")
@click.option("--label-smoothing", type=float, default=0.0, show_default=True, help="Spread over all classes.")
@click.option("--clip-grad", type=float, help="Largest gradient norm.")
@click.option("--ema", type=float, help="Decay of a moving average of the weights, such as 0.9999.")
@click.option("--attention-weight", type=float, default=3.0, show_default=True, help="Weight of the distillation loss.")
@options.seed
@click.option("--order-seed", type=click.IntRange(min=0), help="Seed of the order of samples; without it, the seed.")
@click.option(
    "--shuffle",
    type=click.Choice(["global", "block"]),
    default="global",
    show_default=True,
    help="block reads neighbours together, for disks that hate random reads.",
)
@click.option("--workers", default=0, show_default=True, help="Processes that read ahead; 0 reads in this one.")
@click.option("--keep-mib", default=256, show_default=True, help="Memory for views that were read, in MiB.")
@options.device
@options.precision
@click.option("--validate-every", type=float, default=1.0, show_default=True, help="Epochs between them; 0: the end.")
@click.option("--checkpoint-every", default=1000, show_default=True, help="Steps between checkpoints.")
@click.pass_context
def train(ctx: click.Context, sweep: Path | None, **config: Any) -> None:  # noqa: ANN401 - TrainConfig's fields
    """Train a student from a cache, or from scratch.

    Typing the same command again continues a run that was stopped.

    Example:

    \b
        atcache train --mode copy --cache in1k.zarr --val-cache in1k-val.zarr --out runs/copy
        atcache train --recipe distill-vit-l --cache in1k.zarr --val-data 'val-{00..49}.tar' --out runs/distill
    """
    from ..pipelines.running.ranks import Ranks
    from ..pipelines.train.config import TrainConfig
    from ..pipelines.train.run import train as run_training

    drawn = _views_of_the_recipe(ctx, config["recipe"])
    if sweep is not None:
        _train_sweep(sweep, ctx.command, config, drawn)
    elif config["mode"] is None:
        raise click.UsageError("Missing option '--mode'. It is copy, distill, scratch or finetune; a recipe has one.")
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
    from ..pipelines.train.config import TrainConfig
    from ..pipelines.train.run import train_sweep

    out: Path = common["out"]
    order_seed = common["seed"] if common["order_seed"] is None else common["order_seed"]
    configs: list[TrainConfig] = []
    sweep = read_sweep(file, command)
    modes = {name: values.get("mode", common["mode"]) for name, values in sweep.items()}
    for name, values in sweep.items():
        if modes[name] is None:
            raise ConfigError(f"{file}: student {name} has no mode. Give it one, or --mode for all.")
        views = {} if values.get("cache", common["cache"]) else drawn
        shared = _without_other_modes(common, modes[name], set(modes.values()))
        try:
            student: dict[str, Any] = {**shared, **views, **values, "out": out / name, "order_seed": order_seed}
            configs.append(TrainConfig(**student))
        except ConfigError as error:
            raise ConfigError(f"{file}: student {name}: {error}") from error
    results = train_sweep(configs)
    for result in results:
        options.print_json(result.to_json())
    _print_table(results)
    if given_up := [result.name for result in results if result.summary is None]:
        raise click.ClickException(f"{len(given_up)} of {len(results)} students were given up: {', '.join(given_up)}.")


def _without_other_modes(common: dict[str, Any], mode: Mode, modes: set[Mode]) -> dict[str, Any]:
    """The options of all students but those that this mode cannot have, where a student of the sweep can."""
    from ..pipelines.train.config import MODES_OF_OPTIONS

    others = {
        name
        for name, theirs in MODES_OF_OPTIONS.items()
        if mode not in theirs and modes.intersection(theirs) and not (name == "weights" and common["live_teacher"])
    }
    return {name: value for name, value in common.items() if name not in others}


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
        table.add_row(result.name, "" if label_loss is None else f"{label_loss:.4g}", *scores)
    Console(stderr=True).print(table)
