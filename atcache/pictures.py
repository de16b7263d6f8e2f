"""Pictures of maps, as arrays: over a view, carried back to the source image, side by side, and for training logs.

All functions take and give numpy arrays. A map here is what one query attends to: one value a patch, (grid height, grid
width), of any grid. Attention to prefix tokens has no place in an image; `stats.prefix_mass` says how much it is.

Example:
    cache = atcache.open("in1k.zarr")
    view, tokens = cache.view(sample=3), cache.geometry.tokens
    maps_LHhw = atcache.pictures.query_maps(view.maps_LHQK, tokens, ["cls"])
    top = atcache.pictures.top_of_scale(maps_LHhw)
    picture = atcache.pictures.overlay(view.image, maps_LHhw[-1].mean(axis=0), top)  # uint8 (height, width, 3)
    placement = atcache.pictures.placement(cache, sample=3)
    back = atcache.pictures.carry_back(maps_LHhw[-1, 0], placement)  # of the source image's size, NaN outside the view
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache as cached
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from atcache.attention.tokens import TokenLayout
from atcache.errors import AttentionShapeError, ConfigError
from atcache.stats import patch_grid

if TYPE_CHECKING:
    from atcache.images.source import Source
    from atcache.store.reader import CacheReader
    from atcache.views.placement import Placement
    from atcache.views.policy import ViewPolicy

COLOURS = "inferno"
"""matplotlib's name of the colours, from 0 to the top of the scale."""
ABOVE = (0, 229, 255)
"""The colour of values above the top of the scale: none of `COLOURS`, so that clipped ones are seen as such."""
CAVEAT = (
    "Attention says where a layer reads from, not why the model decides as it does: a patch can be attended to and "
    "change nothing, or matter through other layers."
)
"""What maps do not prove; stands below each figure."""

_GREY_LEVEL = 0.85  # of the image below a map: darker, so that the colours are seen
_ROWS_AT_ONCE = 256  # of a carried map: bounds the memory for its points


class WithImages(Protocol):
    """What `placement` needs of an opened cache."""

    @property
    def reader(self) -> CacheReader: ...
    @property
    def policy(self) -> ViewPolicy: ...
    @property
    def source(self) -> Source: ...


def default_query(tokens: TokenLayout) -> str:
    """The query that is shown if none is named: the class token, or the mean of all without one."""
    return "cls" if tokens.num_prefix_tokens else "all"


def query_tokens(names: Sequence[str], tokens: TokenLayout, num_queries: int | None = None) -> list[int]:
    """The tokens that queries name, in the order of the names.

    Args:
        names: of each query: "cls", "regN" (a register, from 0), "ROW,COLUMN" (a patch, from 0 at the top left), "N" (a
            token by its position), or "all".
        tokens: prefix tokens and patch grid.
        num_queries: of how many first tokens there are rows; None for all.

    Raises:
        ConfigError: there is no such token, or its row is not stored.

    >>> query_tokens(["cls", "reg0", "0,2"], TokenLayout(num_prefix_tokens=2, grid_height=2, grid_width=3))
    [0, 1, 4]
    """
    num_rows = tokens.num_tokens if num_queries is None else num_queries
    found: list[int] = []
    for name in names:
        chosen = list(range(num_rows)) if name == "all" else [_query_token(name, tokens)]
        if chosen[0] >= num_rows:
            raise ConfigError(
                f"query {name!r}: the cache has the rows of the first {num_rows} tokens only, and this is token "
                f"{chosen[0]}. Choose one of these, or build a cache with --queries all."
            )
        found += chosen
    return found


def _query_token(name: str, tokens: TokenLayout) -> int:
    prefix, height, width = tokens.num_prefix_tokens, tokens.grid_height, tokens.grid_width
    if (match := re.fullmatch(r"(\d{1,7}),(\d{1,7})", name)) is not None:
        row, column = int(match[1]), int(match[2])
        if row < height and column < width:
            return prefix + row * width + column
    elif re.fullmatch(r"\d{1,7}", name) is not None and int(name) < tokens.num_tokens:
        return int(name)
    elif name == "cls" and prefix:
        return 0
    elif re.fullmatch(r"reg\d{1,7}", name) is not None and 1 + int(name[3:]) < prefix:
        return 1 + int(name[3:])
    special = ["cls"] * (prefix > 0) + ["reg0"] * (prefix == 2) + [f"reg0 to reg{prefix - 2}"] * (prefix > 2)
    raise ConfigError(
        f"query {name!r}: expected {', '.join([*special, 'all'])}, a patch as ROW,COLUMN from 0,0 to {height - 1},"
        f"{width - 1}, or the number of a token below {tokens.num_tokens}."
    )


