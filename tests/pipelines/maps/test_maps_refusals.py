"""Runs and caches of which no maps can be made are refused in a sentence, before anything is written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from builds import MIXED
from safetensors.torch import load_file, save_file
from training_runs import take_first_steps

from atcache.errors import CacheMismatchError, CacheMissError, ConfigError, CorruptCacheError
from atcache.pipelines.build.config import BuildConfig
from atcache.pipelines.build.run import build
from atcache.pipelines.maps.config import MapsConfig
from atcache.pipelines.maps.run import maps
from atcache.pipelines.pretrain.config import PretrainConfig
from atcache.pipelines.pretrain.run import pretrain
from atcache.pipelines.train.config import TrainConfig
from atcache.pipelines.train.run import train

PLACE = {"device": "cpu", "precision": "fp32"}


def train_run(out: Path, cache: Path | tuple[Path, ...], mode: str = "distill", **fields) -> Path:
    train(TrainConfig(mode=mode, cache=cache, out=out, steps=1, batch_size=8, **PLACE, **fields))
    return out


@pytest.fixture(scope="module")
def finished(tiny_cache, tmp_path_factory) -> Path:
    return train_run(tmp_path_factory.mktemp("runs") / "distill", tiny_cache())


@pytest.fixture
def run(finished, tmp_path) -> Path:
    """A run's folder that a test may damage."""
    return shutil.copytree(finished, tmp_path / "run")


def refused(run: Path, tmp_path: Path, message: str, kind: type[Exception] = ConfigError, **fields) -> None:
    out = tmp_path / "refused.zarr"
    with pytest.raises(kind, match=message):
        maps(MapsConfig(run=run, out=out, workers=0, **PLACE, **fields))
    assert not out.exists()


@pytest.mark.parametrize(
    ("fields", "blocks"),
    [({}, "0-1"), ({"layers": "1"}, "1"), ({"heads": "0"}, "0-1"), ({"what": "q"}, "0-1")],
)
def test_a_student_that_copies_has_no_attention_of_its_own(fields, blocks, tiny_cache, tmp_path):
    copy = train_run(tmp_path / "copy", tiny_cache(), "copy", **fields)
    message = rf"copy copies attention: what it attends to in its blocks {blocks} is its teacher's.*Look at that cache"
    refused(copy, tmp_path, message)
    with pytest.raises(ConfigError, match=message):
        build(BuildConfig(teacher=str(copy), views_from=tiny_cache(), out=tmp_path / "c.zarr", workers=0, **PLACE))


def test_a_folder_that_is_no_run_is_refused(digits_tars, tiny_vit, tmp_path):
    refused(tmp_path / "missing", tmp_path, r"missing is not a run's folder: it does not exist")
    foreign = tmp_path / "teacher"
    pretrain(PretrainConfig(model=tiny_vit, data=str(digits_tars[0]), out=foreign, steps=1, batch_size=8, **PLACE))
    refused(foreign, tmp_path, r"teacher is not a run's folder: it holds no run\.json\. Give the folder of")
    for text in ("[1]", "{", '{"record": 3}', "[" * 100_000, '{"record": {"mode": "distill"}}'):
        (foreign / "run.json").write_text(text)
        refused(foreign, tmp_path, r"teacher is not a run's folder: run\.json cannot be read")


def test_damaged_or_foreign_weights_are_refused(run, tmp_path):
    file = run / "model.safetensors"
    weights = {name: tensor.clone() for name, tensor in load_file(file).items()}  # not mapped from the file
    for damaged in (file.read_bytes()[:-100], b"\xff" * 64, b""):
        file.write_bytes(damaged)
        refused(run, tmp_path, r"model\.safetensors does not hold this run's weights")
    save_file({**weights, "blocks.0.attn.qkv.weight": weights["blocks.0.attn.qkv.weight"][:3]}, file)
    refused(run, tmp_path, r"model\.safetensors does not hold this run's weights: .*size mismatch")
    save_file({name: tensor for name, tensor in weights.items() if name != "pos_embed"}, file)
    refused(run, tmp_path, r"model\.safetensors does not hold this run's weights: .*pos_embed")
    file.unlink()
    refused(run, tmp_path, r"run is not finished: model\.safetensors is missing\. Run its `atcache train` command")


