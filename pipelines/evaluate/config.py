"""The options of an evaluation."""

from __future__ import annotations

from pathlib import Path

from atcache.choices import Precision
from atcache.errors import ConfigError
from atcache.files.location import Location

from ..options import config, device_option, label_key_option, option, precision_option, weights_option
from .sets import EvalSet, eval_sets, with_corrupted


@config
class EvaluateConfig:
    """Which runs to score, on what, and how."""

    runs: tuple[Path, ...] = option(
        "Folders of finished runs. Of several, the averages of their predictions are scored too.",
        metavar="RUN...",
        is_argument=True,
    )
    cache: Location | tuple[Location, ...] | None = option(
        "Validation cache; several are used as one. Copying students take the teacher's maps from it.", default=None
    )
    data: str | tuple[str, ...] | None = option(
        "Tars of validation images, or where the caches' tars are now. May be given more than once.",
        default=None,
        metavar="TARS",
    )
    val_cache: tuple[str, ...] = option(
        "A further set of images: its name, and its validation cache. Repeat for more sets.",
        default=(),
        metavar="NAME=CACHE",
    )
    val_data: tuple[str, ...] = option(
        "A further set of images: its name, and its tars, or where the tars of its cache are now.",
        default=(),
        metavar="NAME=TARS",
    )
    corrupt: tuple[str, ...] = option(
        "Score the images of --data or --cache under a common corruption too: its name or group (noise, blur, weather, "
        "digital, all), and a severity from 1 to 5; all five without. May be given more than once.",
        default=(),
        metavar="KIND[:SEVERITY]",
    )
    classes_of: tuple[str, ...] = option(
        "Text file with one class name or number a line: only these classes are predicted, and samples of others are "
        "left out. NAME=FILE is for one set, FILE for all others.",
        default=(),
        metavar="[NAME=]FILE",
    )
    report: Path | None = option(
        "Write a report here, as Markdown: tables of all sets and runs, and how robust each run is to each set.",
        default=None,
        is_written=True,
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
        self.sets  # noqa: B018 - refuses options that do not fit together
        if self.weights is not None and not self.live_teacher:
            raise ConfigError(f"weights={self.weights} is for a live teacher only. Give --live-teacher too.")
        if self.label_key is not None and all(each.caches for each in self.sets):
            raise ConfigError(
                f"label_key={self.label_key}: labels come from the cache, so no .json is read. Leave it out."
            )

    @property
    def sets(self) -> tuple[EvalSet, ...]:
        """The sets to score on, the main one first.

        Raises:
            ConfigError: there is none, or the options that name them do not fit together.
        """
        sets = eval_sets(self.cache, self.data, self.val_cache, self.val_data, self.classes_of)
        return with_corrupted(sets, self.corrupt)
