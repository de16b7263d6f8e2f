"""One student in training: its state, the training step, and what is written to its folder."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from atcache.errors import ConfigError
from atcache.feed.batch import Batch
from atcache.feed.order import step_seed
from atcache.feed.prefetch import Prefetcher, copied
from atcache.files.durable import encode_json, write_file
from atcache.students.student import Student
from atcache.teachers.devices import autocast, memory_errors_explained, resolve_precision, training_autocast
from atcache.teachers.inputs import normalise_images
from atcache.views.jitter import draw_jitter, jitter_pixels

from ..running.checkpoint import CHECKPOINT_FILE, load_checkpoint, refuse_what_does_not_fit, save_checkpoint
from ..running.metrics import MetricsLog, Speed, read_metrics
from ..running.progress import Progress
from ..running.ranks import Ranks
from ..running.run_files import WEIGHTS_FILE, save_weights
from .compiled import compile_student, compiles, with_module
from .config import TrainConfig
from .data import TrainingData
from .map_pictures import MapPictures, is_pictured
from .optimiser import make_optimizer, make_scheduler
from .scores import Score, score_students
from .summary import SUMMARY_FILE, TrainSummary

LOG_EVERY = 10
"""Steps between two lines of metrics."""
_MUCH_OF_THE_START = 0.05
"""A note warns if the initial weights make up at least this share of the moving average."""
_LESS_MEMORY = "Give --accumulate 2 or more, which takes a batch in parts, or a smaller --batch-size"


class DivergedError(ConfigError):
    """The loss is NaN or infinite."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Reports:
    """Where a run's metrics and log lines go; only the leading rank writes any."""

    metrics: MetricsLog | None = None
    progress: Progress | None = None
    prefix: str = ""
    """What each line starts with."""

    def write(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        """Record the metrics of a step."""
        if self.metrics is not None:
            self.metrics.write(kind, step, values)

    def say(self, line: str) -> None:
        """Show the user a line."""
        if self.progress is not None:
            self.progress.say(self.prefix + line)


class TrainingRun:
    """The state of one run, which changes with every step.

    The loop over batches calls `restore`, then `take` for each batch. After each of these it calls `validate` if the
    step `is_validated`, and `finish` if the run `is_done`; after `restore` too, as either may have been interrupted.

    Runs that are trained together do not affect each other: every step seeds its own random numbers.
    """

    backend: Any = "inductor"
    """torch's backend, if the student is compiled."""

    def __init__(
        self,
        config: TrainConfig,
        data: TrainingData,
        device: torch.device,
        ranks: Ranks = Ranks(),  # noqa: B008 - frozen
    ) -> None:
        from timm.utils.model_ema import ModelEmaV3

        self.config, self.data, self.device, self.ranks = config, data, device, ranks
        self.dtype = resolve_precision(config.precision, device)
        self.student: Student = data.student
        self.student.module.to(device).train()
        self.steps_per_epoch = len(data.order.sample_S) / config.batch_size
        self.num_steps = config.steps or data.order.num_steps(config.epochs)
        self.optimizer = make_optimizer(config, self.student.model, device)
        self.scheduler = make_scheduler(config, self.optimizer, self.num_steps, self.steps_per_epoch)
        self.ema: Any = None if config.ema is None else ModelEmaV3(self.student.module, decay=config.ema)
        self.checkpoint = config.out / CHECKPOINT_FILE
        self.is_compiled = compiles(config.compile, device, ranks, self.num_steps)
        """Whether the student is compiled for its training, if that is possible."""
        self.problem: str | None = None
        """Why the student could not be compiled."""
        self._trained: Student | None = None
        """The student as it is trained, see `prepare`; shares its weights."""
        self._pictures = MapPictures(data, config.log_maps, device, self.dtype) if config.log_maps else None
        self._prefetcher = Prefetcher(device)
        self.step = 0
        self.loss = math.nan
        """The last loss that was logged."""
        self.validation: Score | None = None
        self._seconds_before = 0.0
        """Time of earlier processes, which trained it up to its checkpoint."""

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user should know before the run."""
        decay = self.config.ema
        if decay is None or decay**self.num_steps < _MUCH_OF_THE_START:
            return self.data.notes
        return (
            *self.data.notes,
            f"NOTE: --ema {decay} averages over about {round(1 / (1 - decay))} steps and the run has {self.num_steps}: "
            f"{decay**self.num_steps:.0%} of what is validated and saved are the initial weights. Lower --ema.",
        )

    def restore(self) -> None:
        """Continue from the checkpoint, if there is one.

        Raises:
            CorruptCacheError: it is damaged, or of a model with other weights, such as that of another timm.
        """
        if not self.checkpoint.exists():
            return
        contents = load_checkpoint(self.checkpoint)
        with refuse_what_does_not_fit(self.checkpoint):
            self.student.module.load_state_dict(contents["module"])
            self.optimizer.load_state_dict(contents["optimizer"])
            if self.ema is not None:
                self.ema.module.load_state_dict(contents["ema"])
            self.step, self._seconds_before = contents["step"], contents["seconds"]
        self.scheduler.step_update(self.step)

    @property
    def is_done(self) -> bool:
        """Whether the run has taken all its steps."""
        return self.step >= self.num_steps

    @property
    def is_validated(self) -> bool:
        """Whether to validate after the current step: the last one, and one every `validate_every` epochs."""
        if self.data.validation is None or not self.step:
            return False
        return self.is_done or self._ends_a_stretch()

    def take(self, batch: Batch, speed: Speed, reports: Reports) -> None:
        """Train on this rank's part of the current step's batch; log and save when it is time.

        Raises:
            DivergedError: the loss is NaN or infinite.
        """
        if self._trained is None:
            self._begin(batch, speed, reports)
        lr = self.lr()  # read before the step, which sets the next step's rate
        losses = self.train_step(batch)
        logs = self.step % LOG_EVERY == 0 or self.is_done
        # Before a validation, which may fail, as at a damaged image. Without one, `finish` saves the last step.
        saves = self.is_validated if self.is_done else self._saves_now()
        # The loss is checked before these weights replace a good checkpoint.
        if logs or saves:
            # Reading losses waits for the device, so it is not done at every step.
            sums = self.ranks.sum(torch.stack(list(losses.values())).double())
            values = {name: total / self.ranks.world_size for name, total in zip(losses, sums, strict=True)}
            self.loss = values["loss"]
            self._refuse_divergence()
            if logs:
                reports.write("train", self.step, {**values, "lr": lr, **speed.values()})
        if saves and self.ranks.leads:
            self.save(speed)

    def _begin(self, batch: Batch, speed: Speed, reports: Reports) -> None:
        """Prepare, which takes long if the student is compiled, and tell the user."""
        if self.is_compiled:
            reports.say("compiling the student for its training, which may take minutes (--no-compile does without)")
        with speed.paused():
            self.prepare(batch)
        if self.problem is not None:
            reports.say(f"NOTE: {self.problem}. It is trained uncompiled, which is slower.")

    def train_step(self, batch: Batch) -> dict[str, Tensor]:
        """One optimiser step; returns the losses of this rank's part of the batch."""
        config = self.config
        self.prepare(batch)
        assert self._trained is not None, "just prepared"
        totals: dict[str, Tensor] = {}
        jitter_B3 = self._draw(len(batch.label_B))
        jitters = config.accumulate * [None] if jitter_B3 is None else jitter_B3.chunk(config.accumulate)
        for number, (part, part_B3) in enumerate(zip(batch.cut(config.accumulate), jitters, strict=True), start=1):
            with (
                self._gradients_stay_here(self._trained, number < config.accumulate),
                memory_errors_explained("the student", len(part.label_B), self.device, _LESS_MEMORY),
            ):
                losses = self._losses(self._trained, self.on_device(part), part_B3)
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

    def prepare(self, batch: Batch) -> None:
        """Before the first step, and with a batch like those to come: compile the student and connect it."""
        if self._trained is None:
            self._trained = self._prepare(batch)

    def on_device(self, batch: Batch) -> Batch:
        """The batch on the run's device, copied while the step before runs."""
        return self._prefetcher.send(batch if self.data.teacher is None else self.data.teacher.looked_at(batch))

    def _losses(self, student: Student, part: Batch, jitter_B3: Tensor | None = None) -> dict[str, Tensor]:
        """The losses of a student on a part of a batch, which is on the device."""
        # Only the student's pixels are jittered: a live teacher sees them as they are.
        pixels_BHWC = part.pixels_BHWC
        if jitter_B3 is not None:
            pixels_BHWC = jitter_pixels(pixels_BHWC, copied(jitter_B3, self.device))
        images = normalise_images(pixels_BHWC, self.student.input.mean, self.student.input.std, self.device)
        given = None if self.data.teacher is None else self.data.teacher.factors(part)
        if self.config.attention_only:
            with training_autocast(self.student.model, self.device, self.dtype):
                attention_loss = student.attention_loss(images, given)
            return {"loss": attention_loss, "attention_loss": attention_loss}
        targets = part.targets(self.student.num_classes)
        with training_autocast(self.student.model, self.device, self.dtype):
            label_loss, attention_loss = student.train_step(images, targets, given, self.config.label_smoothing)
        if attention_loss is None:
            return {"label_loss": label_loss, "loss": label_loss}
        loss = label_loss + self.config.attention_weight * attention_loss
        return {"label_loss": label_loss, "loss": loss, "attention_loss": attention_loss}

    def _draw(self, num_images: int) -> Tensor | None:
        """Seed the step's random numbers, and draw the jitter of this rank's images; None without jitter.

        The numbers depend neither on where a run was stopped nor on how it is validated.
        """
        seed = step_seed(self.config.seed, self.step)
        torch.manual_seed(seed)
        factors_B3 = None
        if self.config.student_jitter:
            # Drawn for the whole batch, so that the number of ranks changes nothing.
            all_B3 = draw_jitter(self.config.student_jitter, num_images * self.ranks.world_size)
            factors_B3 = all_B3[num_images * self.ranks.rank : num_images * (self.ranks.rank + 1)]
        if self.ranks.rank:  # otherwise all ranks would drop the same paths
            torch.manual_seed(step_seed(seed, self.ranks.rank))
        return factors_B3

    def _prepare(self, batch: Batch) -> Student:
        """The student as it is trained: compiled if that is wanted, and with gradients averaged over the ranks."""
        part = self.on_device(batch.cut(self.config.accumulate)[0])
        if not self.ranks.is_alone:
            self._freeze_what_is_unused(part.rows(0, 1))
        student = self.student
        if self.is_compiled:
            self._decode_once(part)
            student, self.problem = compile_student(
                student, lambda compiled: self._losses(compiled, part)["loss"], self.backend
            )
        if self.ranks.is_alone:
            return student
        from torch.nn.parallel import DistributedDataParallel

        return with_module(student, DistributedDataParallel(student.module))

    def _decode_once(self, part: Batch) -> None:
        """What a codec makes only once it makes now, outside the compiled graph, which would make it in each step."""
        if self.data.teacher is not None and self.student.pairing is not None:
            with torch.no_grad(), autocast(self.device, self.dtype):
                self.data.teacher.factors(part).layer(self.student.pairing.teacher_layers[0])

    def _freeze_what_is_unused(self, sample: Batch) -> None:
        """Freeze weights that get no gradient, such as q and k of a copying CaiT: DDP would wait for it forever."""
        self.student.module.eval()
        losses = self._losses(self.student, sample)
        self.student.module.train()
        weights = [weight for weight in self.student.module.parameters() if weight.requires_grad]
        gradients = cast(
            "Sequence[Tensor | None]", torch.autograd.grad(losses["loss"], weights, allow_unused=True)
        )  # torch's annotation leaves out the Nones of unused weights
        for weight, gradient in zip(weights, gradients, strict=True):
            weight.requires_grad_(gradient is not None)

    def _gradients_stay_here(self, student: Student, stay: bool) -> AbstractContextManager[None]:
        """A context in which gradients add up on this rank and are not averaged yet; changes nothing without `stay`."""
        no_sync = getattr(student.module, "no_sync", None)
        return no_sync() if stay and no_sync is not None else nullcontext()

    def finish(self, speed: Speed) -> TrainSummary:
        """Save the weights and the summary, and delete the checkpoint. Only the leader may call it."""
        out = self.config.out
        save_weights(out / WEIGHTS_FILE, self._evaluated_student().model)
        logged = read_metrics(out, "train")
        last = logged[-max(1, len(logged) // 10) :]
        summary = TrainSummary(
            out=str(out),
            mode=self.config.mode,
            steps=self.num_steps,
            num_samples=len(self.data.order.sample_S),
            loss=statistics.fmean(row["loss"] for row in last),
            label_loss=None if self.config.attention_only else statistics.fmean(row["label_loss"] for row in last),
            validation=self.validation,
            seconds=self._seconds_before + speed.seconds,
            **(speed.values() if speed.num_images else {name: last[-1][name] for name in speed.values()}),
        )
        write_file(out / SUMMARY_FILE, encode_json(summary.to_json()))
        self.checkpoint.unlink(missing_ok=True)
        return summary

    def lr(self) -> float:
        """The next step's highest learning rate: with layer decay, earlier blocks have lower ones."""
        return max(float(group["lr"]) for group in self.optimizer.param_groups)

    def _refuse_divergence(self) -> None:
        if not math.isfinite(self.loss):
            problem = f"the loss is {self.loss}. Lower --base-lr or give --clip-grad 1, and another --out."
            self.ranks.refuse(DivergedError(f"step {self.step}: {problem}"))

    def _ends_a_stretch(self) -> bool:
        """Whether this step ends a stretch of `validate_every` epochs."""
        if not self.config.validate_every:
            return False
        steps = max(1, self.config.validate_every * self.steps_per_epoch)
        return _stretches(self.step, steps) > _stretches(self.step - 1, steps)

    def _saves_now(self) -> bool:
        return self.step % self.config.checkpoint_every == 0 or self.is_validated

    def validate(self, reports: Reports) -> None:
        """Score the student on the validation set; keep the score and report it."""
        assert self.data.validation is not None, "the caller asks is_validated"
        student = self._evaluated_student()
        (score,) = score_students([student], self.data.validation, self.device, self.dtype, self.ranks).runs
        self.student.module.train()
        self.validation = score
        reports.write("validation", self.step, {"top1": score.top1, "top5": score.top5, "loss": score.loss})
        epoch = self.step / self.steps_per_epoch
        reports.say(
            f"epoch {epoch:.4g}: validation top-1 {score.top1:.2f}, top-5 {score.top5:.2f}, loss {score.loss:.4g}"
        )

    def draw_maps(self, reports: Reports) -> None:
        """Log pictures of some samples' maps, if they are wanted and it is time."""
        if self._pictures is None or reports.metrics is None or not is_pictured(self.step, self.num_steps):
            return
        reports.metrics.write_pictures("maps", self.step, self._pictures.draw(self._evaluated_student()))
        self.student.module.train()

    def _evaluated_student(self) -> Student:
        """The student to validate and save: the moving average if there is one, else the student itself."""
        return self.student if self.ema is None else self.student.averaged(self.ema.module)

    def save(self, speed: Speed) -> None:
        """Replace the checkpoint. Only the leader may call it."""
        save_checkpoint(
            self.checkpoint,
            {
                "step": self.step,
                "seconds": self._seconds_before + speed.seconds,
                "module": self.student.module.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "ema": None if self.ema is None else self.ema.module.state_dict(),
            },
        )

    def is_sound(self) -> bool:
        """Whether all weights are finite. `take` checks the loss of some steps only."""
        return all(bool(torch.isfinite(weight).all()) for weight in self.student.module.parameters())


def _stretches(step: int, length: float) -> int:
    """How many whole stretches of `length` steps, which may be a fraction, the first `step` steps contain."""
    return math.floor(round(step / length, 9))  # to Python, 0.3 / 0.1 is less than 3
