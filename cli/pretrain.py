"""`atcache pretrain`."""

from __future__ import annotations

from typing import Any

import click

from ..pipelines.pretrain.config import PretrainConfig
from . import options
from .fields import options_from


@click.command()
@options_from(PretrainConfig)
def pretrain(**fields: Any) -> None:  # noqa: ANN401 - the options above
    """Pre-train a teacher as a masked autoencoder, without labels.

    The result, OUT/model.safetensors, is a plain timm state dict: give it to `atcache build` with --teacher NAME and
    --weights. Typing the same command again continues a run that was stopped.

    Example:

    \b
        atcache pretrain --model vit_small_patch16_224 --data 'train-{0000..0099}.tar' --out teacher --workers 8
    """
    from ..pipelines.pretrain.run import pretrain as run

    options.print_json(run(PretrainConfig(**fields)).to_json())
