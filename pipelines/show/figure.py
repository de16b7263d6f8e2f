"""The figure of `atcache show`, drawn with matplotlib: images above, heads or a wall below, one scale at the right."""

from __future__ import annotations

import math
import textwrap
from typing import TYPE_CHECKING, Any

import numpy as np

from atcache.pictures import ABOVE, CAVEAT, COLOURS, carry_back, colours, overlay, top_of_scale, wall

from ..pages.plain import plain
from .config import Scale
from .reading import Shown

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_WIDTH = 11.0  # inches, without the colour bar
_BAR = 1.25  # inches for the colour bar and its text
_MARGIN, _LINE = 0.12, 0.19  # inches
_TITLE = 0.24  # inches above each picture
_MOST_ACROSS = 8  # maps of one layer, or of one head
_INK, _FAINT = "#222222", "#666666"


class _Page:
    """A figure laid out from the top in inches, whose height is known first."""

    def __init__(self, height: float) -> None:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        self.width, self.height, self.at = _WIDTH + _BAR, height, _MARGIN
        self.figure: Figure = Figure(figsize=(self.width, height), facecolor="white")
        FigureCanvasAgg(self.figure)

    def axes(self, left: float, top: float, width: float, height: float) -> Axes:
        """Axes without ticks, at inches from the top left."""
        place = (left / self.width, 1 - (top + height) / self.height, width / self.width, height / self.height)
        axes = self.figure.add_axes(place)
        axes.set_xticks([])
        axes.set_yticks([])
        for spine in axes.spines.values():
            spine.set_visible(False)
        return axes

    def text(self, text: str, size: float, *, colour: str = _INK, weight: str = "normal") -> None:
        """A line of text below what is there already."""
        place = (_MARGIN / self.width, 1 - self.at / self.height)
        self.figure.text(*place, text, size=size, color=colour, weight=weight, va="top", parse_math=False)
        self.at += _LINE * size / 9


class _Scale:
    """How values become colours."""

    def __init__(self, maps_LHhw: np.ndarray, scale: Scale, clip: float) -> None:
        self.is_one, self._clip = scale == "figure", clip
        self.top, self.largest = top_of_scale(maps_LHhw, clip), float(maps_LHhw.max())

    def top_of(self, map_HW: np.ndarray) -> float:
        return self.top if self.is_one else top_of_scale(map_HW, self._clip)

    @property
    def clips(self) -> bool:
        return self.largest > self.top * (1 + 1e-6)

    def lines(self) -> list[str]:
        """What stands below the colour bar."""
        above = 1 - self._clip
        if not self.is_one:
            return ["each map has", "its own scale"] + (["cyan: its", f"largest {above:.2%}"] if self.clips else [])
        return ["one scale", "for all maps"] + (
            ["cyan: above it", f"({above:.2%} of the", "values, up to", f"{self.largest:.3g})"] if self.clips else []
        )


def draw_figure(shown: Shown, scale: Scale, clip: float) -> tuple[Figure, float]:
    """The figure, and the value at the top of its scale.

    Args:
        shown: what it shows.
        scale: one scale for all maps, or one for each.
        clip: the quantile at which a scale ends.
    """
    num_layers, num_heads, grid_height, grid_width = shown.maps_LHhw.shape
    scaled = _Scale(shown.maps_LHhw, scale, clip)
    pictures = _pictures(shown, scaled)
    aspects = [width / height for width, height in (size for _, size, _ in pictures)]
    side = min(2.9, (_WIDTH - _MARGIN * (len(pictures) + 1)) / sum(aspects))  # inches, the height of the row
    has_wall = num_layers * num_heads > 1
    # Maps of one layer, or of one head, are drawn one by one over the view; others as one wall, its longer side across.
    is_apart = min(num_layers, num_heads) == 1
    num_rows, num_columns = sorted((num_layers, num_heads))
    if is_apart:
        num_rows = math.ceil(num_columns / _MOST_ACROSS)
        num_columns = math.ceil(num_columns / num_rows)
    tile_width = (_WIDTH - (2 if is_apart else 6) * _MARGIN) / num_columns
    view_aspect = shown.view_height / shown.view_width
    tile_width = min(tile_width, 1.75 if is_apart else 0.85)
    tile_height = tile_width * (view_aspect if is_apart else (grid_height + 1) / (grid_width + 1)) + _TITLE * is_apart
    notes = [line for note in (*shown.notes, CAVEAT) for line in textwrap.wrap(_shortened(note, 600), 165)]
    wall_height = (num_rows * tile_height + _TITLE * (not is_apart) + _MARGIN) * has_wall
    titles_height = _LINE * (12 + 9) / 9 + _TITLE
    page = _Page(3 * _MARGIN + titles_height + side + wall_height + len(notes) * _LINE * 8 / 9)
    title = " · ".join(filter(None, (shown.sample_key, shown.label, f"view {shown.view}")))
    page.text(_shortened(title, 95), 12, weight="bold")
    page.text(_shortened(f"{shown.teacher} · {_named(shown)} · query {_queries(shown)}", 150), 9, colour=_FAINT)
    page.at += _TITLE
    left = _MARGIN
    for (paint, (width, height), title), aspect in zip(pictures, aspects, strict=True):
        axes = page.axes(left, page.at, side * aspect, side)
        axes.set_title(title, size=9, color=_INK, loc="left", pad=4)
        paint(axes)
        axes.set_xlim(0, width)
        axes.set_ylim(height, 0)
        left += side * aspect + _MARGIN
    _draw_bar(page, scaled, side)
    page.at += side + _MARGIN
    if has_wall:
        draw = _draw_apart if is_apart else _draw_wall
        draw(page, shown, scaled, (num_rows, num_columns), (tile_width, tile_height))
        page.at += wall_height
    for line in notes:
        page.text(line, 8, colour=_FAINT)
    return page.figure, scaled.top


