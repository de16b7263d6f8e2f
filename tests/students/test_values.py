"""v, stored on demand and transferred: built, looked at, verified, planned for, trained from and validated with."""

from __future__ import annotations

import copy
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from made_factors import equal_pairing
from safetensors.torch import load_file, save_file
from training_runs import assert_equal_weights, run_until_killed

import atcache
from atcache.attention.blocks import find_blocks
from atcache.attention.capture import FactorCapture
from atcache.attention.intercept import AttentionIntercept
from atcache.cli.main import cli
from atcache.errors import CacheMismatchError, CodecError, ConfigError, TeacherError
from atcache.pipelines.build.config import BuildConfig
from atcache.pipelines.build.run import build
from atcache.pipelines.evaluate.config import EvaluateConfig
from atcache.pipelines.evaluate.run import evaluate
from atcache.pipelines.plan.config import PlanConfig
from atcache.pipelines.plan.run import plan
from atcache.pipelines.train.config import TrainConfig
from atcache.pipelines.train.run import train
from atcache.pipelines.verify.config import VerifyConfig
from atcache.pipelines.verify.run import verify
from atcache.students.copy import CopyStudent
from atcache.students.teacher_side import CachedFactors
from atcache.teachers.inputs import normalise_images
from atcache.teachers.load import create_student, load_teacher
from atcache.teachers.names import parse_model_name

EXACT = "exact:dtype=float32"
CAIT = "cait_xxs24_224:img_size=8,patch_size=2,embed_dim=32,depth=2,num_heads=2,num_classes=10"


@pytest.fixture
def values_cache(tiny_cache):
    """A function: fields of the build -> a cache of the tiny teacher with v."""
    return lambda **fields: tiny_cache(**{"codec": EXACT, "store": "v", **fields})


@pytest.fixture
def config_for(values_cache, tmp_path):
    numbers = iter(range(100))

    def config_for(mode, **fields) -> TrainConfig:
        common = {"out": tmp_path / f"run-{next(numbers)}", "steps": 6, "batch_size": 24, "base_lr": 2e-2}
        recipe = {"device": "cpu", "precision": "fp32", "validate_every": 0, "what": "v"}
        fields.setdefault("cache", values_cache())
        return TrainConfig(mode=mode, **{**common, **recipe, **fields})

    return config_for


def eval_of(config, **fields):
    return evaluate(EvaluateConfig(runs=(config.out,), device="cpu", precision="fp32", batch_size=24, **fields)).score


@pytest.fixture
def live(tiny_vit, tiny_weights):
    """The teacher, and what it takes of the views of a cache that stores pixels."""
    teacher = load_teacher(tiny_vit, weights=tiny_weights)

    def images_of(cache, samples):
        pixels = torch.stack([torch.from_numpy(cache.image(sample)) for sample in samples])
        return normalise_images(pixels, teacher.input.mean, teacher.input.std, torch.device("cpu"))

    return teacher, images_of


# The cache


def test_stored_values_are_the_teachers_and_a_lazy_array(values_cache, live):
    cache = atcache.open(values_cache(pixels="store"))
    teacher, images_of = live
    captured = FactorCapture(teacher.model, with_values=True)(images_of(cache, range(8)))
    for layer, factors in zip((0, 1), captured, strict=True):
        v_VSHTD = cache.factors(layer).v_VSHTD
        assert v_VSHTD.shape == (1, 48, 2, 17, 16)
        np.testing.assert_allclose(v_VSHTD[0, :8].compute(), factors.v_BHTD, atol=1e-5)
        assert np.array_equal(v_VSHTD[0, 5, 1].compute(), v_VSHTD[0].compute()[5, 1])


