"""What goes from a teacher to a student, and where: q or k alone, some heads, students of another shape."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from atcache.attention.intercept import AttentionIntercept
from atcache.errors import CacheMismatchError, ConfigError, TeacherError
from atcache.pipelines.evaluate.config import EvaluateConfig
from atcache.pipelines.evaluate.run import evaluate
from atcache.pipelines.train.config import TrainConfig
from atcache.pipelines.train.run import train
from atcache.students.pairing import Pairing
from atcache.teachers.load import create_student
from atcache.teachers.names import parse_model_name

VIT = "vit_tiny_patch16_224"


def test_a_pairing_is_its_json():
    pairing = Pairing(layers=((0, 0), (1, 2)), heads=((0, 2), (1, 0)), num_student_heads=2, what="k")
    assert Pairing.from_json(json.loads(json.dumps(pairing.to_json()))) == pairing
    assert (pairing.teacher_layers, pairing.teacher_heads, pairing.all_heads) == ((0, 2), (2, 0), True)


BASE = "vit_tiny_patch16_224:img_size=8,patch_size=2"
WIDE = f"{BASE},embed_dim=32,depth=3,num_heads=4"


WIDE_TEACHER = f"{WIDE},num_classes=10"


@pytest.fixture(scope="session")
def wide_weights(tmp_path_factory) -> Path:
    """Weights of a teacher of three blocks with four heads of 8, whose maps are far from uniform."""
    torch.manual_seed(0)
    weights = create_student(parse_model_name(WIDE_TEACHER), num_classes=10).state_dict()
    path = tmp_path_factory.mktemp("wide") / "wide.safetensors"
    save_file({key: tensor * 8 if "qkv.weight" in key else tensor for key, tensor in weights.items()}, path)
    return path


@pytest.fixture(scope="session")
def wide_cache(tiny_cache, wide_weights):
    """A function: fields of the build -> a cache by that teacher."""
    return lambda **fields: tiny_cache(teacher=WIDE_TEACHER, weights=wide_weights, **fields)


@pytest.fixture
def config_for(wide_cache, tmp_path):
    numbers = iter(range(100))

    def config_for(mode, **fields) -> TrainConfig:
        common = {"cache": wide_cache(), "out": tmp_path / f"run-{next(numbers)}", "steps": 20, "batch_size": 24}
        recipe = {"base_lr": 2e-2, "device": "cpu", "precision": "fp32", "validate_every": 0}
        return TrainConfig(mode=mode, **{**common, **recipe, **fields})

    return config_for


def eval_of(config, **fields):
    return evaluate(EvaluateConfig(runs=(config.out,), device="cpu", precision="fp32", batch_size=24, **fields)).score


SHAPES = {
    "half the width": {"student": f"{BASE},embed_dim=16,depth=3,num_heads=4"},
    "fewer layers": {"student": f"{BASE},embed_dim=32,depth=2,num_heads=4", "layer_map": "1:2, 0:1"},
    "fewer heads": {"student": f"{BASE},embed_dim=24,depth=3,num_heads=2", "head_map": "3,1"},
    "some heads": {"heads": "0,2"},
    "both, and narrow": {
        "student": f"{BASE},embed_dim=12,depth=1,num_heads=3",
        "layer_map": "0:1",
        "head_map": "2,0,3",
    },
}


@pytest.mark.parametrize("mode", ["copy", "distill"])
@pytest.mark.parametrize("shape", SHAPES)
def test_students_of_another_shape_are_trained_validated_and_evaluated(shape, mode, config_for, wide_cache):
    val_cache = wide_cache(policy="eval")
    config = config_for(mode, val_cache=val_cache, **SHAPES[shape])
    score = train(config).validation
    record = json.loads((config.out / "run.json").read_text())["record"]
    assert record["pairing"]["what"] == "map"
    if shape == "fewer layers":
        assert record["pairing"]["layers"] == [[0, 1], [1, 2]]
    if shape == "fewer heads":
        assert (record["pairing"]["heads"], record["pairing"]["num_student_heads"]) == ([[0, 3], [1, 1]], 2)
    assert eval_of(config, cache=val_cache) == score
    assert train(config).validation == score


def test_what_a_student_of_another_shape_copies_is_what_its_record_says(config_for, wide_cache):
    # Second opinion: the saved weights in a plain timm model whose attention is the teacher's, head by head.
    import atcache

    val_cache = wide_cache(policy="eval", pixels="store")
    config = config_for("copy", val_cache=val_cache, **SHAPES["both, and narrow"])
    score = train(config).validation
    weights = load_file(config.out / "model.safetensors")
    value_weight, value_bias = weights.pop("blocks.0.attn.v.weight"), weights.pop("blocks.0.attn.v.bias")
    weights["blocks.0.attn.qkv.weight"] = torch.cat([torch.zeros(24, 12), value_weight])
    weights["blocks.0.attn.qkv.bias"] = torch.cat([torch.zeros(24), value_bias])
    plain = timm.create_model(VIT, img_size=8, patch_size=2, embed_dim=12, depth=1, num_heads=3, num_classes=10).eval()
    plain.load_state_dict(weights)
    cache = atcache.open(val_cache)
    maps_SHQK = torch.from_numpy(cache.maps(layer=1)[0].compute())[:, [2, 0, 3]]
    pixels = torch.stack([torch.from_numpy(cache.reader.read_pixels(0, sample)) for sample in range(48)])
    mean, std = (torch.tensor(plain.pretrained_cfg[name]).view(3, 1, 1) for name in ("mean", "std"))
    with torch.no_grad(), AttentionIntercept(plain.blocks, lambda call: maps_SHQK @ call.value):
        logits = plain((pixels.permute(0, 3, 1, 2) / 255 - mean) / std)
    loss = torch.nn.functional.cross_entropy(logits, torch.from_numpy(cache.reader.labels_S))
    assert score.loss == pytest.approx(float(loss), rel=1e-4)


@pytest.mark.parametrize("what", ["q", "k", "qk"])
@pytest.mark.parametrize("mode", ["copy", "distill"])
def test_q_and_k_are_transferred_from_a_cache(mode, what, config_for, wide_cache, tmp_path):
    val_cache = wide_cache(policy="eval")
    config = config_for(mode, val_cache=val_cache, what=what)
    score = train(config).validation
    assert eval_of(config, cache=val_cache) == score
    settings = json.loads((config.out / "run.json").read_text())["settings"]
    assert settings["what"] == what
    as_map = train(config_for(mode, val_cache=val_cache)).validation
    # Copying both is copying the map; everything else is something else.
    assert (score == as_map) == ((mode, what) == ("copy", "qk"))


def test_stored_heads_can_be_chosen_at_training_and_the_other_cache_may_hold_more(config_for, wide_cache):
    few, all_heads = wide_cache(heads="1,3"), wide_cache()
    from_few, from_all = (config_for("copy", cache=cache, heads="3") for cache in (few, all_heads))
    train(from_few)
    train(from_all)
    ours, theirs = (load_file(config.out / "model.safetensors") for config in (from_few, from_all))
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    val_few, val_all = wide_cache(policy="eval", heads="1,3"), wide_cache(policy="eval")
    assert eval_of(from_few, cache=val_few) == eval_of(from_few, cache=val_all)
    with pytest.raises(CacheMismatchError, match="has no maps of head 3, which the student copies"):
        eval_of(from_few, cache=wide_cache(policy="eval", heads="0,1"))


def test_a_live_teacher_gives_another_shape_what_the_cache_gives(config_for, wide_cache, wide_weights, digits_tars):
    exact = "exact:dtype=float32"
    shape = {**SHAPES["both, and narrow"], "cache": wide_cache(codec=exact)}
    cached = config_for("copy", val_cache=wide_cache(codec=exact, policy="eval"), **shape)
    tars = str(digits_tars[0].parent)
    live = config_for("copy", live_teacher=True, weights=wide_weights, val_data=tars, **shape)
    scores = [train(config).validation for config in (cached, live)]
    assert scores[1].loss == pytest.approx(scores[0].loss, rel=1e-4)
    for what in ("q", "qk"):
        losses = [
            train(config_for("distill", cache=shape["cache"], heads="1,2", what=what, **teacher)).loss
            for teacher in ({}, {"live_teacher": True, "weights": wide_weights})
        ]
        assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    again = eval_of(cached, data=tars, live_teacher=True, weights=wide_weights)
    assert again.loss == pytest.approx(scores[0].loss, rel=1e-4)


def test_runs_of_different_shapes_and_heads_are_averaged(config_for, wide_cache):
    val_cache = wide_cache(policy="eval")
    configs = [config_for("copy", **SHAPES[shape]) for shape in ("fewer layers", "fewer heads", "some heads")]
    for config in configs:
        train(config)
    runs = tuple(config.out for config in configs)
    together = evaluate(EvaluateConfig(runs=runs, cache=val_cache, device="cpu", precision="fp32")).score
    alone = [eval_of(config, cache=val_cache).loss for config in configs]
    assert together.loss < sum(alone) / 3  # the logarithm is concave: Jensen


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"student": f"{BASE},embed_dim=24,depth=3,num_heads=3", "head_map": "0,1"}, "3 heads a layer, the head map 2"),
        ({"student": f"{BASE},embed_dim=24,depth=3,num_heads=3"}, "3 heads a layer, the teacher 4.*--head-map"),
        ({"student": f"{BASE},embed_dim=32,depth=2,num_heads=4", "layer_map": "0:0,2:2"}, "2 layers and so no layer 2"),
        (
            {"student": f"{BASE},embed_dim=16,depth=3,num_heads=4", "what": "q"},
            r"heads of 4 components \(scale 0\.5\), the teacher of 8 \(0\.3536\)\. --what q needs equal ones",
        ),
    ],
)
def test_students_that_a_pairing_does_not_fit_are_refused(fields, message, config_for):
    with pytest.raises(TeacherError, match=message):
        train(config_for("copy", **fields))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"layer_map": "0-1"}, r"layer map '0-1': '0-1' is not a pair\. Write STUDENT:TEACHER blocks, such as 0"),
        ({"layer_map": "0:0,0:1"}, "layer map '0:0,0:1': the student's block 0 comes twice"),
        ({"layer_map": "0:3"}, "layer 3 is not in the cache, which holds layers 0, 1, 2"),
        ({"head_map": "0,x"}, "head map '0,x': 'x' is not a head"),
        ({"head_map": "0,0"}, "head map '0,0': a head of the teacher comes twice"),
        ({"head_map": "0,7"}, "head 7 is not in the cache, which holds heads 0, 1, 2, 3"),
        ({"heads": "7"}, "head 7 is not in the cache, which holds heads 0, 1, 2, 3"),
        ({"heads": "0", "head_map": "0"}, "heads and head_map both say which heads are transferred; give one of them"),
        ({"layers": "0", "layer_map": "0:0"}, "layers and layer_map both say which layers"),
        ({"what": "kv"}, "what='kv': expected one of map, qk, q, k, v, qkv"),
        ({"what": "v"}, "--what v needs the teacher's v, which .* does not hold.*Build it with --store v"),
        ({"mode": "scratch", "what": "q"}, "what is for copy and distill: mode scratch uses no teacher's attention"),
        ({"mode": "finetune", "head_map": "0"}, "head_map is for copy and distill: mode finetune uses"),
    ],
)  # fmt: skip
def test_options_that_cannot_be_used_are_refused(fields, message, config_for):
    with pytest.raises(ConfigError, match=message):
        train(config_for(**{"mode": "copy", **fields}))


def test_codecs_that_keep_maps_only_do_not_give_q_or_k(config_for, wide_cache):
    maps_only = wide_cache(codec="logmap")
    for mode, what in (("copy", "q"), ("distill", "k"), ("distill", "qk")):
        expected = f"--what {what} needs the teacher's own q and k, but codec logmap of .* Build it with"
        with pytest.raises(ConfigError, match=expected):
            train(config_for(mode, cache=maps_only, what=what))
    assert train(config_for("copy", cache=maps_only, what="qk", steps=2)).steps == 2
    # A student that copies q needs it of its validation cache too.
    with pytest.raises(ConfigError, match="needs the teacher's own q and k"):
        train(config_for("copy", what="q", val_cache=wide_cache(codec="logmap", policy="eval")))
