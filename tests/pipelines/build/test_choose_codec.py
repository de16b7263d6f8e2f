"""Which codec a build uses: what was named, or what suits the teacher, with the target that was asked for."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import timm
import torch

from atcache.attention.capture import FactorCapture
from atcache.codecs.logmap import LogmapCodec
from atcache.codecs.transform.codec import DEFAULT_TARGET_KL, TransformCodec
from atcache.errors import CodecError, ConfigError
from atcache.pipelines.build.calibrate import attention_nbytes, choose_held_back
from atcache.pipelines.build.codec import choose_codec
from atcache.pipelines.build.config import BuildConfig, CodecTarget, parse_nbytes

NO_TARGET = CodecTarget()


@pytest.fixture(scope="module")
def vit():
    return timm.create_model("vit_tiny_patch16_224", img_size=8, patch_size=2, embed_dim=32, depth=2, num_heads=2)


@pytest.fixture(scope="module")
def cait():
    return timm.create_model("cait_xxs24_224", img_size=8, patch_size=2, embed_dim=32, depth=2, num_heads=2)


def test_transform_is_the_default_and_meets_a_kl(vit):
    assert choose_codec(None, NO_TARGET, vit, 1000) == TransformCodec(target_kl=DEFAULT_TARGET_KL)
    assert choose_codec(None, CodecTarget(kl=0.02), vit, 1000) == TransformCodec(target_kl=0.02)


def test_a_teacher_that_hands_over_maps_has_logmap(cait):
    assert isinstance(choose_codec(None, NO_TARGET, cait, 1000), LogmapCodec)


def test_a_named_codec_is_taken_whatever_the_teacher(vit, cait):
    assert choose_codec("int8", NO_TARGET, vit, 1000).to_json()["name"] == "int8"
    assert choose_codec("logmap:bits=5", NO_TARGET, vit, 1000) == LogmapCodec(bits=5)
    assert isinstance(choose_codec("transform", NO_TARGET, cait, 1000), TransformCodec)


def test_a_budget_is_shared_by_all_views(vit):
    codec = choose_codec(None, CodecTarget(budget="2TB"), vit, 2_562_334)
    assert codec == TransformCodec(target_nbytes=2 * 10**12 // 2_562_334)


def test_megabytes_a_view_are_decimal(vit):
    assert choose_codec("transform", CodecTarget(mb_per_view=0.75), vit, 7) == TransformCodec(target_nbytes=750_000)


def test_a_size_keeps_the_other_fields_of_a_named_transform(vit):
    codec = choose_codec("transform:dct=False", CodecTarget(mb_per_view=0.001), vit, 7)
    assert codec == TransformCodec(dct=False, target_nbytes=1000)


@pytest.mark.parametrize("name", ["int8", "exact:dtype=float32"])
@pytest.mark.parametrize("target", [CodecTarget(kl=0.01), CodecTarget(mb_per_view=1), CodecTarget(budget="1GB")])
def test_a_target_for_a_codec_that_meets_none_is_refused(vit, name, target):
    with pytest.raises(ConfigError, match=f"codec {name} takes no target"):
        choose_codec(name, target, vit, 1000)


@pytest.mark.parametrize("own", ["target_kl=0.1", "target_nbytes=9000", "dct=False,target_kl=0.1"])
@pytest.mark.parametrize(
    ("target", "typed"),
    [(CodecTarget(kl=0.2), "--target-kl 0.2"), (CodecTarget(budget="1GB"), "--budget 1GB")],
)
def test_a_second_target_beside_the_codecs_own_is_refused(vit, own, target, typed):
    with pytest.raises(ConfigError, match=f"--codec transform:{own} and {typed}: a codec meets only one target"):
        choose_codec(f"transform:{own}", target, vit, 1000)


def test_a_target_for_the_maps_of_cait_is_refused(cait):
    with pytest.raises(ConfigError, match="codec logmap takes no target"):
        choose_codec(None, CodecTarget(kl=0.01), cait, 1000)


def test_a_codec_that_does_not_exist_is_refused(vit):
    with pytest.raises(CodecError, match="zip"):
        choose_codec("zip", NO_TARGET, vit, 1000)


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"kl": 0.01, "budget": "2TB"}, "target_kl=0.01 and budget=2TB: a codec meets only one target"),
        ({"mb_per_view": 1.0, "budget": "2TB"}, "target_mb_per_view=1.0 and budget=2TB: a codec meets only one target"),
        ({"kl": 0.01, "mb_per_view": 0.0}, "target_kl=0.01 and target_mb_per_view=0.0: a codec meets only one target"),
    ],
)
def test_two_targets_are_refused(given, sentence):
    with pytest.raises(ConfigError, match=sentence):
        CodecTarget(**given)


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("target_kl", 0.0, "more than 0"),
        ("target_kl", -1.0, "more than 0"),
        ("target_kl", float("nan"), "a finite number"),
        ("target_mb_per_view", 0.0, "more than 0"),
    ],
)
def test_a_target_that_is_nothing_is_refused(name, value, expected):
    with pytest.raises(ConfigError, match=f"{name}={value}: expected {expected}"):
        BuildConfig(teacher="demo-mae", data="a.tar", out=Path("c.zarr"), **{name: value})


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [("2TB", 2 * 10**12), ("750 MB", 750 * 10**6), ("1.5GiB", 3 * 2**29), ("500 kB", 500_000), ("1e9", 10**9)],
)
def test_bytes_are_read_from_words(text, nbytes):
    assert parse_nbytes(text) == nbytes


@pytest.mark.parametrize("text", ["much", "2 parsecs", "", "TB", "TB of 2", "1e999"])
def test_what_is_no_number_of_bytes_is_refused(text):
    with pytest.raises(ConfigError, match=f"budget={text!r}: expected bytes, such as 2TB"):
        CodecTarget(budget=text)


@pytest.mark.parametrize("text", ["0", "0GB", "-2GB"])
def test_no_bytes_at_all_are_refused(text):
    with pytest.raises(ConfigError, match="expected more than 0 bytes"):
        parse_nbytes(text)


@pytest.mark.parametrize(
    ("num_views", "view_nbytes", "expected"),
    [
        (256, 2**20, list(range(4, 256, 8))),
        (256, 2**26, list(range(4, 256, 16))),
        (256, 2**40, [4]),
        (1000, 1, list(range(4, 256, 8))),
        (3, 1, [2]),
        (1, 1, [0]),
    ],
)
def test_few_views_are_held_back_where_their_attention_is_large(num_views, view_nbytes, expected):
    assert choose_held_back(num_views, view_nbytes).nonzero().flatten().tolist() == expected


def test_attention_is_counted_as_it_lies_in_memory(vit, cait):
    images = torch.zeros(1, 3, 8, 8)
    for model in (vit, cait):
        capture = FactorCapture(model.eval())
        layers = capture(images)
        fields = [getattr(layer, field.name) for layer in layers for field in dataclasses.fields(layer)]
        tensors = [value for value in fields if isinstance(value, torch.Tensor)]
        assert attention_nbytes(capture.geometry) == sum(tensor.nbytes for tensor in tensors)