def query_maps(attn_QK: np.ndarray, tokens: TokenLayout, names: Sequence[str]) -> np.ndarray:
    """What queries attend to, as maps over the patches: their mean, if there are several.

    Args:
        attn_QK: maps, shape (..., query, key), with the rows of all tokens or of the first ones.
        tokens: prefix tokens and patch grid.
        names: the queries, as in `query_tokens`.

    Returns:
        Shape (..., grid height, grid width). A map's sum is 1 less what goes to prefix tokens.
    """
    rows = query_tokens(names, tokens, attn_QK.shape[-2])
    grids: Any = patch_grid(attn_QK[..., rows, :].mean(axis=-2, keepdims=True), tokens)
    return grids[..., 0, :, :]


def top_of_scale(maps: np.ndarray, clip: float = 1.0) -> float:
    """The value that gets the last colour: the quantile `clip` of all values, NaN left out.

    A few tokens (sinks) often get far more than all others; 0.995 leaves them out of the scale. `ABOVE` marks them.

    Args:
        maps: any shape.
        clip: in (0, 1]; 1 is the largest value.
    """
    values = maps[np.isfinite(maps)]
    top = float(np.quantile(values, clip)) if values.size else 0.0
    return top if top > 0 else max(float(values.max(initial=0.0)), float(np.finfo(np.float32).tiny))


@cached
def _palette() -> np.ndarray:
    """256 colours, uint8 (256, 3)."""
    import matplotlib

    return np.round(matplotlib.colormaps[COLOURS](np.linspace(0, 1, 256))[:, :3] * 255).astype(np.uint8)


def colours(maps: np.ndarray, top: float) -> np.ndarray:
    """The colours of values from 0 to `top`: uint8 (..., 3). Above it `ABOVE`, for NaN white."""
    level = np.clip(np.nan_to_num(maps / top, nan=0.0), 0, 1)
    painted = _palette()[np.round(level * 255).astype(np.uint8)]
    painted[maps > top * (1 + 1e-6)] = ABOVE
    painted[~np.isfinite(maps)] = 255
    return painted


def overlay(image_HWC: np.ndarray, map_HW: np.ndarray, top: float) -> np.ndarray:
    """An image in grey below a map in colours, uint8 (height, width, 3).

    Each patch is a box of one colour: nothing is smoothed. Low values let the image through, high ones cover it.

    Args:
        image_HWC: uint8 (height, width, 3): a view, or a source image.
        map_HW: the map, of any grid; it covers the whole image. NaN leaves the image grey.
        top: the value of the last colour, as from `top_of_scale`.
    """
    _check_image(image_HWC)
    height, width = image_HWC.shape[:2]
    values_HW = map_HW[_cells(height, map_HW.shape[0])][:, _cells(width, map_HW.shape[1])]
    grey_HW1 = image_HWC.astype(np.float32).mean(axis=-1, keepdims=True) * _GREY_LEVEL
    level_HW = np.clip(np.nan_to_num(values_HW / top, nan=0.0), 0, 1)
    share_HW1 = np.where(np.isfinite(values_HW), 0.2 + 0.7 * level_HW, 0)[..., None]
    blended_HWC: np.ndarray = grey_HW1 * (1 - share_HW1) + colours(values_HW, top) * share_HW1
    return np.round(blended_HWC).astype(np.uint8)


def _cells(num_pixels: int, num_cells: int) -> np.ndarray:
    """The cell that each pixel's centre lies in."""
    return (2 * np.arange(num_pixels) + 1) * num_cells // (2 * num_pixels)


def _check_image(image_HWC: np.ndarray) -> None:
    if image_HWC.ndim != 3 or image_HWC.shape[2] != 3 or image_HWC.dtype != np.uint8:
        raise AttentionShapeError(
            f"an image of shape {image_HWC.shape} and type {image_HWC.dtype}: expected uint8 (height, width, 3)."
        )


def placement(cache: WithImages, sample: int, view: int = 0) -> Placement:
    """Where the source image of a sample is in one of its views; reads the image's header from its tar.

    Args:
        cache: an opened cache.
        sample: its row.
        view: which of its views.

    Raises:
        SourceError: the tars are not where they were; open the cache with `data=`.
        CorruptCacheError: the stored parameters do not fit the image.
    """
    from atcache.views.placement import Placement

    encoded = cache.source.read_encoded(sample)
    return Placement.of(cache.policy, cache.reader.parameters(view, sample), encoded.height, encoded.width)


