"""Pixels as parts of a page."""

from __future__ import annotations

import base64
import io

import numpy as np

from .frame import text

_SMALL = 64  # pixels; below, JPEG would smear what there is
_MOST = 336  # pixels of a side; more is not seen on the page


def image(pixels_HWC: np.ndarray, alt: str) -> str:
    """An image as HTML, with its pixels inside.

    Args:
        pixels_HWC: uint8 (height, width, 3). Large ones are shown smaller; small ones with their pixels as boxes.
        alt: what it shows, for those who do not see it.
    """
    from PIL import Image

    picture = Image.fromarray(pixels_HWC)
    is_small = max(picture.size) <= _SMALL
    picture.thumbnail((_MOST, _MOST))
    file = io.BytesIO()
    if is_small:
        picture.save(file, format="PNG")
    else:
        picture.save(file, format="JPEG", quality=88)
    return encoded_image(file.getvalue(), "png" if is_small else "jpeg", alt, kind="pixels" if is_small else "")


def encoded_image(data: bytes, form: str, alt: str, *, kind: str = "") -> str:
    """An image file as HTML.

    Args:
        data: the file's bytes.
        form: "png" or "jpeg".
        alt: what it shows.
        kind: a class of the style.
    """
    code = base64.b64encode(data).decode()
    return f'<img src="data:image/{form};base64,{code}" alt="{text(alt)}" class="{kind}">'
