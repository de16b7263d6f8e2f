"""Views: drawn by key alone, stored exactly, replayed bit for bit, and equal to what timm and torchvision would do."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from PIL import Image

from atcache.errors import BadImageError, ConfigError, CorruptCacheError
from atcache.views.apply import apply_view, library_versions, pixel_hash
from atcache.views.draw import draw_view
from atcache.views.mixing import MIXING_NAMES, MixPolicy
from atcache.views.policy import INTERPOLATIONS, PARAMETER_NAMES, ViewPolicy
from atcache.views.randaugment import OPERATIONS, level_argument

POLICIES = ("eval", "crop-flip", "randaug")
P = {name: position for position, name in enumerate(PARAMETER_NAMES)}


def policy(name: str = "randaug", height: int = 24, width: int = 24, **fields) -> ViewPolicy:
    return ViewPolicy(name=name, image_height=height, image_width=width, **fields)


def picture(height: int, width: int) -> Image.Image:
    """Smooth colours with some noise, so that both resizing and enhancing change something."""
    y, x = np.mgrid[0:height, 0:width]
    waves = np.stack([np.sin(x / 7), np.cos(y / 5), np.sin((x + y) / 9)], axis=-1) * 100 + 128
    noise = np.random.default_rng(0).normal(0, 12, waves.shape)
    return Image.fromarray(np.clip(waves + noise, 0, 255).astype(np.uint8))


# The same as timm


@pytest.mark.parametrize("size", [(224, 224), (224, 160), (96, 128), (1, 1)])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("crop_pct", [0.875, 0.9, 1.0])
def test_eval_views_equal_timms_evaluation_transform(size, interpolation, crop_pct):
    from timm.data import create_transform

    height, width = size
    transform = create_transform(
        (3, height, width), is_training=False, interpolation=interpolation, crop_pct=crop_pct, normalize=False
    )
    ours = policy("eval", height, width, interpolation=interpolation, crop_pct=crop_pct)
    for source_height, source_width in ((300, 401), (401, 300), (50, 37), (256, 256), (255, 900), (7, 3)):
        image = picture(source_height, source_width)
        pixels = apply_view(image, draw_view(ours, "k", 0, source_height, source_width), ours)
        assert np.array_equal(pixels, transform(image).permute(1, 2, 0).numpy())


def test_level_arguments_equal_timms():
    from timm.data import auto_augment

    assert list(OPERATIONS) == auto_augment._RAND_INCREASING_TRANSFORMS
    for name in OPERATIONS:
        for magnitude in (0.0, 0.3, 4.0, 8.5, 9.0, 9.7, 9.999):
            function = auto_augment.LEVEL_TO_ARG[name]
            ours = {level_argument(name, magnitude, sign) for sign in (-1, 1)}
            if function is None:
                assert ours == {0.0}
                continue
            # timm draws its signs: forty draws show both.
            theirs = {function(magnitude, {})[0] for _ in range(40)}
            assert ours == theirs, name


def test_a_tenth_magnitude_leaves_one_bit():
    assert level_argument("PosterizeIncreasing", 10.0, 1) == 1


def test_operations_equal_timms_op_for_op():
    from timm.data.auto_augment import NAME_TO_OP

    image, ours = picture(24, 24), policy()
    for position, name in enumerate(OPERATIONS):
        parameters_P = np.zeros(len(PARAMETER_NAMES), np.float32)
        parameters_P[2:6] = 24
        argument = np.float32(level_argument(name, 9.2, -1))
        parameters_P[P["operation_1"]], parameters_P[P["argument_1"]], parameters_P[P["operation_2"]] = (
            position,
            argument,
            -1,
        )
        whole = name in ("PosterizeIncreasing", "SolarizeIncreasing", "SolarizeAdd")
        arguments = () if argument == 0 else (int(argument) if whole else float(argument),)
        expected = NAME_TO_OP[name](image, *arguments, resample=Image.Resampling.BICUBIC, fillcolor=(124, 116, 104))
        pixels = apply_view(image, parameters_P, ours)
        assert np.array_equal(pixels, np.asarray(expected)), name


def test_crops_equal_torchvisions_resized_crop():
    from torchvision.transforms import InterpolationMode, functional as F

    image, ours = picture(90, 130), policy("crop-flip", 48, 32)
    for number in range(20):
        parameters_P = draw_view(ours, f"k{number}", 0, 90, 130)
        top, left, height, width = (int(value) for value in parameters_P[:4])
        expected = F.resized_crop(image, top, left, height, width, [48, 32], InterpolationMode.BICUBIC)
        expected = F.hflip(expected) if parameters_P[P["flip"]] else expected
        assert np.array_equal(apply_view(image, parameters_P, ours), np.asarray(expected))


# Distribution


def drawn(name: str, count: int = 3000, height: int = 200, width: int = 300) -> np.ndarray:
    ours = policy(name, 224, 224, seed=3)
    return np.stack([draw_view(ours, f"a.tar/{number}", 0, height, width) for number in range(count)])


def test_crops_and_flips_follow_torchvisions_law():
    import torch
    from torchvision.transforms import RandomResizedCrop

    found = drawn("crop-flip")
    assert 0.47 < found[:, P["flip"]].mean() < 0.53
    torch.manual_seed(0)
    image = Image.new("RGB", (300, 200))
    theirs = np.array([RandomResizedCrop.get_params(image, [0.08, 1.0], [3 / 4, 4 / 3]) for _ in range(3000)])
    quantiles = np.linspace(0.05, 0.95, 19)
    for ours_N, theirs_N, tolerance in (
        (found[:, 2] * found[:, 3], theirs[:, 2] * theirs[:, 3], 2500),
        (found[:, 3] / found[:, 2], theirs[:, 3] / theirs[:, 2], 0.03),
        (found[:, 0], theirs[:, 0], 8),
        (found[:, 1], theirs[:, 1], 10),
    ):
        assert np.abs(np.quantile(ours_N, quantiles) - np.quantile(theirs_N, quantiles)).max() < tolerance


def test_operations_and_erasing_follow_timms_law():
    found = drawn("randaug", 6000)
    operations = found[:, [P["operation_1"], P["operation_2"]]].ravel()
    assert 0.48 < (operations >= 0).mean() < 0.52
    counts = Counter(operations[operations >= 0].astype(int).tolist())
    assert set(counts) == set(range(len(OPERATIONS)))
    assert all(abs(count - 400) < 80 for count in counts.values())
    rotations = found[found[:, P["operation_1"]] == OPERATIONS.index("Rotate"), P["argument_1"]]
    magnitudes = np.abs(rotations) / 3
    assert abs(magnitudes.mean() - 9) < 0.15
    assert 0.35 < magnitudes.std() < 0.6
    assert 0.35 < (rotations > 0).mean() < 0.65
    erased = found[found[:, P["erase_height"]] > 0]
    assert 0.23 < len(erased) / len(found) < 0.27
    areas = erased[:, P["erase_height"]] * erased[:, P["erase_width"]] / 224**2
    assert 0.019 < areas.min() < 0.04
    assert 0.28 < areas.max() < 0.34
    assert len(set(erased[:, P["erase_seed"]].tolist())) > 0.99 * len(erased)


def test_randaug_crops_and_flips_as_crop_flip_does():
    for number in range(30):
        plain, augmented = (draw_view(policy(name), f"k{number}", 1, 50, 60) for name in ("crop-flip", "randaug"))
        assert np.array_equal(plain[:9], augmented[:9])


# Determinism


def test_views_depend_on_seed_key_and_view_and_on_nothing_else():
    import random

    keys = [f"t.tar/{number}" for number in range(20)]
    first = {key: draw_view(policy(), key, 0, 60, 80) for key in keys}
    random.seed(5)
    np.random.seed(5)
    for key in reversed(keys):
        assert np.array_equal(draw_view(policy(), key, 0, 60, 80), first[key])
    others = [draw_view(policy(), keys[0], 1, 60, 80), draw_view(policy(seed=1), keys[0], 0, 60, 80), first[keys[1]]]
    assert all(not np.array_equal(other, first[keys[0]]) for other in others)


def test_drawn_views_are_those_of_spec_1():
    """Golden: new numbers here mean a new SPEC."""
    found = draw_view(policy("randaug", 224, 224, seed=7), "train-000000.tar/n01440764/x", 4, 375, 500).tolist()
    assert found == pytest.approx(GOLDEN, rel=1e-6)


# fmt: off
GOLDEN = [126.0, 4.0, 217.0, 259.0, 224.0, 224.0, 0.0, 0.0, 0.0, 6.0, 86.0, 13.0, 0.43583619594573975, 102.0, 8.0, 76.0,
          189.0, 4703921.0]
# fmt: on


@pytest.mark.parametrize("name", POLICIES)
def test_replay_in_a_new_process_is_bit_equal(name, tmp_path):
    image, ours = picture(70, 50), policy(name)
    image.save(tmp_path / "image.png")
    views = np.stack([draw_view(ours, f"k{number}", 0, 70, 50) for number in range(12)])
    np.save(tmp_path / "views.npy", views)
    code = """if True:
        import json, sys
        import numpy as np
        from PIL import Image
        from atcache.views.policy import ViewPolicy
        from atcache.views.apply import apply_view, pixel_hash
        from atcache.views.draw import draw_view
        folder, fields = sys.argv[1], json.loads(sys.argv[2])
        image, policy = Image.open(folder + "/image.png"), ViewPolicy.from_json(fields)
        stored = np.load(folder + "/views.npy")
        assert all(np.array_equal(draw_view(policy, f"k{n}", 0, 70, 50), row) for n, row in enumerate(stored))
        print(json.dumps([pixel_hash(apply_view(image, row, policy)) for row in stored]))
    """
    command = [sys.executable, "-c", code, str(tmp_path), json.dumps(ours.to_json())]
    hashes = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert hashes == [pixel_hash(apply_view(image, row, ours)) for row in views]


def test_applying_changes_neither_image_nor_parameters():
    image, ours = picture(70, 50), policy()
    before = image.tobytes()
    for number in range(10):
        parameters_P = draw_view(ours, f"k{number}", 0, 70, 50)
        kept = parameters_P.copy()
        parameters_P.setflags(write=False)
        apply_view(image, parameters_P, ours)
        assert np.array_equal(parameters_P, kept)
    assert image.tobytes() == before


def test_erased_boxes_are_noise_and_the_rest_is_untouched():
    image, ours = Image.new("RGB", (24, 24), (9, 9, 9)), policy()
    parameters_P = np.array([0, 0, 24, 24, 24, 24, 0, 0, 0, -1, 0, -1, 0, 3, 5, 10, 12, 77], np.float32)
    pixels = apply_view(image, parameters_P, ours)
    inside = pixels[3:13, 5:17]
    assert 100 < inside.mean() < 155
    assert len(np.unique(inside)) > 150
    assert (np.delete(pixels.reshape(-1, 3), [y * 24 + x for y in range(3, 13) for x in range(5, 17)], 0) == 9).all()
    parameters_P[-1] = 78
    assert not np.array_equal(apply_view(image, parameters_P, ours)[3:13, 5:17], inside)


# Bounds


@settings(max_examples=150, deadline=None)
@given(
    name=st.sampled_from(POLICIES),
    source=st.tuples(st.integers(1, 400), st.integers(1, 400)),
    size=st.tuples(st.integers(1, 64), st.integers(1, 64)),
    key=st.text(max_size=20),
    view=st.integers(0, 2**40),
    seed=st.integers(0, 2**64),
    crop_pct=st.floats(0.2, 1.0),
)
def test_every_drawn_view_fits_and_float32_holds_it(name, source, size, key, view, seed, crop_pct):
    ours = policy(name, *size, seed=seed, crop_pct=crop_pct)
    parameters_P = draw_view(ours, key, view, *source)
    assert parameters_P.dtype == np.float32
    whole = np.delete(parameters_P, [P["argument_1"], P["argument_2"]])
    assert (whole == np.round(whole)).all()
    image = Image.new("RGB", (source[1], source[0]), (200, 10, 60))
    if parameters_P[4] * parameters_P[5] > 1e6:  # a very long image
        return
    pixels = apply_view(image, parameters_P, ours)
    assert pixels.shape == (*size, 3)
    assert pixels.dtype == np.uint8


@settings(max_examples=300, deadline=None)
@given(
    position=st.integers(0, len(PARAMETER_NAMES) - 1),
    value=st.one_of(st.floats(width=32), st.integers(-3, 300).map(float)),
)
def test_hostile_parameters_are_refused_or_harmless(position, value):
    image, ours = Image.new("RGB", (30, 20)), policy()
    parameters_P = draw_view(ours, "k", 0, 20, 30)
    parameters_P[position] = value
    try:
        pixels = apply_view(image, parameters_P, ours)
    except CorruptCacheError:
        return
    assert pixels.shape == (24, 24, 3)


def test_parameters_that_do_not_fit_say_so():
    image, ours = picture(20, 30), policy()
    good = np.array([0, 0, 20, 30, 24, 24, 0, 0, 0, -1, 0, -1, 0, 0, 0, 0, 0, 0], np.float32)
    apply_view(image, good, ours)
    for name, value, message in (
        ("crop_top", 1, r"do not fit an image of 30 x 20 .*crop_top 1.*Is this the image"),
        ("crop_height", 0, "do not fit"),
        ("resize_width", 23, "do not fit"),
        ("resize_width", 2**23, "do not fit"),
        ("window_left", -1, "do not fit"),
        ("flip", 0.5, r"flip is 0\.5"),
        ("crop_left", math.nan, "crop_left is nan"),
        ("operation_1", 15, r"operation 15 in a stored view, expected -1 \(none\) to 14"),
        ("erase_height", 5, "do not fit"),
        ("erase_seed", -1, "do not fit"),
    ):
        bad = good.copy()
        bad[P[name]] = value
        with pytest.raises(CorruptCacheError, match=message):
            apply_view(image, bad, ours)
    bad = good.copy()
    bad[P["operation_2"]], bad[P["argument_2"]] = OPERATIONS.index("Rotate"), math.nan
    with pytest.raises(CorruptCacheError, match="Rotate with argument nan"):
        apply_view(image, bad, ours)
    with pytest.raises(CorruptCacheError, match=r"shape \(17,\), expected \(18,\)"):
        apply_view(image, good[:-1], ours)


def test_an_image_too_long_to_resize_is_a_bad_image():
    with pytest.raises(BadImageError, match="an image of 1 x 100000 would be resized to 256 x 25600000"):
        draw_view(policy("eval", 224, 224), "k", 0, 100000, 1)


# Records


@pytest.mark.parametrize("name", POLICIES)
def test_policies_survive_json(name):
    ours = policy(name, 32, 48, seed=2**63, interpolation="lanczos", crop_pct=0.9)
    fields = json.loads(json.dumps(ours.to_json()))
    assert fields["spec"] == 1
    assert ViewPolicy.from_json(fields) == ours
    with pytest.raises(ConfigError, match=r"views of spec 2 .* knows spec 1"):
        ViewPolicy.from_json({**fields, "spec": 2})


def test_mixing_policies_survive_json_and_others_are_written_as_ever():
    plain, mixed = policy(), policy(mixing=MixPolicy(mixup_alpha=0.8, cutmix_alpha=1.0, prob=0.5))
    fields = json.loads(json.dumps(mixed.to_json()))
    assert ViewPolicy.from_json(fields) == mixed
    assert fields["mixing"] == {"mixup_alpha": 0.8, "cutmix_alpha": 1.0, "prob": 0.5, "switch_prob": 0.5}
    # Who knows spec 1 only must refuse mixed views, and no others.
    assert fields["spec"] == 2
    assert {**fields, "spec": 1}.keys() - plain.to_json().keys() == {"mixing"}
    with pytest.raises(ConfigError, match=r"views of spec 1 .* knows spec 2"):
        ViewPolicy.from_json({**fields, "spec": 1})
    assert (plain.parameter_names, mixed.parameter_names) == (PARAMETER_NAMES, PARAMETER_NAMES + MIXING_NAMES)


def test_mixing_leaves_a_samples_own_view_as_it_is():
    mixed = policy(mixing=MixPolicy(mixup_alpha=0.8))
    for number in range(10):
        assert np.array_equal(draw_view(mixed, f"k{number}", 1, 50, 60), draw_view(policy(), f"k{number}", 1, 50, 60))


def test_impossible_policies_are_refused():
    for fields, message in (
        ({"name": "autoaug"}, "view policy 'autoaug': expected one of eval, crop-flip, randaug"),
        ({"interpolation": "random"}, "interpolation 'random': expected one of nearest"),
        ({"seed": -1}, "seed -1"),
        ({"height": 0}, "views of 0 x 24"),
        ({"crop_pct": 1.1}, r"crop_pct 1\.1: expected more than 0, at most 1"),
        ({"name": "eval", "mixing": MixPolicy(mixup_alpha=0.8)}, "views of policy eval are never mixed"),
    ):
        with pytest.raises(ConfigError, match=message):
            policy(**fields)


def test_every_interpolation_resizes():
    image = picture(50, 60)
    hashes = set()
    for interpolation in INTERPOLATIONS:
        ours = policy("crop-flip", interpolation=interpolation)
        hashes.add(pixel_hash(apply_view(image, draw_view(ours, "k", 0, 50, 60), ours)))
    assert len(hashes) == len(INTERPOLATIONS)


def test_pixel_hashes_are_64_bits_of_the_pixels_alone():
    pixels = np.asarray(picture(24, 24))
    turned = np.asfortranarray(pixels)
    changed = pixels.copy()
    changed[3, 4, 1] ^= 1
    assert 0 <= pixel_hash(pixels) < 2**64
    assert pixel_hash(turned) == pixel_hash(pixels) != pixel_hash(changed)


def test_versions_name_everything_that_makes_pixels():
    assert {"numpy", "pillow", "timm", "torchvision"} <= set(library_versions())