def test_a_cached_v_as_a_students_is_the_teachers_own_path(values_cache, live):
    # The teacher as its own student: with every layer's v, and then q and k too, from float32 codes.
    cache = atcache.open(values_cache(pixels="store"))
    teacher, images_of = live
    images = images_of(cache, range(4))
    codes_BLTC = torch.from_numpy(np.stack([cache.reader.read_codes(0, sample) for sample in range(4)]))
    with torch.no_grad():
        expected = teacher.model(images)
        for what in ("v", "qkv"):
            model = copy.deepcopy(teacher.model)
            student = CopyStudent(model, find_blocks(model), equal_pairing(cache.geometry, what=what))
            logits = student(images, CachedFactors(cache.coder, codes_BLTC))
            torch.testing.assert_close(logits, expected, atol=1e-6, rtol=1e-5)


def test_maps_do_not_change_with_v_beside_them(tiny_cache, values_cache):
    for codec in (EXACT, "int8"):
        without, with_v = (atcache.open(cache) for cache in (tiny_cache(codec=codec), values_cache(codec=codec)))
        assert np.array_equal(without.maps(1).compute(), with_v.maps(1).compute())
        assert without.factors(1).v_VSHTD is None
        assert with_v.reader.layout.num_components > without.reader.layout.num_components


def test_only_chosen_heads_and_layers_keep_their_v(values_cache):
    whole, part = (atcache.open(values_cache(**chosen)) for chosen in ({}, {"layers": "1", "heads": "1"}))
    assert np.array_equal(part.factors(1).v_VSHTD.compute(), whole.factors(1).v_VSHTD.compute()[:, :, 1:])


def test_the_codec_is_int8_unless_named_and_the_error_of_v_is_told(values_cache):
    path = values_cache(codec=None)
    cache = atcache.open(path)
    assert cache.codec.name == "int8"
    exact = atcache.open(values_cache()).factors(0).v_VSHTD[0, 0].compute()
    rebuilt = cache.factors(0).v_VSHTD[0, 0].compute()
    assert 0 < np.abs(rebuilt - exact).max() < np.abs(exact).max() / 200
    measured = cache.attributes["calibration"]["v_error"]
    assert 1e-3 < measured < 1e-2
    assert cache.attributes["complete"]["quality"]["v_error"]["mean"] == pytest.approx(measured, rel=0.2)
    assert [card["v_error"] for card in cache.attributes["calibration"]["layers"]] == pytest.approx(
        [measured, measured], rel=0.3
    )
    printed = CliRunner().invoke(cli, ["info", str(path)]).output
    assert "x 17 tokens, with v" in printed
    assert f"with decoded maps, v off by {measured:.2g}; on" in printed


def test_a_plan_counts_v_and_is_what_the_build_takes(values_cache, tiny_vit, tiny_weights, digits_tars, tmp_path):
    data = str(digits_tars[0].parent)
    common = {"teacher": tiny_vit, "weights": tiny_weights, "data": data, "device": "cpu", "precision": "fp32"}
    assume = ("teacher-img-per-s=100", "student-img-per-s=100", "disk-read-gb-per-s=1", "disk-write-gb-per-s=1")

    def sizes(store):
        made = plan(PlanConfig(**common, workers=0, store=store, assume=assume, out=tmp_path))
        return {one.cost.codec: one.cost.nbytes_per_view for one in made.assessments}

    without, with_v = sizes(None), sizes("v")
    assert set(with_v) == {"exact", "int8"}
    # Half as much again: v is as large as q and as k.
    assert [with_v[name] / without[name] for name in with_v] == pytest.approx([1.5, 1.5], rel=0.05)
    dry = build(BuildConfig(**common, workers=0, store="v", out=tmp_path / "dry.zarr", dry_run=True)).plan
    cache = atcache.open(values_cache(codec=None)).describe()
    assert dry.nbytes_per_view == pytest.approx(cache["nbytes_per_view"], rel=0.05)
    assert dry.v_error == pytest.approx(atcache.open(values_cache(codec=None)).attributes["calibration"]["v_error"])


