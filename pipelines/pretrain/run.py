"""Pre-training of a teacher: any timm ViT as a masked autoencoder, on images without labels, resumable."""

from __future__ import annotations

import importlib
import math
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from atcache.attention.blocks import find_blocks
from atcache.errors import ConfigError
from atcache.feed.batch import Batch
from atcache.feed.loader import BatchStream
from atcache.feed.order import SampleOrder, step_seed
from atcache.feed.sample_views import FreshViews
from atcache.fields import JsonFields
from atcache.files.durable import check_can_write
from atcache.images.source import Source, index_source
from atcache.machine import kept_nbytes
from atcache.teachers.devices import memory_errors_explained, resolve_device, resolve_precision, training_autocast
from atcache.teachers.inputs import input_config, normalise_images
from atcache.teachers.load import create_student
from atcache.teachers.names import parse_model_name
from atcache.teachers.weight_files import read_weights
from atcache.teachers.weights import tensors_sha256

from ..running.checkpoint import CHECKPOINT_FILE, load_checkpoint, refuse_what_does_not_fit, save_checkpoint
from ..running.interrupts import Interrupts
from ..running.metrics import METRICS_FILE, MetricsLog, read_metrics
from ..running.progress import Progress
from ..running.run_files import WEIGHTS_FILE, save_weights
from ..running.run_folder import keep_record, read_saved_record, run_folder, settle_precision
from .autoencoder import MaskedAutoencoder
from .config import PretrainConfig

