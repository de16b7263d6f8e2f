"""Caches of foreign teachers, from the build to a trained student."""

from __future__ import annotations

import json
import shutil
from functools import partial

import pytest
import torch
from builds import picture, write_tar
from foreign_models import (
    COLOURS,
    HandSoftmax,
    HandWrittenViT,
    MultiHead,
    PackedFused,
    eager_maps,
    heads_of,
    save_transformers,
)
from training_runs import batches_of, images_of, training_of

import atcache
from atcache.attention.capture import FactorCapture
from atcache.attention.factors import LayerMaps
from atcache.errors import CacheMismatchError, ConfigError, TeacherError
from atcache.pipelines.train.config import TrainConfig
from atcache.pipelines.train.run import train
from atcache.students.teacher_side import LiveFactors
from atcache.teachers.inputs import normalise_images
from atcache.teachers.load import load_teacher

STUDENT = "vit_tiny_patch16_224:img_size=32,patch_size=8,embed_dim=32,depth=2,num_heads=4"
QUICK = {"workers": 0, "device": "cpu", "precision": "fp32", "calibration_samples": 8}


@pytest.fixture(scope="module")
def tar(tmp_path_factory):
    samples = [{"jpg": picture(seed, side=40), "cls": str(seed % 3).encode()} for seed in range(12)]
    return write_tar(tmp_path_factory.mktemp("tars") / "train-0000.tar", samples)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_transformers(tmp_path_factory.mktemp("dinov2"), "dinov2")


@pytest.fixture(scope="module")
def cache(tar, folder, tmp_path_factory):
    """A cache of a DINOv2 of transformers, without loss."""
    out = tmp_path_factory.mktemp("caches") / "dinov2.zarr"
    atcache.build(teacher=f"transformers:{folder}", data=str(tar), out=out, codec="exact:dtype=float32", **QUICK)
    return out


def test_a_cache_of_transformers_holds_the_maps_of_transformers(cache, folder):
    opened = atcache.open(cache)
    view = opened.view(sample=3)
    input = load_teacher(f"transformers:{folder}").input
    pixels = torch.from_numpy(opened.image(3, 0))[None]
    expected = eager_maps(folder, "dinov2", normalise_images(pixels, input.mean, input.std, "cpu"))
    for layer, own_map in enumerate(expected):
        torch.testing.assert_close(torch.from_numpy(view.maps_LHQK[layer]), own_map[0], atol=2e-6, rtol=1e-4)


def test_a_cache_names_where_its_teacher_came_from(cache, folder):
    teacher = json.loads((cache / "zarr.json").read_text())["attributes"]["atcache"]["teacher"]
    assert teacher["name"] == f"transformers:{folder}"
    assert teacher["weights_from"] == folder.name
    assert len(teacher["weights_sha256"]) == 64
    assert teacher["input"]["mean"] == [0.5, 0.4, 0.3]


def test_the_teacher_verifies_its_cache(cache, folder, tmp_path):
    moved = shutil.copytree(folder, tmp_path / "moved")
    assert not atcache.verify(cache=cache, teacher=f"transformers:{moved}", device="cpu").problems
    other = save_transformers(tmp_path / "other", "dinov2", seed=5)
    with pytest.raises(
        CacheMismatchError, match=rf"teacher transformers:{other} from other has .*with: transformers:{folder}\."
    ):
        atcache.verify(cache=cache, teacher=f"transformers:{other}", device="cpu")


