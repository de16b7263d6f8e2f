"""The options of `atcache view`."""

from __future__ import annotations

import re
from pathlib import Path

from atcache.errors import ConfigError
from atcache.files.location import Location

from ..options import config, option, options_of

DEFAULT_SAMPLES = 32
_OF_SERVING = ("port", "host", "allow_origin", "browser")
_OF_EXPORT = ("samples", "max_mib")


@config
class ViewConfig:
    """The options of `atcache view`."""

    caches: tuple[Location, ...] = option(
        "The cache to look at, or two to compare.", metavar="CACHE [CACHE2]", is_argument=True
    )
    data: str | tuple[str, ...] | None = option(
        "Where the tars are now, if they were moved since the build: folder, files or URLs.  [default: where they "
        "were]",
        default=None,
        metavar="TARS",
    )
    port: int | None = option(
        "Port to listen at; 0 takes any free one.  [default: 8642, or the next that is free]",
        default=None,
        at_least=0,
        at_most=65535,
    )
    host: str | None = option(
        "Let other machines look too: listen at this address, such as 0.0.0.0, behind a secret address that is "
        "printed.  [default: this machine only]",
        default=None,
    )
    allow_origin: str | None = option(
        "Let the web pages of this origin read the caches from here, such as https://viewer.example.org.  [default: "
        "pages of this machine]",
        default=None,
        metavar="ORIGIN",
    )
    browser: bool | None = option("Open the page in the browser.  [default: yes where there is a screen]", default=None)
    export: Path | None = option(
        "Do not serve: write the page and some samples as files, for any web server or bucket. With a name that ends "
        "in .html as one file, to mail or to keep, which needs no server.",
        default=None,
        is_written=True,
        metavar="FOLDER|FILE.html",
    )
    samples: str | None = option(
        "The samples to export, such as 0-31,40 or TAR/KEY.  [default: the first 32]", default=None
    )
    max_mib: float = option("Refuse to export more than this, in MiB.", default=256.0, at_least=1)

    def __post_init__(self) -> None:
        if not 1 <= len(self.caches) <= 2:
            raise ConfigError(f"caches: {len(self.caches)} are named; expected one to look at, or two to compare.")
        if self.export is None:
            self._refuse(_OF_EXPORT, "an export. Give --export too, or leave this option out.")
        else:
            self._refuse(_OF_SERVING, "serving. Leave --export out, or this option.")
        origin = self.allow_origin
        if origin not in (None, "*") and not re.fullmatch(r"https?://[A-Za-z0-9.:\[\]-]+", origin):
            raise ConfigError(
                f"allow_origin={origin!r}: expected scheme, host and port of a web page, such as "
                "https://viewer.example.org, or *."
            )

    def _refuse(self, names: tuple[str, ...], what_for: str) -> None:
        """Refuse options that nothing would read."""
        for name in names:
            value = getattr(self, name)
            if value != options_of(type(self))[name][0].default:
                raise ConfigError(f"{name}={value!r} is only for {what_for}")
