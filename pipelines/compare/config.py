"""The options of `atcache compare`."""

from __future__ import annotations

from pathlib import Path

from atcache.files.location import Location

from ..options import config, option, scheduler_option
from ..stats.config import (
    check_outputs_and_scheduler,
    decoding_threads_option,
    heads_option,
    largest_option,
    layers_option,
    out_option,
    per_view_option,
)


@config
class CompareConfig:
    """The options of `atcache compare`."""

    a: Location = option("The first cache, such as the teacher's; it may be incomplete.", metavar="A", is_argument=True)
    b: Location = option("The second cache, such as the student's.", metavar="B", is_argument=True)
    sample: int = option(
        "Number of views that both caches store, spread evenly, whose maps are compared.", default=256, at_least=1
    )
    layers: str | None = layers_option()
    heads: str | None = heads_option()
    match_heads: bool = option(
        "Compare each head of A with that head of B's layer which is most like it, instead of the head of the same "
        "number: for two models whose heads are numbered without relation.",
        default=False,
    )
    largest: int = largest_option()
    worst: int = option("How many views to name where the maps are furthest apart.", default=10, at_least=0)
    out: tuple[Path, ...] = out_option()
    per_view: Path | None = per_view_option()
    workers: int | None = decoding_threads_option()
    scheduler: str | None = scheduler_option()

    def __post_init__(self) -> None:
        check_outputs_and_scheduler(self.out, self.per_view, self.workers, self.scheduler)
