"""Tables of layers x heads as a picture: one panel a statistic, darker is less."""

from __future__ import annotations

import math
import textwrap
import warnings
from pathlib import Path

import numpy as np

from .tables import NamedTable, Report


def draw_tables(path: Path, report: Report, kind: str) -> None:
    """Draw all tables of a report, each with a colour scale of its own, whose numbers stand beside it.

    Args:
        path: the file to write.
        report: the tables.
        kind: "png", "svg" or "pdf".
    """
    # The object interface needs no display and leaves pyplot's global state alone.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    num_layers, num_heads, num_panels = len(report.layers), len(report.heads), len(report.tables)
    num_columns = min(3 if num_heads <= 16 else 2, num_panels)
    num_rows = math.ceil(num_panels / num_columns)
    panel_width, panel_height = max(3.6, 1.6 + 0.24 * num_heads), max(2.4, 1.2 + 0.2 * num_layers)
    figure = Figure(figsize=(panel_width * num_columns, panel_height * num_rows + 0.5), layout="constrained")
    FigureCanvasAgg(figure)
    width = round(panel_width * num_columns * 12)  # letters of this size that an inch has room for
    # Paths are no formulas, whatever signs they have.
    figure.suptitle("\n".join(textwrap.wrap(report.headline, width)), fontsize=10, parse_math=False)
    axes = figure.subplots(num_rows, num_columns, squeeze=False)
    for axis, table in zip(axes.flat, report.tables, strict=False):
        _draw_panel(figure, axis, report, table)
    for axis in axes.flat[num_panels:]:
        axis.set_axis_off()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # a path in a script that the font lacks
        figure.savefig(path, dpi=130, format=kind)


def _draw_panel(figure: object, axis: object, report: Report, table: NamedTable) -> None:
    """One table: layers downwards, heads to the right."""
    from typing import Any, cast

    axes, mean_LH = cast("Any", axis), np.array(table.mean)
    low, high = float(mean_LH.min()), float(mean_LH.max())
    # Of numbers that are all alike, matplotlib would make a scale around them, with shares below 0.
    scale = {} if high > low else {"vmin": min(low, 0.0), "vmax": max(high, 0.0) or 1.0}
    image = axes.imshow(mean_LH, aspect="auto", interpolation="nearest", cmap="viridis", **scale)
    axes.set_title("\n".join(textwrap.wrap(table.title, 40)), fontsize=9)
    for side, numbers, every in (
        ("x", report.heads, 2 if len(report.heads) > 12 else 1),
        ("y", report.layers, 2 if len(report.layers) > 12 else 1),
    ):
        places = range(0, len(numbers), every)
        getattr(axes, f"set_{side}ticks")([*places], [str(numbers[place]) for place in places], fontsize=7)
    axes.set_xlabel("head", fontsize=8)
    axes.set_ylabel("layer", fontsize=8)
    cast("Any", figure).colorbar(image, ax=axes).ax.tick_params(labelsize=7)
