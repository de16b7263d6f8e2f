"""The options of an evaluation."""

from __future__ import annotations

from pathlib import Path

from atcache.choices import Precision
from atcache.errors import ConfigError
from atcache.files.location import Location

from ..options import config, device_option, label_key_option, option, precision_option, weights_option


@config
class EvaluateConfig:
    """Which runs to score, on what, and how."""

    runs: tuple[Path, ...] = option(
        "Folders of finished runs; the predictions of several are averaged.", metavar="RUN...", is_argument=True
    )
    cache: Location | tuple[Location, ...] | None = option(
        "Validation cache; several are used as one. Copying students take the teacher's maps from it.", default=None
    )
    data: str | tuple[str, ...] | None = option(
        "Tars of validation images, or where the caches' tars are now. May be given more than once.",
        default=None,
        metavar="TARS",
    )
    label_key: str | None = label_key_option()
    by_class: bool = option("Score each class by itself too.", default=False)
    live_teacher: bool = option(
        "Run the teacher for copying students instead of reading its maps from --cache.", default=False
    )
    weights: Path | None = weights_option("The live teacher's")
    batch_size: int = option("Samples in a forward pass; does not change the result.", default=256, at_least=1)
    workers: int = option("Processes that read ahead; 0 reads in the main process.", default=0, at_least=0)
    device: str = device_option()
    precision: Precision = precision_option()

    def __post_init__(self) -> None:
        if not self.runs:
            raise ConfigError("no run to evaluate: name the folder of a finished `atcache train`.")
        if self.cache is None and self.data is None:
            raise ConfigError("nothing to evaluate on: give --cache or --data.")
        if self.weights is not None and not self.live_teacher:
            raise ConfigError(f"weights={self.weights} is for a live teacher only. Give --live-teacher too.")
        if self.label_key is not None and self.cache is not None:
            raise ConfigError(
                f"label_key={self.label_key}: labels come from the cache, so no .json is read. Leave it out."
            )
