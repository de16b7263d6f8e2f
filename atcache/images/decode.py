"""Turn bytes into an RGB image, always in the same way and without warnings."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from atcache.errors import BadImageError

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageFile import ImageFile

IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".ppm", ".pgm", ".bmp")
"""The lower-cased name of a tar member must end in one of these to be a sample's image."""

MAX_PIXELS = 89_478_485
"""Pillow's limit against decompression bombs. Pillow warns above it; here it is an error."""

MAX_SIDE = 2**25 - 1
"""The most pixels of a height or a width. Views of so long and thin an image are cut from its middle. Where the cut
begins is stored as a float32, which holds every whole number only below 2**24."""

_APP_SEGMENT = re.compile(rb"\xff+(?P<marker>[\xe0-\xef])(?P<length>..)", re.DOTALL)
"""The beginning of a JPEG's APPn segment, which come first; any number of fill bytes may stand before the marker."""


class EncodedImage:
    """An image whose size is known and whose pixels are not decoded yet.

    Args:
        data: the file's bytes.
        where: what to call the image in errors, such as its tar and key.

    Raises:
        BadImageError: `data` has an unknown format, or is too large or damaged.
    """

    def __init__(self, data: bytes, *, where: str) -> None:
        self._where = where
        with _errors_of(where):
            image = _open(data)
        if image is None:
            raise BadImageError(
                f"{where}: not a JPEG, PNG, WebP, PPM or BMP image (its first bytes are {data[:8]!r}). Convert it, or "
                "take it out of the tar."
            )
        if math.prod(image.size) > MAX_PIXELS:
            raise BadImageError(
                f"{where}: the image has {image.width} x {image.height} pixels, expected at most {MAX_PIXELS} in all. "
                "Make it smaller."
            )
        if max(image.size) > MAX_SIDE:
            raise BadImageError(
                f"{where}: the image has {image.width} x {image.height} pixels, expected at most {MAX_SIDE} a side. "
                "Crop it, or take it out of the tar; `atcache build` can skip it."
            )
        self._image = image
        self.height, self.width = image.height, image.width
        """Of the whole image, in pixels, whatever is decoded of it."""

    @property
    def can_reduce(self) -> bool:
        """Whether `decode` can make it smaller: only JPEGs can be."""
        return self._image.format == "JPEG"

    def decode(self, reduction: int = 1) -> Image:
        """The image as RGB, with its pixels loaded; see `decode_image`. To be called once.

        Args:
            reduction: 1, or, if the image can be reduced, 2, 4 or 8: each square of so many pixels a side becomes one,
                by an inverse DCT of 4, 2 or 1 values instead of 8. Sides are rounded up: a last pixel may cover less.

        Raises:
            BadImageError: the image is truncated or damaged.
        """
        with _errors_of(self._where):
            if reduction > 1:
                assert self.can_reduce, "checked by the caller"
                self._image.draft(None, (self.width // reduction, self.height // reduction))
                expected = -(-self.width // reduction), -(-self.height // reduction)
                assert self._image.size == expected, "Pillow took another reduction"
            return _to_rgb(self._image)


def decode_image(data: bytes, *, where: str) -> Image:
    """The image as RGB, with its pixels loaded.

    The format may be JPEG, PNG, WebP, PPM/PGM or BMP; the first bytes decide which. An animation gives its first frame.
    A truncated image is an error. The EXIF orientation is not applied: torchvision and WebDataset do not apply it
    either. Palettes, CMYK and grey are converted as Pillow does, and an alpha channel is dropped. 16-bit grey keeps its
    high byte: Pillow does so for 16-bit colour, but would clip 16-bit grey to 255.

    Args:
        data: the file's bytes.
        where: what to call the image in errors, such as its tar and key.

    Raises:
        BadImageError: `data` has an unknown format, or is too large, truncated or damaged.
    """
    return EncodedImage(data, where=where).decode()


@contextmanager
def _errors_of(where: str) -> Generator[None]:
    """Within it, whatever Pillow raises becomes a BadImageError."""
    try:
        yield
    except MemoryError:  # which says nothing about the image
        raise
    except Exception as error:  # Pillow's parsers raise errors of many types for damaged files.
        raise BadImageError(
            f"{where}: the image cannot be decoded: {error}. Take it out of the tar; `atcache build` can skip it."
        ) from error


def _open(data: bytes) -> ImageFile | None:
    """The opened image, whose pixels are not read yet; None for other formats.

    It calls Pillow's format classes directly. `Image.open` warns about large images, and turning that off would change
    the warning filters of the whole process, for all its threads.
    """
    from PIL import BmpImagePlugin, JpegImagePlugin, PngImagePlugin, PpmImagePlugin, WebPImagePlugin

    if data.startswith(b"\xff\xd8\xff"):
        return JpegImagePlugin.JpegImageFile(io.BytesIO(_without_exif(data)))
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return PngImagePlugin.PngImageFile(io.BytesIO(data))
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return WebPImagePlugin.WebPImageFile(io.BytesIO(data))
    if data[:1] == b"P" and data[1:2] in (b"1", b"2", b"3", b"4", b"5", b"6"):
        return PpmImagePlugin.PpmImageFile(io.BytesIO(data))
    if data.startswith(b"BM"):
        return BmpImagePlugin.BmpImageFile(io.BytesIO(data))
    return None


def _without_exif(data: bytes) -> bytes:
    """A JPEG without its EXIF segments, which never change our pixels, but make Pillow warn if they are damaged."""
    kept, start = [data[:2]], 2
    while (found := _APP_SEGMENT.match(data, start)) is not None:
        length = int.from_bytes(found["length"], "big")
        end = found.start("length") + max(2, length)
        if found["marker"] != b"\xe1" or data[found.end() : found.end() + 4] != b"Exif":
            kept.append(data[start:end])
        start = end
    return b"".join([*kept, data[start:]])


def _to_rgb(image: ImageFile) -> Image:
    import numpy as np
    from PIL import Image

    image.load()
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    # Pillow warns when it converts a palette with transparent colours. Alpha is dropped anyway.
    image.info.pop("transparency", None)
    return image.convert("RGB")
