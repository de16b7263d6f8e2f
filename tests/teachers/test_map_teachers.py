"""Teachers that hand over maps (CaiT, whose heads exchange logits): captured, stored, read and learnt from."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
from made_factors import equal_pairing
from safetensors.torch import load_file, save_file
from torch.nn import functional

import atcache
from atcache.attention.blocks import attention_kind, find_blocks
from atcache.attention.capture import FactorCapture, check_capture
from atcache.attention.factors import LayerFactors, LayerMaps
from atcache.attention.geometry import FactorGeometry
from atcache.errors import AttentionShapeError, CacheMissError, CodecError, UnsupportedAttentionError
from atcache.pipelines.build.config import BuildConfig
from atcache.pipelines.build.run import build
from atcache.pipelines.train.config import TrainConfig
from atcache.pipelines.train.run import train
from atcache.students.copy import CopyStudent
from atcache.students.distil import DistilledStudent
from atcache.students.given import ValueOnlyAttention
from atcache.students.teacher_side import LiveFactors
from atcache.teachers.inputs import normalise_images
from atcache.teachers.load import create_student, load_teacher
from atcache.teachers.names import parse_model_name

SMALL = {"img_size": 32, "patch_size": 8, "depth": 2, "embed_dim": 32, "num_heads": 4, "num_classes": 5}


def make_cait(seed=0):
    torch.manual_seed(seed)
    model = timm.create_model("cait_xxs24_224", **SMALL).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(part in name for part in ("bias", "gamma", "attn")):
                parameter.normal_(std=0.4)
    return model


@pytest.fixture
def images():
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def own_logits(model, images):
    """Logits of each block, computed from q, k and the mixing before the softmax, as the paper writes it."""
    logits, handles = [], []

    def keep(attention, args):
        tokens_BTC = args[0]
        q_BTC, k_BTC, _ = attention.qkv(tokens_BTC).chunk(3, dim=-1)
        q_BHTD, k_BHTD = (x.unflatten(2, (attention.num_heads, -1)).transpose(1, 2) for x in (q_BTC, k_BTC))
        plain_BHQK = attention.scale * q_BHTD @ k_BHTD.mT
        weight, bias = attention.proj_l.weight, attention.proj_l.bias
        logits.append(torch.einsum("gh,bhqk->bgqk", weight, plain_BHQK) + bias[:, None, None])

    for block in model.blocks:
        handles.append(block.attn.register_forward_pre_hook(keep))
    model(images)
    for handle in handles:
        handle.remove()
    return logits


def test_captured_maps_are_the_softmax_of_the_mixed_logits(images):
    model = make_cait()
    with torch.no_grad():
        expected = own_logits(model, images)
    for layer, logits_BHQK in zip(FactorCapture(model)(images), expected, strict=True):
        assert isinstance(layer, LayerMaps)
        torch.testing.assert_close(layer.maps(), logits_BHQK.softmax(-1), atol=1e-6, rtol=1e-5)
        assert float(layer.maps().max()) > 0.3, "maps near uniform would prove little"


def test_the_checked_geometry_says_maps_and_leaves_out_the_class_token(images):
    model = make_cait()
    geometry, bias_LHQK = check_capture(model, images)[:2]
    assert (attention_kind(model), geometry.kind, bias_LHQK) == ("maps", "maps", None)
    assert (geometry.layers, geometry.heads, geometry.tokens.num_prefix_tokens) == ((0, 1), (0, 1, 2, 3), 0)
    assert FactorGeometry.from_json(geometry.to_json()) == geometry
    chosen = FactorCapture(model, layers=[1], heads=[0, 2])
    (layer,) = chosen(images)
    torch.testing.assert_close(layer.maps(), FactorCapture(model)(images)[1].maps()[:, [0, 2]])
    assert check_capture(model, images, [1], [0, 2]).geometry.heads == (0, 2)


def test_geometries_of_factors_read_and_write_as_before_there_were_maps(images):
    geometry = check_capture(timm.create_model("vit_tiny_patch16_224", **SMALL).eval(), images).geometry
    assert "kind" not in geometry.to_json()
    assert FactorGeometry.from_json(geometry.to_json()).kind == "factors"


def test_under_autocast_rows_still_sum_to_one(images):
    model = make_cait()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        check_capture(model, images)
        (first, _) = FactorCapture(model)(images)
    assert torch.allclose(first.maps().sum(-1), torch.ones(()), atol=1e-5)


def test_a_block_that_does_something_else_with_its_maps_is_refused(images):
    model = make_cait()
    model.blocks[1].attn.attn_drop.register_forward_hook(lambda _module, _args, attn_BHQK: attn_BHQK.mT)
    with pytest.raises(UnsupportedAttentionError, match="in layer 1 maps, mixed, times v differs from the model's own"):
        check_capture(model, images)


@pytest.mark.parametrize("heads", [None, (1, 2)])
def test_copying_its_own_maps_changes_nothing(images, heads):
    model = make_cait()
    capture = FactorCapture(model, heads=heads)
    layers = dict(enumerate(capture(images)))
    own = copy.deepcopy(model)
    student = CopyStudent(own, find_blocks(own), equal_pairing(capture.geometry))
    torch.testing.assert_close(student(images, LiveFactors(layers)), model(images), rtol=1e-4, atol=1e-5)
    replaced = [isinstance(block.attn, ValueOnlyAttention) for block in own.blocks]
    assert replaced == [heads is None] * 2


def test_a_copying_student_uses_the_teachers_maps_and_learns_its_own_mixing(images):
    model, other = make_cait(), make_cait(7)
    capture = FactorCapture(other)
    given = LiveFactors(dict(enumerate(capture(images))))
    own = copy.deepcopy(model)
    student = CopyStudent(own, find_blocks(own), equal_pairing(capture.geometry))
    # Second opinion: logits whose softmax is the teacher's map, put in where the student mixes its own.
    for index, block in enumerate(model.blocks):
        log_attn_BHQK = given.layer(index).log_maps()
        block.attn.proj_l.register_forward_hook(lambda _m, _a, _o, log=log_attn_BHQK: log.permute(0, 2, 3, 1))
    torch.testing.assert_close(student(images, given), model(images), rtol=1e-4, atol=1e-5)
    student(images, given).square().sum().backward()
    assert [name for name, p in student.named_parameters() if p.grad is None] == []
    names = [name for name, _ in own.blocks.named_parameters()]
    assert "0.attn.mix.weight" in names
    assert not [name for name in names if "qkv" in name or "proj_l" in name]


@pytest.mark.parametrize("heads", [None, (1, 2)])
def test_distillation_is_the_cross_entropy_of_the_maps(images, heads):
    model, other = make_cait(), make_cait(7)
    capture = FactorCapture(other, heads=heads)
    layers = capture(images)
    student = DistilledStudent(model, find_blocks(model), equal_pairing(capture.geometry))
    own = [logits_BHQK[:, list(heads or range(4))] for logits_BHQK in own_logits(model, images)]
    expected = [-(t.maps() * s.log_softmax(-1)).sum(-1).mean() for t, s in zip(layers, own, strict=True)]
    logits, loss = student(images, LiveFactors(dict(enumerate(layers))))
    torch.testing.assert_close(loss, torch.stack(expected).mean())
    torch.testing.assert_close(logits, model(images))
    loss.backward()
    assert float(model.blocks[0].attn.proj_l.weight.grad.abs().sum()) > 0
    with pytest.raises(AttentionShapeError, match="expected the same"):
        student(images[:2], LiveFactors(dict(enumerate(layers))))


@pytest.mark.parametrize("mode", [CopyStudent, DistilledStudent])
def test_factors_teach_a_cait_and_maps_a_vit(images, mode):
    vit = timm.create_model("vit_tiny_patch16_224", **SMALL, class_token=False, global_pool="avg").eval()
    for teacher, student in ((vit, make_cait()), (make_cait(), vit)):
        capture = FactorCapture(teacher)
        layers = capture(images)
        own = copy.deepcopy(student)
        given = LiveFactors(dict(enumerate(layers)))
        wrapped = mode(own, find_blocks(own), equal_pairing(capture.geometry))(images, given)
        as_maps = LiveFactors({i: LayerMaps(attn_BHQK=layer.maps()) for i, layer in enumerate(layers)})
        own = copy.deepcopy(student)
        again = mode(own, find_blocks(own), equal_pairing(capture.geometry))(images, as_maps)
        torch.testing.assert_close(wrapped, again, rtol=1e-4, atol=1e-5)
        assert isinstance(layers[0], LayerFactors if teacher is vit else LayerMaps)


# From building to training

TINY = "cait_xxs24_224:img_size=8,patch_size=2,embed_dim=32,depth=2,num_heads=4,init_values=0.5,num_classes=10"
DIVERGENCE = {"logmap": 2e-3, "logmap:bits=8": 1e-4}


@pytest.fixture(scope="module")
def cait_weights(tmp_path_factory):
    torch.manual_seed(0)
    weights = create_student(parse_model_name(TINY), num_classes=10).state_dict()
    with torch.no_grad():
        for name, tensor in weights.items():
            if "proj_l.weight" in name or "proj_w.weight" in name:
                tensor.normal_(std=0.5).add_(torch.eye(4))
            if "qkv.weight" in name:
                tensor.mul_(16)
    path = tmp_path_factory.mktemp("weights") / "cait.safetensors"
    save_file(weights, path)
    return path


@pytest.fixture(scope="module")
def build_config(digits_tars, cait_weights, tmp_path_factory):
    return BuildConfig(
        teacher=TINY,
        weights=cait_weights,
        data=str(digits_tars[0].parent),
        out=tmp_path_factory.mktemp("caches") / "cait.zarr",
        codec="logmap",
        samples_per_shard=20,
        workers=0,
        device="cpu",
        precision="fp32",
    )


@pytest.fixture(scope="module")
def cait_cache(build_config):
    build(build_config)
    return build_config.out


@pytest.mark.parametrize("codec", DIVERGENCE)
def test_a_built_cache_holds_the_maps_the_teacher_attends_with(codec, build_config, tmp_path):
    config = replace(build_config, codec=codec, out=tmp_path / "cait.zarr")
    summary = build(config)
    cache = atcache.open(config.out)
    teacher = load_teacher(config.teacher, weights=config.weights)
    pixels = torch.from_numpy(np.stack([cache.image(sample) for sample in range(48)]))
    live = FactorCapture(teacher.model)(normalise_images(pixels, teacher.input.mean, teacher.input.std, "cpu"))
    for layer, maps in enumerate(live):
        stored_BHQK = torch.from_numpy(cache.maps(layer=layer)[0].compute())
        divergence = functional.kl_div(stored_BHQK.log(), maps.maps(), reduction="none").sum(-1)
        assert 0 < float(divergence.mean()) < DIVERGENCE[codec]
        assert torch.allclose(stored_BHQK.sum(-1), torch.ones(()), atol=1e-5)
        assert float(maps.maps().max()) > 0.3, "maps near uniform would prove little"
    assert summary.plan.row_kl_nats < DIVERGENCE[codec]
    assert 0 < summary.plan.injected_error < 0.1
    assert np.array_equal(cache.view(3).maps_LHQK[1], cache.maps(layer=1)[0, 3].compute())
    assert np.array_equal(cache.maps(layer=1, heads=[2, 0])[0, 5].compute(), cache.view(5).maps_LHQK[1, [2, 0]])
    with pytest.raises(CacheMissError, match=r"holds maps \(codec logmap\), so it has no q and k. Use maps\(\)"):
        cache.factors(layer=0)


def test_a_codec_of_q_and_k_is_refused_before_anything_is_written(build_config, tmp_path):
    config = replace(build_config, codec="int8", out=tmp_path / "cait.zarr")
    with pytest.raises(CodecError, match=r"codec int8 stores q and k, but this teacher's maps.*Use --codec logmap"):
        build(config)
    assert not config.out.exists()


@pytest.mark.parametrize("mode", ["copy", "distill"])
def test_a_student_trains_from_cached_maps_as_from_live_ones(mode, cait_cache, cait_weights, tmp_path):
    def trained(out, **fields):
        recipe = {"cache": cait_cache, "steps": 20, "batch_size": 24, "warmup_epochs": 1.0, "base_lr": 5e-2}
        common = {"device": "cpu", "precision": "fp32", "validate_every": 0}
        train(TrainConfig(mode=mode, out=tmp_path / out, **{**common, **recipe, **fields}))
        weights = load_file(tmp_path / out / "model.safetensors")
        return torch.cat([tensor.flatten() for _, tensor in sorted(weights.items())])

    fresh, cached = trained("fresh", base_lr=1e-9), trained("cached")
    live = trained("live", live_teacher=True, weights=cait_weights)
    assert float((cached - live).norm()) < 0.02 * float((live - fresh).norm())


def test_any_teachers_maps_can_be_stored_as_maps(tiny_cache):
    exact, logmap = (atcache.open(tiny_cache(codec=codec)) for codec in ("exact", "logmap:bits=8"))
    assert logmap.geometry.kind == "factors"
    for layer in (0, 1):
        attn, decoded = (cache.maps(layer=layer)[0].compute() for cache in (exact, logmap))
        assert 0 < float((attn * np.log(attn / decoded)).sum(-1).mean()) < 2e-4
