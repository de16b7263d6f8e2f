"""The files that tables are written to, checked before anything is computed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from atcache.errors import ConfigError
from atcache.files.durable import check_output_file

PICTURES = (".png", ".svg", ".pdf")
_TABLES = (".csv", ".json", *PICTURES)


def check_outputs(out: Sequence[Path], per_view: Path | None) -> None:
    """Refuse, before long work, files that cannot be written.

    Raises:
        ConfigError: a name has another ending, stands twice, or is a folder.
        NotWritableError: the folder is read-only.
    """
    for option, path, endings in (
        *(("out", path, _TABLES) for path in out),
        *(("per_view", path, (".csv",)) for path in (per_view,) if path is not None),
    ):
        if path.suffix.lower() not in endings:
            raise ConfigError(f"{option}={str(path)!r}: expected a name that ends in {', '.join(endings)}.")
        check_output_file(option, path)
    paths = [path.absolute() for path in (*out, *((per_view,) if per_view is not None else ()))]
    if twice := [path for path in paths if paths.count(path) > 1]:
        raise ConfigError(f"{twice[0]} would be written twice. Give each output a name of its own.")
