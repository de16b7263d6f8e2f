"""Pictures of made maps with known answers: what looks left shows left, and a hot patch lands in its own pixels."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from atcache import pictures
from atcache.attention.tokens import TokenLayout
from atcache.errors import AttentionShapeError, ConfigError
from atcache.pictures import ABOVE, carry_back, colours, overlay, query_maps, query_tokens, top_of_scale, wall
from atcache.views.mixing import MixPolicy
from atcache.views.placement import Placement
from atcache.views.policy import PARAMETER_NAMES, ViewPolicy

TOKENS = TokenLayout(num_prefix_tokens=2, grid_height=3, grid_width=5)


def looks_left(tokens: TokenLayout) -> np.ndarray:
    """Maps (head, query, key): head 0 looks at the patch to the left, wrapping around; head 1 at the class token."""
    attn_HQK = np.zeros((2, tokens.num_tokens, tokens.num_tokens), np.float32)
    for query in range(tokens.num_tokens):
        patch = max(query - tokens.num_prefix_tokens, 0)
        row, column = divmod(patch, tokens.grid_width)
        left = row * tokens.grid_width + (column - 1) % tokens.grid_width
        attn_HQK[0, query, tokens.num_prefix_tokens + left] = 1
        attn_HQK[1, query, 0] = 1
    return attn_HQK


def test_a_head_that_looks_left_shows_left():
    maps_Hhw = query_maps(looks_left(TOKENS), TOKENS, ["1,3"])
    expected_hw = np.zeros((3, 5))
    expected_hw[1, 2] = 1
    assert np.array_equal(maps_Hhw, [expected_hw, np.zeros((3, 5))])
    image_HWC = np.full((30, 50, 3), 200, np.uint8)
    picture_HWC = overlay(image_HWC, maps_Hhw[0], top=1.0).astype(int)
    bright_HW = picture_HWC[..., 0] > picture_HWC[0, 0, 0] + 50
    rows, columns = np.nonzero(bright_HW)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (10, 19, 20, 29)
    assert bright_HW.sum() == 100


def test_several_queries_show_their_mean():
    maps_hw = query_maps(looks_left(TOKENS), TOKENS, ["1,3", "2,1"])[0]
    assert maps_hw[1, 2] == maps_hw[2, 0] == 0.5
    assert query_maps(looks_left(TOKENS), TOKENS, ["all"])[0].sum() == pytest.approx(1)


def parameters(policy: ViewPolicy, *, mix=(), **given) -> np.ndarray:
    values = {**dict.fromkeys(PARAMETER_NAMES, 0), "operation_1": -1, "operation_2": -1, **given}
    values |= {"resize_height": policy.image_height, "resize_width": policy.image_width}
    return np.array([*(values[name] for name in PARAMETER_NAMES), *mix], np.float32)


HEIGHT, WIDTH = 300, 400
CROP = {"crop_top": 37, "crop_left": 91, "crop_height": 143, "crop_width": 211}


def box_of_hot_patch(placement: Placement, row: int, column: int, grid=(4, 7)) -> tuple[int, int, int, int]:
    """First and last row and column of the source pixels to which one hot patch is carried back."""
    map_HW = np.zeros(grid)
    map_HW[row, column] = 1
    back_HW = carry_back(map_HW, placement)
    assert back_HW.shape == (placement.source_height, placement.source_width)
    rows, columns = np.nonzero(back_HW == 1)
    return rows.min(), rows.max(), columns.min(), columns.max()


@pytest.mark.parametrize("flip", [0, 1])
@pytest.mark.parametrize(("row", "column"), [(0, 0), (1, 2), (3, 6), (2, 5)])
def test_a_hot_patch_lands_in_its_own_pixels(flip, row, column):
    policy = ViewPolicy(name="crop-flip", image_height=64, image_width=112)
    placement = Placement.of(policy, parameters(policy, **CROP, flip=flip), HEIGHT, WIDTH)
    seen_column = 6 - column if flip else column
    top, left = 37 + row * 143 / 4, 91 + seen_column * 211 / 7
    expected = np.array([top, top + 143 / 4 - 1, left, left + 211 / 7 - 1])
    assert np.abs(np.array(box_of_hot_patch(placement, row, column)) - expected).max() <= 1
    seen_HW = np.isfinite(carry_back(np.zeros((4, 7)), placement))
    expected_HW = np.zeros((HEIGHT, WIDTH), bool)
    expected_HW[37 : 37 + 143, 91 : 91 + 211] = True
    assert np.array_equal(seen_HW, expected_HW)
    assert np.allclose(placement.outline_42, [[91, 37], [91 + 211, 37], [91 + 211, 37 + 143], [91, 37 + 143]])


def test_a_map_is_carried_back_to_a_smaller_picture_too():
    policy = ViewPolicy(name="crop-flip", image_height=64, image_width=112)
    placement = Placement.of(policy, parameters(policy, **CROP), HEIGHT, WIDTH)
    map_HW = np.arange(28.0).reshape(4, 7)
    small_HW, whole_HW = carry_back(map_HW, placement, (HEIGHT // 4, WIDTH // 4)), carry_back(map_HW, placement)
    assert small_HW.shape == (75, 100)
    # The centre of a small pixel is a corner of the whole image's pixels.
    differ_HW = (small_HW != whole_HW[2::4, 2::4]) & ~(np.isnan(small_HW) & np.isnan(whole_HW[2::4, 2::4]))
    assert differ_HW.mean() < 0.03


def test_only_the_samples_own_part_of_a_cutmix_view_is_carried_back():
    policy = ViewPolicy(name="crop-flip", image_height=64, image_width=112, mixing=MixPolicy(cutmix_alpha=1.0))
    box = (16, 32, 32, 48)  # rows 16 to 47 and columns 32 to 79 of the view: patches 1 to 2, and 2 to 4
    mix = (5, np.float32(1 - 32 * 48 / (64 * 112)), *box)
    for flip in (0, 1):
        placement = Placement.of(policy, parameters(policy, **CROP, flip=flip, mix=mix), HEIGHT, WIDTH)
        map_HW = np.zeros((4, 7))
        map_HW[1:3, 2:5] = 1
        back_HW = carry_back(map_HW, placement)
        assert not (back_HW == 1).any(), "what is attended to there is the other sample"
        hidden = np.isnan(back_HW[37 : 37 + 143, 91 : 91 + 211])
        assert hidden.mean() == pytest.approx(32 * 48 / (64 * 112), abs=0.01)
        columns = np.flatnonzero(hidden.any(axis=0))
        left = 211 * (1 - (32 + 48) / 112) if flip else 211 * 32 / 112
        assert abs(columns.min() - left) <= 1


def test_mixup_shows_the_sample_everywhere_and_tells_its_share():
    policy = ViewPolicy(name="crop-flip", image_height=64, image_width=112, mixing=MixPolicy(mixup_alpha=0.8))
    mix = (5, 0.75, 0, 0, 0, 0)
    placement = Placement.of(policy, parameters(policy, **CROP, mix=mix), HEIGHT, WIDTH)
    assert placement.share == 0.75
    assert np.isfinite(carry_back(np.ones((4, 7)), placement)).sum() == 143 * 211


def test_the_scale_ends_at_a_quantile_and_marks_what_is_above():
    maps_hw = np.append(np.linspace(0, 1, 99), 50).reshape(10, 10)
    assert top_of_scale(maps_hw) == 50
    top = top_of_scale(maps_hw, 0.99)
    assert 0.9 < top < 2
    painted_hwC = colours(maps_hw, top)
    assert (painted_hwC == ABOVE).all(axis=-1).sum() == 1
    assert (painted_hwC[-1, -1] == ABOVE).all()
    assert not (colours(maps_hw, 50) == ABOVE).all(axis=-1).any()


def test_maps_of_zeros_or_nan_have_a_scale_and_colours():
    for value in (0.0, np.nan):
        maps_hw = np.full((2, 2), value)
        top = top_of_scale(maps_hw, 0.995)
        assert top > 0
        assert colours(maps_hw, top).shape == (2, 2, 3)


def test_a_map_that_is_mostly_zero_still_has_a_scale():
    maps_hw = np.zeros((100, 100))
    maps_hw[0, 0] = 0.5
    assert top_of_scale(maps_hw, 0.99) == 0.5


def test_where_there_is_no_map_the_image_stays_grey():
    image_HWC = np.zeros((4, 4, 3), np.uint8)
    image_HWC[..., 1] = 255
    map_HW = np.full((2, 2), np.nan)
    map_HW[0, 0] = 1
    picture_HWC = overlay(image_HWC, map_HW, 1.0)
    assert (picture_HWC[2:] == picture_HWC[3, 3, 0]).all()
    assert not (picture_HWC[:2, :2] == picture_HWC[3, 3, 0]).any()


def test_a_wall_has_each_map_in_its_place():
    maps_RCHW = np.arange(2 * 3 * 2 * 2.0).reshape(2, 3, 2, 2)
    walled = wall(maps_RCHW)
    assert walled.shape == (2 * 2 + 1, 3 * 2 + 2)
    for row, column in np.ndindex(2, 3):
        assert np.array_equal(walled[row * 3 : row * 3 + 2, column * 3 : column * 3 + 2], maps_RCHW[row, column])
    assert np.isnan(walled).sum() == walled.size - maps_RCHW.size


def test_queries_are_named_by_token_register_or_patch():
    assert query_tokens(["cls", "reg0", "0,0", "2,4", "5"], TOKENS) == [0, 1, 2, 16, 5]
    assert query_tokens(["all"], TOKENS, num_queries=2) == [0, 1]


@pytest.mark.parametrize("name", ["3,0", "0,5", "-1,0", "reg1", "17", "CLS", "", "1,2,3", "²,1", "9999999999"])
def test_a_query_that_is_none_is_refused_with_those_there_are(name):
    expected = "cls, reg0, all, a patch as ROW,COLUMN from 0,0 to 2,4, or the number of a token below 17"
    with pytest.raises(ConfigError, match=expected):
        query_tokens([name], TOKENS)


def test_a_row_that_is_not_stored_is_refused():
    with pytest.raises(ConfigError, match="rows of the first 2 tokens only, and this is token 2"):
        query_tokens(["0,0"], TOKENS, num_queries=2)


def test_pictures_for_a_log_have_the_view_beside_rows_of_maps():
    attn_HQK = looks_left(TOKENS)
    images_BHWC = np.random.default_rng(0).integers(0, 256, (2, 24, 40, 3)).astype(np.uint8)
    rows = [("teacher", np.stack([attn_HQK] * 2)), ("student", np.stack([attn_HQK[:1]] * 2))]
    logged_BHWC = pictures.images_for_log(images_BHWC, TOKENS, rows=rows, query="1,3", side=30)
    assert logged_BHWC.dtype == np.uint8
    assert logged_BHWC.shape[0] == 2
    assert logged_BHWC.shape[3] == 3
    # The view is at the left of its picture, three maps wide, in its own shape.
    for image_HWC, logged_HWC in zip(images_BHWC, logged_BHWC, strict=True):
        shown_HWC = np.asarray(Image.fromarray(image_HWC).resize((90, 54)))
        assert np.array_equal(logged_HWC[:54, :90], shown_HWC)


def test_a_change_of_one_row_of_maps_changes_that_row_of_one_picture():
    attn_BHQK = np.stack([looks_left(TOKENS)] * 2)
    images_BHWC = np.full((2, 24, 40, 3), 90, np.uint8)
    changed_BHQK = attn_BHQK.copy()
    changed_BHQK[1, 0] = np.roll(changed_BHQK[1, 0], 1, axis=-1)  # the first head of the second picture
    before, after = (
        pictures.images_for_log(
            images_BHWC, TOKENS, rows=[("teacher", attn_BHQK), ("student", student_BHQK)], query="1,3", side=30
        )
        for student_BHQK in (attn_BHQK, changed_BHQK)
    )
    pictures_B, rows_H, columns_W = np.nonzero((before != after).any(axis=-1))
    assert set(pictures_B) == {1}
    # A row is a line of text of 14 pixels, maps of 30 and a gap of 3. The maps begin 3 pixels right of the view.
    assert (rows_H.min() >= 47 + 14, rows_H.max() < 47 + 14 + 30) == (True, True)
    assert (columns_W.min() >= 90 + 3, columns_W.max() < 90 + 3 + 30) == (True, True)


def test_an_image_of_floats_is_refused():
    with pytest.raises(AttentionShapeError, match=r"type float64: expected uint8 \(height, width, 3\)"):
        overlay(np.zeros((2, 2, 3)), np.zeros((1, 1)), 1.0)