def carry_back(map_HW: np.ndarray, placement: Placement, size: tuple[int, int] | None = None) -> np.ndarray:
    """A view's map in the coordinates of the source image, through window, crop, flip and RandAugment's movements.

    Args:
        map_HW: one value a patch; the grid covers the view.
        placement: where the source image is in the view.
        size: height and width of the result, if the source image is shown at another size; None for its own.

    Returns:
        float32 (height, width): each pixel has the value of the patch that its centre lies in. NaN where the view does
        not show the sample: outside its crop, where it was erased, and where CutMix pasted another sample.
    """
    height, width = size or (placement.source_height, placement.source_width)
    grid_height, grid_width = map_HW.shape
    x_W = (np.arange(width) + 0.5) * (placement.source_width / width)
    back_HW = np.full((height, width), np.nan, np.float32)
    for start in range(0, height, _ROWS_AT_ONCE):
        rows = np.arange(start, min(start + _ROWS_AT_ONCE, height))
        y_R = (rows + 0.5) * (placement.source_height / height)
        points_RW2 = placement.to_view(np.stack(np.broadcast_arrays(x_W[None, :], y_R[:, None]), axis=-1))
        seen_RW = np.isfinite(points_RW2[..., 0])
        points_N2 = points_RW2[seen_RW]
        column_N = np.minimum((points_N2[:, 0] * grid_width / placement.view_width).astype(int), grid_width - 1)
        row_N = np.minimum((points_N2[:, 1] * grid_height / placement.view_height).astype(int), grid_height - 1)
        back_HW[start : start + len(rows)][seen_RW] = map_HW[row_N, column_N]
    return back_HW


def wall(maps_RCHW: np.ndarray, gap: int = 1) -> np.ndarray:
    """Many maps side by side in one array, (height, width), with NaN between them.

    Args:
        maps_RCHW: shape (row, column, grid height, grid width), such as layer x head.
        gap: cells between two maps.

    >>> wall(np.arange(8.0).reshape(2, 2, 1, 2), gap=0)
    array([[0., 1., 2., 3.],
           [4., 5., 6., 7.]])
    """
    num_rows, num_columns, height, width = maps_RCHW.shape
    tiles = np.full((num_rows, height + gap, num_columns, width + gap), np.nan, maps_RCHW.dtype)
    tiles[:, :height, :, :width] = maps_RCHW.transpose(0, 2, 1, 3)
    joined = tiles.reshape(num_rows * (height + gap), num_columns * (width + gap))
    return joined[: joined.shape[0] - gap, : joined.shape[1] - gap]


def images_for_log(
    images_BHWC: np.ndarray,
    tokens: TokenLayout,
    *,
    rows: Sequence[tuple[str, np.ndarray]],
    query: str | None = None,
    side: int = 64,
) -> np.ndarray:
    """A picture of each image beside rows of its maps, for TensorBoard or W&B: uint8 (image, height, width, 3).

    All maps of a picture have one scale, which ends at the quantile 0.995.

    Args:
        images_BHWC: the views, uint8 (image, height, width, 3).
        tokens: prefix tokens and patch grid.
        rows: name and maps of each row, such as ("layer 5 teacher", maps) above ("layer 5 student", maps): maps have
            shape (image, head, query, key); rows may differ in heads.
        query: as in `query_tokens`; None for the class token, or for the mean of all tokens without one.
        side: size of a map in the picture, in pixels.

    Example:
        view = cache.view(sample=3)
        pictures = atcache.pictures.images_for_log(
            view.image[None], cache.geometry.tokens, rows=[("teacher, last layer", view.maps_LHQK[None, -1])]
        )
        wandb.log({"maps": [wandb.Image(picture) for picture in pictures]})
    """
    names = [default_query(tokens) if query is None else query]
    maps = [(name, query_maps(attn_BHQK, tokens, names)) for name, attn_BHQK in rows]
    return np.stack(
        [
            _logged(image_HWC, [(name, of[number]) for name, of in maps], side)
            for number, image_HWC in enumerate(images_BHWC)
        ]
    )


def _logged(image_HWC: np.ndarray, rows: Sequence[tuple[str, np.ndarray]], side: int) -> np.ndarray:
    """One picture of `images_for_log`; the maps of each row have shape (head, grid height, grid width)."""
    from PIL import Image, ImageDraw

    text_height, gap = 14, 3
    row_height = text_height + side + gap
    most_heads = max(len(maps_HHW) for _, maps_HHW in rows)
    top = top_of_scale(np.concatenate([maps_HHW.ravel() for _, maps_HHW in rows]), 0.995)
    picture_height = max(len(rows) * row_height, side)
    shown = Image.fromarray(image_HWC)
    left = min(picture_height, 3 * side)
    shown = shown.resize((left, max(1, min(picture_height, round(left * shown.height / shown.width)))))
    picture = Image.new("RGB", (left + gap + most_heads * (side + gap), picture_height), "white")
    picture.paste(shown, (0, 0))
    draw = ImageDraw.Draw(picture)
    for number, (name, maps_HHW) in enumerate(rows):
        draw.text((left + 2 * gap, number * row_height), name, fill="black")
        for head, map_HW in enumerate(maps_HHW):
            tile = Image.fromarray(colours(map_HW, top)).resize((side, side), Image.Resampling.NEAREST)
            picture.paste(tile, (left + 2 * gap + head * (side + gap) - gap, number * row_height + text_height))
    return np.asarray(picture)
