"""The options of `atcache build`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from atcache.choices import Decoding, Labels, Pixels, PolicyName, Precision, Queries
from atcache.errors import ConfigError
from atcache.files.location import Location, Url
from atcache.teachers.foreign.own import OwnTeacher

from ..options import (
    calibration_samples_option,
    config,
    cutmix_option,
    decoding_option,
    decoding_workers_option,
    device_option,
    kept_heads_option,
    kept_layers_option,
    keys_option,
    label_key_option,
    labels_option,
    max_samples_option,
    mix_prob_option,
    mixup_option,
    option,
    pixels_option,
    policy_option,
    precision_option,
    queries_option,
    recipe_option,
    scheduler_option,
    seed_option,
    store_option,
    weights_option,
)

_OF_VIEWS = {
    "labels": "required",
    "label_key": None,
    "policy": "crop-flip",
    "decoding": "full",
    "mixup": 0.0,
    "cutmix": 0.0,
    "mix_prob": 1.0,
    "corrupt": None,
    "seed": 0,
}
"""Options, with their defaults, that say what samples and views are; with those of another cache they are decided."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CodecTarget:
    """The target that the codec is to meet. At most one is given."""

    kl: float | None = None
    """Mean row KL, in nats."""
    mb_per_view: float | None = None
    """Megabytes that a view's codes take."""
    budget: str | None = None
    """Bytes that all codes take, such as "2TB"."""

    def __post_init__(self) -> None:
        options = {"target_kl": self.kl, "target_mb_per_view": self.mb_per_view, "budget": self.budget}
        given = [f"{name}={value}" for name, value in options.items() if value is not None]
        if len(given) > 1:
            raise ConfigError(f"{' and '.join(given)}: a codec meets only one target. Give one of them.")
        if self.budget is not None:
            parse_nbytes(self.budget)

    def nbytes_per_view(self, num_views: int) -> int | None:
        """Bytes a view may take if `num_views` are stored in all; None if size is not the target."""
        if self.mb_per_view is not None:
            return max(1, round(self.mb_per_view * 1e6))
        return None if self.budget is None else max(1, parse_nbytes(self.budget) // num_views)


def parse_nbytes(text: str) -> int:
    """The number of bytes in a text such as "2TB", "750 MB" or "1.5GiB".

    Raises:
        ConfigError: the text is not a number of bytes.
    """
    from dask.utils import parse_bytes

    try:
        # "TB" alone would be read as 1TB.
        nbytes = int(parse_bytes(text if any(character.isdigit() for character in text) else f"no number: {text}"))
    except (ValueError, OverflowError) as error:
        raise ConfigError(f"budget={text!r}: expected bytes, such as 2TB or 500GB.") from error
    if nbytes < 1:
        raise ConfigError(f"budget={text!r}: expected more than 0 bytes.")
    return nbytes


def check_out(out: Location) -> None:
    """Refuse a place for a cache that is a URL but not on an object store.

    Raises:
        ConfigError: says what it is instead.
    """
    if not isinstance(out, Url):
        return
    if out.root.partition("://")[0] not in ("s3", "gs", "az"):
        raise ConfigError(
            f"out={out}: a build writes to a folder or to an object store (s3, gs, az), and only reads from other "
            "servers. Give one of these, and copy the cache when it is complete."
        )
    if not out.parts:
        raise ConfigError(f"out={out} is a whole bucket. Give a name in it, such as {out}/in1k.zarr.")


def check_views(policy: PolicyName, num_views: int, mixup: float, cutmix: float, mix_prob: float) -> None:
    """Refuse views that a policy does not make. Loads no model.

    Raises:
        ConfigError: several views or mixed ones of policy eval; or the options of mixing do not go together.
    """
    from atcache.views.mixing import mix_policy

    if policy == "eval" and num_views > 1:
        raise ConfigError(
            f"views={num_views}: policy eval always makes the same view, so a cache of it has one. Give --views 1 "
            "(atcache.toml or a recipe may set views), or --policy crop-flip for a cache to train from."
        )
    if mix_policy(mixup, cutmix, mix_prob) is not None and policy == "eval":
        raise ConfigError("views of policy eval are never mixed: leave mixup and cutmix out, or use crop-flip.")


def check_queries(queries: Queries, store: str | None, codecs: Sequence[str]) -> None:
    """Refuse what cannot be kept together with some rows of the maps only. Loads no model.

    Raises:
        ConfigError: v is to be stored too.
        CodecError: a codec stores what whole maps are made from.
    """
    if queries == "all":
        return
    if store is not None:
        raise ConfigError(
            f"queries={queries} and store={store}: {store} is stored beside q and k only. Leave out one of them."
        )
    from atcache.codecs.registry import parse_codec

    for codec in map(parse_codec, codecs):
        codec.refuse_rows()


@config
class BuildConfig:
    """The options of `atcache build`."""

    teacher: str | OwnTeacher = option(
        "The teacher: an alias such as mae-vit-l, or a timm model name, optionally with arguments; or "
        "hf-hub:ORG/MODEL, local-dir:FOLDER, transformers:ORG/MODEL, open-clip:MODEL/TAG; or the folder of a finished "
        "`atcache train`. Python also takes atcache.own_teacher(module, ...)."
    )
    data: str | None = option(
        "The images: WebDataset tars, as a brace pattern ('train-{0000..0099}.tar'), a folder of tars, or one tar; or "
        "URLs of any of these (http, https, s3, gs, az, hf). With --views-from, where the tars of that cache are now.",
        default=None,
        metavar="TARS",
    )
    views_from: Location | None = option(
        "Cache, or its URL, whose samples and views are taken, so that two caches show the very same images.",
        default=None,
        metavar="CACHE",
    )
    labels: Labels = labels_option()
    label_key: str | None = label_key_option()
    max_samples: int | None = max_samples_option()
    keys: Path | None = keys_option()
    out: Location = option(
        "Folder of the cache, or its URL on an object store (s3, gs, az). An unfinished cache is continued.",
        is_written=True,
    )
    grow: bool = option(
        "Add to a cache that exists: the tars of --data that it does not hold, and views up to --views.", default=False
    )
    recipe: str | None = recipe_option()
    weights: Path | None = weights_option()
    policy: PolicyName = policy_option("How views are drawn; eval is for validation caches.")
    decoding: Decoding = decoding_option()
    mixup: float = mixup_option()
    cutmix: float = cutmix_option()
    mix_prob: float = mix_prob_option()
    corrupt: str | None = option(
        "A common corruption of the views and its severity from 1 to 5, such as fog:3; only with --policy eval. The "
        "teacher's maps are those of the corrupted images.",
        default=None,
        metavar="KIND:SEVERITY",
    )
    views: int = option("Views (fixed augmentations) of each sample.", default=1, at_least=1)
    seed: int = seed_option("the views")
    codec: str | None = option(
        "How attention is compressed: transform, int8, exact, exact:dtype=float32 or logmap.  [default: transform; "
        "int8 with --store; logmap with --queries, or if the teacher's maps are not a softmax of one q k^T]",
        default=None,
    )
    target_kl: float | None = option(
        "Fidelity target of codec transform: mean row KL of decoded maps, in nats.  [default: 0.005]",
        default=None,
        above=0,
    )
    target_mb_per_view: float | None = option(
        "Size target, instead of a KL: megabytes that a view's codes take.", default=None, above=0
    )
    budget: str | None = option(
        "Size target, instead of a KL: bytes that all codes take, such as 2TB.", default=None, metavar="BYTES"
    )
    codec_from: Location | None = option(
        "Cache, or its URL, of the same teacher and selection: the new cache gets its codec as it was fitted there.",
        default=None,
        metavar="CACHE",
    )
    layers: str | None = kept_layers_option()
    heads: str | None = kept_heads_option()
    store: Literal["v", "x"] | None = store_option()
    queries: Queries = queries_option()
    pixels: Pixels = pixels_option()
    on_bad_image: Literal["raise", "skip"] = option(
        "What to do with an image that cannot be used: raise stops the build, skip records it and continues.",
        default="raise",
    )
    batch_size: int = option("Views in one forward pass of the teacher.", default=32, at_least=1)
    workers: int | None = decoding_workers_option()
    samples_per_shard: int | None = option(
        "Samples in a shard; one task writes one.  [default: enough for about 256 MiB]", default=None, at_least=1
    )
    calibration_samples: int = calibration_samples_option("the codec is fitted and measured on")
    device: str = device_option()
    precision: Precision = precision_option()
    scheduler: str | None = scheduler_option()
    client: Any = None
    """A `distributed.Client` to use instead of `scheduler`; only from Python."""
    dry_run: bool = option("Print the plan and stop before anything is written.", default=False)

    def __post_init__(self) -> None:
        from atcache.images.labels import LabelRule
        from atcache.views.corrupt import Corruption

        from ..cluster.connect import check_scheduler

        LabelRule(mode=self.labels, key=self.label_key)  # raises if they do not go together
        check_views(self.policy, self.views, self.mixup, self.cutmix, self.mix_prob)
        if self.corrupt is not None:
            Corruption.parse(self.corrupt)  # raises if there is no such corruption
            if self.policy != "eval" and self.views_from is None:
                raise ConfigError(
                    f"corrupt={self.corrupt} and policy={self.policy}: only views of policy eval are corrupted. Give "
                    "--policy eval too."
                )
        check_out(self.out)
        if self.grow and isinstance(self.out, Url):
            raise ConfigError(
                f"grow: {self.out} is on an object store; only local caches grow. Copy it to a folder, grow it there, "
                "and copy it back under another name; or build the new tars to a cache of their own."
            )
        check_scheduler(self.scheduler, self.client)
        if (self.scheduler or self.client) and self.device.startswith("cuda:"):
            raise ConfigError(f"device={self.device}: would be every worker's. Give auto, cpu or cuda.")
        self.target  # noqa: B018 - making it checks the three targets
        self._check_codec_from()
        self._check_views_from()
        check_queries(self.queries, self.store, [] if self.codec is None else [self.codec])

    def _check_codec_from(self) -> None:
        if self.codec_from is None:
            return
        names = ("codec", "target_kl", "target_mb_per_view", "budget")
        given = [f"{name}={value}" for name in names if (value := getattr(self, name)) is not None]
        if given:
            raise ConfigError(
                f"codec_from={self.codec_from} and {' and '.join(given)}: the codec of another cache is taken as it "
                "is. Leave out one of them."
            )
        if self.codec_from == self.out:
            raise ConfigError(f"codec_from={self.codec_from} is the cache to build. Name another one, or none.")

    def _check_views_from(self) -> None:
        if self.views_from is None:
            if self.data is None:
                raise ConfigError("there are no images: give --data, or --views-from to take those of another cache.")
            return
        if self.grow:
            raise ConfigError(
                f"grow and views_from={self.views_from}: a cache with the views of another one cannot grow. Leave out "
                "one of them."
            )
        if self.views_from == self.out:
            raise ConfigError(f"views_from={self.views_from} is the cache to build. Name another one.")
        if given := [name for name, default in _OF_VIEWS.items() if getattr(self, name) != default]:
            raise ConfigError(
                f"views_from={self.views_from} and {given[0]}={getattr(self, given[0])}: the samples and views of that "
                f"cache are taken as they are. Leave out --{given[0].replace('_', '-')}."
            )

    @property
    def chooses_codec(self) -> bool:
        """Whether the codec or a target for it is given."""
        return any(value is not None for value in (self.codec, self.target_kl, self.target_mb_per_view, self.budget))

    @property
    def with_values(self) -> bool:
        """Whether v is stored too."""
        return self.store == "v"

    @property
    def with_block_inputs(self) -> bool:
        """Whether what attention and MLP get is stored too."""
        return self.store == "x"

    @property
    def target(self) -> CodecTarget:
        """The target that the codec is to meet."""
        return CodecTarget(kl=self.target_kl, mb_per_view=self.target_mb_per_view, budget=self.budget)
