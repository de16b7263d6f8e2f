"""A cache of a student's own attention: maps are the student's, views those of the cache that it was trained from."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from builds import MIXED, differences, picture, write_tar
from click.testing import CliRunner
from clusters import threads
from safetensors.torch import load_file

import atcache
from atcache.cli.main import cli
from atcache.errors import (
    CacheMismatchError,
    ConfigError,
    SourceError,
)
from atcache.images.tar_samples import Problem
from atcache.pipelines.build.config import BuildConfig
from atcache.pipelines.build.on_cluster import config_as_sent
from atcache.pipelines.build.run import build
from atcache.pipelines.maps.config import MapsConfig
from atcache.pipelines.maps.run import maps
from atcache.pipelines.train.config import TrainConfig
from atcache.pipelines.train.run import train
from atcache.store.layout import Status
from atcache.store.reader import CacheReader
from atcache.teachers.inputs import normalise_images

EXACT = "exact:dtype=float32"
PLACE = {"device": "cpu", "precision": "fp32"}


@pytest.fixture(scope="module")
def run_of(tiny_cache, tmp_path_factory):
    """A function: a mode and fields of `TrainConfig` -> the folder of a finished run, the same for equal ones."""
    made: dict[tuple, Path] = {}

    def run_of(mode: str = "distill", **fields) -> Path:
        key = (mode, *sorted(fields.items()))
        if key not in made:
            made[key] = tmp_path_factory.mktemp("runs") / mode
            common = {"cache": tiny_cache(codec=EXACT, views=2), "steps": 3, "batch_size": 24, "base_lr": 3e-2}
            train(TrainConfig(mode=mode, out=made[key], **{**common, **PLACE, "validate_every": 0, **fields}))
        return made[key]

    return run_of


def maps_of(run: Path, out: Path, **fields) -> Path:
    common = {"codec": EXACT, "workers": 0, "batch_size": 48, **PLACE}
    maps(MapsConfig(run=run, out=out, **{**common, **fields}))
    return out


def plain_student(run: Path) -> torch.nn.Module:
    """Second opinion: the weights that the run saved, in a plain model of timm."""
    weights = load_file(run / "model.safetensors")
    sizes = {"img_size": 8, "patch_size": 2, "embed_dim": 32, "depth": 2, "num_heads": 2}
    model = timm.create_model("vit_tiny_patch16_224", **sizes, num_classes=10 if "head.bias" in weights else 0)
    model.load_state_dict(weights)
    return model.eval()


def live_factors(model: torch.nn.Module, pixels_BHWC: np.ndarray) -> dict[int, torch.Tensor]:
    """What the model's own projections give, by layer, with axes (q and k, sample, head, token, head dim)."""
    qkv: dict[int, torch.Tensor] = {}
    for layer, block in enumerate(model.blocks):
        block.attn.qkv.register_forward_hook(lambda _, __, out, layer=layer: qkv.__setitem__(layer, out))
    mean, std = model.pretrained_cfg["mean"], model.pretrained_cfg["std"]
    with torch.no_grad():  # normalised by the function that students are trained with, so that all bits are equal
        model(normalise_images(torch.from_numpy(pixels_BHWC), mean, std, torch.device("cpu")))
    return {layer: out.reshape(*out.shape[:2], 3, 2, 16).permute(2, 0, 3, 1, 4)[:2] for layer, out in qkv.items()}


def pixels_of(path: Path, view: int) -> np.ndarray:
    cache = atcache.open(path)
    return np.stack([cache.view(sample, view).image for sample in range(cache.reader.layout.num_samples)])


def views_of(path: Path) -> list[tuple]:
    """All that is stored of each view beside its attention, by its sample's key."""
    reader = CacheReader(path)
    layout, samples = reader.layout, reader.samples
    return [
        (
            samples.sample_key(row),
            view,
            int(reader.status_VS[view, row]),
            int(samples.label_S[row]),
            reader.parameters(view, row).tobytes(),
            reader.pixel_hash(view, row),
        )
        for view in range(layout.num_views)
        for row in range(layout.num_samples)
        if samples.problem_S[row] != Status.NO_SAMPLE
    ]


# What is stored