def _pictures(shown: Shown, scaled: _Scale) -> list[tuple[Any, tuple[int, int], str]]:
    """The pictures of the first row: what paints each, its size (width, height) in its own coordinates, its title."""
    map_HW = shown.maps_LHhw[-1].mean(axis=0)
    name = _main_name(shown)
    top = scaled.top_of(map_HW)
    view_size = shown.view_width, shown.view_height
    pictures: list[tuple[Any, tuple[int, int], str]] = []

    def paint_map(axes: Axes) -> None:
        base = shown.image_HWC
        _show(axes, colours(map_HW, top) if base is None else overlay(base, map_HW, top), view_size)
        _mark_queries(axes, shown)

    if shown.image_HWC is not None:
        image_HWC = shown.image_HWC

        def paint_view(axes: Axes) -> None:
            _show(axes, image_HWC, view_size)
            _mark_queries(axes, shown)

        pictures.append((paint_view, view_size, "the stored view"))
    pictures.append((paint_map, view_size, name))
    if shown.clean_HWC is not None and shown.placement is not None:
        clean_HWC, placement = shown.clean_HWC, shown.placement
        size = placement.source_width, placement.source_height

        def paint_clean(axes: Axes) -> None:
            _show(axes, clean_HWC, size)
            _outline(axes, placement.outline_42)

        def paint_back(axes: Axes) -> None:
            back_HW = carry_back(map_HW, placement, (clean_HWC.shape[0], clean_HWC.shape[1]))
            _show(axes, overlay(clean_HWC, back_HW, top), size)
            _outline(axes, placement.outline_42)
            _mark_queries(axes, shown, in_source=True)

        pictures.append((paint_clean, size, "the clean image, with the view's box"))
        pictures.append((paint_back, size, "carried back to the clean image"))
    return pictures


def _show(axes: Axes, picture_HWC: np.ndarray, size: tuple[int, int]) -> None:
    axes.imshow(picture_HWC, extent=(0, size[0], size[1], 0), interpolation="nearest", aspect="auto")


def _outline(axes: Axes, corners_42: np.ndarray) -> None:
    """A box that is seen on light and dark ground."""
    from matplotlib.patches import Polygon

    for width, colour in ((3.2, "black"), (1.6, "white")):
        axes.add_patch(Polygon(corners_42, closed=True, fill=False, edgecolor=colour, linewidth=width, clip_on=False))


def _mark_queries(axes: Axes, shown: Shown, *, in_source: bool = False) -> None:
    """A box around each patch that is a query."""
    grid_height, grid_width = shown.maps_LHhw.shape[2:]
    for row, column in shown.patches:
        corners_42 = np.array([[column, row], [column + 1, row], [column + 1, row + 1], [column, row + 1]], float)
        corners_42 *= [shown.view_width / grid_width, shown.view_height / grid_height]
        if in_source and shown.placement is not None:
            corners_42 = shown.placement.to_source(corners_42)
        _outline(axes, corners_42)


def _draw_bar(page: _Page, scaled: _Scale, height: float) -> None:
    axes = page.axes(_WIDTH + _MARGIN, page.at, 0.18, height * 0.62)
    axes.imshow(np.linspace(1, 0, 256)[:, None], cmap=COLOURS, extent=(0, 1, 0, 1), aspect="auto")
    axes.yaxis.tick_right()
    labels = [f"{share * scaled.top:.3g}" for share in (0, 0.5, 1)] if scaled.is_one else ["0", "", "top"]
    axes.set_yticks([0, 0.5, 1], labels, size=8)
    if scaled.clips:
        axes.plot([0, 0.5, 1], [1.02, 1.09, 1.02], color=np.array(ABOVE) / 255, clip_on=False)
        axes.fill([0, 0.5, 1], [1.02, 1.09, 1.02], color=np.array(ABOVE) / 255, clip_on=False)
        axes.set_ylim(0, 1)
    for number, line in enumerate(scaled.lines()):
        place = ((_WIDTH + _MARGIN) / page.width, 1 - (page.at + height * 0.66 + number * 0.145) / page.height)
        page.figure.text(*place, line, size=7.5, color=_FAINT, va="top", parse_math=False)


