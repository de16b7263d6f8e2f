"""The options of a training run."""

from __future__ import annotations

from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

from atcache.choices import MAX_SEED, Mode, PolicyName, Precision, Shuffle, What
from atcache.errors import ConfigError
from atcache.files.location import Location, listed

from ..options import (
    config,
    cutmix_option,
    device_option,
    label_key_option,
    mix_prob_option,
    mixup_option,
    option,
    precision_option,
    recipe_option,
    seed_option,
)

STREAM_FIELDS = (
    "cache",
    "data",
    "val_cache",
    "val_data",
    "label_key",
    "num_classes",
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
"""Settings that must be the same for all students of a sweep."""
PLACES = ("out", "cache", "data", "val_cache", "val_data", "label_key", "weights")
"""Settings that say where something is: another place makes no other run."""
_WHERE_FIELDS = ("layers", "heads", "layer_map", "head_map")
"""Settings that say which of the teacher's layers and heads go where in the student."""
MODES_OF_OPTIONS: dict[str, tuple[Mode, ...]] = {
    "weights": ("finetune",),
    **dict.fromkeys((*_WHERE_FIELDS, "what"), ("copy", "distill")),
    "attention_weight": ("distill",),
    "attention_only": ("distill",),
    "log_maps": ("distill", "scratch", "finetune"),
}
"""The modes that can use a setting, if not all can. With a live teacher all modes can have `weights`: the teacher's."""
_ATTENTION_WEIGHT = 3.0  # the paper's (arXiv 2411.09702)


@config
class TrainConfig:
    """Everything a run depends on. By default, epochs, learning rate and weight decay are the paper's for mode copy.

    The paper is arXiv 2411.09702. Its layer decay and its moving average are off by default.
    """

    mode: Mode = option(
        "What the student does: copy the teacher's attention, distill it, train from scratch without it, or finetune "
        "the teacher's weights."
    )
    out: Path = option("The run's folder. If it holds an unfinished run, that run continues.", is_written=True)
    recipe: str | None = recipe_option()
    cache: Location | tuple[Location, ...] | None = option(
        "The training cache, a path or URL. Several caches are used as one. scratch and finetune can train without a "
        "cache; they then draw new views every epoch.",
        default=None,
    )
    data: str | tuple[str, ...] | None = option(
        "Where the caches' tars are now, if they were moved; without a cache, the tars to train on. May be given more "
        "than once.",
        default=None,
        metavar="TARS",
    )
    val_cache: Location | tuple[Location, ...] | None = option(
        "Cache of validation views and their maps; several are used as one. To validate, mode copy needs it, or "
        "--live-teacher.",
        default=None,
    )
    val_data: str | tuple[str, ...] | None = option(
        "Tars of validation images, or where the validation caches' tars are now. May be given more than once.",
        default=None,
        metavar="TARS",
    )
    label_key: str | None = label_key_option()
    num_classes: int | None = option(
        "Outputs of the student's head.  [default: as many as classes.txt names, or as the largest label needs]",
        default=None,
        at_least=1,
    )
    student: str | None = option(
        "The student: a timm name, with arguments after a colon.  [default: the teacher's architecture]", default=None
    )
    weights: Path | None = option(
        "The teacher's weights, a file or the folder of a run, for finetune and --live-teacher.  [default: timm's, "
        "from the hub]",
        default=None,
    )
    layers: str | None = option(
        "Blocks whose attention is transferred, such as 0-17; the others use their own.  [default: all in the cache]",
        default=None,
    )
    heads: str | None = option(
        "Heads of these blocks whose attention is transferred, such as 0,3; the others use their own.  [default: all "
        "in the cache]",
        default=None,
    )
    layer_map: str | None = option(
        "Instead of --layers, for a student with another number of blocks: pairs STUDENT:TEACHER of blocks, such as "
        "0:0,1:2,2:4.",
        default=None,
    )
    head_map: str | None = option(
        "Instead of --heads, for a student with fewer heads: the teacher's head for each head of the student, such as "
        "0,2,5.",
        default=None,
    )
    what: What = option(
        "What is transferred. A student that copies only q, k or v computes the others itself. Distilling anything "
        "but maps uses a mean squared error. v and qkv need --live-teacher, or a cache of `build --store v`.",
        default="map",
    )
    live_teacher: bool = option(
        "Run the teacher in every step instead of reading its maps from the cache, to compare the two.", default=False
    )
    policy: PolicyName | None = option(
        "How views are drawn without a cache; a cache's views are fixed.  [default: crop-flip]", default=None
    )
    mixup: float = mixup_option()
    cutmix: float = cutmix_option()
    mix_prob: float = mix_prob_option()
    epochs: float = option("Passes over the samples.", default=100.0, above=0)
    steps: int | None = option("Optimiser steps, instead of epochs.", default=None, at_least=1)
    batch_size: int = option("Samples in an optimiser step.", default=256, at_least=1)
    accumulate: int = option("Cut each step's batch into this many equal parts, to save memory.", default=1, at_least=1)
    subset: int | None = option(
        "Train on this many samples only, drawn evenly over the classes by the seed.", default=None, at_least=1
    )
    optimizer: str = option("Name of a timm optimiser.", default="adamw")
    base_lr: float = option(
        "Learning rate for 256 samples in a step; the one used is base_lr * batch_size / 256.", default=1e-3, above=0
    )
    min_lr: float = option("Learning rate at the end of the cosine schedule.", default=0.0, at_least=0)
    warmup_epochs: float = option(
        "Passes in which the learning rate rises from 0; never more than a tenth of the run.", default=5.0, at_least=0
    )
    weight_decay: float = option("Weight decay; biases and norms have none.", default=0.05, at_least=0)
    beta2: float | None = option(
        "The second of the optimiser's two betas.  [default: the optimiser's own, such as AdamW's 0.999]",
        default=None,
        at_least=0,
        below=1,
    )
    layer_decay: float | None = option(
        "Learning rate of each block as a share of the next block's, such as 0.75.  [default: all are the same]",
        default=None,
        above=0,
        at_most=1,
    )
    drop_path: float = option("Stochastic depth of the student.", default=0.0, at_least=0, below=1)
    student_jitter: float = option(
        "How far brightness, contrast and saturation of the student's images vary at every step; 0.4 means factors "
        "of 0.6 to 1.4. Nothing in the image moves, so a cache's maps still fit.",
        default=0.0,
        at_least=0,
        at_most=1,
    )
    label_smoothing: float = option(
        "Share of the label's probability that is spread over all classes.", default=0.0, at_least=0, below=1
    )
    clip_grad: float | None = option("Largest norm of the gradients.  [default: no limit]", default=None, above=0)
    ema: float | None = option(
        "Decay of a moving average of the weights, such as 0.9999. The average is then what is validated and saved.",
        default=None,
        at_least=0,
        below=1,
    )
    attention_only: bool = option(
        "Distill by the attention loss alone: no labels are needed, and the student has no head.", default=False
    )
    attention_weight: float = option(
        "Weight of the distillation loss; 3 is the paper's.", default=_ATTENTION_WEIGHT, at_least=0
    )
    seed: int = seed_option("weights, dropout and, without --order-seed, the order of samples")
    order_seed: int | None = option(
        "Seed of the stream of batches: order, subset and, without a cache, views.  [default: --seed]",
        default=None,
        at_least=0,
        at_most=MAX_SEED,
    )
    shuffle: Shuffle = option(
        "global mixes all samples; block reads neighbours together, for disks that are slow at random reads.",
        default="global",
    )
    workers: int = option("Processes that read ahead; 0 reads in the training process.", default=0, at_least=0)
    keep_mib: int = option(
        "Memory that keeps views once they are read, in MiB, over all workers: small datasets are read only once.",
        default=256,
        at_least=0,
    )
    device: str = device_option()
    precision: Precision = precision_option()
    compile: bool | None = option(
        "Train with the student compiled by torch.compile: faster steps, after a wait at the start.  [default: on a "
        "GPU, if the run has one process and at least 500 steps]",
        default=None,
    )
    validate_every: float = option("Epochs between validations; 0 validates at the end only.", default=1.0, at_least=0)
    checkpoint_every: int = option(
        "Steps between checkpoints; each validation saves one too.", default=1000, at_least=1
    )
    log_maps: int = option(
        "Draw the maps of this many samples for TensorBoard, the teacher's above the student's, 20 times in the run.",
        default=0,
        at_least=0,
        at_most=64,
    )
    report: bool = option(
        "Write report.html into the run's folder at the end: one page of curves, accuracy and maps.", default=True
    )

    def __post_init__(self) -> None:
        if self.min_lr > (lr := self.base_lr * self.batch_size / 256):
            raise ConfigError(
                f"min_lr={self.min_lr} is over the learning rate {lr:.4g} (base_lr * batch_size / 256), so the "
                "rate would rise. Lower min_lr; it is not scaled with the batch."
            )
        if self.batch_size % self.accumulate:
            raise ConfigError(
                f"batch_size={self.batch_size} cannot be cut into accumulate={self.accumulate} equal parts. Give a "
                f"multiple of {self.accumulate}."
            )
        transfers = self.mode in ("copy", "distill")
        if not self.caches and transfers:
            raise ConfigError(
                f"mode {self.mode} needs the teacher's attention: give --cache, made with `atcache build`."
            )
        if not self.caches and (not self.data or self.student is None):
            raise ConfigError(
                "without --cache, give --data and --student: nothing else says what to train, and on which images."
            )
        if self.caches and self.policy is not None:
            raise ConfigError(
                f"policy={self.policy}: the views of {self.caches[0]} are drawn already; leave --policy out."
            )
        if self.label_key is not None and self.caches and (self.val_data is None or self.val_cache is not None):
            raise ConfigError(
                f"label_key={self.label_key}: labels come from the caches, so no .json is read. Leave it out."
            )
        self._check_mixing()
        if self.log_maps:
            self._check_log_maps()
        if self.weights is not None and self.mode != "finetune" and not self.live_teacher:
            raise ConfigError(
                f"weights={self.weights} is for finetune and --live-teacher: mode {self.mode} starts from random "
                "weights and runs no teacher. Leave --weights out."
            )
        self._check_transfer(transfers)
        if self.attention_only:
            self._check_attention_only()

    def _check_log_maps(self) -> None:
        if self.mode == "copy":
            raise ConfigError(
                f"log_maps={self.log_maps}: a student that copies has the teacher's maps, so there is nothing to "
                "compare. Leave --log-maps out; `atcache show` draws the maps of the cache."
            )
        if find_spec("tensorboard") is None:
            raise ConfigError(
                f"log_maps={self.log_maps}: the pictures are written for TensorBoard, which is not installed. "
                "pip install 'atcache[tensorboard]'."
            )

    def _check_attention_only(self) -> None:
        if self.mode != "distill":
            raise ConfigError(
                f"attention_only: mode {self.mode} learns from labels. Use --mode distill, or leave it out."
            )
        if self.val_cache is not None or self.val_data is not None:
            raise ConfigError(
                "attention_only: the student has no head, so it has no accuracy to measure. Leave --val-cache and "
                "--val-data out."
            )
        of_labels = {"num_classes": None, "label_smoothing": 0.0, "attention_weight": _ATTENTION_WEIGHT}
        if given := [name for name, default in of_labels.items() if getattr(self, name) != default]:
            raise ConfigError(
                f"{given[0]}={getattr(self, given[0])}: with attention_only there is no loss of labels. Leave one of "
                "the two out."
            )

    def _check_mixing(self) -> None:
        if not (self.mixup or self.cutmix or self.mix_prob != 1):
            return
        if self.caches:
            raise ConfigError(
                f"mixup={self.mixup}, cutmix={self.cutmix}, mix_prob={self.mix_prob}: the views of {self.caches[0]} "
                "are drawn already, mixed or not; leave these options out, and give them to `atcache build`."
            )
        from atcache.views.mixing import mix_policy

        mix_policy(self.mixup, self.cutmix, self.mix_prob)  # raises for values that cannot be used
        if self.policy == "eval":
            raise ConfigError("views of policy eval are never mixed: leave --mixup and --cutmix out.")

    def _check_transfer(self, transfers: bool) -> None:
        given = [name for name in ("live_teacher", *_WHERE_FIELDS) if getattr(self, name)]
        given += ["what"] if self.what != "map" else []
        if given and not transfers:
            raise ConfigError(f"{given[0]} is for copy and distill: mode {self.mode} uses no teacher's attention.")
        if self.mode != "distill" and self.attention_weight != _ATTENTION_WEIGHT:
            raise ConfigError(
                f"attention_weight={self.attention_weight}: mode {self.mode} has no attention loss to weigh. Leave "
                "--attention-weight out, or use mode distill."
            )
        for name, mapped in (("layers", "layer_map"), ("heads", "head_map")):
            if name in given and mapped in given:
                raise ConfigError(f"{name} and {mapped} both say which {name} are transferred; give one of them.")

    @property
    def caches(self) -> tuple[Location, ...]:
        """The caches to train on; may be empty. Their order is part of the run, because it numbers the rows."""
        return listed(self.cache)

    @property
    def stream_seed(self) -> int:
        """The seed of the stream of batches."""
        return self.seed if self.order_seed is None else self.order_seed

    def stream(self) -> dict[str, Any]:
        """The settings that students of one stream must have in common: what makes the stream, and where it runs."""
        common = {name: getattr(self, name) for name in STREAM_FIELDS}
        # All students share one live teacher and its weights. Without it, `weights` are where each student starts.
        weights = self.weights if self.live_teacher else None
        return {**common, "cache": self.caches, "weights": weights, "order_seed": self.stream_seed}

    def places(self) -> dict[str, Any]:
        """Where what the run reads and writes is, as JSON: as it was typed, and in which folder."""
        places: dict[str, Any] = {"folder": str(Path.cwd())}
        for name in PLACES:
            value: Any = getattr(self, name)
            if value is not None:
                several = isinstance(value, tuple)
                places[name] = [str(one) for one in cast("tuple[Any, ...]", value)] if several else str(value)
        return places

    def settings(self) -> dict[str, Any]:
        """The settings that identify this run: not paths, device or workers, nor how often it validates and saves."""
        settings = asdict(self)
        how_often = ("checkpoint_every", "validate_every", "log_maps", "report")
        for name in (*PLACES, *how_often, "recipe", "workers", "keep_mib", "device", "compile"):
            del settings[name]
        if self.stream_seed == self.seed:  # the same run, whether --order-seed repeats the seed or is left out
            settings["order_seed"] = None
        # Runs from before these options were made without them, and continue.
        for name in ("attention_only", "num_classes"):
            if not settings[name]:
                del settings[name]
        return settings
