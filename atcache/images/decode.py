"""Decoding: bytes to an RGB image, by a fixed recipe, without ever warning."""

from __future__ import annotations

import io
import math
from typing import TYPE_CHECKING

from atcache.errors import BadImageError

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageFile import ImageFile

IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".ppm", ".pgm", ".bmp")
"""What a member must end in, lower-cased, to be a sample's image."""

MAX_PIXELS = 89_478_485
"""Pillow's decompression-bomb limit, here an error."""


def decode_image(data: bytes, *, where: str) -> Image:
    """The image as RGB, its pixels loaded.

    JPEG, PNG, WebP, PPM/PGM and BMP only, recognised by their first bytes; of an animation the first frame. Truncated
    images are errors. The EXIF orientation is not applied, as torchvision and WebDataset do not apply it either.
    Palettes, CMYK and grey are converted as Pillow does, an alpha channel is dropped, and of 16-bit grey the high byte
    is kept (Pillow would clip it to 255; this is what it does for 16-bit colour).

    Args:
        data: the file's bytes.
        where: what to call the image in errors, such as its tar and key.

    Raises:
        BadImageError: `data` is of no known format, too large, truncated or damaged.
    """
    try:
        image = _open(data)
        if image is None:
            raise BadImageError(f"{where}: no JPEG, PNG, WebP, PPM or BMP image (its first bytes are {data[:8]!r}).")
        if math.prod(image.size) > MAX_PIXELS:
            raise BadImageError(
                f"{where}: an image of {image.width} x {image.height} pixels, expected at most {MAX_PIXELS} in all."
            )
        return _to_rgb(image)
    except BadImageError:
        raise
    except Exception as error:  # Pillow raises whatever its parsers stumble on.
        raise BadImageError(
            f"{where}: the image cannot be decoded: {error}. Take it out of the tar; `atcache build` can skip it."
        ) from error


def _open(data: bytes) -> ImageFile | None:
    """The opened file, its pixels not yet read; None for other formats.

    The format classes are called directly: `Image.open` warns about large images, and silencing that would change the
    warning filters of the whole process, for all its threads.
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
    """A JPEG without its EXIF segment, which never changes our pixels but makes Pillow warn where it is damaged."""
    position = 2
    while data[position : position + 1] == b"\xff":
        marker = data[position + 1]
        if not 0xE0 <= marker <= 0xEF:  # EXIF stands among the APPn segments at the front
            break
        end = position + 2 + int.from_bytes(data[position + 2 : position + 4], "big")
        if marker == 0xE1 and data[position + 4 : position + 8] == b"Exif":
            return data[:position] + data[end:]
        position = end
    return data


def _to_rgb(image: ImageFile) -> Image:
    import numpy as np
    from PIL import Image

    image.load()
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    # Converting a palette with per-colour transparency warns; alpha is dropped anyway.
    image.info.pop("transparency", None)
    return image.convert("RGB")