def _draw_apart(
    page: _Page, shown: Shown, scaled: _Scale, rows_columns: tuple[int, int], tile: tuple[float, float]
) -> None:
    """Each map by itself, over the view."""
    maps_NHW = shown.maps_LHhw.reshape(-1, *shown.maps_LHhw.shape[2:])
    names = [f"head {head}" for head in shown.heads] if len(shown.layers) == 1 else [f"layer {n}" for n in shown.layers]
    for number, (map_HW, name, mass) in enumerate(zip(maps_NHW, names, shown.prefix_mass_LH.ravel(), strict=True)):
        row, column = divmod(number, rows_columns[1])
        place = (_MARGIN + column * tile[0], page.at + row * tile[1] + _TITLE)
        axes = page.axes(*place, tile[0] - _MARGIN, tile[1] - _TITLE - _MARGIN * shown.view_height / shown.view_width)
        top = scaled.top_of(map_HW)
        picture = colours(map_HW, top) if shown.image_HWC is None else overlay(shown.image_HWC, map_HW, top)
        _show(axes, picture, (shown.view_width, shown.view_height))
        _mark_queries(axes, shown)
        axes.set_xlim(0, shown.view_width)
        axes.set_ylim(shown.view_height, 0)
        prefix = f" · prefix {mass:.0%}" if mass >= 0.005 else ""
        axes.set_title(f"{name}{prefix}", size=8, color=_INK, loc="left", pad=3)


def _draw_wall(
    page: _Page, shown: Shown, scaled: _Scale, rows_columns: tuple[int, int], tile: tuple[float, float]
) -> None:
    """All maps as one picture, with the numbers of layers and heads at its sides."""
    num_rows, num_columns = rows_columns
    maps_LHhw = shown.maps_LHhw
    if not scaled.is_one:
        tops_LH = [[scaled.top_of(map_HW) for map_HW in maps_HHW] for maps_HHW in maps_LHhw]
        maps_LHhw = maps_LHhw / np.array(tops_LH)[:, :, None, None]
    layers_across = len(shown.layers) > len(shown.heads)
    maps_RChw = maps_LHhw.swapaxes(0, 1) if layers_across else maps_LHhw
    grid_height, grid_width = maps_RChw.shape[2:]
    joined = wall(maps_RChw)
    left = 5 * _MARGIN
    axes = page.axes(left, page.at + _TITLE, num_columns * tile[0], num_rows * tile[1])
    height, width = joined.shape
    _show(axes, colours(joined, scaled.top if scaled.is_one else 1.0), (width, height))
    x_C, y_R = np.arange(num_columns) * (grid_width + 1), np.arange(num_rows) * (grid_height + 1)
    for row, column in shown.patches:
        x_RC, y_RC = np.broadcast_arrays(x_C[None] + column + 0.5, y_R[:, None] + row + 0.5)
        axes.scatter(x_RC, y_RC, s=7, facecolors="none", edgecolors="white", linewidths=0.7)
    axes.set_xlim(0, width)
    axes.set_ylim(height, 0)
    axes.tick_params(length=0, colors=_INK)
    axes.xaxis.tick_top()
    layers, heads = [f"layer {layer}" for layer in shown.layers], [f"head {head}" for head in shown.heads]
    across, down = (layers, heads) if layers_across else (heads, layers)
    axes.set_xticks(x_C + grid_width / 2, across, size=8 if num_columns <= 14 else 6)
    axes.set_yticks(y_R + grid_height / 2, down, size=8)


def _main_name(shown: Shown) -> str:
    first, *others = shown.heads
    return f"layer {shown.layers[-1]}, {'mean of the heads' if others else _head(first)}"


def _named(shown: Shown) -> str:
    layers = f"layer {shown.layers[-1]}" if len(shown.layers) == 1 else f"{len(shown.layers)} layers"
    first, *others = shown.heads
    return f"{layers}, {f'{1 + len(others)} heads' if others else _head(first)}"


def _head(name: str) -> str:
    return f"{name} of the heads" if name in ("mean", "max") else f"head {name}"


def _queries(shown: Shown) -> str:
    names = {"all": "all tokens (their mean)", "cls": "CLS"}
    told = [names.get(name, f"patch {name}" if "," in name else name) for name in shown.queries]
    return "mean of " * (len(told) > 1) + ", ".join(told)


def _shortened(text: str, most: int) -> str:
    kept = plain(text)
    return kept if len(kept) <= most else kept[: most - 3] + "..."
