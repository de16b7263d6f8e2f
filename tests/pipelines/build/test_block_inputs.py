"""`build --store x`: what attention and MLP of each layer get is stored, read, checked and handed out in batches."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from click.testing import CliRunner

import atcache
from atcache.attention.capture import FactorCapture, check_capture
from atcache.cli.main import cli
from atcache.errors import CacheMissError, CodecError, ConfigError
from atcache.pipelines.build.config import BuildConfig
from atcache.pipelines.build.run import build
from atcache.pipelines.plan.config import PlanConfig
from atcache.pipelines.verify.config import VerifyConfig
from atcache.pipelines.verify.run import verify
from atcache.store.manifest import read_commits
from atcache.teachers.inputs import normalise_images
from atcache.teachers.load import load_teacher

# The most a value may be off, as a share of its vector's largest: half a step, and float16's rounding.
BOUND = {"exact:dtype=float32": 1e-6, "exact": 2**-11, "int8": 1 / 254 + 2**-11}


def own_inputs(model, images):
    """What timm's own norms before attention and MLP return, inputs_BNTC of each block."""
    seen: dict[int, list[torch.Tensor]] = {}
    handles = []
    for layer, block in enumerate(model.blocks):
        for norm in (block.norm1, block.norm2):
            handles.append(
                norm.register_forward_hook(lambda _n, _a, out, at=layer: seen.setdefault(at, []).append(out))
            )
    with torch.no_grad():
        model.forward_features(images)
    for handle in handles:
        handle.remove()
    return [torch.stack(seen[layer], dim=1) for layer in sorted(seen)]


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("vit_tiny_patch16_224", {}),
        ("vit_small_patch14_reg4_dinov2", {"img_size": 42}),
        ("beitv2_base_patch16_224", {}),
        ("vit_small_patch16_dinov3", {}),
    ],
)
def test_what_is_captured_is_what_the_norms_return_up_to_the_last_layer(name, arguments):
    torch.manual_seed(0)
    model = timm.create_model(name, **{"img_size": 48, "depth": 3, **arguments}).eval()
    images = torch.randn(2, 3, *model.patch_embed.img_size)
    expected = own_inputs(model, images)
    check = check_capture(model, images, layers=[0, 2], with_block_inputs=True)
    assert check.geometry.input_width == model.embed_dim
    capture = FactorCapture(model, layers=[0, 2], with_block_inputs=True)
    for _ in range(2):  # the second time it stops after the last layer's MLP was called
        for layer, factors in zip((0, 2), capture(images), strict=True):
            torch.testing.assert_close(factors.inputs_BNTC, expected[layer])
    assert not any(module._forward_pre_hooks for module in model.modules())
    without = FactorCapture(model, layers=[0, 2])(images)
    assert all(torch.equal(one.q_BHTD, other.q_BHTD) for one, other in zip(capture(images), without, strict=True))
    assert without[0].inputs_BNTC is None


@pytest.mark.parametrize("name", ["vit_pwee_patch16_reg1_gap_256", "vit_small_patch16_18x2_224"])
def test_blocks_without_attention_and_mlp_of_their_own_are_refused(name):
    model = timm.create_model(name, img_size=48, depth=1)
    with pytest.raises(ConfigError, match=r"store=x: a block of \w+ \(\w+\) has no `\.attn` and `\.mlp` of its own"):
        FactorCapture(model, with_block_inputs=True)


@pytest.fixture
def path(tiny_cache):
    return tiny_cache(codec=None, store="x")


@pytest.mark.parametrize("codec", [None, *BOUND])
def test_they_come_back_within_what_the_codec_rounds(tiny_cache, tiny_vit, tiny_weights, codec):
    cache = atcache.open(tiny_cache(codec=codec, store="x"))
    assert cache.codec.name == ("int8" if codec is None else codec.partition(":")[0])
    teacher = load_teacher(tiny_vit, weights=tiny_weights)
    pixels = torch.from_numpy(np.stack([cache.image(sample) for sample in range(8)]))
    live = own_inputs(teacher.model, normalise_images(pixels, teacher.input.mean, teacher.input.std, "cpu"))
    for layer in (0, 1):
        for number, of in enumerate(("attention", "mlp")):
            x_VSTC = cache.inputs(layer, of=of)
            assert x_VSTC.shape == (1, 48, 17, 32)
            expected = live[layer][:, number].numpy()
            bound = BOUND[codec or "int8"] * np.abs(expected).max(axis=-1, keepdims=True) + 1e-5
            assert (np.abs(x_VSTC[0, :8].compute() - expected) <= bound).all()
    view = cache.view(3)
    assert view.inputs_LNTC.shape == (2, 2, 17, 32)
    assert np.array_equal(view.inputs_LNTC[1, 1], cache.inputs(1, of="mlp")[0, 3].compute())


