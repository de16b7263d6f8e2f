"""A cache of the class token's rows, from the command to the student: built, read, verified, learnt from."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import atcache
from atcache.cli.main import cli
from atcache.errors import AttentionShapeError, CacheMismatchError, CacheMissError, CodecError, ConfigError
from atcache.pipelines.build.config import BuildConfig
from atcache.pipelines.build.run import build
from atcache.pipelines.plan.config import PlanConfig
from atcache.pipelines.plan.run import plan
from atcache.pipelines.train.config import TrainConfig
from atcache.pipelines.train.run import train
from atcache.pipelines.verify.config import VerifyConfig
from atcache.pipelines.verify.run import verify

NO_CLASS_TOKEN = (
    "vit_tiny_patch16_224:img_size=8,patch_size=2,embed_dim=32,depth=2,num_heads=2,num_classes=10,class_token=False,"
    "global_pool=avg"
)


@pytest.fixture
def path(tiny_cache):
    return tiny_cache(codec=None, queries="cls")


@pytest.fixture
def cache(path):
    return atcache.open(path)


def test_the_rows_are_those_of_the_whole_maps_to_the_bit(cache, tiny_cache):
    whole = atcache.open(tiny_cache(codec="logmap"))
    assert cache.codec == whole.codec
    assert cache.queries == (0,)
    assert whole.queries == tuple(range(17))
    for layer in (0, 1):
        rows_VSHQK, attn_VSHQK = cache.maps(layer), whole.maps(layer)
        assert rows_VSHQK.shape == (1, 48, 2, 1, 17)
        assert np.array_equal(rows_VSHQK.compute(), attn_VSHQK[:, :, :, :1].compute())
    assert np.array_equal(cache.view(3).maps_LHQK, whole.view(3).maps_LHQK[:, :, :1])
    assert np.array_equal(cache.image(3), whole.image(3))
    with pytest.raises(CacheMissError, match=r"holds maps \(codec logmap\), so it has no q and k"):
        cache.factors(0)


def test_xarray_says_whose_rows_they_are(cache):
    attn = cache.to_xarray(layer=1)
    assert attn.coords["query"].values.tolist() == [0]
    assert np.array_equal(attn.sel(query=0).values, cache.maps(1)[:, :, :, 0].compute())


def test_statistics_take_the_rows(cache):
    tokens, rows_SHQK = cache.geometry.tokens, cache.maps(0)[0]
    grid_SHQYX = atcache.stats.patch_grid(rows_SHQK, tokens).compute()
    assert grid_SHQYX.shape == (48, 2, 1, 4, 4)
    assert np.array_equal(grid_SHQYX[5, 1, 0].ravel(), rows_SHQK[5, 1, 0, 1:].compute())
    assert 0 < float(atcache.stats.attention_entropy(rows_SHQK).mean().compute()) < np.log2(17)
    with pytest.raises(AttentionShapeError, match="none of them a patch"):
        atcache.stats.mean_attention_distance(rows_SHQK, tokens, cache.queries)


def test_info_and_the_plan_count_rows(path, cache):
    about = cache.describe()
    assert (about["num_queries"], about["num_tokens"]) == (1, 17)
    assert about["map_nbytes_per_view"] == 2 * 2 * 17 * 2
    shown = CliRunner().invoke(cli, ["info", str(path)]).output
    assert "2 layers (0-1) x 2 heads (0-1) x 1 of 17 rows" in shown


def test_all_prefix_tokens_have_a_row(tmp_path, digits_build, digits_tars):
    registers = digits_build.teacher + ",reg_tokens=3"
    config = replace(digits_build, teacher=registers, weights=weights_of(registers, tmp_path), queries="prefix")
    build(config)
    cache = atcache.open(config.out)
    assert cache.queries == (0, 1, 2, 3)
    assert cache.maps(0).shape == (1, 48, 2, 4, 20)
    build(replace(config, queries="all", codec="exact:dtype=float32", out=tmp_path / "whole.zarr"))
    whole_VSHQK = atcache.open(tmp_path / "whole.zarr").maps(1)[:, :, :, :4].compute()
    assert np.allclose(cache.maps(1).compute(), whole_VSHQK, atol=0.05)


def weights_of(teacher, folder):
    from safetensors.torch import save_file

    from atcache.teachers.load import create_student
    from atcache.teachers.names import parse_model_name

    torch.manual_seed(0)
    weights = create_student(parse_model_name(teacher), num_classes=10).state_dict()
    save_file({name: one * 8 if "qkv.weight" in name else one for name, one in weights.items()}, folder / "w.st")
    return folder / "w.st"


def test_a_build_that_was_stopped_continues_to_the_same_bytes(digits_build, tmp_path):
    config = replace(digits_build, queries="cls")
    build(config)
    stopped = replace(config, out=tmp_path / "stopped.zarr")
    build(stopped)
    (stopped.out / "commits/v0000-b000002.json").unlink()
    build(stopped)
    for file in sorted(config.out.rglob("*")):
        if file.is_file():
            assert (stopped.out / file.relative_to(config.out)).read_bytes() == file.read_bytes(), file


def test_a_cache_of_other_rows_is_not_continued(digits_build):
    build(replace(digits_build, queries="cls"))
    with pytest.raises(CacheMismatchError, match=r"selection\.queries is 'cls' there and None here"):
        build(replace(digits_build, codec="logmap"))


def test_the_teacher_verifies_its_rows(path, tiny_vit, tiny_weights):
    summary = verify(VerifyConfig(cache=path, teacher=tiny_vit, weights=tiny_weights, teacher_sample=8, device="cpu"))
    assert [finding.message for finding in summary.problems] == []
    assert summary.fidelity is not None
    assert 0 < summary.fidelity.row_kl_nats < 0.002
    assert 0 < summary.fidelity.injected_error < 0.02


# Students


@pytest.fixture
def config_for(path, tmp_path):
    def config_for(**fields):
        common = {"mode": "distill", "cache": path, "out": tmp_path / "run", "steps": 3, "batch_size": 8}
        return TrainConfig(**{**common, "workers": 0, "device": "cpu", "precision": "fp32", **fields})

    return config_for


def test_a_student_is_distilled_from_the_rows_as_from_the_running_teacher(config_for, tiny_weights, tmp_path):
    losses = []
    for live in (False, True):
        teacher = {"live_teacher": True, "weights": tiny_weights} if live else {}
        config = config_for(out=tmp_path / f"live-{live}", **teacher)
        train(config)
        lines = (config.out / "metrics.jsonl").read_text().splitlines()
        losses.append([row["attention_loss"] for row in map(json.loads, lines) if "attention_loss" in row])
    assert losses[0]
    assert losses[0] == pytest.approx(losses[1], abs=0.01)
    assert losses[0] != losses[1]


def test_batches_bring_the_rows_and_a_made_student_takes_them(path, cache):
    batch = next(iter(atcache.batches(path, batch_size=4, device="cpu")))
    rows_BHQK = batch.attention.layer(1).maps()
    expected = np.stack([cache.view(int(sample)).maps_LHQK[1] for sample in batch.sample])
    assert np.array_equal(rows_BHQK.numpy(), expected)
    student = atcache.make_student(path, "distill")
    _, loss = student(batch.images, batch.attention)
    loss.backward()
    assert torch.isfinite(loss)
    assert all(torch.isfinite(one.grad).all() for one in student.parameters() if one.grad is not None)


def test_what_needs_whole_maps_is_refused_before_any_work(config_for, path):
    copies = r"student that copies needs the rows of all tokens, and the cache keeps only rows of maps .*--queries cls"
    with pytest.raises(ConfigError, match=copies):
        train(config_for(mode="copy"))
    with pytest.raises(ConfigError, match=copies):
        atcache.make_student(path, "copy")
    with pytest.raises(ConfigError, match=r"--what q needs q and k, and the cache keeps only rows"):
        train(config_for(what="q"))
    assert not config_for().out.exists()


def test_caches_of_different_rows_do_not_teach_one_student(path, digits_build, tmp_path):
    build(replace(digits_build, codec="logmap"))
    with pytest.raises(CacheMismatchError, match=r"geometry\.queries is 'cls' in .* and None in "):
        atcache.batches([path, digits_build.out], batch_size=4)


# Builds that are refused


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"store": "v"}, ConfigError, "queries=cls and store=v: v is stored beside q and k only"),
        ({"codec": "int8"}, CodecError, "codec int8 stores what whole maps are made from.* Use --codec logmap"),
        ({"codec": "transform"}, CodecError, "codec transform stores what whole maps are made from"),
    ],
)
@pytest.mark.parametrize("config", [BuildConfig, PlanConfig])
def test_what_does_not_go_with_rows_is_refused_before_a_model_is_loaded(config, fields, error, message, tmp_path):
    fields = {"codec": (fields["codec"],)} if config is PlanConfig and "codec" in fields else fields
    common = {"teacher": "nowhere", "data": "nowhere.tar", "out": tmp_path / "none.zarr", "queries": "cls"}
    with pytest.raises(error, match=message):
        config(**{**common, **fields})


@pytest.mark.parametrize("target", [{"target_kl": 0.01}, {"budget": "1GB"}])
def test_rows_take_no_target(digits_build, target):
    with pytest.raises(ConfigError, match="codec logmap takes no target"):
        build(replace(digits_build, queries="cls", **target))


def test_a_teacher_without_a_class_token_is_refused(digits_build, tmp_path):
    config = replace(digits_build, teacher=NO_CLASS_TOKEN, weights=weights_of(NO_CLASS_TOKEN, tmp_path), queries="cls")
    with pytest.raises(ConfigError, match="queries=cls: vit_tiny_patch16_224 attends with no prefix tokens"):
        build(config)
    assert not config.out.exists()


def test_plan_measures_rows(digits_build):
    shared = {name: getattr(digits_build, name) for name in ("teacher", "weights", "data", "device", "precision")}
    assumed = ("teacher-img-per-s=100", "student-img-per-s=100", "disk-read-gb-per-s=1", "disk-write-gb-per-s=1")
    config = PlanConfig(**shared, queries="cls", mode="distill", assume=assumed, policy="eval")
    (assessment,) = plan(config).assessments
    assert assessment.cost.codec == "logmap"
    assert assessment.cost.map_nbytes_per_view == 2 * 2 * 17 * 2
    with pytest.raises(ConfigError, match=r"queries=cls and mode=copy: .* Give --mode distill"):
        replace(config, mode="copy")
