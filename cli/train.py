"""`atcache train`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from . import options

_PATH = click.Path(path_type=Path)


@click.command()
@click.option(
    "--mode", required=True, type=click.Choice(["copy", "distill", "scratch", "finetune"]), help="What to do."
)
@click.option("--out", required=True, type=_PATH, help="The run's folder; an unfinished run is continued.")
@click.option("--cache", type=_PATH, help="The training cache; scratch and finetune can do with --data alone.")
@click.option("--data", metavar="TARS", help="Where the cache's tars now are, or what to train on without a cache.")
@click.option("--val-cache", type=_PATH, help="Validation views with maps; copying students need one to be validated.")
@click.option("--val-data", metavar="TARS", help="Validation images, or where the validation cache's tars now are.")
@click.option("--student", help="A timm name with arguments; without it, the teacher's architecture.")
@click.option("--weights", type=_PATH, help="The teacher's weights, for finetune and --live-teacher.")
@click.option("--layers", help="Blocks whose attention is transferred, such as 0-17; all of the cache without it.")
@click.option("--live-teacher", is_flag=True, help="Run the teacher in every step instead of reading its maps.")
@click.option(
    "--policy",
    type=click.Choice(["eval", "crop-flip", "randaug"]),
    help="How views are drawn without a cache; without it, crop-flip.",
)
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
@click.option("--beta2", type=float, default=0.999, show_default=True, help="Adam's second momentum.")
@click.option("--layer-decay", type=float, help="Learning rate of a block relative to the one above, such as 0.75.")
@click.option("--drop-path", type=float, default=0.0, show_default=True, help="Stochastic depth of the student.")
@click.option("--label-smoothing", type=float, default=0.0, show_default=True, help="Spread over all classes.")
@click.option("--clip-grad", type=float, help="Largest gradient norm.")
@click.option("--ema", type=float, help="Decay of a moving average of the weights, such as 0.9999.")
@click.option("--attention-weight", type=float, default=3.0, show_default=True, help="Weight of the distillation loss.")
@options.seed
@click.option("--workers", default=0, show_default=True, help="Processes that read ahead; 0 reads in this one.")
@click.option("--keep-mib", default=256, show_default=True, help="Memory for views that were read, in MiB.")
@options.device
@options.precision
@click.option("--validate-every", type=float, default=1.0, show_default=True, help="Epochs between them; 0: the end.")
@click.option("--checkpoint-every", default=1000, show_default=True, help="Steps between checkpoints.")
def train(**config: Any) -> None:  # noqa: ANN401 - one keyword a field of TrainConfig
    """Train a student from a cache, or from scratch.

    Typing the same command again continues a run that was stopped.

    Example:

    \b
        atcache train --mode copy --cache in1k.zarr --val-cache in1k-val.zarr --out runs/copy
    """
    from ..pipelines.train import TrainConfig
    from ..pipelines.train import train as run_training

    options.print_json(run_training(TrainConfig(**config)).to_json())
