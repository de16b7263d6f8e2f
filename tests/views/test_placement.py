"""Where the source image is in a view, against the pixels that `apply_view` makes of an image of coordinates."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, strategies as st
from PIL import Image, ImageFilter

from atcache.errors import CorruptCacheError
from atcache.views.apply import apply_view
from atcache.views.draw import draw_view
from atcache.views.mixing import MixPolicy
from atcache.views.placement import Placement
from atcache.views.policy import PARAMETER_NAMES, ViewPolicy
from atcache.views.randaugment import OPERATIONS

HEIGHT, WIDTH = 180, 240  # of the source image; coordinates fit in a byte


def image_of_coordinates() -> Image.Image:
    """Red is the column, green the row; blue tells an image's pixel from a filled one."""
    rows, columns = np.mgrid[:HEIGHT, :WIDTH]
    return Image.fromarray(np.stack([columns, rows, np.full_like(rows, 255)], axis=-1).astype(np.uint8))


def parameters(**given_values) -> np.ndarray:
    plain = {"crop_height": HEIGHT, "crop_width": WIDTH, "operation_1": -1, "operation_2": -1}
    values = {**dict.fromkeys(PARAMETER_NAMES, 0), **plain, **given_values}
    return np.array([values[name] for name in PARAMETER_NAMES], np.float32)


def assert_points_are_where_their_pixels_are(policy, parameters_P):
    """Each view pixel shows the source pixel that the placement puts there, within a pixel."""
    pixels_HWC = apply_view(image_of_coordinates(), parameters_P, policy).astype(float)
    placement = Placement.of(policy, parameters_P, HEIGHT, WIDTH)
    step = 5  # source pixels between two points
    points = np.stack(np.meshgrid(np.arange(0, WIDTH, step), np.arange(0, HEIGHT, step)), axis=-1).reshape(-1, 2) + 0.5
    found_N2 = placement.to_view(points)
    seen_N = np.isfinite(found_N2[:, 0])
    assert np.allclose(placement.to_source(found_N2[seen_N]), points[seen_N])
    places_N2 = np.floor(found_N2[seen_N]).astype(int)
    shown_NC = pixels_HWC[places_N2[:, 1], places_N2[:, 0]]
    # A view pixel covers several source pixels where the crop is shrunk, and bicubic edges ring.
    crop = dict(zip(PARAMETER_NAMES, parameters_P.tolist(), strict=True))
    tolerance = 1.5 + max(crop["crop_width"] / crop["resize_width"], crop["crop_height"] / crop["resize_height"]) * 1.5
    # Pixels near the border of what was moved in are blends with the fill.
    blue = Image.fromarray(pixels_HWC[..., 2].astype(np.uint8)).filter(ImageFilter.MinFilter(5))
    inner_N = np.asarray(blue)[places_N2[:, 1], places_N2[:, 0]] == 255
    wrong_N = np.abs(shown_NC[:, :2] + 0.5 - points[seen_N]).max(axis=1) > tolerance
    assert not (wrong_N & inner_N).any(), (
        found_N2[seen_N][wrong_N & inner_N][:3],
        points[seen_N][wrong_N & inner_N][:3],
    )
    assert inner_N.sum() >= 0.6 * len(inner_N)
    return inner_N.sum()


@given(st.integers(0, 10**6))
def test_crops_and_flips_put_points_where_their_pixels_are(seed):
    policy = ViewPolicy(name="crop-flip", seed=seed, image_height=96, image_width=128, interpolation="bilinear")
    assert_points_are_where_their_pixels_are(policy, draw_view(policy, "a.tar/k", 0, HEIGHT, WIDTH))


