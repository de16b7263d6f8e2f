"""The options of `atcache stats`, some of which `atcache compare` has too."""

from __future__ import annotations

from pathlib import Path

from atcache.files.location import Location

from ..options import config, option, scheduler_option
from .outputs import check_outputs


def layers_option() -> str | None:
    """Layers to look at."""
    return option("Layers to look at, such as 0-5,11.  [default: all that are stored]", default=None)


def heads_option() -> str | None:
    """Heads to look at."""
    return option("Heads to look at, such as 0,3.  [default: all that are stored]", default=None)


def largest_option() -> int:
    """How many keys are the largest of a row."""
    return option(
        "How many keys count as the largest of a row; all, if it has fewer.", default=10, at_least=1, metavar="KEYS"
    )


def out_option() -> tuple[Path, ...]:
    """Files for the tables."""
    return option(
        "Also write the tables to this file: .csv, .json, or a picture of layers x heads, .png, .svg or .pdf. May come "
        "several times.",
        default=(),
        is_written=True,
        metavar="FILE",
    )


def per_view_option() -> Path | None:
    """A file for the numbers of each view."""
    return option(
        "Also write the numbers of every view to this .csv file, with a row for each of its layers and heads.",
        default=None,
        is_written=True,
        metavar="FILE",
    )


def decoding_threads_option() -> int | None:
    """Threads that decode."""
    return option(
        "Threads that decode.  [default: one per processor that the command may use]", default=None, at_least=1
    )


def check_outputs_and_scheduler(
    out: tuple[Path, ...], per_view: Path | None, workers: int | None, scheduler: str | None
) -> None:
    """Refuse, before long work, options that both commands have and that do not go together.

    Raises:
        ConfigError: an output cannot be written, or the scheduler's address or workers do not fit.
        NotWritableError: the folder of an output is read-only.
    """
    from ..cluster.connect import check_scheduler, check_workers_option

    check_scheduler(scheduler, None)
    check_workers_option(workers, scheduler, None)
    check_outputs(out, per_view)


@config
class StatsConfig:
    """The options of `atcache stats`."""

    cache: Location = option("The cache; it may be incomplete.", is_argument=True)
    sample: int = option("Number of stored views, spread evenly, whose maps are looked at.", default=256, at_least=1)
    layers: str | None = layers_option()
    heads: str | None = heads_option()
    largest: int = largest_option()
    all: bool = option(
        "Also the statistics that take far longer: effective rank, and likeness of heads (CKA, Jensen-Shannon).",
        default=False,
    )
    out: tuple[Path, ...] = out_option()
    per_view: Path | None = per_view_option()
    workers: int | None = decoding_threads_option()
    scheduler: str | None = scheduler_option()

    def __post_init__(self) -> None:
        check_outputs_and_scheduler(self.out, self.per_view, self.workers, self.scheduler)
