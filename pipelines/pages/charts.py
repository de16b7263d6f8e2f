"""matplotlib's pictures as parts of a page: SVG whose colours are the page's own, so that they suit light and dark."""

from __future__ import annotations

import io
import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from .frame import text

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# matplotlib draws in colours that stand for the page's, which replace them afterwards.
_STANDS_FOR = {
    "#010101": "var(--ink)",
    "#020202": "var(--faint)",
    "#030303": "var(--line)",
    "#0a0101": "var(--one)",
    "#0a0202": "var(--two)",
    "#0a0303": "var(--three)",
}
_INK, _FAINT, _LINE, *_SERIES = _STANDS_FOR
_DASHES = ("-", "--", ":")  # beside the colours, for those who do not see them
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "text.color": _INK,
    "axes.edgecolor": _FAINT,
    "axes.labelcolor": _INK,
    "axes.titlecolor": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _LINE,
    "grid.linewidth": 0.7,
    "xtick.color": _FAINT,
    "ytick.color": _FAINT,
    "xtick.labelcolor": _INK,
    "ytick.labelcolor": _INK,
    "legend.frameon": False,
    "font.size": 10,
    "text.parse_math": False,
}
_MOST_POINTS = 300  # of a curve: more are not seen, and make the page large
_counter = itertools.count()


def chart(draw: Callable[[Axes], None], *, title: str, says: str, size: tuple[float, float] = (4.4, 2.7)) -> str:
    """A chart as HTML.

    Args:
        draw: draws on the axes.
        title: stands above it.
        says: what it shows in words, for those who do not see it; also stands below it.
        size: width and height, in inches; the page stretches it.
    """
    # The object interface needs no display and leaves pyplot's global state alone.
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    file = io.StringIO()
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasSVG(figure)
        draw(figure.subplots())
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    svg = _part_of_a_page(file.getvalue(), says)
    widest = f"max-width: {size[0] * 1.25:.1f}in"  # letters would be larger than the page's
    return f'<figure style="{widest}"><h3>{text(title)}</h3>{svg}<figcaption>{text(says)}</figcaption></figure>'


def _part_of_a_page(svg: str, says: str) -> str:
    """The SVG without its head, with names that no other chart of the page has."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    prefix = f"c{next(_counter)}-"
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{prefix}", svg)
    for stand_in, colour in _STANDS_FOR.items():
        svg = svg.replace(stand_in, colour)
    return svg.replace("<svg ", f'<svg role="img" aria-label="{text(says)}" ', 1)


def curves(
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    *,
    title: str,
    says: str,
    unit: str,
    points: Sequence[str] = (),
) -> str:
    """Curves over the steps of a run, as HTML.

    Args:
        series: steps and values by name, at most three.
        title: stands above.
        says: what they show, in words.
        unit: of the values, at the axis.
        points: names of the series whose single values are marked.
    """

    def draw(axes: Axes) -> None:
        for (name, (steps, values)), colour, dash in zip(series.items(), _SERIES, _DASHES, strict=False):
            x, y = thinned(steps, values)
            marker = "o" if name in points and len(x) <= 40 else None
            axes.plot(x, y, color=colour, linestyle=dash, linewidth=1.6, marker=marker, markersize=3.5, label=name)
        axes.set_xlabel("step")
        axes.set_ylabel(unit)
        if len(series) > 1:
            axes.legend()

    return chart(draw, title=title, says=says)


def thinned(steps: Sequence[float], values: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """A long curve as means of neighbours: at most 300 points."""
    x, y = np.asarray(steps, float), np.asarray(values, float)
    if len(x) <= _MOST_POINTS:
        return x, y
    parts = np.array_split(np.arange(len(x)), _MOST_POINTS)
    return np.array([x[part].mean() for part in parts]), np.array([y[part].mean() for part in parts])


def bars(values: Mapping[str, float], *, title: str, says: str, unit: str) -> str:
    """Horizontal bars with their numbers, the first at the top, as HTML."""

    def draw(axes: Axes) -> None:
        names, numbers = list(values), list(values.values())
        drawn = axes.barh(names, numbers, color=_SERIES[0], height=0.62)
        axes.bar_label(drawn, [f"{number:.1f}" for number in numbers], padding=4)
        axes.invert_yaxis()
        axes.set_xlabel(unit)
        axes.set_xlim(0, max(*numbers, 1e-9) * 1.12)
        axes.grid(visible=False, axis="y")
        axes.tick_params(axis="y", length=0)

    return chart(draw, title=title, says=says, size=(7.2, 0.8 + 0.42 * len(values)))


def by_layer_and_head(
    values_LH: np.ndarray, layers: Sequence[int], heads: Sequence[int], *, title: str, says: str, unit: str
) -> str:
    """A number for each layer and head as a picture: layers downwards, heads to the right, lighter is more."""

    def draw(axes: Axes) -> None:
        top = float(values_LH.max()) or 1.0
        # Boxes, not an image of pixels: they stay sharp however wide the page is.
        mesh = axes.pcolormesh(values_LH, cmap="viridis", vmin=0, vmax=top, edgecolors="none", linewidth=0)
        axes.invert_yaxis()
        axes.grid(visible=False)
        every_x, every_y = -(-len(heads) // 16), -(-len(layers) // 16)
        axes.set_xticks(np.arange(0, len(heads), every_x) + 0.5, [str(head) for head in heads[::every_x]])
        axes.set_yticks(np.arange(0, len(layers), every_y) + 0.5, [str(layer) for layer in layers[::every_y]])
        axes.tick_params(length=0)
        axes.set_xlabel("head")
        axes.set_ylabel("layer")
        bar = axes.figure.colorbar(mesh, ax=axes, label=unit)
        bar.outline.set_visible(False)  # type: ignore[union-attr]

    height = min(6.5, 1.2 + 0.32 * len(layers))
    return chart(draw, title=title, says=says, size=(min(7.2, 2.6 + 0.42 * len(heads)), height))
