"""The options of `atcache show`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

from atcache.errors import ConfigError
from atcache.files.location import Location

from ..options import config, option

SUFFIXES = (".png", ".svg", ".pdf")
Scale = Literal["figure", "each"]


@config
class ShowConfig:
    """The options of `atcache show`."""

    cache: Location = option("The cache; it may be incomplete.", is_argument=True)
    sample: str = option("The sample: its row, or its sample_key TAR/KEY.", is_argument=True)
    out: Path = option("The picture: a .png, .svg or .pdf file.", is_written=True)
    view: int = option("Which view of the sample.", default=0, at_least=0)
    layer: str | None = option(
        "Block of the teacher, or all for a wall of layers x heads.  [default: the last that is stored]", default=None
    )
    head: str = option(
        "A head, all for each beside the others, or their mean or max.", default="all", metavar="HEAD|all|mean|max"
    )
    query: str | tuple[str, ...] | None = option(
        "The token whose attention is shown: a patch as ROW,COLUMN from 0,0 at the top left, cls, reg0, the number of "
        "a token, or all. Given several times, their mean.  [default: cls, or all without a class token]",
        default=None,
    )
    scale: Scale = option("One scale for all maps of the figure, or one for each.", default="figure")
    clip: float = option(
        "The scale ends at this quantile of the values, so that a few tokens with far more do not hide the others; "
        "they get a colour of their own. 1 ends it at the largest.",
        default=0.995,
        above=0,
        at_most=1,
    )
    data: str | tuple[str, ...] | None = option(
        "Where the cache's tars are now, if they were moved. May be given more than once.", default=None, metavar="TARS"
    )

    def __post_init__(self) -> None:
        if self.out.suffix.lower() not in SUFFIXES:
            raise ConfigError(f"out={self.out}: expected a file that ends in {', '.join(SUFFIXES)}.")
        if self.layer is not None and self.layer != "all" and re.fullmatch(r"\d{1,6}", self.layer) is None:
            raise ConfigError(f"layer={self.layer}: expected the number of a block, or all.")
        if self.head not in ("all", "mean", "max") and re.fullmatch(r"\d{1,6}", self.head) is None:
            raise ConfigError(f"head={self.head}: expected the number of a head, all, mean or max.")