def test_a_damaged_coding_of_v_is_noticed_though_the_maps_are_right(values_cache, tiny_vit, tiny_weights, tmp_path):
    path = shutil.copytree(values_cache(codec="int8"), tmp_path / "v.zarr")
    config = VerifyConfig(cache=path, teacher=tiny_vit, weights=tiny_weights, device="cpu", sample=0)
    summary = verify(config)
    assert summary.problems == ()
    assert 0 < summary.fidelity.v_error <= summary.fidelity.v_error_limit
    about = json.loads((path / "zarr.json").read_text())
    # As if the build had coded v ten times as well as what is stored.
    about["attributes"]["atcache"]["calibration"]["v_error"] /= 10
    del about["attributes"]["atcache"]["crc32"]
    (path / "zarr.json").write_text(json.dumps(about))
    found = [finding.message for finding in verify(config).problems]
    assert len(found) == 1
    assert "decoded v is off by" in found[0]


def test_a_cache_with_v_is_not_continued_without_it(values_cache, tiny_vit, tiny_weights, digits_tars):
    fields = {"teacher": tiny_vit, "weights": tiny_weights, "data": str(digits_tars[0].parent), "codec": EXACT}
    with pytest.raises(CacheMismatchError, match=r"selection.store is 'v' there and None here"):
        build(BuildConfig(**fields, out=values_cache(), device="cpu", precision="fp32", workers=0))


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"codec": "transform"}, CodecError, "codec transform stores only what the maps .*Use --codec int8 or exact"),
        ({"codec": "logmap"}, CodecError, "codec logmap stores only what the maps are made from"),
        ({"target_kl": 0.01}, ConfigError, "codec int8 takes no target"),
        ({"teacher": CAIT}, ConfigError, "store=v: this teacher hands over maps.*Leave --store out"),
    ],
)
def test_v_that_cannot_be_stored_is_refused_before_anything_is_written(
    fields, error, message, tiny_vit, tiny_weights, digits_tars, tmp_path
):
    if fields.get("teacher") == CAIT:
        fields = {**fields, "weights": cait_weights(tmp_path)}
    common = {"teacher": tiny_vit, "weights": tiny_weights, "data": str(digits_tars[0].parent), "store": "v"}
    with pytest.raises(error, match=message):
        build(BuildConfig(**{**common, **fields}, out=tmp_path / "no.zarr", device="cpu", workers=0))
    assert not (tmp_path / "no.zarr").exists()


def cait_weights(folder: Path) -> Path:
    path = folder / "cait.safetensors"
    save_file(create_student(parse_model_name(CAIT), num_classes=10).state_dict(), path)
    return path


# Training


@pytest.mark.parametrize("what", ["v", "qkv"])
@pytest.mark.parametrize("mode", ["copy", "distill"])
def test_v_is_transferred_validated_and_evaluated_from_caches(mode, what, config_for, values_cache):
    val_cache = values_cache(policy="eval")
    config = config_for(mode, what=what, val_cache=val_cache)
    score = train(config).validation
    assert eval_of(config, cache=val_cache) == score
    run = json.loads((config.out / "run.json").read_text())
    assert run["record"]["pairing"]["what"] == run["settings"]["what"] == what
    shapes = {name: tuple(tensor.shape) for name, tensor in load_file(config.out / "model.safetensors").items()}
    rows = {"copy v": 64, "copy qkv": None, "distill v": 96, "distill qkv": 96}[f"{mode} {what}"]
    assert shapes.get("blocks.1.attn.qkv.weight") == (None if rows is None else (rows, 32))


