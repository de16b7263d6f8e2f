"""Where a file or folder is: a local path, or the URL of a server."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias
from urllib.parse import quote, unquote, urlsplit

from atcache.errors import ConfigError

_WEB_SCHEMES = ("http", "https")
_STORE_SCHEMES = ("s3", "gs", "az")
_HUB_ROOT = "hf://datasets/"
_SCHEMES = (*_WEB_SCHEMES, *_STORE_SCHEMES, "hf")
_HUB_PART = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_HUB_REVISION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]*")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_LOOKS_LIKE_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://|pipe:")
_COLLAPSED = re.compile(rf"({'|'.join(_SCHEMES)}):/[^/]")


@dataclass(frozen=True, slots=True)
class Url:
    """A file or folder on a server. It has those parts of `Path` that code for both kinds of location uses.

    This is a plain value: it does not use the network. `parse_location` makes and checks it.
    """

    root: str
    """Scheme and host or bucket, such as "https://data.example.org" or "s3://bucket"; on a hub "hf://datasets/ORG/NAME",
    with "@REVISION" behind it if one was named."""
    parts: tuple[str, ...]
    """Names of the folders and the file, with the percent encoding of a web address decoded."""

    def __str__(self) -> str:
        parts = [quote(part) for part in self.parts] if self.root.startswith(_WEB_SCHEMES) else self.parts
        return "/".join([self.root, *parts])

    def __truediv__(self, path: str) -> Url:
        return Url(self.root, self.parts + _split(path, f"{self}/{path}"))

    @property
    def key(self) -> str:
        """The path on the server, as obstore expects it."""
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
        """The folder it is in."""
        return Url(self.root, self.parts[:-1])

    def absolute(self) -> Url:
        """The same URL; here only because `Path` has this method."""
        return self

    @property
    def can_list(self) -> bool:
        """Whether its server can list a folder. Object stores can; web servers cannot, and hubs are read as such."""
        return not self.root.startswith((*_WEB_SCHEMES, _HUB_ROOT))

    @property
    def is_on_hub(self) -> bool:
        """Whether it is in a dataset repository of a Hugging Face hub."""
        return self.root.startswith(_HUB_ROOT)

    @property
    def repository(self) -> str:
        """ORG/NAME of its repository; only on a hub."""
        return self.root.removeprefix(_HUB_ROOT).partition("@")[0]

    @property
    def revision(self) -> str:
        """The branch, tag or commit of its repository; only on a hub."""
        return unquote(self.root.partition("@")[2]) or "main"

    @property
    def is_pinned(self) -> bool:
        """Whether its revision is a commit, whose files never change; only on a hub."""
        return _COMMIT.fullmatch(self.revision) is not None

    def at_revision(self, revision: str) -> Url:
        """The same place in another revision of its repository."""
        return Url(f"{_HUB_ROOT}{self.repository}@{quote(revision, safe='')}", self.parts)


Location: TypeAlias = Path | Url


def listed(places: Location | tuple[Location, ...] | None) -> tuple[Location, ...]:
    """The locations in a setting that accepts none, one or several, as a tuple.

    >>> listed(None), listed(Path("a")), listed((Path("a"), Path("b")))
    ((), (PosixPath('a'),), (PosixPath('a'), PosixPath('b')))
    """
    if places is None:
        return ()
    return places if isinstance(places, tuple) else (places,)


def looks_like_url(text: str) -> bool:
    """Whether the user means a text as a URL, even if it is not a valid one."""
    return _LOOKS_LIKE_URL.match(text) is not None


def expand_home(path: Path) -> Path:
    """`path` with the home folder in place of a leading `~` or `~user`.

    Shells do this only where a word begins with it, not in `--out=~/x`, and nothing does it in a TOML file.

    Raises:
        ConfigError: there is no such user, so that a folder called `~user` would be made.

    >>> expand_home(Path("~/tars")) == Path.home() / "tars"
    True
    """
    try:
        return path.expanduser()
    except RuntimeError as error:
        raise ConfigError(
            f"{str(path)!r} begins with ~, but there is no user {path.parts[0][1:]!r} with a home folder. Write the "
            "whole path, from /."
        ) from error


def parse_location(place: str | Path | Url) -> Location:
    """The location that a user's text names.

    Raises:
        ConfigError: the URL is not valid, has a scheme that atcache cannot read, or contains a password or a query.

    >>> parse_location("s3://bucket/in1k.zarr") / "zarr.json"
    Url(root='s3://bucket', parts=('in1k.zarr', 'zarr.json'))
    """
    if isinstance(place, Url):
        return place
    text = str(place)
    if isinstance(place, Path):
        if _COLLAPSED.match(text):
            raise ConfigError(f"{text!r} was a URL before it became a Path, which drops slashes. Pass it as a str.")
        return expand_home(place)
    if not looks_like_url(text):
        return expand_home(Path(text))
    return _parse_url(text)


def _parse_url(text: str) -> Url:
    shown = _without_secrets(text)
    try:
        found = urlsplit(text)
        found.port  # noqa: B018 - raises if it is not a number
    except ValueError:  # its message may hold a part of a password
        raise ConfigError(
            f"{shown!r} is not a URL: its host or port cannot be read. Check how it is written; it must have no "
            "password."
        ) from None
    if found.scheme not in _SCHEMES:
        raise ConfigError(
            f"{shown!r} cannot be read: expected a path, or a URL that begins with "
            f"{', '.join(f'{scheme}://' for scheme in _SCHEMES)}."
        )
    if "@" in found.netloc or found.query or found.fragment:
        # They are often secret, and would appear in caches and messages.
        raise ConfigError(
            f"{shown}: a URL must have no password, query or fragment. Give credentials in the environment variables "
            "of the store."
        )
    if found.scheme == "hf":
        return _parse_hub(text)
    if not found.netloc or not re.fullmatch(r"[A-Za-z0-9._:\[\]-]+", found.netloc):
        raise ConfigError(f"{shown!r} does not name a host or bucket; expected a URL such as s3://bucket/folder.")
    root = f"{found.scheme}://{found.netloc}"
    path = found.path.strip("/")
    return Url(root, _split(path, text, encoded=found.scheme in _WEB_SCHEMES))


def _without_secrets(text: str) -> str:
    """A URL for messages: without what comes before an "@", and without query and fragment.

    >>> _without_secrets("ftp://me:pass/word@host/x?sig=1"), _without_secrets("https://me:pass?word@host/x")
    ('ftp://host/x', 'https://...')
    """
    scheme, _, rest = text.partition("://")
    if scheme == text:
        return f"{text.partition(':')[0]}:..."
    place, *behind = re.split("[?#]", rest)
    if "@" in "".join(behind):  # a password or a query: it cannot be told where it ends
        return f"{scheme}://..."
    return f"{scheme}://{place.rpartition('@')[2]}"


def _parse_hub(text: str) -> Url:
    """Of "hf://datasets/ORG/NAME@REVISION/FOLDER", where a slash in the revision is written %2F."""
    org, _, rest = text.removeprefix(_HUB_ROOT).partition("/")
    repository, _, path = rest.partition("/")
    name, at, revision = repository.partition("@")
    revision = unquote(revision)
    names_repository = text.startswith(_HUB_ROOT) and all(_HUB_PART.fullmatch(part) for part in (org, name))
    names_revision = not at or (_HUB_REVISION.fullmatch(revision) and ".." not in revision)
    if not names_repository or not names_revision:
        raise ConfigError(
            f"{text!r} does not name a dataset on a hub; expected hf://datasets/ORG/NAME/FOLDER, with @REVISION behind "
            "NAME for a branch, tag or commit other than main."
        )
    return Url(f"{_HUB_ROOT}{org}/{name}{at}{quote(revision, safe='')}", _split(path.strip("/"), text))


def _split(path: str, shown: str, *, encoded: bool = False) -> tuple[str, ...]:
    """The parts of a path below a root. Refuses parts that would lead out of it, such as ".."."""
    parts = tuple(unquote(part) if encoded else part for part in path.split("/")) if path else ()
    if any(part in {"", ".", ".."} or "/" in part or not part.isprintable() for part in parts):
        raise ConfigError(f"{shown!r} is not a path on a server: expected names between single slashes.")
    return parts
