"""What does not fit is refused by name, before anything is written."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from training_runs import run_until_killed

from atcache.errors import CacheMismatchError, ConfigError, CorruptCacheError, TeacherError
from atcache.pipelines.build.config import BuildConfig
from atcache.pipelines.build.run import build
from atcache.pipelines.running.checkpoint import load_checkpoint, save_checkpoint
from atcache.pipelines.train.config import TrainConfig
from atcache.pipelines.train.run import train
from atcache.store.manifest import commit_path
from atcache.store.reader import CacheReader


def test_other_settings_for_an_existing_run_are_refused_with_each_difference_named(config_for, tiny_cache):
    config = config_for("distill", steps=3)
    train(config)
    expected = (
        r"holds another run: --drop-path is 0.0 there and 0.1 here; --steps is 3 there and 4 here\. "
        r"Give another --out, or the same options"
    )
    with pytest.raises(CacheMismatchError, match=expected):
        train(replace(config, steps=4, drop_path=0.1))
    with pytest.raises(CacheMismatchError, match=r"another run: num_views is 1 there and 2 here"):
        train(replace(config, cache=tiny_cache(views=2)))
    with pytest.raises(CacheMismatchError, match=r"holds another run: .*codec\.name is 'exact' there and 'int8' here"):
        train(replace(config, cache=tiny_cache(codec="int8")))


STUDENT = "vit_tiny_patch16_224:img_size=8,patch_size=2,embed_dim=32,depth=2,num_heads=2"


@pytest.mark.parametrize(
    ("student", "message"),
    [
        (STUDENT.replace("heads=2", "heads=4"), "has 4 heads a layer, the teacher 2"),
        (STUDENT.replace("patch_size=2", "patch_size=4"), r"1 \+ 2x2 tokens, the teacher 1 \+ 4x4 tokens"),
        (
            STUDENT.replace("img_size=8", "img_size=16"),
            r"give --student .*img_size=16.* with the img_size of the cache's views, if its .* a grid of 4x4, or leave",
        ),
        (
            STUDENT + ",class_token=False,global_pool=avg",
            r"choose one with as many tokens before its patches, or leave",
        ),
        (STUDENT + ",class_token=False,global_pool=avg", r"0 \+ 4x4 tokens, the teacher 1 \+ 4x4 tokens"),
        (STUDENT.replace("depth=2", "depth=1"), "1 layers and so no layer 1"),
    ],
)
@pytest.mark.parametrize("mode", ["copy", "distill"])
def test_students_that_the_maps_do_not_fit_are_refused(mode, student, message, config_for):
    with pytest.raises(TeacherError, match=message):
        train(config_for(mode, student=student))


def test_other_image_sizes_are_refused(config_for):
    larger = STUDENT.replace("img_size=8", "img_size=16")
    expected = r"the views of .* are 8 x 8 pixels, the student takes 16 x 16\. Give --student with img_size=8"
    with pytest.raises(ConfigError, match=expected):
        train(config_for("scratch", student=larger))
    with pytest.raises(ConfigError, match="for a finished run, give a cache whose views are 16 x 16, or --data"):
        train(config_for("scratch", student=larger))
    same_grid = larger.replace("patch_size=2", "patch_size=4")
    with pytest.raises(ConfigError, match=expected):
        train(config_for("copy", student=same_grid))


def test_an_unfinished_cache_is_refused(config_for, digits_tars, tiny_vit, tiny_weights, tmp_path):
    out = tmp_path / "half.zarr"
    build(
        BuildConfig(
            teacher=tiny_vit, weights=tiny_weights, data=str(digits_tars[0]), out=out, workers=0, samples_per_shard=8
        )
    )
    commit_path(out, CacheReader(out).layout.tasks()[1]).unlink()
    expected = r"half\.zarr is not complete: 1 of 2 tasks are missing\. Run its `atcache build` command again"
    with pytest.raises(CacheMismatchError, match=expected):
        train(config_for("scratch", cache=out))


def test_a_cache_that_does_not_say_what_its_teacher_was_is_refused(tiny_cache, config_for, tmp_path):
    root = json.loads((tiny_cache() / "zarr.json").read_text())
    del root["attributes"]["atcache"]["geometry"]
    (tmp_path / "other.zarr").mkdir()
    (tmp_path / "other.zarr" / "zarr.json").write_text(json.dumps(root))
    with pytest.raises(CorruptCacheError, match=r'other\.zarr/zarr\.json has no "geometry"'):
        train(config_for("copy", cache=tmp_path / "other.zarr"))


def test_a_layer_that_the_cache_does_not_hold_is_refused(config_for, tiny_cache):
    with pytest.raises(ConfigError, match="layer 0 is not in the cache, which holds layers 1"):
        train(config_for("distill", cache=tiny_cache(layers="1"), layers="0"))


@pytest.fixture(scope="session")
def other_weights(tiny_weights, tmp_path_factory):
    """Weights of the same architecture that give other maps."""
    path = tmp_path_factory.mktemp("other") / "other.safetensors"
    save_file({name: tensor * 1.1 for name, tensor in load_file(tiny_weights).items()}, path)
    return path


def test_validation_that_does_not_fit_the_student_is_refused(config_for, tiny_cache, digits_tars, other_weights):
    other = tiny_cache(policy="eval", weights=other_weights)
    with pytest.raises(
        CacheMismatchError, match=r"holds maps of .* \(sha256 .*\), but the student copies .* with that t"
    ):
        train(config_for("copy", val_cache=other))
    with pytest.raises(CacheMismatchError, match="has no maps of layer 0, which the student copies"):
        train(config_for("copy", val_cache=tiny_cache(policy="eval", layers="1")))
    with pytest.raises(CacheMismatchError, match="has no maps of head 0, which the student copies"):
        train(config_for("copy", val_cache=tiny_cache(policy="eval", heads="1")))
    with pytest.raises(CacheMismatchError, match=r"keeps only some rows .*--queries cls\).* needs the rows of all"):
        train(config_for("copy", val_cache=tiny_cache(policy="eval", queries="cls", codec="logmap")))
    with pytest.raises(ConfigError, match="a copying student needs the teacher's maps to predict, and no cache"):
        train(config_for("copy", val_data=str(digits_tars[0])))
    # Students with attention of their own do not mind whose maps these are.
    assert train(config_for("distill", steps=1, val_cache=other)).validation.num_samples == 48


def test_weights_other_than_the_caches_teacher_are_refused(config_for, other_weights):
    with pytest.raises(
        CacheMismatchError, match=r"finetune would start from other\.safetensors .* but the cache's teacher"
    ):
        train(config_for("finetune", weights=other_weights))
    with pytest.raises(CacheMismatchError, match=r"from other\.safetensors has weights of sha256 .*, expected"):
        train(config_for("copy", live_teacher=True, weights=other_weights))


def test_a_loss_that_is_no_number_stops_the_run(config_for):
    config = config_for("scratch", base_lr=1e30, warmup_epochs=0.0)
    with pytest.raises(ConfigError, match=r"step 10: the loss is (nan|inf)\. Lower --base-lr or give --clip-grad 1"):
        train(config)
    assert not (config.out / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mode": "imitate"}, "mode='imitate': expected one of copy, distill, scratch, finetune"),
        ({"steps": 0}, "steps=0: expected at least 1"),
        ({"subset": 0}, "subset=0: expected at least 1"),
        ({"accumulate": 5}, "batch_size=256 cannot be cut into accumulate=5 equal parts. Give a multiple of 5"),
        ({"ema": 1.0}, "ema=1.0: expected at least 0 and less than 1"),
        ({"drop_path": -0.1}, "drop_path=-0.1: expected at least 0 and less than 1"),
        ({"layer_decay": 1.5}, "layer_decay=1.5: expected more than 0 and at most 1"),
        ({"clip_grad": 0.0}, "clip_grad=0.0: expected more than 0"),
        (
            {"min_lr": 2e-3, "batch_size": 128},
            r"min_lr=0\.002 is over the learning rate 0\.0005 .*, so the rate would rise\. Lower",
        ),
        ({"workers": -1}, "workers=-1: expected at least 0"),
        ({"validate_every": -1.0}, "validate_every=-1.0: expected at least 0"),
        ({"cache": None}, "mode copy needs the teacher's attention: give --cache"),
        ({"cache": None, "mode": "scratch", "data": "tars"}, "without --cache, give --data and --student"),
        ({"mode": "scratch", "live_teacher": True}, "live_teacher is for copy and distill: mode scratch uses"),
        ({"mode": "finetune", "layers": "0"}, "layers is for copy and distill: mode finetune uses"),
        ({"mode": "copy", "weights": Path("w")}, "weights=w is for finetune and --live-teacher: mode copy starts from"),
        ({"mode": "scratch", "policy": "eval"}, "policy=eval: the views of .* are drawn already"),
        ({"attention_weight": 1.0}, r"attention_weight=1\.0: mode copy has no attention loss to weigh\. Leave"),
        ({"beta2": 1.0}, r"beta2=1\.0: expected at least 0 and less than 1"),
        *(
            ({name: value}, f"{name}={value}: expected a finite number")
            for name in ("epochs", "base_lr", "weight_decay", "clip_grad", "min_lr", "warmup_epochs", "validate_every")
            for value in (float("nan"), float("inf"))
        ),
        ({"seed": 2**63}, r"seed=9223372036854775808: expected 0 to 9223372036854775807"),
    ],
)
def test_values_that_cannot_be_used_are_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        TrainConfig(**{"mode": "copy", "out": Path("run"), "cache": Path("c.zarr"), **fields})


def test_a_refused_run_leaves_nothing_that_stands_in_the_way_of_the_right_one(config_for):
    config = config_for("scratch", steps=2)
    with pytest.raises(ConfigError, match="optimizer"):
        train(replace(config, optimizer="nosuch"))
    assert not config.out.exists()
    wild = replace(config, base_lr=1e30, steps=20, checkpoint_every=15)
    with pytest.raises(ConfigError, match="step 10: the loss is"):
        train(wild)
    assert not (config.out / "checkpoint.pt").exists()
    assert train(config).steps == 2


@pytest.mark.parametrize("name", ["model.safetensors", "checkpoint.pt", "config.json", "zarr.json"])
def test_a_folder_that_holds_something_else_is_refused_and_left_alone(name, config_for):
    config = config_for("scratch", steps=1)
    config.out.mkdir(parents=True)
    (config.out / name).write_bytes(b"precious")
    with pytest.raises(ConfigError, match=rf"holds something else: there is {name}, but no run\.json"):
        train(config)
    assert [file.name for file in config.out.iterdir()] == [name]
    assert (config.out / name).read_bytes() == b"precious"


@pytest.mark.parametrize("part", ["module", "optimizer", "ema"])
def test_a_checkpoint_of_another_model_is_refused(part, config_for):
    config = config_for("scratch", drop_path=0.4, ema=0.9, steps=40, checkpoint_every=15)
    run_until_killed(config)
    file = config.out / "checkpoint.pt"
    contents = load_checkpoint(file)
    del contents[part][next(iter(contents[part]))]
    save_checkpoint(file, contents)
    with pytest.raises(CorruptCacheError, match=r"checkpoint\.pt does not fit the model \(.*\)\. Another version"):
        train(config)
