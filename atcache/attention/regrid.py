"""Maps on another patch grid, as targets for students whose grid is not the teacher's."""

from __future__ import annotations

import torch
from torch import Tensor

from atcache.attention.tokens import TokenLayout
from atcache.errors import AttentionShapeError


def regrid_maps(attn_BHQK: Tensor, tokens: TokenLayout, grid: tuple[int, int]) -> Tensor:
    """A teacher's maps between the patches of another grid, which covers the same image.

    A patch of the new grid attends as the old patches that it covers do on average, weighted by area. What an old patch
    receives is spread over the new patches that cover it, by area too. Attention to and from tokens that are no
    patches (class token, registers) is left out, and rows are made to sum to 1 again. On the teacher's own grid these
    are its maps between patches.

    Args:
        attn_BHQK: maps, shape (..., query, key), any float dtype.
        tokens: the maps' tokens: `cache.geometry.tokens`.
        grid: rows and columns of the new grid, such as (7, 7) for the last features of a ResNet at 224 pixels.

    Returns:
        attn_BHQK of the same dtype, shape (..., rows * columns, rows * columns), patches row by row.

    Raises:
        AttentionShapeError: the maps do not have these tokens, or the grid is empty.

    Example:
        tokens = atcache.open("in1k.zarr").geometry.tokens
        batch = next(iter(atcache.batches("in1k.zarr", batch_size=8)))
        target = atcache.regrid_maps(batch.attention.layer(1).maps(), tokens, (2, 2))
        target.shape  # (8, head, 4, 4)
    """
    if tuple(attn_BHQK.shape[-2:]) != (tokens.num_tokens, tokens.num_tokens):
        raise AttentionShapeError(
            f"maps of shape {tuple(attn_BHQK.shape)}: expected (..., {tokens.num_tokens}, {tokens.num_tokens}) for "
            f"{tokens.num_prefix_tokens} prefix tokens and {tokens.grid_height} x {tokens.grid_width} patches."
        )
    if min(grid) < 1:
        raise AttentionShapeError(f"grid={grid}: expected at least one row and one column.")
    start = tokens.num_prefix_tokens
    # In float32, since the sums of bfloat16 products are coarse.
    patches_BHQK = attn_BHQK[..., start:, start:].float()
    shares = (_shares(old, new) for old, new in zip((tokens.grid_height, tokens.grid_width), grid, strict=True))
    shares_GP = torch.kron(*shares).to(patches_BHQK.device)  # G: patches of the new grid, P: of the old
    mean_GP = shares_GP / shares_GP.sum(dim=1, keepdim=True)
    rows_BHGK = mean_GP @ patches_BHQK @ shares_GP.mT
    return (rows_BHGK / rows_BHGK.sum(dim=-1, keepdim=True).clamp_min(1e-30)).to(attn_BHQK.dtype)


def _shares(num_old: int, num_new: int) -> Tensor:
    """The share of each of `num_old` equal parts of a line that each of `num_new` equal parts covers: (new, old)."""
    # In units of 1 / (num_old * num_new), all edges are whole numbers, so the shares are exact.
    new_edges, old_edges = torch.arange(num_new + 1) * num_old, torch.arange(num_old + 1) * num_new
    stops = torch.minimum(new_edges[1:, None], old_edges[None, 1:])
    starts = torch.maximum(new_edges[:-1, None], old_edges[None, :-1])
    return (stops - starts).clamp_min(0).float() / num_new
