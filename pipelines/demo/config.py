"""The options of the demo."""

from __future__ import annotations

from pathlib import Path

from ..options import config, option


@config
class DemoConfig:
    """Where the demo works, and how much it trains."""

    out: Path = option(
        "Folder for tars, caches, runs, a page of results, a picture of maps and the commands. What an earlier demo "
        "made there is replaced; other files stay.",
        default=Path("atcache-demo"),
        is_written=True,
    )
    seeds: int = option("Students of each mode, one per seed; several show how results vary.", default=1, at_least=1)
    pretrain: bool = option("Pre-train the teacher instead of using the one that comes with atcache.", default=False)
    codec: str = option("Codec that stores the teacher's factors.", default="transform")
