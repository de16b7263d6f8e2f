"""What a build was asked for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from atcache.errors import ConfigError
from atcache.views.mixing import mix_policy
from atcache.views.policy import PolicyName

from .codec import CodecTarget


@dataclass(frozen=True, kw_only=True, slots=True)
class BuildConfig:
    """What `atcache build` was asked for."""

    teacher: str
    """An alias such as "mae-vit-l", or a timm name with arguments."""
    data: str
    """The images: see `atcache.images.tars.expand_tars`."""
    out: Path
    """The cache, a folder; an unfinished one is continued."""
    weights: Path | None = None
    """The teacher's weights; None takes timm's."""
    policy: PolicyName = "crop-flip"
    """How views are drawn. `eval` is for validation caches."""
    mixup: float = 0.0
    """Mixup: each view is blended with that of another sample of its block, by a share of Beta(mixup, mixup)."""
    cutmix: float = 0.0
    """CutMix: a box of the other view, its area by Beta(cutmix, cutmix). With mixup too, either for half the views."""
    mix_prob: float = 1.0
    """Share of the views that are mixed, where mixup or cutmix is given."""
    views: int = 1
    """Views of each sample."""
    seed: int = 0
    """Seed of the views."""
    codec: str | None = None
    """How attention becomes integers; None takes transform, int8 where v is stored too, or logmap where the teacher
    hands over maps."""
    target_kl: float | None = None
    """Mean row KL, in nats, that codec transform is to meet; None for its default."""
    target_mb_per_view: float | None = None
    """Megabytes a view's codes may take, instead of a KL."""
    budget: str | None = None
    """Bytes that all codes may take, such as "2TB", instead of a KL."""
    layers: str | None = None
    """Block indices, such as "0-17"; None for all."""
    heads: str | None = None
    """Head indices, such as "0,3"; None for all."""
    store: Literal["v"] | None = None
    """`v` keeps the teacher's values beside q and k, for students that are given them; None keeps what maps need."""
    pixels: Literal["replay", "store"] = "replay"
    """`store` keeps the augmented images too: exact on any machine, and no JPEG decoding in training."""
    on_bad_image: Literal["raise", "skip"] = "raise"
    """`skip` records a bad sample in the cache and goes on."""
    batch_size: int = 32
    """Views a forward."""
    workers: int | None = None
    """Processes that decode and augment; None takes one less than there are processors. 0 works in this one."""
    samples_per_shard: int | None = None
    """Samples a task; None makes shards of about 256 MiB."""
    calibration_samples: int = 256
    """Samples the codec is fitted and measured on, spread over the dataset."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    precision: str = "auto"
    """auto, fp32 or bf16: what the teacher computes in."""
    dry_run: bool = False
    """Plan and stop before anything is written."""

    def __post_init__(self) -> None:
        for name in ("views", "batch_size", "calibration_samples", "samples_per_shard"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name}={value}: expected at least 1.")
        if self.workers is not None and self.workers < 0:
            raise ConfigError(f"workers={self.workers}: expected 0 or more.")
        if self.policy == "eval" and self.views > 1:
            raise ConfigError(f"views={self.views}: policy eval is the same every time; use --policy crop-flip.")
        if mix_policy(self.mixup, self.cutmix, self.mix_prob) is not None and self.policy == "eval":
            raise ConfigError("views of policy eval are never mixed: leave mixup and cutmix out, or use crop-flip.")
        self.target  # noqa: B018 - checks what it is made of

    @property
    def with_values(self) -> bool:
        """Whether v is stored too."""
        return self.store == "v"

    @property
    def target(self) -> CodecTarget:
        """What the codec is to meet."""
        return CodecTarget(kl=self.target_kl, mb_per_view=self.target_mb_per_view, budget=self.budget)
