"""The click types of paths. All of them expand `~`, as no shell does in `--out=~/x` and nothing does in a TOML file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from atcache.errors import ConfigError
from atcache.files.location import Location, expand_home, looks_like_url, parse_location


class PathType(click.Path):
    """A path on this machine. URLs are refused, as a folder `s3:` would be looked for."""

    def __init__(self, **settings: Any) -> None:  # noqa: ANN401 - click's own
        super().__init__(**settings, path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:  # noqa: ANN401 - click's
        if isinstance(value, str) and looks_like_url(value):
            self.fail(
                f"{value!r} is a URL, and this option reads no URLs. Copy what is there to this machine, and give that "
                "path.",
                param,
                ctx,
            )
        try:
            return super().convert(expand_home(Path(value)), param, ctx)
        except ConfigError as error:
            self.fail(str(error), param, ctx)


class OutType(PathType):
    """A path to write to. URLs are refused: of what commands make, only caches are written to servers."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:  # noqa: ANN401 - click's
        if isinstance(value, str) and looks_like_url(value):
            self.fail(
                f"{value!r} is a URL, but of all commands only build, maps, push and verify --repair write to servers. "
                "Give a folder of this machine, and copy it to the server when the command has ended.",
                param,
                ctx,
            )
        return super().convert(value, param, ctx)


class LocationType(click.ParamType[Location]):
    """A path, or a URL of a server that is read."""

    name = "path or URL"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Location:  # noqa: ANN401 - click's
        try:
            return parse_location(value)
        except ConfigError as error:
            self.fail(str(error), param, ctx)


PATH = PathType()
EXISTING_FILE = PathType(exists=True, dir_okay=False)
OUT = OutType()
LOCATION = LocationType()