@pytest.mark.parametrize("mode", ["copy", "distill"])
def test_a_timm_student_is_given_the_maps_of_transformers(cache, folder, tmp_path, mode):
    common = {"epochs": 2, "batch_size": 4, "workers": 0, "device": "cpu", "precision": "fp32"}
    config = TrainConfig(mode=mode, cache=cache, out=tmp_path / "run", student=STUDENT, **common)
    run = training_of(config)
    (batch,) = batches_of(run)
    input = load_teacher(f"transformers:{folder}").input
    maps = eager_maps(folder, "dinov2", normalise_images(batch.pixels_BHWC, input.mean, input.std, "cpu"))
    given = run.data.teacher.factors(batch)
    for layer, attn_BHQK in enumerate(maps):
        torch.testing.assert_close(given.layer(layer).maps(), attn_BHQK, atol=2e-6, rtol=1e-4)
    # The first step's losses are those of a student to which transformers itself gives its maps.
    live = LiveFactors({layer: LayerMaps(attn_BHQK=attn_BHQK) for layer, attn_BHQK in enumerate(maps)})
    with torch.no_grad():
        expected = run.student.train_step(images_of(run, batch), batch.label_B, live, 0.0)
    found = run.train_step(batch)
    assert float(found["label_loss"]) == pytest.approx(float(expected[0]), rel=1e-4)
    if mode == "distill":
        assert float(found["attention_loss"]) == pytest.approx(float(expected[1]), rel=1e-4)
    assert train(config).steps == 6
    assert (tmp_path / "run" / "model.safetensors").exists()


def test_a_student_of_the_teachers_own_architecture_cannot_be_made(cache, tmp_path):
    with pytest.raises(TeacherError, match=r"only timm makes students, .* --student \(in Python student=\)"):
        atcache.train(mode="copy", cache=cache, out=tmp_path / "run", epochs=1, batch_size=4, workers=0, device="cpu")
    with pytest.raises(TeacherError, match="only timm makes students"):
        atcache.make_student(cache, "copy")
    with pytest.raises(ConfigError, match="mode finetune begins with the weights of the teacher, transformers:"):
        atcache.train(
            mode="finetune", cache=cache, out=tmp_path / "f", student=STUDENT, epochs=1, batch_size=4, device="cpu"
        )


@pytest.mark.parametrize("make", [PackedFused, MultiHead, HandSoftmax])
def test_a_teacher_of_ones_own_runs_in_bfloat16(tar, tmp_path, make):
    teacher = atcache.own_teacher(HandWrittenViT(make), image_size=32, patch_size=8, **COLOURS)
    atcache.build(teacher=teacher, data=str(tar), out=tmp_path / "own.zarr", **{**QUICK, "precision": "bf16"})
    assert not atcache.verify(cache=tmp_path / "own.zarr", teacher=teacher, device="cpu", threshold=3).problems


CODECS = ["transform", "int8", "logmap"]


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("make", [PackedFused, partial(HandSoftmax, style="einsum")], ids=["fused", "by hand"])
def test_a_module_of_ones_own_is_built_verified_and_continued(tar, tmp_path, codec, make):
    def teacher():
        return atcache.own_teacher(HandWrittenViT(make), image_size=32, patch_size=8, **COLOURS)

    out = tmp_path / "own.zarr"
    atcache.build(teacher=teacher(), data=str(tar), out=out, codec=codec, **QUICK)
    again = atcache.build(teacher=teacher(), data=str(tar), out=out, codec=codec, **QUICK)
    assert again.num_built_views == 0
    assert not atcache.verify(cache=out, teacher=teacher(), device="cpu", threshold=3).problems
    other = atcache.own_teacher(HandWrittenViT(MultiHead), image_size=32, patch_size=8, **COLOURS)
    with pytest.raises(CacheMismatchError, match="built with another teacher"):
        atcache.verify(cache=out, teacher=other, device="cpu")
    maps = atcache.open(out).view(sample=0).maps_LHQK
    loaded = load_teacher(teacher())
    pixels = torch.from_numpy(atcache.open(out).image(0, 0))[None]
    images = normalise_images(pixels, loaded.input.mean, loaded.input.std, "cpu")
    for layer, live in enumerate(FactorCapture(loaded.model)(images)):
        assert float((live.maps()[0] - torch.from_numpy(maps[layer])).abs().mean()) < 0.01


