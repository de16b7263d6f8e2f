"""What a demo was asked for."""

from __future__ import annotations

from pathlib import Path

from ..options import config, option


@config
class DemoConfig:
    """What `atcache demo` was asked for."""

    out: Path = option(
        "Folder for tars, caches, runs, a picture of maps and the commands. What an earlier demo made there is "
        "replaced; all else stays.",
        default=Path("atcache-demo"),
        is_written=True,
    )
    seeds: int = option("Students of each mode; several show how much the result varies.", default=1, at_least=1)
    pretrain: bool = option("Make the teacher anew instead of taking the one that ships.", default=False)
    codec: str = option("How the teacher's factors are stored.", default="transform")