@pytest.mark.parametrize(
    ("mode", "fields"),
    [
        ("distill", {"ema": 0.5, "drop_path": 0.3}),
        ("distill", {"attention_only": True}),
        ("scratch", {}),
        ("finetune", {}),
    ],
)
def test_exact_maps_are_those_of_the_students_saved_weights(mode, fields, run_of, tiny_cache, tiny_weights, tmp_path):
    if mode == "finetune":
        fields = {"weights": tiny_weights}
    run = run_of(mode, **fields)
    cache = atcache.open(maps_of(run, tmp_path / "own.zarr"))
    for view in range(2):
        for layer, (q_BHTD, k_BHTD) in live_factors(plain_student(run), pixels_of(cache.path, view)).items():
            stored = cache.factors(layer)
            assert torch.equal(torch.from_numpy(stored.q_VSHTD[view].compute()), q_BHTD)
            assert torch.equal(torch.from_numpy(stored.k_VSHTD[view].compute()), k_BHTD)
            attn_BHQK = (q_BHTD @ k_BHTD.mT / 4).softmax(-1).numpy()
            assert np.allclose(cache.maps(layer)[view].compute(), attn_BHQK, rtol=0, atol=1e-6)
    teachers = atcache.open(tiny_cache(codec=EXACT, views=2)).maps(0)[0].compute()
    assert np.abs(cache.maps(0)[0].compute() - teachers).max() > 0.01, "of the student, not of its teacher"


def test_a_codec_keeps_the_students_maps_within_its_target(run_of, tmp_path):
    exact = atcache.open(maps_of(run_of(), tmp_path / "exact.zarr"))
    coded = atcache.open(maps_of(run_of(), tmp_path / "coded.zarr", codec=None, target_kl=0.001))
    p, q = exact.maps(1).compute().astype(np.float64), coded.maps(1).compute().astype(np.float64)
    assert 0 < (p * np.log(p / q)).sum(-1).mean() < 0.002
    assert coded.record.calibration.row_kl_nats <= 0.001


def test_the_cache_says_whose_attention_it_holds(run_of, tiny_cache, tmp_path):
    run, teachers = run_of(), atcache.open(tiny_cache(codec=EXACT, views=2)).record
    own = atcache.open(maps_of(run, tmp_path / "own.zarr"))
    trained = own.record.trained
    assert (trained.run, trained.mode, trained.num_classes, trained.subset) == ("distill", "distill", 10, None)
    assert trained.teacher_weights_sha256 == teachers.identity.weights_sha256 != own.record.identity.weights_sha256
    assert trained.sources == (teachers.identity.fingerprint,)
    assert own.record.weights_from == "distill/model.safetensors"
    assert own.record.identity.teacher == teachers.identity.teacher, "timm's name, as of any teacher"
    assert own.attributes["teacher"]["trained"]["teacher"] == teachers.identity.teacher
    assert "trained" not in atcache.open(tiny_cache(codec=EXACT, views=2)).attributes["teacher"]
    shown = CliRunner().invoke(cli, ["info", str(own.path)])
    assert "trained    distill by vit_tiny_patch16_224" in shown.stdout
    assert "on labels of 10 classes, by the run distill" in shown.stdout


def test_the_cache_is_verified_by_the_run_and_by_its_weights(run_of, tiny_vit, tiny_weights, tmp_path):
    run, own = run_of(), maps_of(run_of(), tmp_path / "own.zarr")
    for fields in ({"teacher": str(run)}, {"teacher": tiny_vit, "weights": run}):
        verified = atcache.verify(cache=own, device="cpu", **fields)
        assert (verified.problems, verified.fidelity.row_kl_nats < 1e-6) == ((), True)
    with pytest.raises(CacheMismatchError, match="has weights of sha256"):
        atcache.verify(cache=own, device="cpu", teacher=tiny_vit, weights=tiny_weights)


def test_a_student_can_be_trained_from_the_maps_of_another(run_of, tmp_path):
    own = maps_of(run_of(), tmp_path / "own.zarr")
    train(TrainConfig(mode="copy", cache=own, out=tmp_path / "second", steps=1, batch_size=8, **PLACE))
    record = json.loads((tmp_path / "second" / "run.json").read_text())
    assert record["caches"] == [str(own)]


# Which views


@pytest.mark.parametrize(
    "fields",
    [{"views": 2}, {"views": 2, **MIXED}, {"views": 2, "policy": "randaug"}, {"pixels": "store"}],
    ids=["crops", "mixed", "randaug", "stored"],
)
def test_views_are_those_of_the_cache_that_the_student_was_trained_from(fields, run_of, tiny_cache, tmp_path):
    given = tiny_cache(codec=EXACT, **fields)
    own = maps_of(run_of(cache=given), tmp_path / "own.zarr", batch_size=7)
    assert views_of(own) == views_of(given)
    theirs, ours = (atcache.open(path).record.identity for path in (given, own))
    assert (ours.fingerprint, ours.policy, ours.num_views) == (theirs.fingerprint, theirs.policy, theirs.num_views)
    assert atcache.verify(cache=own).problems == ()


