"""The options of a report."""

from __future__ import annotations

from pathlib import Path

from atcache.choices import Precision
from atcache.errors import ConfigError
from atcache.files.location import Location

from ..options import config, device_option, label_key_option, option, precision_option

REPORT_FILE = "report.html"


@config
class ReportConfig:
    """Which run to report on, from which validation data, and where to."""

    run: Path = option("Folder of a finished `atcache train`.", metavar="RUN", is_argument=True)
    val_cache: Location | tuple[Location, ...] | None = option(
        "Validation cache to look at; several are used as one.  [default: the one that the run was validated on]",
        default=None,
    )
    val_data: str | tuple[str, ...] | None = option(
        "Tars of validation images, or where the validation caches' tars are now. May be given more than once.  "
        "[default: those of the run]",
        default=None,
        metavar="TARS",
    )
    label_key: str | None = label_key_option()
    out: Path | None = option(
        "The page to write.  [default: report.html in the run's folder]", default=None, is_written=True
    )
    samples: int = option(
        "Validation samples to predict, drawn at random, always the same ones; 0 leaves predictions out.",
        default=1024,
        at_least=0,
    )
    map_samples: int = option(
        "Validation samples whose maps are compared with the teacher's; 0 leaves maps out.", default=64, at_least=0
    )
    device: str = device_option()
    precision: Precision = precision_option()

    def __post_init__(self) -> None:
        if self.out is not None and self.out.is_dir():
            raise ConfigError(f"out={str(self.out)!r} is a folder: expected the name of a file, such as report.html.")
        if self.label_key is not None and (self.val_cache is not None or self.val_data is None):
            raise ConfigError(
                f"label_key={self.label_key} says where labels are in the .json files of --val-data; labels of a cache "
                "come from the cache. Leave it out, or give --val-data alone."
            )

    @property
    def file(self) -> Path:
        """The page to write."""
        return self.out or self.run / REPORT_FILE
