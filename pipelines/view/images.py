"""The images of samples and views, made when they are asked for."""

from __future__ import annotations

import io
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from atcache.cache.cache import Cache
from atcache.errors import AtcacheError, CacheMissError
from atcache.files.location import Location, Url
from atcache.files.ranges import open_file
from atcache.images.decode import EncodedImage
from atcache.machine import num_processors
from atcache.store.layout import Status, describe_status

from .files import Memory

if TYPE_CHECKING:
    from PIL.Image import Image

# Of a file's first bytes. Whatever else is in a tar is decoded here and sent as PNG, or refused. So are files with
# transparent parts: the teacher saw their colours, which a browser would not draw.
_FOR_BROWSERS = ((b"\xff\xd8\xff", "image/jpeg"), (b"\x89PNG\r\n\x1a\n", "image/png"), (b"RIFF", "image/webp"))
_LOOK_AGAIN_S = 2.0


class Pictures:
    """The images of one cache. Threads may share it. It needs no torch, which would delay the first picture.

    A cache that grows, or is built again, is opened again.
    """

    def __init__(self, location: Location, data: str | Path | Sequence[str | Path] | None = None) -> None:
        """Open the cache; see `Cache` for the errors."""
        self._location, self._data = location, data
        self._lock = threading.Lock()
        # A decoded photo takes up to 270 MB; a page with a strip of thumbnails asks for many at once.
        self._turns = threading.BoundedSemaphore(max(2, min(8, num_processors())))
        self._version, self._looked_s = self._read_version(), time.monotonic()
        self._cache = Cache(location, data=data)
        self._location = self._cache.path  # on a hub with the commit that was there, which stays

    def _read_version(self) -> str:
        """A text that changes when the cache does; empty if it is not there."""
        file = self._location / "zarr.json"
        try:
            if isinstance(file, Url):
                return open_file(file).version
            about = file.stat()
        except OSError:
            return ""
        return f"{about.st_mtime_ns}-{about.st_ino}"

    @property
    def cache(self) -> Cache:
        """The cache as it is now.

        Raises:
            CacheMissError: it is not there any more.
        """
        with self._lock:
            if time.monotonic() - self._looked_s > _LOOK_AGAIN_S:
                version = self._read_version()
                if not version:
                    raise CacheMissError(f"{self._location} is not there any more.")
                if version != self._version:
                    self._cache = Cache(self._location, data=self._data)
                self._version, self._looked_s = version, time.monotonic()
            return self._cache

    def warm_up(self) -> None:
        """Read and import what the first image needs, without hurry. Errors come again when an image is asked for."""
        with suppress(AtcacheError, OSError):
            self.image(0, 96)

    def image(self, row: int, size: int | None = None) -> tuple[Memory, str]:
        """The image file of a sample and its MIME type, or a thumbnail.

        The file is as it is in its tar if a browser shows it as the teacher saw it. Else it is made again, as PNG.

        Raises:
            CacheMissError: there is no such sample.
            SourceError: its image is missing or damaged, or the tars are not where they were.
        """
        cache = self.cache
        _check_row(cache, row)
        data = cache.source.read_bytes(row)
        where = cache.source.where(row)
        if size is None and not _has_alpha(data):
            for first, mime in _FOR_BROWSERS:
                if data.startswith(first):
                    return Memory(data), mime
        with self._turns:
            encoded = EncodedImage(data, where=where)
            return _encode(encoded.decode(_reduction(encoded, size)), size)

    def view(self, view: int, row: int, size: int | None = None) -> tuple[Memory, str]:
        """A view as the teacher saw it and its MIME type, as PNG, or a thumbnail.

        Raises:
            CacheMissError: there is no such view, or it is not stored; the message says why.
            CacheMismatchError: the image replayed from the tars is not the one the teacher saw.
            SourceError: the tars are not where they were.
        """
        from PIL import Image

        cache = self.cache
        status = cache.reader.status(view, row)
        if status != Status.STORED:
            raise CacheMissError(
                f"view {view} of sample {row} is not stored in {cache.path}: {describe_status(status)}."
            )
        with self._turns:
            return _encode(Image.fromarray(cache.image(row, view)), size)


def _has_alpha(data: bytes) -> bool:
    """Whether a PNG or WebP may have transparent parts, by its header alone."""
    if data.startswith(b"\x89PNG"):
        # The colour type says so, or a chunk tRNS before the pixels; see the PNG specification, sections 11.2.1 and
        # 11.3.1.1.
        return data[25:26] in (b"\x04", b"\x06") or data.find(b"tRNS", 33, data.find(b"IDAT", 33)) >= 0
    if data[8:12] == b"WEBP":
        # A flag of the extended header, or of a lossless image; see RFC 9649, sections 2.7.1 and 3.4.
        flag = {b"VP8X": (20, 0x10), b"VP8L": (24, 0x10)}.get(data[12:16])
        return flag is not None and len(data) > flag[0] and bool(data[flag[0]] & flag[1])
    return False


def _check_row(cache: Cache, row: int) -> None:
    num_samples = cache.reader.layout.num_samples
    if row >= num_samples:
        raise CacheMissError(f"sample {row} is not in {cache.path}: it has samples 0 to {num_samples - 1}.")


def _reduction(encoded: EncodedImage, size: int | None) -> int:
    """How much smaller a JPEG may be decoded for a thumbnail."""
    if size is None or not encoded.can_reduce:
        return 1
    longer = max(encoded.height, encoded.width)
    return next((factor for factor in (8, 4, 2) if longer >= factor * size), 1)


def _encode(image: Image, size: int | None) -> tuple[Memory, str]:
    encoded, how = io.BytesIO(), _png if size is None else _jpeg
    if size is not None:
        image.thumbnail((size, size))
    mime = how(image, encoded)
    return Memory(encoded.getvalue()), mime


def _png(image: Image, file: Any) -> str:  # noqa: ANN401
    image.save(file, format="PNG", compress_level=1)  # it goes to the same machine
    return "image/png"


def _jpeg(image: Image, file: Any) -> str:  # noqa: ANN401
    image.save(file, format="JPEG", quality=85)
    return "image/jpeg"