@pytest.mark.parametrize("crop_pct", [0.875, 1.0])
def test_the_window_of_an_evaluation_is_in_the_middle(crop_pct):
    policy = ViewPolicy(name="eval", image_height=96, image_width=96, crop_pct=crop_pct, interpolation="bilinear")
    parameters_P = draw_view(policy, "a.tar/k", 0, HEIGHT, WIDTH)
    assert_points_are_where_their_pixels_are(policy, parameters_P)
    outline_42 = Placement.of(policy, parameters_P, HEIGHT, WIDTH).outline_42
    side = HEIGHT * crop_pct
    assert np.abs(outline_42.mean(axis=0) - [WIDTH / 2, HEIGHT / 2]).max() < 2
    assert np.abs(outline_42[2] - outline_42[0] - side).max() < 3


@pytest.mark.parametrize(
    ("name", "argument"),
    [
        ("Rotate", 20.0),
        ("Rotate", -27.0),
        ("ShearX", 0.3),
        ("ShearX", -0.2),
        ("ShearY", 0.25),
        ("TranslateXRel", 0.3),
        ("TranslateXRel", -0.4),
        ("TranslateYRel", -0.2),
    ],
)
@pytest.mark.parametrize("flip", [0, 1])
def test_what_randaugment_moves_is_followed(name, argument, flip):
    policy = ViewPolicy(name="randaug", image_height=90, image_width=120, interpolation="bilinear")
    crop = {"crop_top": 20, "crop_left": 30, "crop_height": 120, "crop_width": 160, "flip": flip}
    moved = {"operation_1": OPERATIONS.index(name), "argument_1": argument}
    parameters_P = parameters(**crop, resize_height=90, resize_width=120, **moved)
    assert_points_are_where_their_pixels_are(policy, parameters_P)
    second = {"operation_2": OPERATIONS.index("Rotate"), "argument_2": -10.0}
    assert_points_are_where_their_pixels_are(
        policy, parameters(**crop, resize_height=90, resize_width=120, **moved, **second)
    )


def test_what_one_operation_moves_out_does_not_come_back_with_the_next():
    policy = ViewPolicy(name="randaug", image_height=180, image_width=240)
    there, back = ("operation_1", "argument_1", 0.4), ("operation_2", "argument_2", -0.4)
    translate = OPERATIONS.index("TranslateXRel")
    moves = {name: value for op, arg, by in (there, back) for name, value in ((op, translate), (arg, by))}
    placement = Placement.of(policy, parameters(resize_height=180, resize_width=240, **moves), HEIGHT, WIDTH)
    # 0.4 of the width went out at the left, and the fill came back.
    assert np.isnan(placement.to_view(np.array([90.0, 50.0]))).all()
    assert np.allclose(placement.to_view(np.array([100.0, 50.0])), [100, 50])


def test_what_was_erased_or_pasted_is_not_seen():
    policy = ViewPolicy(name="randaug", image_height=180, image_width=240, mixing=MixPolicy(cutmix_alpha=1.0))
    own_P = parameters(resize_height=180, resize_width=240, erase_top=10, erase_left=20, erase_height=5, erase_width=8)
    box = [3, float(np.float32(1 - 40 * 50 / (180 * 240))), 100, 120, 40, 50]
    placement = Placement.of(policy, np.concatenate([own_P, np.array(box, np.float32)]), HEIGHT, WIDTH)
    rows, columns = np.mgrid[:HEIGHT, :WIDTH]
    seen_HW = np.isfinite(placement.to_view(np.stack([columns, rows], axis=-1) + 0.5)[..., 0])
    expected_HW = np.ones((HEIGHT, WIDTH), bool)
    expected_HW[10:15, 20:28] = expected_HW[100:140, 120:170] = False
    assert np.array_equal(seen_HW, expected_HW)
    assert placement.share == 1


def test_parameters_of_another_image_are_refused():
    policy = ViewPolicy(name="crop-flip", image_height=96, image_width=96)
    with pytest.raises(CorruptCacheError, match="do not fit an image of 240 x 100"):
        Placement.of(policy, parameters(resize_height=96, resize_width=96), 100, 240)
