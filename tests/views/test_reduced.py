"""Reduced decoding: a JPEG is decoded only as large as its view needs, recorded in the policy, replayed bit for bit."""

from __future__ import annotations

import io
import tarfile
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from PIL import Image

from atcache.errors import BadImageError, ConfigError
from atcache.feed.sample_views import FreshViews
from atcache.images.decode import EncodedImage, decode_image
from atcache.images.source import Source, index_source
from atcache.views.apply import apply_view, library_versions, reduction_of, render_alone
from atcache.views.draw import draw_view
from atcache.views.mixing import NOT_MIXED, MixPolicy
from atcache.views.policy import PARAMETER_NAMES, ViewPolicy
from atcache.views.rendering import Renderer, replay_view, stored_mix

FULL = ViewPolicy(name="crop-flip", seed=3, image_height=32, image_width=32)
REDUCED = replace(FULL, decoding="reduced")
MIXED = replace(REDUCED, mixing=MixPolicy(mixup_alpha=0.8, cutmix_alpha=1.0))


def waves(height: int, width: int) -> Image.Image:
    """Smooth colours, which JPEG and a reduced decoding keep; a ramp in red tells positions apart."""
    y, x = np.mgrid[0:height, 0:width]
    parts = [255 * x / width, 128 + 100 * np.sin(y / 40), 128 + 100 * np.cos((x + y) / 60)]
    return Image.fromarray(np.stack(parts, axis=-1).astype(np.uint8))


def encoded(image: Image.Image, **options) -> EncodedImage:
    file = io.BytesIO()
    image.save(file, **{"format": "JPEG", "quality": 95, **options})
    return EncodedImage(file.getvalue(), where="x")


def crop(top: int, left: int, height: int, width: int, side: int = 32) -> np.ndarray:
    """Parameters of a view that only crops and resizes."""
    values = dict.fromkeys(PARAMETER_NAMES, 0.0)
    values |= {"crop_top": top, "crop_left": left, "crop_height": height, "crop_width": width}
    values |= {"resize_height": side, "resize_width": side, "operation_1": -1, "operation_2": -1}
    return np.array(list(values.values()), np.float32)


@given(*[st.integers(1, 5000)] * 4)
def test_the_reduction_is_the_most_that_leaves_the_box_large_enough(height, width, resize_height, resize_width):
    found = reduction_of(height, width, resize_height, resize_width)
    good = [one for one in (1, 2, 4, 8) if height / one >= resize_height and width / one >= resize_width]
    assert found == max(good, default=1)


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_a_box_of_the_reduced_image_is_where_it_is_in_the_whole_one(data):
    """A shift by one source pixel would change the ramp's mean by more than is allowed here."""
    height, width = data.draw(st.integers(70, 300)), data.draw(st.integers(70, 300))
    box_height, box_width = data.draw(st.integers(64, height)), data.draw(st.integers(64, width))
    top, left = data.draw(st.integers(0, height - box_height)), data.draw(st.integers(0, width - box_width))
    parameters_P = crop(top, left, box_height, box_width)
    values_W = np.arange(width) * 255 / width
    ramp = Image.fromarray(np.broadcast_to(values_W[:, None], (height, width, 3)).astype(np.uint8))
    reduced = render_alone(encoded(ramp, quality=100, subsampling=0), parameters_P, REDUCED)
    whole = render_alone(encoded(ramp, quality=100, subsampling=0), parameters_P, FULL)
    difference = reduced.astype(float) - whole
    # Values are rounded, by half a step at most, and a source pixel is 0.85 steps of the ramp or more.
    assert abs(difference[:, 4:-4].mean()) < 0.6 * 255 / width
    assert np.abs(difference).max() <= 12  # at the box's edge a reduced pixel may lie half outside


@pytest.mark.parametrize("name", ["eval", "crop-flip", "randaug"])
@pytest.mark.parametrize("size", [(300, 401), (401, 300), (257, 263), (900, 640)])
def test_a_reduced_view_is_close_to_the_full_one(name, size):
    full = replace(FULL, name=name)
    reduced = replace(full, decoding="reduced")
    image = waves(*size)
    for view in range(3):
        drawn_P = draw_view(full, "k", view, *size)
        assert np.array_equal(drawn_P, draw_view(reduced, "k", view, *size))
        there, here = (render_alone(encoded(image), drawn_P, one).astype(int) for one in (full, reduced))
        if name != "randaug":  # operations such as Posterize turn a difference of 1 into a large one
            assert np.abs(there - here).mean() < 1.5


