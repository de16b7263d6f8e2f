"""Maps on another patch grid: what a reader would compute by hand, and what must not change."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import atcache
from atcache.attention.tokens import TokenLayout
from atcache.errors import AttentionShapeError


def made_maps(tokens: TokenLayout, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    shape = (2, 3, tokens.num_tokens, tokens.num_tokens)
    return torch.softmax(4 * torch.randn(shape, generator=generator), dim=-1)


def test_on_the_same_grid_the_maps_between_patches_stay():
    tokens = TokenLayout(num_prefix_tokens=2, grid_height=3, grid_width=4)
    attn_BHQK = made_maps(tokens)
    patches = attn_BHQK[..., 2:, 2:]
    torch.testing.assert_close(
        atcache.regrid_maps(attn_BHQK, tokens, (3, 4)), patches / patches.sum(dim=-1, keepdim=True)
    )


def test_a_grid_of_half_the_size_averages_queries_and_adds_keys():
    tokens = TokenLayout(num_prefix_tokens=0, grid_height=4, grid_width=6)
    attn_BHQK = made_maps(tokens)
    # The slow way: pool the queries' axes, then the keys', as images.
    rows = attn_BHQK.view(2, 3, 4, 6, 24).permute(0, 1, 4, 2, 3).flatten(0, 1)
    queries = F.avg_pool2d(rows, 2).view(2, 3, 24, 6).permute(0, 1, 3, 2)
    keys = F.avg_pool2d(queries.reshape(2, 18, 4, 6), 2).view(2, 3, 6, 6) * 4
    torch.testing.assert_close(atcache.regrid_maps(attn_BHQK, tokens, (2, 3)), keys)


@pytest.mark.parametrize("grid", [(7, 5), (1, 1), (16, 16), (3, 8)])
def test_rows_stay_distributions_and_uniform_maps_stay_uniform_in_area(grid):
    tokens = TokenLayout(num_prefix_tokens=1, grid_height=6, grid_width=4)
    found = atcache.regrid_maps(made_maps(tokens), tokens, grid)
    num_patches = grid[0] * grid[1]
    assert found.shape == (2, 3, num_patches, num_patches)
    torch.testing.assert_close(found.sum(-1), torch.ones(2, 3, num_patches))
    assert bool((found >= 0).all())
    uniform = torch.full((1, 1, 25, 25), 1 / 25)
    regridded = atcache.regrid_maps(uniform, tokens, grid)
    torch.testing.assert_close(regridded, torch.full_like(regridded, 1 / num_patches))


def test_mass_stays_where_it_is_in_the_image():
    # Every query looks at the patch in the lower right corner, which covers a quarter of the new patch there.
    tokens = TokenLayout(num_prefix_tokens=0, grid_height=4, grid_width=4)
    attn_BHQK = torch.zeros(1, 1, 16, 16)
    attn_BHQK[..., 15] = 1
    assert atcache.regrid_maps(attn_BHQK, tokens, (2, 2))[0, 0].argmax(-1).tolist() == [3, 3, 3, 3]
    (row,) = atcache.regrid_maps(attn_BHQK, tokens, (3, 3))[0, 0, :1]
    assert row.argmax().item() == 8
    assert row[8].item() == pytest.approx(1.0)  # the new corner is larger than the old, and covers all of it


def test_the_type_is_kept_and_wrong_shapes_are_refused():
    tokens = TokenLayout(num_prefix_tokens=1, grid_height=2, grid_width=2)
    assert atcache.regrid_maps(made_maps(tokens).bfloat16(), tokens, (1, 2)).dtype == torch.bfloat16
    with pytest.raises(AttentionShapeError, match=r"maps of shape .*: expected \(..., 5, 5\)"):
        atcache.regrid_maps(torch.ones(4, 4), tokens, (2, 2))
    with pytest.raises(AttentionShapeError, match=r"grid=\(0, 2\)"):
        atcache.regrid_maps(torch.ones(5, 5), tokens, (0, 2))
