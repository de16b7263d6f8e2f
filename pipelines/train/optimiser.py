"""A run's optimiser and learning-rate schedule: timm's, set up from the run's config."""

from __future__ import annotations

import importlib
import math
from typing import Any

import torch
from torch import nn

from atcache.errors import ConfigError

from .config import TrainConfig


def make_optimizer(config: TrainConfig, model: nn.Module, device: torch.device) -> torch.optim.Optimizer:
    """timm's optimiser of this name. adam and adamw are torch's fused ones: a tenth faster for small models."""
    optim: Any = importlib.import_module("timm.optim")  # its functions are only partly typed
    fused = {"fused": device.type in ("cpu", "cuda")} if config.optimizer in ("adam", "adamw") else {}
    try:
        optimizer: torch.optim.Optimizer = optim.create_optimizer_v2(
            model,
            opt=config.optimizer,
            lr=config.base_lr * config.batch_size / 256,
            weight_decay=config.weight_decay,
            layer_decay=config.layer_decay,
            **fused,
        )
    except (ValueError, AssertionError, ImportError) as error:  # timm asserts that the library of an optimiser is there
        raise ConfigError(
            f"optimizer={config.optimizer!r}: {error}. timm.optim.list_optimizers() lists all names; those of bnb and "
            "fused need libraries of their own."
        ) from error
    if getattr(optimizer, "is_second_order", False):
        raise ConfigError(
            f"optimizer={config.optimizer!r} needs second derivatives, which are not made here. Choose another, such "
            "as adamw."
        )
    if config.beta2 is not None:
        _set_beta2(optimizer, config.optimizer, config.beta2)
    return optimizer


def _set_beta2(optimizer: torch.optim.Optimizer, name: str, beta2: float) -> None:
    """Replace the second of an optimiser's two betas. The first stays the optimiser's own default."""
    for group in optimizer.param_groups:
        betas = group.get("betas")
        if betas is None or len(betas) != 2:
            raise ConfigError(
                f"beta2={beta2}: optimizer={name!r} does not have two betas. Leave --beta2 out, or choose one that "
                "does, such as adamw."
            )
        group["betas"] = (betas[0], beta2)


def make_scheduler(
    config: TrainConfig, optimizer: torch.optim.Optimizer, num_steps: int, steps_per_epoch: float
) -> Any:  # noqa: ANN401 - timm's class is only partly typed
    """timm's schedule: linear warm-up from 0, then a cosine that would reach `min_lr` one step after the last.

    Layer decay scales both.
    """
    from timm.scheduler.cosine_lr import CosineLRScheduler

    warmup_steps = min(math.ceil(config.warmup_epochs * steps_per_epoch), num_steps // 10)
    return CosineLRScheduler(
        optimizer,
        t_initial=max(1, num_steps - warmup_steps),
        lr_min=config.min_lr,
        warmup_t=warmup_steps,
        warmup_prefix=True,
        t_in_epochs=False,
    )
