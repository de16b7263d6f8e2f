"""A teacher that computes NaN is named as the reason, with the layer, the image and the precision."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
import webdataset
from PIL import Image
from safetensors.torch import save_file

from atcache.attention.finite import NotFiniteError
from atcache.pipelines.build.config import BuildConfig
from atcache.pipelines.build.run import build
from atcache.pipelines.plan.config import PlanConfig
from atcache.pipelines.plan.run import plan
from atcache.teachers.load import create_student
from atcache.teachers.names import parse_model_name

WHITE = 5


@pytest.fixture(scope="module")
def greys(tmp_path_factory):
    """A tar of 12 grey images, of which one is white."""
    random = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("greys") / "grey-0000.tar"
    with path.open("wb") as file, webdataset.TarWriter(file) as writer:
        for sample in range(12):
            png = io.BytesIO()
            pixels_HWC = np.full((8, 8, 3), 255) if sample == WHITE else random.integers(127, 129, (8, 8, 3))
            Image.fromarray(pixels_HWC.astype(np.uint8)).save(png, format="PNG")
            writer.write({"__key__": f"{sample:05d}", "png": png.getvalue(), "cls": b"0"})
    return path


@pytest.fixture(scope="module")
def weights_of(tiny_vit, tmp_path_factory):
    """A function that changes a state dict -> a file of such weights."""

    def weights_of(change):
        weights = create_student(parse_model_name(tiny_vit), num_classes=10).state_dict()
        change(weights)
        path = tmp_path_factory.mktemp("weights") / "weights.safetensors"
        save_file(weights, path)
        return path

    return weights_of


def overflow_at_white(weights):
    # A white patch lies in one direction, which the first unit of block 0's MLP waits for; greys are about 0.
    direction_C = torch.ones(32)
    direction_C[16:] = -1
    weights["patch_embed.proj.bias"][:] = 0
    weights["patch_embed.proj.weight"][:] = 0.01 * direction_C[:, None, None, None]
    weights["blocks.0.mlp.fc1.weight"][0], weights["blocks.0.mlp.fc1.bias"][0] = 10 * direction_C, -240
    weights["blocks.0.mlp.fc2.weight"][:, 0] = 1e38


def be_nan_in_layer_1(weights):
    weights["blocks.1.attn.qkv.bias"][40] = torch.nan  # of k


@pytest.fixture
def config(greys, tiny_vit, weights_of, tmp_path):
    def config(change, **fields) -> BuildConfig:
        common = {
            "teacher": tiny_vit,
            "data": str(greys),
            "out": tmp_path / "cache.zarr",
            "workers": 0,
            "batch_size": 4,
        }
        common |= {"device": "cpu", "precision": "fp32", "policy": "eval", "weights": weights_of(change)}
        return BuildConfig(**{**common, **fields})

    return config


@pytest.mark.parametrize("codec", ["exact", "int8", "logmap", "transform:target_kl=0.01"])
def test_the_one_image_of_a_long_build_is_named(codec, config):
    # Of 2 calibration images none is white.
    sentence = (
        r"from layer 1 on \(q\), for 1 of 4 images, the first is .*grey-0000.*00005.*in float32\. Check its weights"
    )
    with pytest.raises(NotFiniteError, match=sentence):
        build(config(overflow_at_white, codec=codec, calibration_samples=2))


@pytest.mark.parametrize("codec", ["int8", "transform:target_kl=0.01"])
@pytest.mark.parametrize("number", [12, 11])
def test_the_image_is_named_wherever_calibration_meets_it(codec, number, config):
    # Of 12 it is fitted to; of 11, which leaves out one, it is at another place.
    with pytest.raises(NotFiniteError, match=r"for 1 of \d images, the first is .*grey-0000.*00005"):
        build(config(overflow_at_white, codec=codec, calibration_samples=number))


@pytest.mark.parametrize(("precision", "advice"), [("fp32", "Check its weights"), ("bf16", "Give --precision fp32")])
def test_weights_that_are_nan_are_found_at_once(precision, advice, config):
    settings = config(be_nan_in_layer_1, precision=precision)
    name = {"fp32": "float32", "bf16": "bfloat16"}[precision]
    sentence = rf"from layer 1 on \(k\), for 4 of 4 images, the first is .*00000.*computed in {name}\. {advice}"
    with pytest.raises(NotFiniteError, match=sentence):
        build(settings)
    assert not settings.out.exists()
    fields = {name: getattr(settings, name) for name in ("teacher", "weights", "data", "device", "precision")}
    with pytest.raises(NotFiniteError, match=sentence):
        plan(PlanConfig(**fields, workers=0))


def test_features_after_the_last_attention_count_too(config):
    def be_nan_at_the_end(weights):
        weights["blocks.1.mlp.fc2.bias"][0] = torch.nan

    with pytest.raises(NotFiniteError, match="in its final features, after all of its attention, for"):
        build(config(be_nan_at_the_end, codec="exact"))