def test_the_cache_of_the_training_must_be_where_it_was(run, tiny_cache, tmp_path):
    record = json.loads((run / "run.json").read_text())

    def with_caches(*places: Path) -> None:
        (run / "run.json").write_text(json.dumps({**record, "caches": [str(place) for place in places]}))

    with_caches(tmp_path / "gone.zarr")
    refused(run, tmp_path, r"was trained from is not at .*gone\.zarr any more\. Give --cache, where", CacheMissError)
    with_caches(tiny_cache(seed=5))
    refused(run, tmp_path, "is not the one that .*run was trained from, or has grown", CacheMismatchError)
    with_caches(tiny_cache(), tiny_cache(seed=5))
    refused(run, tmp_path, r"was trained from 2 caches: .*Give --cache, the one whose")
    with_caches()  # as older versions wrote it
    refused(run, tmp_path, r"does not say where the cache is that it was trained from\. Give --cache")


def test_a_run_remembers_where_its_cache_is_now(tiny_cache, tmp_path):
    first = shutil.copytree(tiny_cache(), tmp_path / "first.zarr")
    out = train_run(tmp_path / "run", first)
    written = (out / "run.json").read_bytes()
    assert json.loads(written)["caches"] == [str(first)]
    second = shutil.copytree(first, tmp_path / "second.zarr")
    train_run(out, second)  # the finished run is only read
    assert (out / "run.json").read_bytes() == written
    (out / "run.json").write_text(json.dumps({k: v for k, v in json.loads(written).items() if k != "caches"}))
    train_run(out, second)  # as an older version wrote it


def test_a_run_goes_on_with_a_cache_that_was_moved_and_remembers_its_new_place(tiny_cache, tmp_path):
    first, second = (shutil.copytree(tiny_cache(), tmp_path / name) for name in ("first.zarr", "second.zarr"))
    common = {"mode": "distill", "out": tmp_path / "run", "steps": 2, "batch_size": 8, "workers": 0, **PLACE}
    take_first_steps(TrainConfig(cache=first, **common), 1, saves=True)
    take_first_steps(TrainConfig(cache=second, **common), 1, saves=True)
    assert json.loads((tmp_path / "run" / "run.json").read_text())["caches"] == [str(second)]


def test_options_and_caches_that_do_not_fit_are_refused(run, tiny_cache, tmp_path):
    refused(run, tmp_path, "policy=eval and cache=.*Leave out one", policy="eval", cache=tiny_cache())
    refused(run, tmp_path, "policy=eval: new views are drawn of the images in --data", policy="eval")
    refused(run, tmp_path, "views=3: .* has 1 of each sample", views=3)
    mixed = tiny_cache(**MIXED)
    refused(run, tmp_path, "are mixed with those of other samples.*Leave out --max-samples", cache=mixed, max_samples=3)
    refused(run, tmp_path, r"none\.zarr is not a cache", CacheMissError, cache=tmp_path / "none.zarr")


def test_views_of_another_size_are_refused(run, digits_tars, tmp_path):
    large = tmp_path / "large.zarr"
    teacher = "vit_tiny_patch16_224:img_size=16,patch_size=4,embed_dim=32,depth=1,num_heads=2"
    student = train_student(teacher, digits_tars, tmp_path / "student")
    build(BuildConfig(teacher=str(student), data=str(digits_tars[0]), out=large, workers=0, codec="int8", **PLACE))
    refused(run, tmp_path, "large.zarr are 16 x 16 pixels, the model takes 8 x 8", cache=large)


def train_student(name: str, tars: list[Path], out: Path) -> Path:
    train(TrainConfig(mode="scratch", data=str(tars[0]), student=name, out=out, steps=1, batch_size=8, **PLACE))
    return out


def test_an_unfinished_cache_and_damaged_views_are_refused(run, tiny_cache, tmp_path):
    given = shutil.copytree(tiny_cache(), tmp_path / "given.zarr")
    file = given / "zarr.json"
    text = file.read_text()
    file.write_text(text.replace('"views"', '"view"', 1))
    refused(run, tmp_path, "zarr.json", CorruptCacheError, cache=given)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"grow": True}, "grow and views_from=.*cannot grow"),
        ({"policy": "eval"}, "views_from=.* and policy=eval: .* taken as they are. Leave out --policy"),
        ({"mixup": 0.8}, "and mixup=0.8"),
        ({"label_key": "x"}, "Leave out --label-key"),
        ({"seed": 3}, "and seed=3"),
        ({"views_from": None}, "there are no images: give --data, or --views-from"),
        ({"views_from": Path("out.zarr")}, "is the cache to build. Name another one"),
    ],
)
def test_options_of_a_build_with_given_views_are_checked(fields, message):
    with pytest.raises(ConfigError, match=message):
        BuildConfig(**{"teacher": "demo-mae", "views_from": Path("c.zarr"), "out": Path("out.zarr"), **fields})
