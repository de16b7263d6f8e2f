"""What a training run was asked for."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from atcache.errors import ConfigError
from atcache.feed.order import MAX_SEED, SHUFFLES, Shuffle
from atcache.files.location import Location, listed
from atcache.students.pairing import WHATS, What
from atcache.students.student import MODES, Mode
from atcache.views.mixing import mix_policy
from atcache.views.policy import PolicyName

STREAM_FIELDS = (
    "cache",
    "data",
    "val_cache",
    "val_data",
    "live_teacher",
    "policy",
    "mixup",
    "cutmix",
    "mix_prob",
    "batch_size",
    "subset",
    "order_seed",
    "shuffle",
    "workers",
    "keep_mib",
    "device",
    "precision",
    "checkpoint_every",
)
"""What the students of a sweep must have in common."""
_WHERE_FIELDS = ("layers", "heads", "layer_map", "head_map")
"""What goes where, for students that are given a teacher's attention."""
MODES_OF_OPTIONS: dict[str, tuple[Mode, ...]] = {
    "weights": ("finetune",),
    **dict.fromkeys((*_WHERE_FIELDS, "what"), ("copy", "distill")),
    "attention_weight": ("distill",),
}
"""Settings that only students of these modes can have. A live teacher has weights in all modes."""
_ATTENTION_WEIGHT = 3.0


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """Everything a run depends on. Epochs, learning rate and weight decay are the paper's for copy (arXiv 2411.09702).

    Its layer decay and moving average are off unless asked for.
    """

    mode: Mode
    """copy, distill, scratch or finetune."""
    out: Path
    """The run's folder; an unfinished run is continued."""
    recipe: str | None = None
    """The recipe these settings were taken from, by name or file. Read for one thing only: where a cache's views are
    drawn otherwise than the recipe's, a note says so."""
    cache: Location | tuple[Location, ...] | None = None
    """The training cache, or several that are trained on as one: see `caches`. scratch and finetune can do without, and
    then draw new views every epoch from `data`."""
    data: str | tuple[str, ...] | None = None
    """The tars: where the caches' now are, or what to train on without one."""
    val_cache: Location | tuple[Location, ...] | None = None
    """Validation views with maps, from one cache or several; what a copying student is validated on."""
    val_data: str | tuple[str, ...] | None = None
    """Validation images, or where the validation caches' tars now are."""
    student: str | None = None
    """A timm name; None takes the teacher's architecture."""
    weights: Path | None = None
    """The teacher's weights, for finetune and live_teacher; None takes timm's."""
    layers: str | None = None
    """Blocks whose attention is transferred, such as "0-17"; the rest is free. None for all in the cache."""
    heads: str | None = None
    """Heads of them, such as "0,3"; the rest is free. None for all in the cache."""
    layer_map: str | None = None
    """For a student of other depth, instead of layers: pairs STUDENT:TEACHER of blocks, such as "0:0,1:2,2:4"."""
    head_map: str | None = None
    """For a student with fewer heads, instead of heads: a teacher's head for each of its own, such as "0,2,5"."""
    what: What = "map"
    """map, qk, q, k, v or qkv. Copying one of q, k and v leaves the student its own others; distilling them is a mean
    squared error. Copying qk is copying the map, copying qkv the map and v. v needs a cache that was built to store
    it, or a live teacher."""
    live_teacher: bool = False
    """Run the teacher in every step instead of reading its maps: what the cache replaces, for comparison."""
    policy: PolicyName | None = None
    """How views are drawn without a cache; None for crop-flip. A cache has views of its own."""
    mixup: float = 0.0
    """Mixup without a cache: each view is blended with another sample's, by a share of Beta(mixup, mixup)."""
    cutmix: float = 0.0
    """CutMix without a cache: a box of another sample's view. With mixup too, either for half the views."""
    mix_prob: float = 1.0
    """Share of the views that are mixed, where mixup or cutmix is given."""
    epochs: float = 100.0
    """Passes over the samples."""
    steps: int | None = None
    """Optimiser steps, instead of epochs."""
    batch_size: int = 256
    """Samples an optimiser step."""
    accumulate: int = 1
    """Parts a step's batch is cut into, one after another, where it does not fit in memory."""
    subset: int | None = None
    """Train on so many samples only, drawn evenly over the classes by the seed."""
    optimizer: str = "adamw"
    """Any of timm's."""
    base_lr: float = 1e-3
    """Learning rate for 256 samples a step; the real one is base_lr * batch_size / 256."""
    min_lr: float = 0.0
    """Where the cosine ends."""
    warmup_epochs: float = 5.0
    """Passes in which the learning rate rises from 0; never more than a tenth of the run."""
    weight_decay: float = 0.05
    """Not applied to biases and norms."""
    beta2: float | None = None
    """The second of an optimiser's two betas, such as AdamW's; None for its own: AdamW's is 0.999."""
    layer_decay: float | None = None
    """Learning rate of a block relative to the one above; None for equal ones."""
    drop_path: float = 0.0
    """Stochastic depth of the student."""
    student_jitter: float = 0.0
    """How far brightness, contrast and saturation of the student's images vary, anew at every step; 0.4 is 0.6..1.4.
    Moves no token, so a cache's maps stay right."""
    label_smoothing: float = 0.0
    """Share of the label's probability spread over all classes."""
    clip_grad: float | None = None
    """Largest gradient norm."""
    ema: float | None = None
    """Decay of a moving average of the weights, which is then what is validated and saved."""
    attention_weight: float = _ATTENTION_WEIGHT
    """Weight of the distillation loss; 3 is the paper's."""
    seed: int = 0
    """Of weights and dropout, and of the stream of batches where `order_seed` is None."""
    order_seed: int | None = None
    """Of the stream of batches: order, subset, and views without a cache. None takes `seed`."""
    shuffle: Shuffle = "global"
    """global, or block for disks that hate random reads: see `SampleOrder.shuffle`."""
    workers: int = 0
    """Processes that read ahead; 0 reads in this one."""
    keep_mib: int = 256
    """Memory for views that were read, in MiB, over all workers: small datasets are read once."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    precision: str = "auto"
    """auto, fp32 or bf16 (autocast)."""
    validate_every: float = 1.0
    """Epochs between validations; 0 validates at the end only."""
    checkpoint_every: int = 1000
    """Steps between checkpoints, beside one at each validation."""

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ConfigError(f"mode={self.mode!r}: expected one of {', '.join(MODES)}.")
        if self.shuffle not in SHUFFLES:
            raise ConfigError(f"shuffle={self.shuffle!r}: expected one of {', '.join(SHUFFLES)}.")
        self._check_numbers()
        if self.batch_size % self.accumulate:
            raise ConfigError(
                f"batch_size={self.batch_size} cannot be cut into accumulate={self.accumulate} equal parts."
            )
        transfers = self.mode in ("copy", "distill")
        if not self.caches and transfers:
            raise ConfigError(
                f"mode {self.mode} needs the teacher's attention: give --cache, made with `atcache build`."
            )
        if not self.caches and (not self.data or self.student is None):
            raise ConfigError(
                "without --cache, give --data and --student: there is nothing else to train on, and what."
            )
        if self.caches and self.policy is not None:
            raise ConfigError(
                f"policy={self.policy}: the views of {self.caches[0]} are drawn already; leave --policy out."
            )
        self._check_mixing()
        if self.weights is not None and self.mode != "finetune" and not self.live_teacher:
            raise ConfigError(
                f"weights are for finetune and --live-teacher: mode {self.mode} begins fresh and needs no teacher."
            )
        self._check_transfer(transfers)

    def _check_mixing(self) -> None:
        if not (self.mixup or self.cutmix or self.mix_prob != 1):
            return
        if self.caches:
            raise ConfigError(
                f"mixup={self.mixup}, cutmix={self.cutmix}, mix_prob={self.mix_prob}: the views of {self.caches[0]} "
                "are drawn already, mixed or not; leave these options out, and give them to `atcache build`."
            )
        mix_policy(self.mixup, self.cutmix, self.mix_prob)  # refuses what cannot be
        if self.policy == "eval":
            raise ConfigError("views of policy eval are never mixed: leave --mixup and --cutmix out.")

    def _check_transfer(self, transfers: bool) -> None:
        if self.what not in WHATS:
            raise ConfigError(f"what={self.what!r}: expected one of {', '.join(WHATS)}.")
        given = [name for name in ("live_teacher", *_WHERE_FIELDS) if getattr(self, name)]
        given += ["what"] if self.what != "map" else []
        if given and not transfers:
            raise ConfigError(f"{given[0]} is for copy and distill: mode {self.mode} uses no attention of a teacher.")
        if self.mode != "distill" and self.attention_weight != _ATTENTION_WEIGHT:
            raise ConfigError(
                f"attention_weight={self.attention_weight}: mode {self.mode} has no attention loss to weigh. Leave "
                "--attention-weight out, or use mode distill."
            )
        for name, mapped in (("layers", "layer_map"), ("heads", "head_map")):
            if name in given and mapped in given:
                raise ConfigError(f"{name} and {mapped} both say which {name} are transferred; give one of them.")

    def _check_numbers(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, float) and not math.isfinite(value):
                raise ConfigError(f"{field.name}={value}: expected a number.")
        for name in ("epochs", "steps", "batch_size", "accumulate", "subset", "base_lr", "checkpoint_every"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ConfigError(f"{name}={value}: expected more than 0.")
        for name in ("seed", "order_seed"):
            if (seed := getattr(self, name)) is not None and not 0 <= seed <= MAX_SEED:
                raise ConfigError(f"{name}={seed}: expected 0 to {MAX_SEED}.")
        for name in ("min_lr", "warmup_epochs", "weight_decay", "attention_weight", "workers", "keep_mib"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name}={getattr(self, name)}: expected 0 or more.")
        for name in ("beta2", "drop_path", "label_smoothing", "ema"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < 1:
                raise ConfigError(f"{name}={value}: expected 0 or more, and less than 1.")
        if self.min_lr > (lr := self.base_lr * self.batch_size / 256):
            raise ConfigError(
                f"min_lr={self.min_lr} is over the learning rate {lr:.4g} (base_lr * batch_size / 256): it would rise. "
                "Lower it; it is not scaled with the batch."
            )
        if not 0 <= self.student_jitter <= 1:
            raise ConfigError(f"student_jitter={self.student_jitter}: expected 0 to 1, such as 0.4.")
        if self.clip_grad is not None and self.clip_grad <= 0:
            raise ConfigError(f"clip_grad={self.clip_grad}: expected more than 0.")
        if self.layer_decay is not None and not 0 < self.layer_decay <= 1:
            raise ConfigError(f"layer_decay={self.layer_decay}: expected more than 0, and at most 1.")
        if self.validate_every < 0:
            raise ConfigError(f"validate_every={self.validate_every}: expected 0 or more.")

    @property
    def caches(self) -> tuple[Location, ...]:
        """The caches to train on, none or more. Their order is part of the run: rows are numbered through them."""
        return listed(self.cache)

    @property
    def stream_seed(self) -> int:
        """The seed of the stream of batches."""
        return self.seed if self.order_seed is None else self.order_seed

    def stream(self) -> dict[str, Any]:
        """What students that share one stream of batches must have in common: what it is made of, and where it runs."""
        common = {name: getattr(self, name) for name in STREAM_FIELDS}
        # A live teacher is one for all; without one, weights are what a student begins with, its own affair.
        weights = self.weights if self.live_teacher else None
        return {**common, "cache": self.caches, "weights": weights, "order_seed": self.stream_seed}

    def settings(self) -> dict[str, Any]:
        """What makes this run this run: not where things lie, where it runs, or how often it looks up."""
        settings = asdict(self)
        places = ("out", "recipe", "cache", "data", "val_cache", "val_data", "weights")
        for name in (*places, "workers", "keep_mib", "device", "checkpoint_every", "validate_every"):
            del settings[name]
        if self.stream_seed == self.seed:
            settings["order_seed"] = None
        return settings
