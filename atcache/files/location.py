"""Where a file or folder lies: a path of this machine, or a URL of a server."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias
from urllib.parse import quote, unquote, urlsplit

from atcache.errors import ConfigError

_WEB_SCHEMES = ("http", "https")
_STORE_SCHEMES = ("s3", "gs", "az")
_LOOKS_LIKE_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://|pipe:")
_COLLAPSED = re.compile(rf"({'|'.join(_WEB_SCHEMES + _STORE_SCHEMES)}):/[^/]")


@dataclass(frozen=True, slots=True)
class Url:
    """A file or folder of a server; what of `Path`'s arithmetic is used on either.

    A plain value that touches no network. Made by `parse_location`, which checks it.
    """

    root: str
    """Scheme and host or bucket, such as "https://data.example.org" or "s3://bucket"."""
    parts: tuple[str, ...]
    """Names of folders and file, as they are: percent signs of a web address are undone."""

    def __str__(self) -> str:
        parts = [quote(part) for part in self.parts] if self.root.startswith(_WEB_SCHEMES) else self.parts
        return "/".join([self.root, *parts])

    def __truediv__(self, path: str) -> Url:
        return Url(self.root, self.parts + _split(path, f"{self}/{path}"))

    @property
    def key(self) -> str:
        """The path on the server, as obstore takes it."""
        return "/".join(self.parts)

    @property
    def name(self) -> str:
        """The last part; empty for the root."""
        return self.parts[-1] if self.parts else ""

    @property
    def suffix(self) -> str:
        """The name's extension with its dot, as `Path.suffix`."""
        return Path(self.name).suffix

    @property
    def parent(self) -> Url:
        """The folder it lies in."""
        return Url(self.root, self.parts[:-1])

    def absolute(self) -> Url:
        """Itself."""
        return self

    @property
    def can_list(self) -> bool:
        """Whether its server can say what lies in a folder. Web servers cannot; object stores can."""
        return not self.root.startswith(_WEB_SCHEMES)


Location: TypeAlias = Path | Url


def listed(places: Location | tuple[Location, ...] | None) -> tuple[Location, ...]:
    """What a setting names that takes none, one or several locations.

    >>> listed(None), listed(Path("a")), listed((Path("a"), Path("b")))
    ((), (PosixPath('a'),), (PosixPath('a'), PosixPath('b')))
    """
    if places is None:
        return ()
    return places if isinstance(places, tuple) else (places,)


def looks_like_url(text: str) -> bool:
    """Whether a text is meant as a URL, whether or not it is one that can be read."""
    return _LOOKS_LIKE_URL.match(text) is not None


def parse_location(place: str | Path | Url) -> Location:
    """The location a user names.

    Raises:
        ConfigError: a URL that is none, of a scheme that is not read, or with a password or a query in it.

    >>> parse_location("s3://bucket/in1k.zarr") / "zarr.json"
    Url(root='s3://bucket', parts=('in1k.zarr', 'zarr.json'))
    """
    if isinstance(place, Url):
        return place
    text = str(place)
    if isinstance(place, Path):
        if _COLLAPSED.match(text):
            raise ConfigError(f"{text!r} was a URL before it became a Path, which drops slashes. Give it as text.")
        return place
    if not looks_like_url(text):
        return Path(os.fspath(text))
    return _parse_url(text)


def _parse_url(text: str) -> Url:
    try:
        found = urlsplit(text)
        found.port  # noqa: B018 - raises where it is no number
    except ValueError as error:
        raise ConfigError(f"{text!r} is no URL ({error}).") from None
    if found.scheme not in _WEB_SCHEMES + _STORE_SCHEMES:
        raise ConfigError(
            f"{text!r} cannot be read: expected a path, or a URL that begins with "
            f"{', '.join(f'{scheme}://' for scheme in _WEB_SCHEMES + _STORE_SCHEMES)}."
        )
    if "@" in found.netloc or found.query or found.fragment:
        # They would end up in caches and messages, and they are often secret.
        raise ConfigError(
            f"{found.scheme}://{found.netloc.rpartition('@')[2]}{found.path}: a URL must have no password, query or "
            "fragment. Give credentials by the environment variables of the store."
        )
    if not found.netloc or not re.fullmatch(r"[A-Za-z0-9._:\[\]-]+", found.netloc):
        raise ConfigError(f"{text!r} names no host or bucket.")
    root = f"{found.scheme}://{found.netloc}"
    path = found.path.strip("/")
    return Url(root, _split(path, text, encoded=found.scheme in _WEB_SCHEMES))


def _split(path: str, shown: str, *, encoded: bool = False) -> tuple[str, ...]:
    """The parts of a path below a root, none of which may lead elsewhere."""
    parts = tuple(unquote(part) if encoded else part for part in path.split("/")) if path else ()
    if any(part in {"", ".", ".."} or "/" in part or not part.isprintable() for part in parts):
        raise ConfigError(f"{shown!r} is no place on a server: expected names between single slashes.")
    return parts
