"""The options of `atcache merge`."""

from __future__ import annotations

from pathlib import Path

from atcache.errors import ConfigError

from ..options import config, option


@config
class MergeConfig:
    """The options of `atcache merge`."""

    caches: tuple[Path, ...] = option(
        "Complete caches of different samples, in the order that their samples are to have.",
        metavar="CACHE...",
        is_argument=True,
    )
    out: Path = option("Folder of the merged cache.", is_written=True)

    def __post_init__(self) -> None:
        if len(self.caches) < 2:
            raise ConfigError(f"caches={[str(path) for path in self.caches]}: name two or more to merge.")