def test_what_a_student_copies_of_v_is_what_its_record_says(config_for, values_cache):
    # Second opinion: the saved weights in a plain timm model whose v is the cache's, head by head.
    import timm

    val_cache = values_cache(policy="eval", pixels="store")
    student = "vit_tiny_patch16_224:img_size=8,patch_size=2,embed_dim=16,depth=3,num_heads=1"
    config = config_for("copy", student=student, layer_map="0:1,2:0", head_map="1", val_cache=val_cache)
    score = train(config).validation
    weights = load_file(config.out / "model.safetensors")
    for block in (0, 2):
        for part in ("weight", "bias"):
            name = f"blocks.{block}.attn.qkv.{part}"
            weights[name] = torch.cat([weights[name], torch.zeros_like(weights[name][:16])])
    plain = timm.create_model(
        "vit_tiny_patch16_224", img_size=8, patch_size=2, embed_dim=16, depth=3, num_heads=1, num_classes=10
    ).eval()
    plain.load_state_dict(weights)
    cache = atcache.open(val_cache)
    v_SHTD = {block: torch.from_numpy(cache.factors(of).v_VSHTD[0, :, 1:].compute()) for block, of in ((0, 1), (2, 0))}
    pixels = torch.stack([torch.from_numpy(cache.image(sample)) for sample in range(48)])
    mean, std = (plain.pretrained_cfg[name] for name in ("mean", "std"))

    def attend(call):
        scores = torch.softmax(call.query @ call.key.mT * call.scale, dim=-1)
        return scores @ v_SHTD.get(call.block, call.value)

    with torch.no_grad(), AttentionIntercept(plain.blocks, attend):
        logits = plain(normalise_images(pixels, mean, std, torch.device("cpu")))
    loss = torch.nn.functional.cross_entropy(logits, torch.from_numpy(cache.reader.labels_S))
    assert score.loss == pytest.approx(float(loss), rel=1e-4)


@pytest.mark.parametrize("cached", [{}, {"store": None}])
def test_a_live_teacher_gives_the_v_that_the_cache_gives(cached, config_for, values_cache, tiny_weights, digits_tars):
    val_data = str(digits_tars[0].parent)
    from_cache = config_for("copy", val_cache=values_cache(policy="eval"), heads="1")
    running = config_for(
        "copy", cache=values_cache(**cached), live_teacher=True, weights=tiny_weights, val_data=val_data, heads="1"
    )
    scores = [train(config).validation for config in (from_cache, running)]
    assert scores[1].loss == pytest.approx(scores[0].loss, rel=1e-4)
    losses = [
        train(config_for("distill", cache=config.cache, live_teacher=config.live_teacher, weights=config.weights)).loss
        for config in (from_cache, running)
    ]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_a_run_that_was_killed_continues_to_the_same_weights(config_for):
    whole = config_for("copy", ema=0.9, steps=40, checkpoint_every=7)
    died = replace(whole, out=whole.out.with_name("died"))
    run_until_killed(died)
    for config in (whole, died):
        train(config)
    assert_equal_weights(died, whole)
    with pytest.raises(CacheMismatchError, match="what is 'v' there and 'map' here"):
        train(replace(died, what="map"))


def test_caches_with_and_without_v_go_together_where_none_is_wanted(config_for, tiny_cache, digits_tars):
    parts = [
        tiny_cache(data=str(tar), codec=EXACT, store=store)
        for tar, store in zip(digits_tars, ("v", "v", None), strict=True)
    ]
    with_v, mixed = tuple(parts[:2]), tuple(parts[1:])
    assert train(config_for("copy", cache=with_v)).steps == 6
    assert train(config_for("distill", cache=mixed, what="qk")).steps == 6
    with pytest.raises(ConfigError, match=f"--what v needs the teacher's v, which {parts[2]} does not hold"):
        train(config_for("copy", cache=mixed))


@pytest.mark.parametrize("mode", ["copy", "distill"])
def test_a_cache_without_v_is_refused_for_training_and_for_validation(mode, config_for, tiny_cache):
    expected = r"--what v needs the teacher's v, which .* does not hold.*Build it with --store v"
    with pytest.raises(ConfigError, match=expected):
        train(config_for(mode, cache=tiny_cache(codec=EXACT)))
    if mode == "copy":
        with pytest.raises(ConfigError, match=expected):
            train(config_for(mode, val_cache=tiny_cache(codec=EXACT, policy="eval")))


def test_a_student_whose_v_is_of_another_width_is_refused(config_for):
    student = "vit_tiny_patch16_224:img_size=8,patch_size=2,embed_dim=16,depth=2,num_heads=2"
    with pytest.raises(TeacherError, match=r"has a v of 8 components a head, the teacher of 16\. --what v needs"):
        train(config_for("copy", student=student))
