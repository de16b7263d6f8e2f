"""Train: a student from a cache (copy, distill), or the runs it is compared with (scratch, finetune).

One run is one folder: run.json (its settings), metrics.jsonl and TensorBoard events, checkpoint.pt while it runs,
model.safetensors when it is done. Typing the same command again continues from the checkpoint, exactly.
"""

from __future__ import annotations

import importlib
import json
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from atcache.errors import ConfigError, CorruptCacheError
from atcache.loader import Batch, training_batches
from atcache.order import step_seed
from atcache.precision import autocast, resolve_device, resolve_precision
from atcache.rendering import normalise_images
from atcache.store.durable import encode_json, write_file

from .checkpoint import CHECKPOINT_FILE, check_same_run, load_checkpoint, save_checkpoint
from .metrics import MetricsLog, read_metrics
from .progress import Progress
from .runs import RUN_FILE, WEIGHTS_FILE, save_weights
from .students import Student
from .train_config import TrainConfig
from .training_data import TrainingData, open_training_data
from .validation import Score, score_student

SUMMARY_FILE = "summary.json"
LOG_EVERY = 10
"""Steps between two lines of metrics."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainSummary:
    """What a run came to."""

    out: str
    mode: str
    steps: int
    num_samples: int
    loss: float
    """The mean over the last tenth of the logged steps."""
    validation: Score | None
    """At the end; None without validation data."""
    seconds: float
    """Of this process."""
    img_per_s: float
    waited_for_data: float
    """Share of the time spent waiting for batches."""

    def to_json(self) -> dict[str, Any]:
        """The fields as a JSON object."""
        return asdict(self)

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> TrainSummary:
        """The summary `to_json` came from."""
        score = fields["validation"]
        values: dict[str, Any] = {**fields, "validation": None if score is None else Score(**score)}
        return cls(**values)


def train(config: TrainConfig) -> TrainSummary:
    """Train a student, or continue.

    Raises:
        AtcacheError: one of its children for each thing that does not fit; a checkpoint that was saved stays valid.
    """
    device = resolve_device(config.device)
    # What is drawn from torch's global generator must not disturb the caller's.
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(config.seed)  # the student's weights are the first thing drawn
        data = open_training_data(config, device)
        check_same_run(
            config.out / RUN_FILE,
            {"settings": config.settings(), "record": data.record.to_json(), "data": data.identity},
        )
        summary_file = config.out / SUMMARY_FILE
        if (config.out / WEIGHTS_FILE).exists() and summary_file.exists():
            return _read_summary(summary_file)
        training = _Training(config, data, device)
        summary = training.run()
    write_file(summary_file, encode_json(summary.to_json()))
    training.checkpoint.unlink(missing_ok=True)
    return summary


def _read_summary(file: Path) -> TrainSummary:
    try:
        return TrainSummary.from_json(json.loads(file.read_text()))
    except (KeyError, TypeError, ValueError) as error:
        raise CorruptCacheError(f"{file} is damaged ({error}). Delete {file.parent} to train this run anew.") from error


class _Training:
    """One run's changing state, and its loop."""

    def __init__(self, config: TrainConfig, data: TrainingData, device: torch.device) -> None:
        from timm.scheduler.cosine_lr import CosineLRScheduler
        from timm.utils.model_ema import ModelEmaV3

        self.config, self.data, self.device = config, data, device
        self.dtype = resolve_precision(config.precision, device)
        self.student: Student = data.student
        self.student.module.to(device).train()
        self.steps_per_epoch = len(data.order.sample_S) / config.batch_size
        self.num_steps = config.steps or math.ceil(config.epochs * self.steps_per_epoch)
        self.optimizer = _optimizer(config, self.student.model, device)
        warmup_steps = min(math.ceil(config.warmup_epochs * self.steps_per_epoch), self.num_steps // 10)
        self.scheduler = CosineLRScheduler(
            self.optimizer,
            t_initial=max(1, self.num_steps - warmup_steps),
            lr_min=config.min_lr,
            warmup_t=warmup_steps,
            warmup_prefix=True,
            t_in_epochs=False,
        )
        self.ema: Any = None if config.ema is None else ModelEmaV3(self.student.module, decay=config.ema)
        self.checkpoint = config.out / CHECKPOINT_FILE
        self.step = 0
        self.validation: Score | None = None

    def run(self) -> TrainSummary:
        """Train from the current step to the last, then save the weights and drop the checkpoint."""
        config = self.config
        if self.checkpoint.exists():
            self._restore(load_checkpoint(self.checkpoint, self.device))
        speed = _Speed()
        with (
            MetricsLog(config.out, first_step=self.step) as metrics,
            Progress(config.mode, total=self.num_steps, unit="steps", done=self.step) as progress,
        ):
            for note in self.data.notes:
                progress.say(note)
            for batch in speed.timed(self._batches()):
                losses = self._train_step(batch)
                speed.num_images += config.batch_size
                if self.step % LOG_EVERY == 0 or self.step == self.num_steps:
                    # Reading losses waits for the device, so it is not done at every step.
                    values = {name: float(loss) for name, loss in losses.items()}
                    self._refuse_divergence(values["loss"])
                    metrics.write("train", self.step, {**values, "lr": self._lr(), **speed.values()})
                    progress.advance(self.step - progress.done, f"loss {values['loss']:.4g}  {speed}")
                if self.step == self.num_steps or self._validates_now():
                    self._validate(metrics, progress)
                if self.step < self.num_steps and self._saves_now():
                    self._save()
        student = self._evaluated_student()
        save_weights(config.out / WEIGHTS_FILE, student.model)
        logged = [row["loss"] for row in read_metrics(config.out, "train")]
        last = logged[-max(1, len(logged) // 10) :]
        return TrainSummary(
            out=str(config.out),
            mode=config.mode,
            steps=self.num_steps,
            num_samples=len(self.data.order.sample_S),
            loss=sum(last) / len(last),
            validation=self.validation,
            seconds=speed.seconds,
            **speed.values(),
        )

    def _batches(self) -> Iterator[Batch]:
        return training_batches(
            self.data.views,
            self.data.label_S,
            self.data.order,
            first_step=self.step,
            stop_step=self.num_steps,
            workers=self.config.workers,
        )

    def _train_step(self, batch: Batch) -> dict[str, Tensor]:
        """One optimiser step; returns the batch's losses."""
        config = self.config
        # Each step seeds its own numbers: they do not depend on where a run was stopped, or on how it is validated.
        torch.manual_seed(step_seed(config.seed, self.step))
        totals: dict[str, Tensor] = {}
        for part in _cut(batch, config.accumulate):
            images = normalise_images(part.pixels_BHWC, self.student.input.mean, self.student.input.std, self.device)
            given = None if self.data.teacher is None else self.data.teacher.factors(part)
            with autocast(self.device, self.dtype):
                label_loss, attention_loss = self.student.train_step(
                    images, part.label_B.to(self.device), given, config.label_smoothing
                )
            losses = {"label_loss": label_loss, "loss": label_loss}
            if attention_loss is not None:
                losses |= {
                    "attention_loss": attention_loss,
                    "loss": label_loss + config.attention_weight * attention_loss,
                }
            (losses["loss"] / config.accumulate).backward()
            for name, loss in losses.items():
                totals[name] = totals.get(name, 0) + loss.detach() / config.accumulate
        if config.clip_grad is not None:
            torch.nn.utils.clip_grad_norm_(self.student.model.parameters(), config.clip_grad)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.scheduler.step_update(self.step)
        if self.ema is not None:
            self.ema.update(self.student.module, step=self.step)
        return totals

    def _lr(self) -> float:
        """The learning rate of the last block's weights: the highest under layer decay."""
        return max(float(group["lr"]) for group in self.optimizer.param_groups)

    def _refuse_divergence(self, loss: float) -> None:
        if not math.isfinite(loss):
            raise ConfigError(
                f"step {self.step}: the loss is {loss}. Lower --base-lr or give --clip-grad 1, in another --out."
            )

    def _validates_now(self) -> bool:
        """Whether this step ends a stretch of `validate_every` epochs."""
        if not self.config.validate_every:
            return False
        return self.step % max(1, round(self.config.validate_every * self.steps_per_epoch)) == 0

    def _saves_now(self) -> bool:
        return self.step % self.config.checkpoint_every == 0 or self._validates_now()

    def _validate(self, metrics: MetricsLog, progress: Progress) -> None:
        if self.data.validation is None:
            return
        score = score_student(self._evaluated_student(), self.data.validation, self.device, self.dtype)
        self.student.module.train()
        self.validation = score
        metrics.write("validation", self.step, {"top1": score.top1, "top5": score.top5, "loss": score.loss})
        epoch = self.step / self.steps_per_epoch
        progress.say(
            f"epoch {epoch:.4g}: validation top-1 {score.top1:.2f}, top-5 {score.top5:.2f}, loss {score.loss:.4g}"
        )

    def _evaluated_student(self) -> Student:
        """The student that counts: the moving average where there is one."""
        return self.student if self.ema is None else self.student.averaged(self.ema.module)

    def _save(self) -> None:
        save_checkpoint(
            self.checkpoint,
            {
                "step": self.step,
                "module": self.student.module.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "ema": None if self.ema is None else self.ema.module.state_dict(),
            },
        )

    def _restore(self, contents: dict[str, Any]) -> None:
        self.step = contents["step"]
        self.student.module.load_state_dict(contents["module"])
        self.optimizer.load_state_dict(contents["optimizer"])
        if self.ema is not None:
            self.ema.module.load_state_dict(contents["ema"])
        self.scheduler.step_update(self.step)


def _optimizer(config: TrainConfig, model: nn.Module, device: torch.device) -> torch.optim.Optimizer:
    """timm's optimiser of this name; torch's own Adams in their fused form, which spares small models a tenth."""
    optim: Any = importlib.import_module("timm.optim")  # its functions are only partly typed
    arguments: dict[str, Any] = {}
    if "adam" in config.optimizer:
        arguments["betas"] = (0.9, config.beta2)
    if config.optimizer in ("adam", "adamw"):
        arguments["fused"] = device.type in ("cpu", "cuda")
    try:
        return optim.create_optimizer_v2(
            model,
            opt=config.optimizer,
            lr=config.base_lr * config.batch_size / 256,
            weight_decay=config.weight_decay,
            layer_decay=config.layer_decay,
            **arguments,
        )
    except ValueError as error:
        raise ConfigError(
            f"optimizer={config.optimizer!r}: {error}. timm.optim.list_optimizers() names all."
        ) from error


class _Speed:
    """Images per second, and the share of the time that went into waiting for batches."""

    def __init__(self) -> None:
        self._start_s = time.monotonic()
        self._waited_s = 0.0
        self.num_images = 0

    @property
    def seconds(self) -> float:
        """Since the start."""
        return max(1e-9, time.monotonic() - self._start_s)

    def timed(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The same batches; the time each takes to come counts as waiting."""
        while True:
            start_s = time.monotonic()
            batch = next(batches, None)
            self._waited_s += time.monotonic() - start_s
            if batch is None:
                return
            yield batch

    def values(self) -> dict[str, float]:
        """Both numbers by name."""
        return {"img_per_s": self.num_images / self.seconds, "waited_for_data": self._waited_s / self.seconds}

    def __str__(self) -> str:
        values = self.values()
        return f"{values['img_per_s']:.4g} img/s  waited {values['waited_for_data']:.0%}"


def _cut(batch: Batch, num_parts: int) -> Iterator[Batch]:
    """A batch in equal parts."""
    if num_parts == 1:
        yield batch
        return
    for part in zip(
        *(num_parts * [None] if tensor is None else tensor.chunk(num_parts) for tensor in batch), strict=True
    ):
        yield Batch(*part)
