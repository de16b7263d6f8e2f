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


def table_html(title: str, layers: Sequence[int], heads: Sequence[int], numbers_LH: Sequence[Sequence[float]]) -> str:
    """A table with a row a layer and a column a head; the larger a number, the darker its ground.

    Args:
        title: plain text.
        layers: names of the rows.
        heads: names of the columns.
        numbers_LH: a number for each layer and head.
    """
    known = [number for numbers in numbers_LH for number in numbers if number == number]
    low, high = (min(known), max(known)) if known else (0.0, 0.0)
    cell = f"{_CELL};text-align:right"
    header = "".join(f'<th scope="col" style="{cell}">head {escaped(head)}</th>' for head in heads)
    rows: list[str] = []
    for layer, numbers in zip(layers, numbers_LH, strict=True):
        shades = [0.0 if number != number else (number - low) / ((high - low) or 1) for number in numbers]
        cells = "".join(
            f'<td style="{cell};background:rgba(230,120,20,{0.55 * shade:.2f})">{number:.3g}</td>'
            for number, shade in zip(numbers, shades, strict=True)
        )
        rows.append(f'<tr><th scope="row" style="{_CELL}">layer {escaped(layer)}</th>{cells}</tr>')
    caption = f'<caption style="text-align:left">{escaped(title)}</caption>'
    return f"<table>{caption}<tr><td></td>{header}</tr>{''.join(rows)}</table>"