# Mixed views keep the gap: each partner must stay in its view's shard.
@pytest.mark.parametrize(("mix", "num_rows"), [(MIXED, 52), ({"policy": "crop-flip"}, 48)], ids=["mixed", "plain"])
def test_views_of_a_cache_that_has_grown_are_taken(mix, num_rows, digits_build, digits_tars, run_of, tmp_path):
    given = digits_build.out
    common = {"teacher": digits_build.teacher, "weights": digits_build.weights, "workers": 0, **PLACE, **mix}
    build(BuildConfig(data=str(digits_tars[0]), out=given, samples_per_shard=10, codec=EXACT, **common))
    data = str(digits_tars[0].parent)
    build(BuildConfig(data=data, out=given, samples_per_shard=10, codec=EXACT, grow=True, **common))
    assert CacheReader(given).layout.num_samples == 20 + 32
    own = maps_of(run_of(), tmp_path / "own.zarr", cache=given)
    assert CacheReader(own).layout.num_samples == num_rows
    assert views_of(own) == views_of(given)
    assert atcache.verify(cache=own).problems == ()


def test_some_samples_and_views_are_the_same_ones_in_every_cache(run_of, tiny_cache, tmp_path):
    given = tiny_cache(codec=EXACT, views=2)
    own = maps_of(run_of(), tmp_path / "own.zarr", max_samples=13, views=1, batch_size=4, workers=1)
    few, all_views = views_of(own), views_of(given)
    assert len(few) == 13
    assert set(few) < set(all_views)
    drawn = tiny_cache(codec=EXACT, max_samples=13)
    assert few == views_of(drawn)


def test_images_that_were_left_out_are_left_out_again(digits_build, run_of, tiny_vit, tiny_weights, tmp_path):
    samples = [{"jpg": picture(seed), "cls": b"3"} for seed in range(12)]
    samples[4]["jpg"] = b"\xff\xd8\xff\xe0 this is no JPEG"
    del samples[9]["jpg"]
    samples[10]["__key__"] = "sample-000"
    tar = write_tar(tmp_path / "bad.tar", samples)
    common = {"teacher": tiny_vit, "weights": tiny_weights, "workers": 0, **PLACE}
    build(BuildConfig(data=str(tar), out=tmp_path / "given.zarr", on_bad_image="skip", **common))
    own = maps_of(run_of(), tmp_path / "own.zarr", cache=tmp_path / "given.zarr")
    assert views_of(own) == views_of(tmp_path / "given.zarr")
    status_S = CacheReader(own).status_VS[0]
    assert [int(status_S[row]) for row in (4, 9, 10)] == [Status.UNDECODABLE, Status.NO_IMAGE, Status.DUPLICATE_KEY]
    assert Problem.NONE not in status_S[[4, 9, 10]]


