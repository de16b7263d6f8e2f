"""What is at which address of the viewer.

    index.html, assets/...      the page
    site.json                   {"version": 1, "caches": [{"name": "in1k.zarr", "root": "caches/0/",
                                "images": "images/0/", "views": "views/0/"}, ...]}
    caches/N/...                the files of a cache: metadata and chunks, nothing else
    images/N/ROW                the image file of a sample, as it is in its tar; one with alpha as PNG without it
    views/N/VIEW/ROW.png        a view as the teacher saw it: stored, or replayed and checked by its hash

`images` and `views` are optional: what an exported site lacks is not named in its site.json. An exported cache stores
its views in `pixels/rgb`. What is not there is answered with {"error": "one sentence"}.

`images/N/ROW?size=96` and `views/N/VIEW/ROW.png?size=96` are thumbnails whose longer side is that long, as JPEG. Where
only files are served, the query is ignored and the whole image comes. The teacher did not see what EXIF says of an
image's orientation, so a page must not turn it either (`imageOrientation: "none"`, `image-orientation: none`).

`--export FOLDER` writes the same files, with the caches' chosen samples in caches of their own: their rows are counted
from 0 again. `--export page.html` puts them into the page, in base64, and `page/src/cache/inlined.ts` reads them there:

    <script type="application/json" id="inlined">{"site.json": "ewogI...", "caches/0/zarr.json": ...}</script>
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from atcache.errors import ConfigError
from atcache.files.location import Location

from .files import Bytes, CacheFiles, Memory, NotThereError
from .images import Pictures

BUILT = Path(__file__).with_name("built")
"""The page, as `make page` builds it."""

_MIME_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".json": "application/json",
    ".wasm": "application/wasm",
    ".svg": "image/svg+xml",
    ".png": "image/png",
    ".md": "text/plain; charset=utf-8",
    ".txt": "text/plain; charset=utf-8",
}

_NUMBER = re.compile(r"[0-9]{1,6}")
_IMAGE = re.compile(r"([0-9]{1,10})")
_VIEW = re.compile(r"([0-9]{1,5})/([0-9]{1,10})\.png")


@dataclass(frozen=True, slots=True)
class Found:
    """What is at an address."""

    file: Bytes
    mime: str
    is_kept: bool = True
    """Whether a browser may keep a copy, and ask whether it is still good. It keeps no parts of shards: one request
    would wait for the other to fill the copy, and a cache that is built again must not be seen half old."""


@dataclass(frozen=True, slots=True)
class ServedCache:
    """A cache of the site."""

    name: str
    files: CacheFiles
    pictures: Pictures


class Site:
    """All that is served. Threads may share it."""

    def __init__(self, caches: Sequence[ServedCache], page: Path = BUILT) -> None:
        """Read the page, which is small.

        Raises:
            ConfigError: the page is not built.
        """
        self._caches = caches
        self._page = read_page(page)
        names = [
            {"name": one.name, "root": f"caches/{n}/", "images": f"images/{n}/", "views": f"views/{n}/"}
            for n, one in enumerate(caches)
        ]
        self._page["site.json"] = describe_site(names)

    def find(self, path: str, query: Mapping[str, Sequence[str]]) -> Found:
        """What is at a path, relative to the site's root.

        Raises:
            NotThereError: nothing.
            AtcacheError: it cannot be read or made; the message says why.
        """
        if (data := self._page.get(path or "index.html")) is not None:
            return Found(Memory(data), mime_type(path or "index.html"))
        kind, _, rest = path.partition("/")
        number, _, name = rest.partition("/")
        if not _NUMBER.fullmatch(number) or int(number) >= len(self._caches):
            raise NotThereError(f"there is nothing at {path}.")
        cache = self._caches[int(number)]
        if kind == "caches":
            return Found(cache.files.open(name), mime_type(name), is_kept=False)
        if kind == "images" and (match := _IMAGE.fullmatch(name)):
            return Found(*cache.pictures.image(int(match[1]), _size(query)))
        if kind == "views" and (match := _VIEW.fullmatch(name)):
            return Found(*cache.pictures.view(int(match[1]), int(match[2]), _size(query)))
        raise NotThereError(f"there is nothing at {path}.")


def name_caches(locations: Sequence[Location]) -> list[str]:
    """What the page calls caches: their own names. Two of the same name are told apart.

    >>> name_caches([Path("a/in1k.zarr"), Path("b/in1k.zarr")])
    ['in1k.zarr', 'in1k.zarr (2)']
    """
    names = [location.absolute().name or str(location) for location in locations]
    return [f"{name} ({number})" if name in names[: number - 1] else name for number, name in enumerate(names, 1)]


def describe_site(caches: Sequence[Mapping[str, str]]) -> bytes:
    """The file site.json."""
    about: dict[str, Any] = {"version": 1, "caches": list(caches)}
    return json.dumps(about, indent=1).encode()


def read_page(folder: Path = BUILT) -> dict[str, bytes]:
    """The files of the built page, by their paths.

    Raises:
        ConfigError: the page is not built.
    """
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    if "index.html" not in files:
        raise ConfigError(f"the viewer's page is not in {folder}. In a checkout, build it: make page (it needs Node).")
    return {name: path.read_bytes() for name, path in files.items()}


def mime_type(name: str) -> str:
    """The MIME type of a file of the page or of a cache."""
    return _MIME_TYPES.get(Path(name).suffix, "application/octet-stream")


def _size(query: Mapping[str, Sequence[str]]) -> int | None:
    """The side of a thumbnail, if one is asked for."""
    if "size" not in query:
        return None
    text = query["size"][-1]
    if not _NUMBER.fullmatch(text) or not 16 <= int(text) <= 1024:
        raise NotThereError(f"size={text[:20]}: expected 16 to 1024 pixels.")
    return int(text)