@pytest.mark.parametrize(
    ("mode", "options"),
    [
        ("RGB", {}),
        ("RGB", {"progressive": True}),
        ("RGB", {"subsampling": 0}),
        ("RGB", {"subsampling": 2}),
        ("L", {}),
        ("CMYK", {}),
        ("RGB", {"exif": b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"}),
    ],
)
@pytest.mark.parametrize("reduction", [1, 2, 4, 8])
def test_jpegs_of_every_kind_are_reduced_to_the_mean_of_their_pixels(mode, options, reduction):
    image = encoded(waves(97, 130).convert(mode), **options)
    whole = np.asarray(encoded(waves(97, 130).convert(mode), **options).decode()).astype(float)
    found = image.decode(reduction)
    assert (found.mode, image.width, image.height) == ("RGB", 130, 97)
    assert found.size == (-(-130 // reduction), -(-97 // reduction))
    rows, columns = 97 // reduction, 130 // reduction
    means = whole[: rows * reduction, : columns * reduction].reshape(rows, reduction, columns, reduction, 3)
    difference = np.asarray(found)[:rows, :columns] - means.mean((1, 3))
    assert np.abs(difference).mean() < 2


@pytest.mark.parametrize("format", ["PNG", "WEBP", "PPM", "BMP"])
def test_other_formats_are_decoded_whole(format):
    image = encoded(waves(200, 300), format=format, **({"lossless": True} if format == "WEBP" else {}))
    assert not image.can_reduce
    parameters_P = crop(0, 0, 200, 300)
    assert np.array_equal(render_alone(image, parameters_P, REDUCED), apply_view(waves(200, 300), parameters_P, FULL))


def test_a_file_of_several_jpegs_is_a_jpeg():
    image = encoded(waves(200, 300), format="MPO", save_all=True, append_images=[waves(10, 10)])
    assert image.can_reduce
    assert image.decode(4).size == (75, 50)


def test_full_decoding_and_small_boxes_give_the_same_pixels_as_ever():
    image, small_P, large_P = waves(200, 300), crop(5, 7, 63, 200), crop(0, 0, 200, 300)
    whole = encoded(image).decode()
    for parameters_P, policy in ((small_P, FULL), (large_P, FULL), (small_P, REDUCED)):
        assert np.array_equal(render_alone(encoded(image), parameters_P, policy), apply_view(whole, parameters_P, FULL))
    assert not np.array_equal(render_alone(encoded(image), large_P, REDUCED), apply_view(whole, large_P, FULL))


def test_a_truncated_jpeg_is_an_error_at_any_reduction():
    file = io.BytesIO()
    waves(200, 300).save(file, "JPEG")
    for decode in (
        lambda data: decode_image(data, where="thing"),
        lambda data: EncodedImage(data, where="thing").decode(4),
    ):
        with pytest.raises(BadImageError, match="thing: the image cannot be decoded"):
            decode(file.getvalue()[:2000])


# The record


def test_only_a_policy_that_reduces_says_so_and_has_another_spec():
    assert "decoding" not in FULL.to_json()
    assert FULL.to_json()["spec"] == 1
    for policy in (REDUCED, MIXED):
        fields = policy.to_json()
        assert (fields["decoding"], fields["spec"]) == ("reduced", 3)
        assert ViewPolicy.from_json(fields) == policy
        with pytest.raises(ConfigError, match="knows spec 3"):
            ViewPolicy.from_json({**fields, "spec": 2})
    assert ViewPolicy.from_json(FULL.to_json()).decoding == "full"


def test_another_decoding_is_refused():
    with pytest.raises(ConfigError, match="decoding 'half': expected one of full, reduced"):
        replace(FULL, decoding="half")


# Replay


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Source:
    path = tmp_path_factory.mktemp("large") / "large-0.tar"
    with tarfile.open(path, "w") as tar:
        for number in range(12):
            file = io.BytesIO()
            image = waves(150 + 17 * number, 220 - 3 * number)
            image.save(file, "PNG" if number % 4 == 3 else "JPEG")
            ending = "png" if number % 4 == 3 else "jpg"
            for name, data in ((f"s{number:02}.{ending}", file.getvalue()), (f"s{number:02}.cls", b"1")):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return Source(index_source(str(path)))


@pytest.mark.parametrize("policy", [REDUCED, MIXED], ids=["alone", "mixed"])
def test_reduced_views_replay_to_the_same_pixels(source, policy):
    renderer = Renderer(source, policy, skip_bad=False, keep_nbytes=2**20)
    rendered = {sample: renderer.render(sample, 1) for sample in range(12)}
    num_mixed = num_reduced = 0
    for sample, view in rendered.items():
        stored = {row: one.parameters_P for row, one in rendered.items()}
        again = replay_view(source, policy, sample, stored.__getitem__, view.pixel_hash, library_versions())
        assert np.array_equal(again, view.pixels_HWC)
        num_mixed += stored_mix(policy, view.parameters_P) != NOT_MIXED
        height, width, *resized = view.parameters_P[2:6]
        num_reduced += source.read_encoded(sample).can_reduce and reduction_of(height, width, *resized) > 1
    assert num_reduced > 3
    assert (num_mixed > 3) == (policy is MIXED)


@pytest.mark.parametrize("keep_nbytes", [0, 2**26])
def test_fresh_views_are_the_renderers(source, keep_nbytes):
    renderer = Renderer(source, MIXED, skip_bad=False)
    fresh = FreshViews(source, MIXED, keep_nbytes=keep_nbytes)
    for sample in range(12):
        assert np.array_equal(fresh.read(sample, 2).pixels_HWC, renderer.render(sample, 2).pixels_HWC)