def test_tars_may_have_moved_and_stored_pixels_need_none(digits_tars, run_of, tiny_vit, tiny_weights, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    shutil.copytree(digits_tars[0].parent, first)
    common = {"teacher": tiny_vit, "weights": tiny_weights, "data": str(first), "workers": 0, **PLACE}
    build(BuildConfig(out=tmp_path / "given.zarr", **common))
    build(BuildConfig(out=tmp_path / "stored.zarr", pixels="store", **common))
    first.rename(second)
    with pytest.raises(SourceError, match=r"digits-0000\.tar cannot be opened: No such file.* give their place"):
        maps_of(run_of(), tmp_path / "own.zarr", cache=tmp_path / "given.zarr")
    assert not (tmp_path / "own.zarr").exists()
    own = maps_of(run_of(), tmp_path / "own.zarr", cache=tmp_path / "given.zarr", data=str(second))
    assert views_of(own) == views_of(tmp_path / "given.zarr")
    (second / "digits-0002.tar").unlink()
    with pytest.raises(SourceError, match=r"does not hold the tars that were indexed: digits-0002\.tar is missing"):
        maps_of(run_of(), tmp_path / "other.zarr", cache=tmp_path / "given.zarr", data=str(second))
    own = maps_of(run_of(), tmp_path / "from-stored.zarr", cache=tmp_path / "stored.zarr")
    assert views_of(own) == views_of(tmp_path / "stored.zarr")


def test_new_views_are_drawn_where_that_is_asked_or_no_cache_is_known(digits_tars, run_of, tiny_cache, tmp_path):
    data = str(digits_tars[0].parent)
    drawn = maps_of(run_of(), tmp_path / "drawn.zarr", data=data, policy="eval")
    assert views_of(drawn) == views_of(tiny_cache(codec=EXACT, policy="eval"))
    alone = run_of("scratch", cache=None, data=data, student=atcache.open(drawn).record.identity.teacher)
    of_scratch = maps_of(alone, tmp_path / "scratch.zarr", data=data)
    assert views_of(of_scratch) == views_of(drawn)
    with pytest.raises(ConfigError, match="scratch was trained without a cache, so no views are known: give --data"):
        maps_of(alone, tmp_path / "none.zarr")


def test_images_without_labels_can_be_looked_at(run_of, tmp_path):
    tar = write_tar(tmp_path / "plain.tar", [{"jpg": picture(seed)} for seed in range(5)])
    own = maps_of(run_of(), tmp_path / "own.zarr", data=str(tar), policy="crop-flip", views=2)
    assert CacheReader(own).samples.label_S.tolist() == [-1] * 5


# The same build, whoever does it


def test_the_same_command_continues_and_a_cluster_makes_the_same_bytes(run_of, tmp_path):
    fields = {"codec": "int8", "max_samples": 20, "batch_size": 8}
    own = maps_of(run_of(), tmp_path / "own.zarr", **fields)
    options = {"run": run_of(), "workers": 0, **PLACE, **fields}
    assert maps(MapsConfig(out=own, **options)).num_built_views == 0
    with threads(2) as (_, client):
        maps(MapsConfig(out=tmp_path / "cluster.zarr", client=client, **options))
    assert differences(tmp_path / "cluster.zarr", own) == []


def test_what_a_cluster_is_sent_means_the_same_in_another_folder(run_of, tmp_path, monkeypatch):
    monkeypatch.chdir(run_of().parent)
    given = BuildConfig(teacher="distill", views_from=Path("given.zarr"), out=Path("own.zarr"))
    sent = config_as_sent(given)
    assert (sent.teacher, sent.views_from, sent.data) == (str(run_of()), run_of().parent / "given.zarr", None)


def test_a_build_takes_a_run_as_its_teacher_and_the_views_of_a_cache(run_of, tiny_cache, tiny_vit, tmp_path):
    given, own = tiny_cache(codec=EXACT, views=2), maps_of(run_of(), tmp_path / "own.zarr", codec="int8")
    common = {"workers": 0, "batch_size": 48, **PLACE}
    atcache.build(teacher=str(run_of()), views_from=given, views=2, codec="int8", out=tmp_path / "built.zarr", **common)
    assert differences(tmp_path / "built.zarr", own) == []
    atcache.build(
        teacher=str(run_of()), views_from=given, codec_from=own, out=tmp_path / "codec.zarr", max_samples=5, **common
    )
    assert CacheReader(tmp_path / "codec.zarr").layout.num_samples == 5
    with pytest.raises(ConfigError, match=r"a run comes with its weights\. Leave out --weights"):
        atcache.build(teacher=str(run_of()), weights=run_of(), views_from=given, out=tmp_path / "no.zarr")


def test_a_name_of_a_model_is_never_a_folder(run_of, tiny_cache, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(run_of(), tmp_path / "demo-mae")
    given = {"views_from": tiny_cache(policy="eval"), "workers": 0, **PLACE}
    atcache.build(teacher="demo-mae", out="named.zarr", **given)
    assert atcache.open("named.zarr").record.trained is None
    atcache.build(teacher="./demo-mae", out="run.zarr", **given)
    assert atcache.open("run.zarr").record.trained.run == "demo-mae"
    maps_of(Path("demo-mae"), Path("maps.zarr"))
    assert atcache.open("maps.zarr").record.trained.run == "demo-mae"


def test_the_command_and_the_function_do_the_same(run_of, tmp_path):
    words = ["maps", str(run_of()), "--out", str(tmp_path / "own.zarr"), "--codec", "int8", "--workers", "0"]
    done = CliRunner().invoke(cli, [*words, "--device", "cpu", "--precision", "fp32", "--max-samples", "7"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["complete"]["num_stored"] == 14
    assert "7 samples x 2 views" in done.stderr
    made = atcache.maps(run=run_of(), out=tmp_path / "b.zarr", codec="int8", max_samples=7, workers=0, **PLACE)
    assert made.complete["num_stored"] == 14
    planned = atcache.maps(run=run_of(), out=tmp_path / "c.zarr", dry_run=True, workers=0, **PLACE)
    assert (planned.plan.num_samples, (tmp_path / "c.zarr").exists()) == (48, False)
