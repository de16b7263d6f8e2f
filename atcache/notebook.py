"""Small pieces of HTML by which results show themselves in a notebook.

All text is escaped: names of classes and samples come with a cache, and a cache may come from anybody. Pictures are in
the text itself, so nothing is loaded from anywhere.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

_LONGEST = 200  # letters of a text
_CELL = "padding:1px 6px;text-align:left;vertical-align:top"


def escaped(text: object) -> str:
    """A text that a browser shows as it is, cut if it is very long."""
    plain = str(text)
    return html.escape(plain if len(plain) <= _LONGEST else plain[: _LONGEST - 3] + "...")


def facts_html(title: str, facts: Mapping[str, object], pictures: Sequence[str] = ()) -> str:
    """A title, names with values, and pictures below them.

    Args:
        title: plain text.
        facts: plain texts by name; empty ones are left out.
        pictures: HTML, as `picture_html` makes it.
    """
    rows = "".join(
        f'<tr><td style="{_CELL};opacity:.7">{escaped(name)}</td><td style="{_CELL}">{escaped(value)}</td></tr>'
        for name, value in facts.items()
        if value != ""
    )
    shown = f'<div style="display:flex;flex-wrap:wrap;gap:12px;align-items:flex-end">{"".join(pictures)}</div>'
    return f"<div><strong>{escaped(title)}</strong><table>{rows}</table>{shown if pictures else ''}</div>"


def picture_html(picture_HWC: np.ndarray, caption: str, *, enlarge: int = 1) -> str:
    """A picture as HTML, with the file in its address.

    Args:
        picture_HWC: uint8 (height, width, 3).
        caption: plain text below it, which is also read to those who cannot see it.
        enlarge: how many pixels a side each pixel becomes.
    """
    from PIL import Image

    picture = Image.fromarray(picture_HWC)
    picture = picture.resize((picture.width * enlarge, picture.height * enlarge), Image.Resampling.NEAREST)
    file = io.BytesIO()
    picture.save(file, format="PNG", optimize=True)
    address = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
    image = f'<img src="{address}" alt="{escaped(caption)}" width="{picture.width}" height="{picture.height}">'
    style = f"margin:4px 0;width:{max(picture.width, 120)}px"
    return f'<figure style="{style}">{image}<figcaption style="opacity:.7">{escaped(caption)}</figcaption></figure>'