def test_other_weights_and_other_code_do_not_continue_a_build(tar, tmp_path):
    def build(module):
        teacher = atcache.own_teacher(module, image_size=32, patch_size=8, **COLOURS)
        atcache.build(teacher=teacher, data=str(tar), out=tmp_path / "own.zarr", **QUICK)

    build(HandWrittenViT(PackedFused))
    changed = HandWrittenViT(PackedFused)
    with torch.no_grad():
        changed.position.add_(0.1)
    with pytest.raises(CacheMismatchError, match="weights_sha256"):
        build(changed)
    with pytest.raises(CacheMismatchError, match=r"own:HandWrittenViT@\w+"):
        build(HandWrittenViT(HandSoftmax))


def test_a_buffer_that_is_not_saved_does_not_continue_a_build(tar, tmp_path):
    def build(temperature):
        module = HandWrittenViT(HandSoftmax)
        for attention in module.attentions():
            attention.style = "temperature"
            del attention.temperature
            attention.register_buffer("temperature", torch.full((4, 1, 1), temperature), persistent=False)
        teacher = atcache.own_teacher(
            module, image_size=32, patch_size=8, **COLOURS, attention=HandSoftmax, query_key=query_key
        )
        return atcache.build(teacher=teacher, data=str(tar), out=tmp_path / "own.zarr", samples_per_shard=4, **QUICK)

    assert build(0.3).num_built_views == 12
    assert build(0.3).num_built_views == 0
    with pytest.raises(CacheMismatchError, match=r"own:HandWrittenViT@\w+"):
        build(0.4)


def query_key(attention, x):
    q, k, _ = (heads_of(part, attention.num_heads) for part in attention.to_qkv(x).chunk(3, dim=-1))
    return q * attention.temperature, k


def test_a_config_that_was_edited_does_not_continue_a_build(tar, tmp_path):
    folder, out = save_transformers(tmp_path / "dinov2", "dinov2"), tmp_path / "dinov2.zarr"
    config = json.loads((folder / "config.json").read_text())

    def build(**edited):
        (folder / "config.json").write_text(json.dumps({**config, **edited}))
        return atcache.build(teacher=f"transformers:{folder}", data=str(tar), out=out, codec="int8", **QUICK)

    assert build().num_built_views == 12
    for edited in ({"hidden_act": "relu"}, {"layer_norm_eps": 1e-3}, {"num_attention_heads": 2}):
        with pytest.raises(CacheMismatchError, match=r"weights_sha256"):
            build(**edited)
        with pytest.raises(
            CacheMismatchError, match=rf"with: transformers:{folder}\. The hash is of the weights and of hidden_act, .*"
        ):
            atcache.verify(cache=out, teacher=f"transformers:{folder}", device="cpu")
    assert build(architectures=["Other"], attention_probs_dropout_prob=0.5).num_built_views == 0


def test_values_of_a_softmax_by_hand_cannot_be_stored(tar, tmp_path):
    teacher = atcache.own_teacher(HandWrittenViT(HandSoftmax), image_size=32, patch_size=8, **COLOURS)
    with pytest.raises(ConfigError, match="this teacher forms its maps by hand, so its v is not seen"):
        atcache.build(teacher=teacher, data=str(tar), out=tmp_path / "own.zarr", store="v", **QUICK)


def test_values_of_the_fused_call_are_stored(tar, tmp_path):
    teacher = atcache.own_teacher(HandWrittenViT(PackedFused), image_size=32, patch_size=8, **COLOURS)
    atcache.build(teacher=teacher, data=str(tar), out=tmp_path / "own.zarr", store="v", **QUICK)
    assert atcache.open(tmp_path / "own.zarr").geometry.v_head_dim == 8


def test_a_plan_takes_foreign_teachers_with_a_student_of_timm(tar, folder):
    given = {"teacher": f"transformers:{folder}", "data": str(tar), "device": "cpu", "calibration_samples": 8}
    assert atcache.plan(**given, student=STUDENT, codec="int8").teacher == given["teacher"]
