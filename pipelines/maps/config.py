"""The options of `atcache maps`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from atcache.choices import PolicyName, Precision
from atcache.errors import ConfigError
from atcache.files.location import Location

from ..options import (
    calibration_samples_option,
    config,
    decoding_workers_option,
    device_option,
    kept_layers_option,
    max_samples_option,
    option,
    precision_option,
    scheduler_option,
)


@config
class MapsConfig:
    """Whose attention is stored, and of which images."""

    run: Path = option("Folder of a finished `atcache train`.", metavar="RUN", is_argument=True)
    out: Location = option(
        "Folder of the new cache, or its URL on an object store. An unfinished cache is continued.", is_written=True
    )
    cache: Location | None = option(
        "Cache, or its URL, whose samples and views are taken.  [default: the one the student was trained from]",
        default=None,
    )
    data: str | None = option(
        "Where the tars of that cache are now, if they were moved; with --policy, or for a student that was trained "
        "without a cache, the images to draw new views of.",
        default=None,
        metavar="TARS",
    )
    policy: PolicyName | None = option(
        "Draw new views of the images in --data instead of taking those of a cache. eval shows whole images.  "
        "[default: eval, for a student that was trained without a cache]",
        default=None,
    )
    views: int | None = option(
        "Views of each sample.  [default: all of the cache; 1 if new ones are drawn]", default=None, at_least=1
    )
    max_samples: int | None = max_samples_option()
    layers: str | None = kept_layers_option("the student")
    codec: str | None = option("How attention is compressed, as for build.", default=None)
    target_kl: float | None = option(
        "Fidelity target of codec transform: mean row KL of decoded maps, in nats.  [default: 0.005]",
        default=None,
        above=0,
    )
    batch_size: int = option("Views in one forward pass of the student.", default=32, at_least=1)
    workers: int | None = decoding_workers_option()
    calibration_samples: int = calibration_samples_option("the codec is fitted and measured on")
    device: str = device_option()
    precision: Precision = precision_option()
    scheduler: str | None = scheduler_option()
    client: Any = None
    """A `distributed.Client` to use instead of `scheduler`; only from Python."""
    dry_run: bool = option("Print the plan and stop before anything is written.", default=False)

    def __post_init__(self) -> None:
        if self.policy is not None and self.cache is not None:
            raise ConfigError(
                f"policy={self.policy} and cache={self.cache}: views are drawn or those of a cache. Leave out one of "
                "the two."
            )
        if self.policy is not None and self.data is None:
            raise ConfigError(f"policy={self.policy}: new views are drawn of the images in --data. Give it too.")
