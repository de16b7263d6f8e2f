"""The frame of a page, and the parts it is made of, as HTML.

Functions here take plain text and escape it, except where they say HTML. Nothing is fetched and no script runs: the
page forbids itself both.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from .plain import plain

_STYLE = """
:root { color-scheme: light dark; --ground: #ffffff; --panel: #f4f6f9; --ink: #1b222c; --faint: #535d6b;
  --line: #d3d9e1; --link: #0b57b8; --one: #1f5fbf; --two: #b04a0c; --three: #2b7331; }
@media (prefers-color-scheme: dark) { :root { --ground: #11151b; --panel: #1a2028; --ink: #e6eaf0; --faint: #a6b0bd;
  --line: #38424f; --link: #86b8ff; --one: #7fb2ff; --two: #ffad73; --three: #86d08d; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 62rem; margin: 0 auto; padding: 1.5rem 1rem 4rem; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .5rem; }
h2 { font-size: 1.2rem; margin: 2.5rem 0 .5rem; padding-top: 1rem; border-top: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.25rem 0 .25rem; }
p, ul { margin: .5rem 0; max-width: 46rem; }
a { color: var(--link); }
.lead { font-size: 1.1rem; }
.faint, figcaption { color: var(--faint); font-size: .875rem; }
table { border-collapse: collapse; margin: .75rem 0; font-variant-numeric: tabular-nums; overflow-wrap: break-word; }
caption { text-align: left; color: var(--faint); font-size: .875rem; padding-bottom: .25rem; }
th, td { text-align: left; padding: .25rem 1rem .25rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th { font-weight: 600; }
tbody th { min-width: 4.5rem; }
.number { text-align: right; }
figure { margin: .75rem 0; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 19rem), 1fr)); gap: 1rem; }
.charts figure { margin: 0; }
img { max-width: 100%; height: auto; }
svg { display: block; width: 100%; height: auto; }
svg text { font-family: system-ui, sans-serif !important; }
.tiles { display: grid; grid-template-columns: repeat(auto-fill, minmax(8.5rem, 1fr)); gap: 1rem; padding: 0; margin: 0;
  max-width: none; list-style: none; }
.tiles img, .triple img { width: 100%; height: auto; display: block; border-radius: 3px; }
.pixels { image-rendering: pixelated; }
.triples { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 18rem), 1fr)); gap: 1.25rem; }
.triples > figure { margin: 0; }
.triple { display: flex; gap: .4rem; }
.triple > span { flex: 1; }
.triple small { display: block; color: var(--faint); }
pre { background: var(--panel); border: 1px solid var(--line); border-radius: 4px; padding: .6rem .75rem;
  white-space: pre-wrap; font: .85rem/1.5 ui-monospace, monospace; margin: .5rem 0; }
details { margin: .5rem 0; }
summary { cursor: pointer; color: var(--link); }
.wide { overflow-x: auto; }
@media (min-width: 32rem) { thead th { white-space: nowrap; } }
@media (max-width: 32rem) { th, td { padding-right: .6rem; } h1 { font-size: 1.35rem; } }
"""

_FORBIDS = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"


def page(title: str, body: str) -> str:
    """A whole page.

    Args:
        title: plain text; also the page's first heading.
        body: HTML of the parts below.
    """
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_FORBIDS}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{text(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n"
        f"<h1>{text(title)}</h1>\n{body}\n</main>\n</body>\n</html>\n"
    )


def text(value: object) -> str:
    """Any value as HTML text. Signs that cannot be printed become question marks; no line ends before a per cent."""
    return escape(plain(str(value))).replace(" %", "&nbsp;%")


def section(title: str, *parts: str) -> str:
    """A part of the page under a heading; `parts` are HTML."""
    return f"<section>\n<h2>{text(title)}</h2>\n" + "\n".join(filter(None, parts)) + "\n</section>"


def paragraph(words: str, kind: str = "") -> str:
    """A paragraph of plain text; `kind` is a class of the style."""
    return f'<p class="{kind}">{text(words)}</p>' if kind else f"<p>{text(words)}</p>"


def table(headings: Sequence[str], rows: Sequence[Sequence[object]], *, caption: str, numbers: int = 0) -> str:
    """A table, whose first cell in each row names the row.

    Args:
        headings: of the columns.
        rows: the cells.
        caption: what the table shows.
        numbers: how many of the last columns hold numbers, which are set right.
    """
    first = len(headings) - numbers
    classes = ['class="number"' if place >= first else "" for place in range(len(headings))]
    head = "".join(f'<th scope="col" {kind}>{text(name)}</th>' for name, kind in zip(headings, classes, strict=True))
    lines: list[str] = []
    for row in rows:
        name, *others = (text(cell) for cell in row)
        cells = (f"<td {kind}>{cell}</td>" for cell, kind in zip(others, classes[1:], strict=True))
        lines.append(f'<tr><th scope="row" {classes[0]}>{name}</th>{"".join(cells)}</tr>')
    body = "\n".join(lines)
    # Scrolled by itself where the screen is narrow; keys can do that only if it can be reached by them.
    return (
        f'<div class="wide" role="region" tabindex="0" aria-label="{text(caption)}"><table>'
        f"<caption>{text(caption)}</caption><thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table></div>"
    )


def commands(lines: Sequence[str]) -> str:
    """Commands to type, each in a box of its own. Bytes of paths that are no UTF-8 become question marks."""
    return "\n".join(f"<pre>{escape(line.encode(errors='replace').decode())}</pre>" for line in lines)


def folded(title: str, *parts: str) -> str:
    """Parts, as HTML, that are shown when the title is clicked."""
    return f"<details><summary>{text(title)}</summary>\n" + "\n".join(parts) + "\n</details>"
