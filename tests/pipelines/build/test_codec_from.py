"""`atcache build --codec-from`: a new cache takes another one's codec as it was fitted there, or says why it cannot."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from builds import differences, files, picture, run_cli, write_tar

import atcache
from atcache.errors import CacheMismatchError, CacheMissError, ConfigError, CorruptCacheError
from atcache.pipelines.build.config import BuildConfig
from atcache.pipelines.build.run import build
from atcache.teachers.load import create_student
from atcache.teachers.names import parse_model_name


@pytest.fixture(scope="module")
def other(tiny_cache, digits_tars) -> Path:
    """A cache with a fitted codec that no default would give."""
    return tiny_cache(codec=None, target_kl=0.02, data=str(digits_tars[0]), batch_size=3)


@pytest.fixture
def config(digits_build, digits_tars, other) -> BuildConfig:
    """A build of the images that `other` lacks, with its codec."""
    return replace(digits_build, data=str(digits_tars[1]), seed=7, codec_from=other)


def state_of(path: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    arrays = atcache.open(path).reader.state
    return {name: (array.dtype.name, array.shape, array.tobytes()) for name, array in arrays.items()}


def codec_of(path: Path) -> dict:
    return dict(atcache.open(path).record.identity.codec)


# What it takes


def test_codec_and_state_are_the_other_caches_bit_for_bit(config, other, tmp_path):
    summary = build(config)
    assert summary.complete is not None
    assert summary.complete["num_stored"] == 16
    assert "basis_LJC" in state_of(other)
    assert state_of(config.out) == state_of(other)
    assert codec_of(config.out) == codec_of(other)
    assert codec_of(config.out)["target_kl"] == 0.02
    fitted = replace(config, codec_from=None, target_kl=0.02, out=tmp_path / "fitted.zarr")
    build(fitted)
    assert state_of(fitted.out) != state_of(other), "or taking it would prove nothing"


def test_the_same_images_become_the_same_cache(config, other, digits_tars, tmp_path):
    config = replace(config, data=str(digits_tars[0]), seed=0, samples_per_shard=20)
    build(config)
    assert differences(config.out, other) == []


def test_a_validation_cache_with_other_views_shares_the_codec(config, other):
    config = replace(config, policy="eval", pixels="store", on_bad_image="skip")
    summary = build(config)
    assert state_of(config.out) == state_of(other)
    assert summary.plan is not None
    assert 0 < summary.plan.row_kl_nats < 0.05, "measured on these views"


def test_a_codec_that_is_not_fitted_is_taken_too(config, tiny_cache):
    config = replace(config, codec_from=tiny_cache(codec="int8", store="v"), store="v")
    build(config)
    assert codec_of(config.out)["name"] == "int8"
    assert atcache.open(config.out).geometry.v_head_dim > 0


def test_an_unfinished_cache_will_do(config, other, tmp_path):
    begun = tmp_path / "begun.zarr"
    shutil.copytree(other, begun)
    (begun / "commits/v0000-b000000.json").unlink()
    build(replace(config, codec_from=begun))
    assert state_of(config.out) == state_of(other)


def test_a_dry_run_measures_and_writes_nothing(config):
    summary = build(replace(config, dry_run=True))
    assert summary.plan is not None
    assert summary.plan.row_kl_nats > 0
    assert summary.plan.state_nbytes > 0
    assert not config.out.exists()


def test_images_that_the_codec_does_not_suit_are_warned_of(config, tmp_path):
    flat = [{"png": picture(0, kind="PNG"), "cls": b"0"}] * 2
    noise = [{"png": picture(seed, kind="PNG"), "cls": b"0"} for seed in range(1, 25)]
    for name, samples in (("flat", flat), ("noise", noise)):
        write_tar(tmp_path / f"{name}.tar", samples)
    narrow = replace(config, codec_from=None, data=str(tmp_path / "flat.tar"), out=tmp_path / "narrow.zarr")
    build(narrow)
    summary = build(replace(config, data=str(tmp_path / "noise.tar"), codec_from=narrow.out))
    assert summary.plan is not None
    assert summary.plan.row_kl_nats > 1.5 * 0.005
    assert summary.warning is not None
    assert re.search(r"over 1\.5 times the 0\.005 of the codec's target.* without --codec-from", summary.warning)


# Going on


def test_an_unfinished_build_goes_on_to_the_same_bytes(config, tmp_path):
    build(config)
    shutil.copytree(config.out, tmp_path / "whole.zarr")
    for again in (config, replace(config, codec_from=None, target_kl=0.02)):  # its own state is used in any case
        (config.out / "commits/v0000-b000001.json").unlink()
        assert build(again).num_built_views == 8
        assert differences(config.out, tmp_path / "whole.zarr") == []


def test_going_on_with_another_fit_of_the_same_codec_is_refused(config, tiny_cache, digits_tars):
    build(config)
    before = files(config.out)
    elsewhere = tiny_cache(codec=None, target_kl=0.02, data=str(digits_tars[2]), batch_size=3)
    sentence = (
        r"not begun with the codec of codec_from=\S+: its fitted \S.*\bmean_right_LRC\b.* differ\. Give another --out"
    )
    for unfinished in (False, True):
        if unfinished:
            (config.out / "commits/v0000-b000001.json").unlink()
            before.pop("commits/v0000-b000001.json")
        with pytest.raises(CacheMismatchError, match=sentence):
            build(replace(config, codec_from=elsewhere, weights=Path("nowhere.pth")))
        assert files(config.out) == before


def test_going_on_with_another_codec_names_it(config, tiny_cache):
    build(config)
    with pytest.raises(
        CacheMismatchError,
        match=r"codec\.name is 'transform' in \S+cache\.zarr and 'int8' in \S+digits\.zarr; .*target_kl is 0\.02 in ",
    ):
        build(replace(config, codec_from=tiny_cache(codec="int8"), weights=Path("nowhere.pth")))


def test_a_cache_that_was_fitted_itself_does_not_go_on_with_another_codec(config):
    build(replace(config, codec_from=None, target_kl=0.02))
    with pytest.raises(CacheMismatchError, match=r"was not begun with the codec of codec_from="):
        build(config)


# What is refused

ANOTHER_TEACHER = "vit_tiny_patch16_224:img_size=8,patch_size=2,embed_dim=32,depth=3,num_heads=2,num_classes=10"


@pytest.mark.parametrize(
    ("fields", "difference"),
    [
        ({"teacher": ANOTHER_TEACHER}, r"teacher\.name is '\S*depth=2\S*' there and '\S*depth=3\S*' here"),
        ({"teacher": "mae-vit-l"}, r"teacher\.name is 'vit_tiny\S+' there and 'vit_large_patch16_224\.mae' here"),
        ({"precision": "bf16"}, r"teacher\.precision is 'float32' there and 'bfloat16' here"),
        ({"layers": "1"}, r"layers is \[0, 1\] there and \[1\] here"),
        ({"heads": "0"}, r"heads is \[0, 1\] there and \[0\] here"),
        ({"store": "v"}, r"store is None there and 'v' here"),
        ({"queries": "cls"}, r"queries is 'all' there and 'cls' here"),
        (
            {"layers": "0", "heads": "1", "store": "v"},
            r"heads is \[0, 1\] there and \[1\] here; layers is \[0, 1\] there and \[0\] here; store is None there and "
            "'v' here",
        ),
    ],
    ids=["teacher", "alias", "precision", "layers", "heads", "store", "queries", "several"],
)
def test_other_attention_is_refused_before_the_teacher_is_loaded(config, fields, difference):
    with pytest.raises(
        CacheMismatchError,
        match=rf"codec_from=\S+digits\.zarr: the codec of this cache was fitted to other attention: {difference}\. G",
    ):
        build(replace(config, **{"weights": Path("nowhere.pth"), **fields}))
    assert not config.out.exists()


def test_the_same_selection_written_otherwise_is_no_difference(config):
    build(replace(config, layers="0,1", heads="0-1", dry_run=True))


def test_a_layer_that_the_teacher_lacks_is_named(config):
    with pytest.raises(ConfigError, match="layer 2 does not exist: the model has 2"):
        build(replace(config, layers="0-2"))


def test_other_weights_are_refused(config, tmp_path):
    model = create_student(parse_model_name(config.teacher), num_classes=10)
    torch.save(model.state_dict(), tmp_path / "other.pth")
    with pytest.raises(
        CacheMismatchError,
        match=r"fitted to other attention: teacher\.weights_sha256 is '\w{12}...' there and '\w{12}...' here\. ",
    ):
        build(replace(config, weights=tmp_path / "other.pth"))
    assert not config.out.exists()


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"codec": "transform"}, "codec=transform"),
        ({"target_kl": 0.02}, r"target_kl=0\.02"),
        ({"target_mb_per_view": 0.5}, r"target_mb_per_view=0\.5"),
        ({"budget": "2TB"}, "budget=2TB"),
        ({"codec": "transform", "budget": "2TB"}, "codec=transform and budget=2TB"),
    ],
)
def test_another_word_on_the_codec_is_refused(config, fields, named):
    with pytest.raises(ConfigError, match=rf"codec_from=\S+digits\.zarr and {named}: the codec of another cache is "):
        replace(config, **fields)


def test_the_cache_to_build_is_no_other_cache(config):
    with pytest.raises(ConfigError, match=r"codec_from=\S+cache\.zarr is the cache to build\."):
        replace(config, codec_from=config.out)


def test_what_is_no_cache_is_refused(config, tmp_path):
    with pytest.raises(CacheMissError, match=r"nowhere\.zarr is not a cache"):
        build(replace(config, codec_from=tmp_path / "nowhere.zarr"))
    assert not config.out.exists()


def test_a_damaged_state_is_named_before_the_teacher_is_loaded(config, other, tmp_path):
    damaged = tmp_path / "damaged.zarr"
    shutil.copytree(other, damaged)
    file = damaged / "attention/state/shrink_L3/c/0/0"
    file.write_bytes(file.read_bytes()[::-1])
    with pytest.raises(CorruptCacheError, match=r"damaged\.zarr/attention/state/shrink_L3/c/0/0 is damaged"):
        build(replace(config, codec_from=damaged, weights=Path("nowhere.pth")))
    shutil.rmtree(damaged / "attention/state/shrink_L3")
    with pytest.raises(CorruptCacheError, match=r"damaged\.zarr/attention/state"):
        build(replace(config, codec_from=damaged, weights=Path("nowhere.pth")))


def test_the_command_line_takes_it_and_refuses_in_one_sentence(config, other):
    refused = run_cli(config, codec_from=str(other), codec="int8")
    assert refused.exit_code == 1
    assert refused.stderr.splitlines()[-1].startswith(f"Error: codec_from={other} and codec=int8: ")
    assert not config.out.exists()
    result = run_cli(config, codec_from=str(other), seed="7")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["complete"]["num_stored"] == 16
    assert state_of(config.out) == state_of(other)
