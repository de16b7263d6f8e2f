"""The options of a pre-training run."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from atcache.choices import PolicyName, Precision
from atcache.errors import ConfigError

from ..options import config, device_option, option, policy_option, precision_option, seed_option


@config
class PretrainConfig:
    """Everything a pre-training run depends on. Defaults are those of MAE (arXiv 2111.06377, table 8)."""

    model: str = option(
        "The teacher: a timm name, with arguments after a colon. It is made without a head.", metavar="NAME"
    )
    data: str = option(
        "The images: WebDataset tars, as a brace pattern ('train-{0000..0099}.tar'), a folder of tars, or one tar; or "
        "URLs of any of these. Labels are not needed.",
        metavar="TARS",
    )
    out: Path = option("Folder for weights, config, metrics and checkpoint.", is_written=True)
    steps: int = option("Optimiser steps.", default=20_000, at_least=1)
    batch_size: int = option("Images in a step.", default=256, at_least=1)
    base_lr: float = option(
        "Learning rate for 256 images in a step; the one used is base_lr * batch_size / 256.", default=1.5e-4, above=0
    )
    warmup_steps: int | None = option(
        "Steps in which the learning rate rises from 0.  [default: a twentieth of all, like MAE's 40 of 800 epochs]",
        default=None,
        at_least=0,
    )
    weight_decay: float = option(
        "AdamW's weight decay; biases, norms and position embeddings have none.", default=0.05, at_least=0
    )
    mask_ratio: float = option("Share of the patches that the encoder does not see.", default=0.75, above=0, below=1)
    decoder_dim: int | None = option(
        "Width of the decoder.  [default: 512, or the encoder's width if smaller]", default=None, at_least=1
    )
    decoder_depth: int | None = option(
        "Blocks of the decoder.  [default: 8, or half the encoder's blocks if fewer]", default=None, at_least=1
    )
    decoder_heads: int | None = option(
        "Heads of the decoder.  [default: one per 32 of the width, like MAE]", default=None, at_least=1
    )
    normalise_targets: bool = option("Predict each patch normalised by its own mean and deviation.", default=True)
    policy: PolicyName = policy_option("How images are augmented: crop-flip is MAE's, eval does not augment.")
    seed: int = seed_option("weights, order, views and masks")
    workers: int = option(
        "Processes that decode and augment images; 0 does it in the training process.", default=0, at_least=0
    )
    keep_mib: int = option(
        "Memory that keeps decoded images, in MiB, over all workers: small datasets are read only once.",
        default=512,
        at_least=0,
    )
    precision: Precision = precision_option()
    device: str = device_option()
    checkpoint_every: int = option("Steps between checkpoints.", default=1000, at_least=1)

    def __post_init__(self) -> None:
        if self.warmup_steps is not None and self.warmup_steps >= self.steps:
            raise ConfigError(
                f"warmup_steps={self.warmup_steps}: expected at most {self.steps - 1}, fewer than all steps."
            )

    @property
    def lr(self) -> float:
        """The highest learning rate."""
        return self.base_lr * self.batch_size / 256

    def recorded(self) -> dict[str, Any]:
        """The settings that the result depends on, as JSON: no paths, and nothing that only changes the speed."""
        recorded = asdict(self)
        for name in ("data", "out", "workers", "keep_mib", "device", "checkpoint_every"):
            del recorded[name]
        return recorded
