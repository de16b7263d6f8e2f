"""The common corruptions: the same pixels everywhere and always, worse with severity, and names that are parsed."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

import atcache
from atcache.errors import ConfigError, CorruptCacheError
from atcache.views.apply import apply_view, pixel_hash
from atcache.views.corrupt import GROUPS, NAMES, Corruption, corrupt, parse_corruptions
from atcache.views.corruptions.draws import Draws
from atcache.views.corruptions.filters import ONE, gaussian_blur, motion_blur, moved
from atcache.views.corruptions.noise import shot_noise
from atcache.views.corruptions.plasma import clouds, ice
from atcache.views.draw import draw_view
from atcache.views.policy import PARAMETER_NAMES, ViewPolicy

POLICY = ViewPolicy(name="eval", image_height=12, image_width=16, crop_pct=1.0)
GOLDEN = sorted((Path(__file__).parent.parent / "golden").glob("format-*/*.zarr"))
every_corruption = pytest.mark.parametrize("name", NAMES)
RANDOM = ("gaussian_noise", "shot_noise", "impulse_noise", "glass_blur", "motion_blur", "snow", "frost", "fog")
RANDOM = (*RANDOM, "elastic_transform")


@lru_cache
def scene(height: int = 112, width: int = 112) -> np.ndarray:
    """Smooth ground with hard edges and fine texture, made of whole numbers, so that it is the same everywhere."""
    y, x = np.mgrid[0:height, 0:width]
    ground = np.stack([40 + 90 * y // height, 60 + 80 * x // width, 90 + 60 * (x + y) // (height + width)], axis=-1)
    ground += 50 * ((x // 13 + y // 17) % 2)[..., None] + (x * 7 + y * 5)[..., None] % 19
    disk = (y - height // 2) ** 2 + (x - width // 3) ** 2 < (min(height, width) // 4) ** 2
    ground[disk] = 235 - ground[disk] // 2
    pixels = ground.astype(np.uint8)
    pixels.setflags(write=False)
    return pixels


def psnr(one: np.ndarray, other: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / max(np.mean((one.astype(float) - other) ** 2), 1e-9)))


def mean_psnrs(name: str) -> list[float]:
    """For each severity, of two seeds, at the size that the published constants are for."""
    clean = scene(224, 224)
    found = [[psnr(corrupt(clean, f"{name}:{severity}", seed=n), clean) for n in (0, 1)] for severity in range(1, 6)]
    return np.mean(found, axis=1).tolist()


# What stays the same


def hashes_of(names: list[str]) -> dict[str, str]:
    return {name: f"{pixel_hash(corrupt(scene(), f'{name}:3', seed=1, sample_key='a.tar/k')):016x}" for name in names}


PINNED = {
    "gaussian_noise": "a5d8f4694638c809",
    "shot_noise": "45d6ca911053f60c",
    "impulse_noise": "a115cc69acea6ddd",
    "defocus_blur": "5de8f3960e5f5409",
    "glass_blur": "16d8def3c8b1923d",
    "motion_blur": "bf95a8f8677c2f78",
    "zoom_blur": "7ea873c7621d19d7",
    "snow": "b1b79dca485e2dd4",
    "frost": "656d8b694b9d2d02",
    "fog": "c708b6c8a71efc4d",
    "brightness": "581df548a46a9bbd",
    "contrast": "bebde8c23eb28fdb",
    "elastic_transform": "18ce6e2e8385880e",
    "pixelate": "6be2cbe8f52a7ea2",
    "jpeg_compression": "b81f99100c55998e",
}
"""Hashes of severity 3. Stored views must be made again for ever, so these never change while `CORRUPT_SPEC` is 4."""


def test_the_pixels_are_what_they_were():
    assert hashes_of([*NAMES]) == PINNED


def test_another_process_processor_and_order_give_the_same_pixels():
    """The child runs plain code of numpy and OpenBLAS, in one thread, from the last corruption to the first."""
    program = (
        "import sys, json; sys.path.insert(0, sys.argv[1]); import test_corrupt as here; "
        "print(json.dumps(here.hashes_of([*reversed(here.NAMES)])))"
    )
    plain = {"OPENBLAS_CORETYPE": "Prescott", "OPENBLAS_NUM_THREADS": "1", "NPY_DISABLE_CPU_FEATURES": "AVX512F"}
    words = [sys.executable, "-W", "ignore", "-c", program, str(Path(__file__).parent)]
    done = subprocess.run(words, env={**os.environ, **plain}, capture_output=True, text=True, check=True, timeout=60)
    assert json.loads(done.stdout) == PINNED


@every_corruption
def test_sample_key_and_seed_decide_what_is_random(name):
    given = scene().copy()
    first = corrupt(given, f"{name}:2", seed=1, sample_key="a")
    assert np.array_equal(given, scene()), "the image is not changed"
    assert np.array_equal(first, corrupt(scene(), f"{name}:2", seed=1, sample_key="a"))
    others = [
        corrupt(scene(), f"{name}:2", seed=1, sample_key="b"),
        corrupt(scene(), f"{name}:2", seed=2, sample_key="a"),
    ]
    assert all(np.array_equal(first, other) == (name not in RANDOM) for other in others)


@settings(deadline=None, max_examples=50)
@given(st.sampled_from(NAMES), st.integers(1, 5), st.integers(1, 40), st.integers(1, 40))
def test_any_size_keeps_its_shape_and_type(name, severity, height, width):
    found = corrupt(scene(height, width), f"{name}:{severity}")
    assert (found.shape, found.dtype) == ((height, width, 3), np.uint8)
    assert found.flags.c_contiguous


@pytest.mark.parametrize("size", [(8, 8), (48, 130), (130, 48)], ids=str)
@every_corruption
def test_small_and_long_images_are_changed(name, size):
    """Pixelate by less than a pixel and the like must not leave a view of 8 x 8 as it was."""
    assert psnr(corrupt(scene(*size), f"{name}:5"), scene(*size)) < 35


@every_corruption
def test_black_and_white_images_have_no_surprises(name):
    for value in (0, 255):
        flat = np.full((16, 16, 3), value, np.uint8)
        for severity in range(1, 6):
            found = corrupt(flat, f"{name}:{severity}")
            if GROUPS["blur"].count(name) or name in ("contrast", "elastic_transform", "pixelate"):
                assert np.array_equal(found, flat), "what moves or averages equal pixels changes nothing"


# How severe


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("elastic_transform", "frost")])
def test_each_severity_is_further_from_the_clean_image(name):
    found = mean_psnrs(name)
    assert all(later < earlier + 0.1 for earlier, later in itertools.pairwise(found)), found
    assert found[4] < found[0] - 1.5


def test_elastic_severities_are_of_two_kinds():
    """As published: 1 and 2 stretch, 3 to 5 bend."""
    found = mean_psnrs("elastic_transform")
    assert found[1] < found[0]
    assert found[4] < found[3] < found[2]


def test_each_severity_of_frost_leaves_less_of_the_image():
    """It also takes away brightness that ice added, so the distance alone may fall."""
    kept = [
        np.corrcoef(corrupt(scene(), f"frost:{severity}").ravel(), scene().ravel())[0, 1] for severity in range(1, 6)
    ]
    assert kept == sorted(kept, reverse=True)


# The parts, against their closed forms


def test_noise_has_the_published_strength():
    grey = np.full((200, 200, 3), 128, np.uint8)
    assert np.std(corrupt(grey, "gaussian_noise:1").astype(float)) == pytest.approx(0.08 * 255, rel=0.02)
    for severity, share in ((1, 0.03), (5, 0.27)):
        noisy = corrupt(grey, f"impulse_noise:{severity}")
        assert [np.mean(noisy == value) for value in (0, 255)] == pytest.approx([share / 2] * 2, rel=0.1)
    # A Poisson number of mean 12 * 64 / 255, times 255 / 12.
    photons = shot_noise(grey // 2, 3, Draws(0)).astype(float) * 12 / 255
    assert (photons.mean(), photons.var()) == pytest.approx((12 * 64 / 255,) * 2, rel=0.03)
    assert np.array_equal(corrupt(np.zeros((4, 4, 3), np.uint8), "shot_noise:5"), np.zeros((4, 4, 3))), "no light"


def test_normal_numbers_are_normal():
    found = Draws(3).normals(400, 400)
    moments = [found.mean(), found.var(), (found**3).mean(), (found**4).mean()]
    assert moments == pytest.approx([0, 1, 0, 3], abs=0.05)


def test_gaussian_blur_spreads_a_point_as_the_bell_curve_says():
    point = np.zeros((1, 61, 61))
    point[0, 30, 30] = 255
    blurred = gaussian_blur(point, 3.0)[0]
    y, x = np.mgrid[-30:31, -30:31]
    expected = 255 * np.exp(-(x**2 + y**2) / 18) / (2 * np.pi * 9)
    assert np.abs(blurred - expected).max() < 0.01
    assert gaussian_blur(np.full((2, 5, 9), 7), 20.0, reflects=True) == pytest.approx(7)


def test_motion_blur_is_half_a_bell_curve_in_its_direction():
    point = np.zeros((21, 21), np.uint8)
    point[10, 10] = 200
    right, below = (motion_blur(point, 4, 2.0, angle) / ONE for angle in (0, 90))
    weights = np.exp(-0.5 * (np.arange(9) / 2) ** 2)
    assert right[10, 10:1:-1] == pytest.approx(200 * weights / weights.sum(), abs=0.01)
    assert np.array_equal(right, below.T)
    assert right.sum() == pytest.approx(200)


def test_defocus_is_a_disk():
    point = np.zeros((224, 224, 3), np.uint8)
    point[100:102, 100:102] = 255
    blurred = corrupt(point, "defocus_blur:3")[..., 0].astype(float)
    y, x = np.mgrid[0:224, 0:224] - 100.5
    distance = np.hypot(y, x)
    assert blurred[distance < 4].min() == blurred[distance < 4].max() == pytest.approx(4 * 255 / (np.pi * 36), abs=1)
    assert blurred[distance > 9].max() == 0


def test_pixels_move_where_they_are_told():
    y, x = np.mgrid[0:20, 0:30].astype(float)
    pixels = np.stack([y * 5, x * 5, y + x], axis=-1).astype(np.uint8)
    assert np.array_equal(moved(pixels, y, x), pixels)
    assert np.array_equal(moved(pixels, y + 1, x - 2)[:-1, 2:], pixels[1:, :-2])
    assert np.array_equal(moved(pixels, y, x - 3)[:, :3], pixels[:, 2::-1]), "mirrored at the edge"
    assert moved(pixels, y + 0.5, x)[:-1, :, 0] == pytest.approx(5 * y[:-1] + 2.5, abs=0.51)


def test_glass_moves_pixels_no_further_than_its_rounds_allow():
    ramp = np.zeros((64, 224, 3), np.uint8)
    ramp[..., 0] = np.arange(224)
    side = corrupt(np.repeat(ramp, 4, axis=0)[:224], "glass_blur:4")[..., 0].astype(float)
    offset = np.abs(side - np.arange(224))
    assert 0.5 < offset[:, 20:-20].mean() < 3
    assert offset[:, 20:-20].max() <= 2 * 3 + 1


def test_clouds_and_ice_fill_their_range():
    found = clouds(100, 60, 2.0, Draws(1))
    assert found.shape == (100, 60)
    assert found.min() >= 0
    assert found.max() <= 1
    rough = clouds(100, 60, 1.2, Draws(1))
    steps = [np.abs(np.diff(one, axis=0)).mean() / one.std() for one in (found, rough)]
    assert steps[0] < steps[1], "a smaller decay is rougher"
    frozen = ice(90, 70, Draws(1))
    assert frozen.shape == (90, 70, 3)
    assert 60 < frozen.mean() < 170
    assert frozen.std() > 25


# Names


def test_groups_and_names_stand_for_their_corruptions():
    assert [str(one) for one in parse_corruptions("fog:3")] == ["fog:3"]
    assert [str(one) for one in parse_corruptions("fog")] == [f"fog:{severity}" for severity in range(1, 6)]
    assert [one.name for one in parse_corruptions("noise:2")] == ["gaussian_noise", "shot_noise", "impulse_noise"]
    assert (len(NAMES), len(parse_corruptions("all:1")), len(parse_corruptions("all"))) == (15, 15, 75)
    assert sum(GROUPS.values(), ()) == NAMES


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "smog:3",
            r"corruption 'smog:3': there is no 'smog'. Expected .* such as fog:3 or noise. .*groups are noise, blur",
        ),
        ("", r"corruption '': there is no ''"),
        ("fog:6", r"corruption 'fog:6': the severity is '6', expected 1 to 5, such as fog:3."),
        ("fog:", r"corruption 'fog:': the severity is '', expected 1 to 5"),
        ("fog:3:1", r"the severity is '3:1', expected 1 to 5"),
    ],
)
def test_a_wrong_name_or_severity_is_refused_in_a_sentence(text, message):
    with pytest.raises(ConfigError, match=message):
        parse_corruptions(text)


def test_several_where_one_is_wanted_and_wrong_images_are_refused():
    with pytest.raises(
        ConfigError, match=r"corruption 'noise:3' stands for 3 corruptions, expected one, such as gaussi"
    ):
        corrupt(scene(), "noise:3")
    with pytest.raises(ConfigError, match=r"corruption fog of severity 9: expected 1 to 5"):
        Corruption("fog", 9)
    with pytest.raises(ConfigError, match=r"corruption 'smog': expected one of gaussian_noise"):
        Corruption("smog", 1)
    with pytest.raises(
        ConfigError, match=r"an image of shape \(4, 4\) and type uint8: expected \(height, width, 3\) of"
    ):
        corrupt(np.zeros((4, 4), np.uint8), "fog:3")
    with pytest.raises(ConfigError, match=r"type float64: expected"):
        corrupt(np.zeros((4, 4, 3)), "fog:3")
    with pytest.raises(ConfigError, match=r"seed -1: expected a whole number from 0"):
        corrupt(scene(), "fog:3", seed=-1)


# In a view policy


def test_a_view_is_the_clean_one_corrupted_by_the_public_function():
    from PIL import Image

    policy, image = replace(POLICY, seed=5, corrupt="snow:4"), Image.fromarray(scene(40, 60))
    clean_P, foul_P = (draw_view(one, "a.tar/k", 0, 40, 60) for one in (replace(POLICY, seed=5), policy))
    clean, foul = apply_view(image, clean_P, replace(POLICY, seed=5)), apply_view(image, foul_P, policy)
    assert np.array_equal(foul, atcache.corrupt(clean, "snow:4", seed=5, sample_key="a.tar/k"))
    assert np.array_equal(foul_P[:-1], clean_P)
    assert policy.parameter_names == (*PARAMETER_NAMES, "corrupt_seed")
    for wrong in (-1.0, 0.5, 2.0**24):
        with pytest.raises(CorruptCacheError, match=r"corrupt_seed is .* in a stored view, expected a whole number"):
            apply_view(image, np.append(clean_P, np.float32(wrong)), policy)
    with pytest.raises(CorruptCacheError, match=r"shape \(18,\), expected \(19,\) for corrupted views"):
        apply_view(image, clean_P, policy)


def test_the_record_of_a_policy_says_its_corruption_and_only_then():
    policy = replace(POLICY, corrupt=" fog:3")
    assert policy.to_json() == {**POLICY.to_json(), "spec": 4, "corrupt": "fog:3"}
    assert ViewPolicy.from_json(policy.to_json(), "x") == policy
    assert "corrupt" not in POLICY.to_json()
    assert POLICY.to_json()["spec"] == 1
    with pytest.raises(ConfigError, match=r"spec 1 with .* this atcache knows spec 4"):
        ViewPolicy.from_json({**policy.to_json(), "spec": 1}, "x")
    with pytest.raises(
        ConfigError, match="corrupt=fog:3 with policy crop-flip: only views of policy eval are corrupted"
    ):
        replace(POLICY, name="crop-flip", corrupt="fog:3")
    with pytest.raises(ConfigError, match="stands for 5 corruptions, expected one"):
        replace(POLICY, corrupt="fog")


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_policies_of_old_caches_are_recorded_as_before(path):
    recorded = json.loads((path / "zarr.json").read_text())["attributes"]["atcache"]["views"]["policy"]
    assert atcache.open(path).policy.to_json() == recorded
