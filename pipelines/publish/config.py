"""The options of `atcache push` and `atcache pull`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from atcache.errors import ConfigError
from atcache.files.location import Location, Url

from ..options import config, option

Visibility = Literal["private", "public"]


@config
class PushConfig:
    """What `atcache push` sends, and where to."""

    cache: Path = option("The cache, which must be complete.", is_argument=True)
    to: Location = option(
        "Where it goes: hf://datasets/ORG/NAME, a folder in it, or another branch: hf://datasets/ORG/NAME@BRANCH/FOLDER.",
        is_argument=True,
    )
    create: Visibility | None = option(
        "Make the repository if there is none: private, for you and your organisation only, or public. Its page can "
        "change that later.",
        default=None,
    )

    def __post_init__(self) -> None:
        if not isinstance(self.to, Url) or not self.to.is_on_hub:
            raise ConfigError(f"to={str(self.to)!r}: expected a dataset on a hub, such as hf://datasets/ORG/NAME.")
        if self.to.is_pinned:
            raise ConfigError(f"to={str(self.to)!r} names a commit, which never changes. Name a branch, or none.")

    @property
    def place(self) -> Url:
        """`to`, which is on a hub."""
        assert isinstance(self.to, Url), "checked above"
        return self.to


@config
class PullConfig:
    """What `atcache pull` fetches, and where to."""

    cache: Location = option("The cache: hf://datasets/ORG/NAME, another URL, or a folder.", is_argument=True)
    out: Path = option("Folder of the copy.", is_argument=True, is_written=True)
    views: int | None = option(
        "Fetch only the first views of each sample, this many.  [default: all]", default=None, at_least=1
    )
    tars: str | tuple[str, ...] | None = option(
        "Fetch only the samples of these tars: names with * or {000..009}. May be given more than once.  "
        "[default: all]",
        default=None,
        metavar="NAMES",
    )

    @property
    def tar_names(self) -> tuple[str, ...]:
        """The patterns of `tars`, none for all."""
        return (self.tars,) if isinstance(self.tars, str) else self.tars or ()
