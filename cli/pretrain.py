"""`atcache pretrain`."""

from __future__ import annotations

from typing import Any

import click

from . import options


@click.command()
@click.option("--model", required=True, metavar="NAME", help="A timm model, with arguments after a colon.")
@options.data
@click.option("--out", required=True, type=options.OUT, help="Folder for weights, config and metrics.")
@click.option("--steps", type=click.IntRange(min=1), default=20_000, show_default=True, help="Optimiser steps.")
@click.option("--batch-size", type=click.IntRange(min=1), default=256, show_default=True, help="Images a step.")
@click.option("--base-lr", type=float, default=1.5e-4, show_default=True, help="Learning rate for 256 images a step.")
@click.option("--warmup-steps", type=int, help="Steps in which the learning rate rises.  [default: a twentieth of all]")
@click.option("--weight-decay", type=float, default=0.05, show_default=True, help="Not of biases and norms.")
@click.option("--mask-ratio", type=float, default=0.75, show_default=True, help="Share of patches to hide.")
@click.option(
    "--normalise-targets/--no-normalise-targets",
    default=True,
    show_default=True,
    help="Predict each patch with its own mean and deviation taken out.",
)
@click.option("--decoder-dim", type=int, help="Width of the decoder.  [default: 512, or the encoder's if smaller]")
@click.option("--decoder-depth", type=int, help="Blocks of the decoder.  [default: 8, or half the encoder's]")
@click.option("--decoder-heads", type=int, help="Heads of the decoder.  [default: as many as are 32 wide]")
@click.option(
    "--policy",
    type=click.Choice(["eval", "crop-flip", "randaug"]),
    default="crop-flip",
    show_default=True,
    help="How images are augmented; eval shows each as it is.",
)
@click.option(
    "--workers",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Processes that decode and augment images.",
)
@click.option("--keep-mib", default=512, show_default=True, help="Memory for images that were decoded, in MiB.")
@click.option("--checkpoint-every", default=1000, show_default=True, help="Steps between checkpoints.")
@options.device
@options.precision
@options.seed
def pretrain(**fields: Any) -> None:  # noqa: ANN401 - the options above
    """Pre-train a teacher as a masked autoencoder, without labels.

    The result, OUT/model.safetensors, is a plain timm state dict: give it to `atcache build` with --teacher NAME and
    --weights. The same command continues a run that was stopped.

    Example:

    \b
        atcache pretrain --model vit_small_patch16_224 --data 'train-{0000..0099}.tar' --out teacher --workers 8
    """
    from ..pipelines.pretrain.run import PretrainConfig
    from ..pipelines.pretrain.run import pretrain as run

    options.print_json(run(PretrainConfig(**fields)).to_json())
