"""Pre-training of a teacher: any timm ViT as a masked autoencoder, on images without labels, resumable."""

from __future__ import annotations

import importlib
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO, cast

import torch
from torch import Tensor

from atcache.errors import CacheMismatchError, ConfigError
from atcache.mae import MaskedAutoencoder
from atcache.precision import autocast, resolve_device, resolve_precision
from atcache.rendering import normalise_images
from atcache.source import Source, index_source
from atcache.teachers import InputConfig, create_student, input_config, parse_model_name
from atcache.view_stream import ViewBatches, mixed_seed, stream_batches
from atcache.views import PolicyName, ViewPolicy
from atcache.weights import read_weights, tensors_sha256

from .progress import Progress

WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "config.json"
METRICS_FILE = "metrics.jsonl"
CHECKPOINT_FILE = "checkpoint.pt"
LOG_EVERY = 50
"""Steps between two lines of metrics."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PretrainConfig:
    """Everything a pre-training run depends on. Defaults are those of MAE (arXiv 2111.06377, table 8)."""

    model: str
    """A timm name with arguments, see `parse_model_name`; its head is left out."""
    data: str
    """Tars of images, as for `build`; labels are not needed."""
    out: Path
    """Folder for the weights, config, metrics and checkpoint."""
    steps: int = 20_000
    """Optimizer steps."""
    batch_size: int = 256
    """Images a step."""
    base_lr: float = 1.5e-4
    """Learning rate for 256 images a step; the real one is base_lr * batch_size / 256."""
    warmup_steps: int | None = None
    """Steps in which the learning rate rises from 0; None takes a twentieth of all, as MAE's 40 of 800 epochs."""
    weight_decay: float = 0.05
    """AdamW's; not applied to biases, norms and position embeddings."""
    mask_ratio: float = 0.75
    """Share of the patches the encoder does not see."""
    decoder_dim: int | None = None
    """Width of the decoder; None takes 512, or the encoder's width where that is smaller."""
    decoder_depth: int | None = None
    """Blocks of the decoder; None takes 8, or half the encoder's where that is smaller."""
    decoder_heads: int | None = None
    """Heads of the decoder; None makes heads of 32, as MAE's."""
    normalise_targets: bool = True
    """Predict each patch with its own mean and deviation taken out."""
    views: PolicyName = "crop-flip"
    """How images are augmented: "crop-flip" is MAE's, "eval" shows every image as it is."""
    seed: int = 0
    """Of weights, order, views and masks."""
    num_workers: int = 0
    """Processes that decode and augment; 0 does it between the steps."""
    precision: str = "auto"
    """"auto", "fp32" or "bf16"."""
    device: str = "auto"
    """"auto", "cpu" or "cuda"."""
    checkpoint_every: int = 1000
    """Steps between two checkpoints; a run that died continues from the last one."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} {getattr(self, name)}: expected at least 1.")
        for name in ("seed", "num_workers", "weight_decay"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} {getattr(self, name)}: expected at least 0.")
        if not self.base_lr > 0:
            raise ConfigError(f"base_lr {self.base_lr}: expected more than 0.")
        if not 0 < self.mask_ratio < 1:
            raise ConfigError(f"mask_ratio {self.mask_ratio}: expected more than 0 and less than 1.")
        if self.warmup_steps is not None and not 0 <= self.warmup_steps < self.steps:
            raise ConfigError(
                f"warmup_steps {self.warmup_steps}: expected 0 to {self.steps - 1}, fewer than all steps."
            )

    @property
    def lr(self) -> float:
        """The highest learning rate."""
        return self.base_lr * self.batch_size / 256

    def recorded(self) -> dict[str, Any]:
        """What the result depends on, as JSON: not where it lies, nor what only changes the speed."""
        fields = asdict(self)
        for name in ("data", "out", "num_workers", "device", "checkpoint_every"):
            del fields[name]
        return fields


@dataclass(frozen=True, kw_only=True, slots=True)
class PretrainSummary:
    """What a finished run gave."""

    weights: Path
    """The encoder: a plain timm state dict, for `--teacher MODEL --weights FILE`."""
    weights_sha256: str
    """Of its tensors."""
    model: str
    """The name to give with the weights."""
    steps: int
    """Steps trained in all, in this run or earlier ones."""
    first_loss: float
    """Mean over the first steps that were logged."""
    final_loss: float
    """Mean over the last steps that were logged."""
    images_per_s: float
    """Speed of the last logged steps."""

    def to_json(self) -> dict[str, Any]:
        """The fields as a JSON object."""
        return {**asdict(self), "weights": str(self.weights)}


def pretrain(config: PretrainConfig) -> PretrainSummary:
    """Train, or continue, or return what an earlier run of the same config gave.

    Every step is a pure function of (seed, step) and the weights before it, so a run that was interrupted and continued
    gives the same weights on the same machine as one that was not. Files are replaced whole; after a failure the last
    checkpoint is valid.

    Raises:
        ConfigError: a value does not fit the model or the data, or the loss is no longer a number.
        CacheMismatchError: the folder holds a run of another config; the message names each difference.
    """
    index = index_source(config.data, labels="optional")
    record = {**config.recorded(), "source_fingerprint": index.fingerprint, "num_samples": index.num_samples}
    _claim_folder(config.out, record)
    if (config.out / WEIGHTS_FILE).exists():
        return _summary(config)
    # What is drawn from torch's global generator (initial weights, dropout) must not disturb the caller's.
    device = resolve_device(config.device)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        _Run(config, Source(index), device).to_the_end()
    return _summary(config)


class _Run:
    """The state of one training: model, optimizer, schedule and step."""

    def __init__(self, config: PretrainConfig, source: Source, device: torch.device) -> None:
        from timm.scheduler import cosine_lr

        optim: Any = importlib.import_module("timm.optim")

        self.config, self.device = config, device
        self.dtype = resolve_precision(config.precision, device)
        torch.manual_seed(mixed_seed(config.seed, 0))
        self.model = _autoencoder(config).to(device).train()
        self.optimizer = optim.create_optimizer_v2(
            self.model,
            opt="adamw",
            lr=config.lr,
            weight_decay=config.weight_decay,
            betas=(0.9, 0.95),
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
        self.batches = ViewBatches(
            source, _view_policy(config, self.input), batch_size=config.batch_size, seed=config.seed
        )
        self.step = 0
        self._restore()

    def to_the_end(self) -> None:
        """Train from the current step to the last, then write the weights and drop the checkpoint."""
        config = self.config
        batches = stream_batches(self.batches, start=self.step, stop=config.steps, num_workers=config.num_workers)
        with (
            (config.out / METRICS_FILE).open("a") as metrics,
            Progress("pretrain", total=config.steps, unit="steps", done=self.step) as progress,
        ):
            self._train(batches, metrics, progress)
        _write_weights(self.model, config.out / WEIGHTS_FILE)
        (config.out / CHECKPOINT_FILE).unlink(missing_ok=True)

    def _train(self, batches: Iterator[Tensor], metrics: TextIO, progress: Progress) -> None:
        losses: list[Tensor] = []
        note, start_s = "", time.monotonic()
        for pixels_BHWC in batches:
            losses.append(self._train_step(pixels_BHWC))
            self.step += 1
            if self.step % LOG_EVERY == 0 or self.step == self.config.steps:
                # Reading the loss waits for the device, so it is done for many steps at once.
                loss = float(torch.stack(losses).mean())
                images_per_s = len(losses) * self.config.batch_size / (time.monotonic() - start_s)
                self._check_loss(loss)
                row = {"step": self.step, "loss": loss, "lr": self._lr(), "images_per_s": round(images_per_s, 1)}
                print(json.dumps(row), file=metrics, flush=True)
                note = f"loss {loss:.4f}"
                losses.clear()
                start_s = time.monotonic()
            if self.step % self.config.checkpoint_every == 0 and self.step < self.config.steps:
                self._save()
            progress.advance(1, note)

    def _train_step(self, pixels_BHWC: Tensor) -> Tensor:
        step_seed = mixed_seed(self.config.seed, 1, self.step)
        torch.manual_seed(step_seed)
        order_BT = self.model.draw_order(len(pixels_BHWC), torch.Generator().manual_seed(step_seed))
        self.scheduler.step_update(self.step)
        images_BCHW = normalise_images(pixels_BHWC, self.input.mean, self.input.std, self.device)
        with autocast(self.device, self.dtype):
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
                f"the loss is {loss} after {self.step} steps, expected a number. Lower base_lr "
                f"({self.config.base_lr:g}) or try precision fp32."
            )

    def _save(self) -> None:
        state = {"step": self.step, "model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        path = self.config.out / CHECKPOINT_FILE
        _replace(path, lambda temporary: torch.save(state, temporary))

    def _restore(self) -> None:
        path = self.config.out / CHECKPOINT_FILE
        if path.exists():
            state: dict[str, Any] = torch.load(path, map_location=self.device, weights_only=True)
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.step = int(state["step"])
        metrics = self.config.out / METRICS_FILE
        rows = [row for row in _read_metrics(metrics) if row["step"] <= self.step]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        _replace(metrics, lambda temporary: temporary.write_text(text))


def _autoencoder(config: PretrainConfig) -> MaskedAutoencoder:
    encoder: Any = create_student(parse_model_name(config.model), 0)
    width = config.decoder_dim or min(512, int(encoder.embed_dim))
    return MaskedAutoencoder(
        encoder,
        mask_ratio=config.mask_ratio,
        decoder_dim=width,
        decoder_depth=config.decoder_depth or min(8, max(1, len(encoder.blocks) // 2)),
        decoder_heads=config.decoder_heads or max(1, width // 32),
        normalise_targets=config.normalise_targets,
    )


def _view_policy(config: PretrainConfig, model_input: InputConfig) -> ViewPolicy:
    return ViewPolicy(
        name=config.views,
        seed=config.seed,
        image_height=model_input.height,
        image_width=model_input.width,
        interpolation=model_input.interpolation,
        crop_pct=model_input.crop_pct,
    )


def _claim_folder(out: Path, record: dict[str, Any]) -> None:
    """Write the config into a new folder, or check that the folder is of the same run."""
    path = out / CONFIG_FILE
    if path.exists():
        before = cast("dict[str, Any]", json.loads(path.read_text()))
        differences = [
            f"{name} {before.get(name)!r} before, {record.get(name)!r} now"
            for name in sorted({*before, *record})
            if before.get(name) != record.get(name)
        ]
        if differences:
            raise CacheMismatchError(
                f"{out} holds a pre-training of another config: {'; '.join(differences)}. Give another folder, or "
                "delete this one."
            )
        return
    if out.exists() and not out.is_dir():
        raise ConfigError(f"{out}: a file is in the way of the output folder. Give another folder.")
    out.mkdir(parents=True, exist_ok=True)
    text = json.dumps(record, indent=2) + "\n"
    _replace(path, lambda temporary: temporary.write_text(text))


def _write_weights(model: MaskedAutoencoder, path: Path) -> None:
    from safetensors import torch as safetensors_torch

    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.encoder.state_dict().items()}
    _replace(path, lambda temporary: safetensors_torch.save_file(tensors, temporary, metadata={"format": "pt"}))


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    """Write beside `path`, then rename: the old file stays whole until the new one is."""
    temporary = path.with_name(path.name + ".tmp")
    write(temporary)
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    temporary.replace(path)


def _read_metrics(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    # A line cut short by a crash ends the file; it is of a step that will be run again.
    return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]


def _summary(config: PretrainConfig) -> PretrainSummary:
    rows = _read_metrics(config.out / METRICS_FILE)
    if not rows:
        raise ConfigError(
            f"{config.out / METRICS_FILE} is missing or empty beside finished weights. Give another folder."
        )
    return PretrainSummary(
        weights=config.out / WEIGHTS_FILE,
        weights_sha256=tensors_sha256(read_weights(config.out / WEIGHTS_FILE)),
        model=str(parse_model_name(config.model)),
        steps=config.steps,
        first_loss=rows[0]["loss"],
        final_loss=rows[-1]["loss"],
        images_per_s=rows[-1]["images_per_s"],
    )