CONFIG_FILE = "config.json"
LOG_EVERY = 50
"""Steps between two lines of metrics."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PretrainSummary(JsonFields):
    """The result of a finished run."""

    weights: Path
    """The encoder: a plain timm state dict, for `--teacher MODEL --weights FILE`."""
    weights_sha256: str
    """SHA-256 of the tensors in it."""
    model: str
    """The name to give with the weights."""
    steps: int
    """Steps trained in all, in this run or earlier ones."""
    first_loss: float
    """Mean over the first steps that were logged."""
    final_loss: float
    """Mean over the last steps that were logged."""
    img_per_s: float
    """Speed of the last logged steps."""


def pretrain(config: PretrainConfig) -> PretrainSummary:
    """Pre-train a teacher, continue a run that was stopped, or return the result of a finished run of this config.

    Every step is a pure function of (seed, step) and the weights before it, so a run that was interrupted and continued
    gives the same weights on the same machine as one that was not. Files are replaced whole; after a failure the last
    checkpoint is valid.

    Raises:
        ConfigError: a value does not fit the model or the data, or the loss is NaN or infinite.
        CacheMismatchError: the folder holds a run of another config; the message names each difference.
    """
    kept_nbytes(config.keep_mib, config.workers)  # raises here, before anything takes long
    device = resolve_device(config.device)
    begun = read_saved_record(config.out / CONFIG_FILE)
    config = replace(config, precision=settle_precision(config.precision, begun, device))
    if not (config.out / WEIGHTS_FILE).exists():
        check_can_write(config.out)
    index = index_source(config.data, labels="optional")
    record = {**config.recorded(), "source_fingerprint": index.fingerprint, "num_samples": index.num_samples}
    # What is drawn from torch's global generator (initial weights, dropout) must not disturb the caller's.
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        run = _Run(config, Source(index), device)  # before anything is written: an error leaves no files
        with run_folder(config.out):
            keep_record(config.out / CONFIG_FILE, record)
            if not (config.out / WEIGHTS_FILE).exists():
                run.to_the_end()
            return _summary(config)


class _Run:
    """The state of one training: model, optimiser, schedule and step."""

    def __init__(self, config: PretrainConfig, source: Source, device: torch.device) -> None:
        from timm.scheduler import cosine_lr

        optim: Any = importlib.import_module("timm.optim")

        self.config, self.device = config, device
        self.dtype = resolve_precision(config.precision, device)
        torch.manual_seed(config.seed)
        self.model = _autoencoder(config).to(device).train()
        self.optimizer = optim.create_optimizer_v2(
            self.model,
            opt="adamw",
            lr=config.lr,
            weight_decay=config.weight_decay,
            betas=(0.9, 0.95),  # MAE's, table 8
            fused=device.type in ("cpu", "cuda"),
        )
        warmup_steps = config.steps // 20 if config.warmup_steps is None else config.warmup_steps
        self.scheduler = cosine_lr.CosineLRScheduler(
            self.optimizer,
            t_initial=config.steps,
            warmup_t=warmup_steps,
            warmup_prefix=False,
            t_in_epochs=False,
        )
        self.input = input_config(self.model.encoder)
        self.source = source
        self.step = 0
        self.losses: list[Tensor] = []
        """Losses of the steps since the last line of metrics."""
        self.checkpoint = config.out / CHECKPOINT_FILE

    def to_the_end(self) -> None:
        """Train from the checkpoint, or the first step, to the last; write the weights and delete the checkpoint."""
        config = self.config
        self._restore()
        with (
            MetricsLog(config.out, first_step=self.step) as metrics,
            Progress("pretrain", total=config.steps, unit="steps", done=self.step) as progress,
            Interrupts() as interrupts,
        ):
            if self.step:
                progress.say(f"continuing after step {self.step} of {config.steps}")
            self._train(self._batches(), metrics, progress, interrupts)
        save_weights(config.out / WEIGHTS_FILE, self.model.encoder)
        self.checkpoint.unlink(missing_ok=True)

    def _batches(self) -> Iterable[Batch]:
        config, index = self.config, self.source.index
        keep_nbytes = kept_nbytes(config.keep_mib, config.workers)
        return BatchStream(
            FreshViews(self.source, self.input.view_policy(config.policy, config.seed), keep_nbytes=keep_nbytes),
            index.label_S,
            SampleOrder(sample_S=np.flatnonzero(index.problem_S == 0), seed=config.seed, batch_size=config.batch_size),
            first_step=self.step,
            num_steps=config.steps,
            workers=config.workers,
        )

    def _train(self, batches: Iterable[Batch], metrics: MetricsLog, progress: Progress, interrupts: Interrupts) -> None:
        note, start_s, num_images = "", time.monotonic(), 0
        for batch in batches:
            num_images += self.config.batch_size
            self.losses.append(self._train_step(batch.pixels_BHWC))
            self.step += 1
            is_last = self.step == self.config.steps
            logs = self.step % LOG_EVERY == 0 or is_last
            saves = (self.step % self.config.checkpoint_every == 0 or interrupts.came) and not is_last
            if logs or saves:
                # Reading losses waits for the device, so it is done for many steps at once.
                loss = float(torch.stack(self.losses).mean())
                self._check_loss(loss)
                note = f"loss {loss:.4f}"
                if logs:
                    img_per_s = num_images / (time.monotonic() - start_s)
                    metrics.write("train", self.step, {"loss": loss, "lr": self._lr(), "img_per_s": img_per_s})
                    self.losses.clear()
                    start_s, num_images = time.monotonic(), 0
                if saves:
                    self._save()
            progress.advance(1, note)
            if saves and interrupts.came:
                progress.say(f"stopped after step {self.step}, which is saved")
                interrupts.end()

    def _train_step(self, pixels_BHWC: Tensor) -> Tensor:
        seed = step_seed(self.config.seed, self.step)
        torch.manual_seed(seed)
        order_BT = self.model.draw_order(len(pixels_BHWC), torch.Generator().manual_seed(seed))
        self.scheduler.step_update(self.step)
        images_BCHW = normalise_images(pixels_BHWC, self.input.mean, self.input.std, self.device)
        with memory_errors_explained("the autoencoder", len(pixels_BHWC), self.device):
            with training_autocast(self.model.encoder, self.device, self.dtype):
                loss = self.model(images_BCHW, order_BT.to(self.device, non_blocking=True))
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
        self.optimizer.step()
        return loss.detach()

    def _lr(self) -> float:
        return float(self.optimizer.param_groups[0]["lr"])

    def _check_loss(self, loss: float) -> None:
        if not math.isfinite(loss):
            raise ConfigError(
                f"the loss is {loss} after {self.step} steps, expected a finite one. Lower base_lr "
                f"({self.config.base_lr:g}) or try precision fp32."
            )

    def _save(self) -> None:
        save_checkpoint(
            self.checkpoint,
            {
                "step": self.step,
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "losses": self.losses,
            },
        )

    def _restore(self) -> None:
        if self.checkpoint.exists():
            contents = load_checkpoint(self.checkpoint)
            with refuse_what_does_not_fit(self.checkpoint):
                self.model.load_state_dict(contents["model"])
                self.optimizer.load_state_dict(contents["optimizer"])
                self.step, self.losses = contents["step"], [loss.to(self.device) for loss in contents["losses"]]


def _autoencoder(config: PretrainConfig) -> MaskedAutoencoder:
    encoder: Any = create_student(parse_model_name(config.model), 0)
    find_blocks(encoder)  # refuses a model that is not a plain ViT, by its name
    width = config.decoder_dim or min(512, int(encoder.embed_dim))
    return MaskedAutoencoder(
        encoder,
        mask_ratio=config.mask_ratio,
        decoder_dim=width,
        decoder_depth=config.decoder_depth or min(8, max(1, len(encoder.blocks) // 2)),
        decoder_heads=config.decoder_heads or max(1, width // 32),
        normalise_targets=config.normalise_targets,
    )


def _summary(config: PretrainConfig) -> PretrainSummary:
    rows = read_metrics(config.out)
    if not rows:
        raise ConfigError(
            f"{config.out / METRICS_FILE} is missing or empty, though its weights are finished. Give another --out."
        )
    return PretrainSummary(
        weights=config.out / WEIGHTS_FILE,
        weights_sha256=tensors_sha256(read_weights(config.out / WEIGHTS_FILE)),
        model=str(parse_model_name(config.model)),
        steps=config.steps,
        first_loss=rows[0]["loss"],
        final_loss=rows[-1]["loss"],
        img_per_s=rows[-1]["img_per_s"],
    )