def test_maps_are_those_of_a_cache_without_them(path, tiny_cache):
    cache, plain = atcache.open(path), atcache.open(tiny_cache(codec="int8"))
    assert np.array_equal(cache.maps(1).compute(), plain.maps(1).compute())
    assert cache.geometry == replace(plain.geometry, input_width=32)
    with pytest.raises(CacheMissError, match=r"holds no inputs of attention and MLP\. Build it with --store x"):
        plain.inputs(0, of="mlp")
    assert plain.view(0).inputs_LNTC is None
    with pytest.raises(CacheMissError, match="'q' are never stored: expected one of attention, mlp"):
        cache.inputs(0, of="q")  # pyright: ignore[reportArgumentType]


def test_the_documented_reader_gives_them_without_atcache(path):
    page = (Path(__file__).parents[3] / "docs" / "format.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    names: dict[str, Any] = {}
    exec(code, names)
    inputs_LNTC = atcache.open(path).view(5).inputs_LNTC
    for position in (0, 1):
        assert np.array_equal(names["read_inputs"](path, 0, 5, position), inputs_LNTC[position])


def test_batches_bring_them_and_students_learn_beside_them(path):
    cache = atcache.open(path)
    batch = next(iter(atcache.batches(path, batch_size=4, device="cpu")))
    for row, sample in enumerate(batch.sample.tolist()):
        inputs_NTC = batch.attention.layer(1).inputs_BNTC[row]
        assert np.array_equal(inputs_NTC.numpy(), cache.view(sample).inputs_LNTC[1])
    for mode in ("copy", "distill"):
        atcache.make_student(path, mode)(batch.images, batch.attention)


def test_caches_with_and_without_them_teach_one_student(tiny_cache, digits_build, digits_tars):
    first = replace(digits_build, data=str(digits_tars[0]), codec="int8", store="x")
    second = replace(first, data=str(digits_tars[1]), store=None, out=first.out.with_name("second.zarr"))
    build(first)
    build(second)
    both = next(iter(atcache.batches([first.out, second.out], batch_size=32, device="cpu"))).attention.layer(0)
    assert both.inputs_BNTC is None
    assert both.maps().shape == (32, 2, 17, 17)


def test_their_error_is_measured_recorded_and_verified(path, tiny_vit, tiny_weights):
    cache = atcache.open(path)
    calibration = cache.record.calibration
    assert 0 < calibration.x_error < 0.01
    assert calibration.x_error == pytest.approx(np.mean([card.x_error for card in calibration.layers]))
    assert all(0 < commit.quality["x_error"] < 0.01 for commit in read_commits(path).values())
    shown = CliRunner().invoke(cli, ["info", str(path)]).output
    assert "x 17 tokens, with x" in shown
    assert re.search(r"^x +off by 0\.00\d+ on average", shown, re.MULTILINE)
    assert re.search(r"with decoded maps, x off by 0\.00\d+; on", shown)
    summary = verify(VerifyConfig(cache=path, teacher=tiny_vit, weights=tiny_weights, teacher_sample=8, device="cpu"))
    assert [finding.message for finding in summary.problems] == []
    assert summary.fidelity is not None
    assert 0 < summary.fidelity.x_error <= summary.fidelity.worst_x_error < summary.fidelity.x_error_limit


@pytest.mark.parametrize("codec", ["transform", "logmap"])
def test_codecs_of_maps_refuse_them_before_any_work(codec, digits_build):
    with pytest.raises(CodecError, match=f"codec {codec} stores only .*, and x is not part of that.* int8 or exact"):
        build(replace(digits_build, codec=codec, store="x"))
    with pytest.raises(CodecError, match="and x is not part of that"):
        PlanConfig(teacher="nowhere", data="nowhere.tar", codec=(codec,), store="x")
    assert not digits_build.out.exists()


def test_rows_have_none_beside_them(tmp_path):
    with pytest.raises(ConfigError, match="queries=cls and store=x: x is stored beside q and k only"):
        BuildConfig(teacher="nowhere", data="nowhere.tar", out=tmp_path / "none.zarr", queries="cls", store="x")
