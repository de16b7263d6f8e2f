"""A probe from caches and from tars: what it trains, that it continues, and what it refuses."""

from __future__ import annotations

import io
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from builds import picture, write_tar
from click.testing import CliRunner
from PIL import Image
from safetensors.torch import load_file

import atcache
from atcache.cli.main import cli
from atcache.errors import CacheMismatchError, ConfigError, SourceError
from atcache.pipelines.probe.caches import open_probe_caches
from atcache.pipelines.probe.config import ProbeConfig
from atcache.pipelines.probe.run import ProbeResult, probe
from atcache.pipelines.running.run_folder import read_record
from atcache.store.reader import CacheReader

FAST = {"steps": 4, "batch_size": 12, "seeds": 2, "device": "cpu", "precision": "fp32"}


@pytest.fixture(scope="module")
def probed(tiny_cache, tmp_path_factory) -> tuple[ProbeConfig, ProbeResult, list[str]]:
    """A finished probe of two caches, its result and what it said."""
    out = tmp_path_factory.mktemp("probe") / "p"
    config = ProbeConfig(cache=tiny_cache(), val_cache=tiny_cache(policy="eval"), samples=30, out=out, **FAST)
    said: list[str] = []
    return config, probe(config, say=said.append), said


def settings_of(run: Path) -> dict:
    return read_record(run / "run.json")["settings"]


def test_pairs_differ_in_nothing_but_the_attention(probed):
    config, result, _ = probed
    assert [pair.seed for pair in result.pairs] == [0, 1]
    for seed in (0, 1):
        ours, theirs = (settings_of(config.out / "runs" / f"{mode}-{seed}") for mode in ("copy", "scratch"))
        assert {name for name in ours if ours[name] != theirs[name]} == {"mode"}
        assert (ours["seed"], ours["subset"], ours["steps"]) == (seed, 30, 4)


def test_the_numbers_are_those_of_the_runs(probed):
    config, result, said = probed
    for pair in result.pairs:
        for mode, top1 in (("copy", pair.transfer), ("scratch", pair.scratch)):
            summary = json.loads((config.out / "runs" / f"{mode}-{pair.seed}" / "summary.json").read_text())
            assert summary["validation"]["top1"] == top1
            assert summary["num_samples"] == result.num_samples == 30
    differences = [pair.transfer - pair.scratch for pair in result.pairs]
    assert result.difference.mean == pytest.approx(sum(differences) / 2)
    assert (result.steps, result.num_val_images, result.num_classes) == (4, 48, 10)
    assert result.verdict.line == said[0]
    assert said[-1].startswith("seed 1: copy ")
    assert json.loads((config.out / "result.json").read_text()) == result.to_json()
    assert ProbeResult.from_json(result.to_json()) == result
    assert not (config.out / "timing").exists()


def test_more_seeds_add_pairs_and_the_others_are_kept(probed):
    config, first, _ = probed
    said: list[str] = []
    result = probe(replace(config, seeds=3), say=said.append)
    assert result.pairs[:2] == first.pairs
    assert len(result.pairs) == 3
    assert [line.endswith("(trained before)") for line in said if line.startswith("seed ")] == [True, True, False]
    assert not any(line.startswith("timing") for line in said)
    assert not any("There was an answer" in note for note in first.notes)
    assert any(note.startswith("There was an answer after 2 pairs already") for note in result.notes)


def test_other_options_and_other_folders_are_refused(probed, tmp_path):
    config, _, _ = probed
    with pytest.raises(CacheMismatchError, match=r"holds another probe: samples is 30 there and 20 here"):
        probe(replace(config, samples=20))
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"holds something else than a probe: there is no probe\.json"):
        probe(replace(config, out=tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_small_caches_of_other_samples_are_built_of_tars(digits_tars, tiny_vit, tiny_weights, tmp_path):
    out = tmp_path / "probe"
    settings = {"teacher": tiny_vit, "weights": tiny_weights, "data": digits_tars[0].parent, "out": out}
    sizes = {"samples": 20, "val_samples": 10, "views": 2, "mode": "distill", "minutes": 5}
    words = [word for name, value in {**settings, **sizes, **FAST}.items() for word in (_option(name), str(value))]
    done = CliRunner().invoke(cli, ["probe", *words])
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    assert (result["mode"], result["num_samples"], result["num_val_images"]) == ("distill", 20, 10)
    assert result["sentence"] in done.stderr
    assert "20 training samples, 4 steps; top-1 % on 10 others" in done.stderr
    assert "Both kinds of student are near chance (14.3%; distill" in done.stderr, "of 7 classes"
    train, val = atcache.open(out / "train.zarr"), atcache.open(out / "val.zarr")
    keys = [set(cache.samples.sample_key.values.tolist()) for cache in (train, val)]
    assert [len(part) for part in keys] == [20, 10]
    assert not keys[0] & keys[1]
    assert (train.describe()["num_views"], val.describe()["views"]["policy"]["name"]) == (2, "eval")
    counts = [Counter(cache.samples.label.values.tolist()) for cache in (train, val)]
    assert result["num_classes"] == len(counts[0]) == len(counts[1]) == 7, "as few as have 30 samples"
    assert set(counts[0]) == set(counts[1])
    assert set(counts[1].values()) == {1, 2}, "as even as can be; training takes what is left"


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def test_of_many_classes_only_those_are_probed_that_students_can_learn(many_classes, tiny_vit, tiny_weights, tmp_path):
    """Each of 60 classes has 4 images. Of 20 to train on, drawn over all, no class would have two."""
    settings = {"teacher": tiny_vit, "weights": tiny_weights, "views": 1, **FAST}
    of_one = ProbeConfig(**settings, data=str(many_classes), samples=20, val_samples=8, out=tmp_path / "one")
    result = probe(of_one)
    caches = [atcache.open(of_one.out / name) for name in ("train.zarr", "val.zarr")]
    trained, validated = (set(cache.samples.label.values.tolist()) for cache in caches)
    assert validated <= trained
    assert result.num_classes == len(trained) == 7, "as few as have 28 images"
    assert (result.num_samples, result.num_val_images) == (20, 8)
    assert any(note.startswith(f"The samples are of 7 of the {max(trained) + 1} classes") for note in result.notes)
    of_two = replace(of_one, val_data=str(many_classes), out=tmp_path / "two")
    of_two.out.mkdir()
    built = open_probe_caches(of_two)
    labels = [set(atcache.open(place).samples.label.values.tolist()) for place in (built.train, built.val)]
    assert labels[1] <= labels[0]
    assert (built.num_classes, len(labels[0])) == (5, 5)


def test_a_small_class_is_trained_on_and_validated(tiny_vit, tiny_weights, tmp_path):
    """Of 3 images that one class has, validation would take all if it took as many as of the others."""
    numbers = [40] * 4 + [3]
    data = tar_of_classes(tmp_path, [label for label, number in enumerate(numbers) for _ in range(number)])
    config = ProbeConfig(teacher=tiny_vit, weights=tiny_weights, data=str(data), views=1, out=tmp_path / "p", **FAST)
    config.out.mkdir()
    built = open_probe_caches(config)
    counts = [Counter(atcache.open(place).samples.label.values.tolist()) for place in (built.train, built.val)]
    assert built.num_classes == 5
    assert (counts[0][4], counts[1][4]) == (1, 2)


def test_a_probe_that_could_not_begin_is_begun_with_other_options(digits_tars, tiny_vit, tiny_weights, tmp_path):
    """In the same folder, as its messages advise, until the first students are trained."""
    good = {"teacher": tiny_vit, "weights": tiny_weights, "data": str(digits_tars[0].parent)}
    common = {"out": tmp_path / "p", "policy": "eval", "val_samples": 12, **FAST}

    def begin(**fields) -> ProbeResult:
        return probe(ProbeConfig(**{**common, **good, **fields}))

    with pytest.raises(SourceError):
        begin(data=str(tmp_path / "typo.tar"))
    with pytest.raises(ConfigError, match="Give fewer"):
        begin(samples=40)
    with pytest.raises(ConfigError, match=r"minutes=1e-05 is too short: .* a smaller --batch-size or fewer"):
        begin(samples=30, minutes=1e-5)
    assert CacheReader(tmp_path / "p/train.zarr").layout.num_samples == 30
    result = begin(samples=20, batch_size=10)
    assert CacheReader(tmp_path / "p/train.zarr").layout.num_samples == result.num_samples == 20
    with pytest.raises(CacheMismatchError, match=r"holds another probe: samples is 20 there and 30 here"):
        begin(samples=30, batch_size=10)


def test_of_mixed_views_all_samples_are_taken(tiny_cache, tmp_path):
    mixed, val = tiny_cache(mixup=0.8, seed=1), tiny_cache(policy="eval")
    config = ProbeConfig(cache=mixed, val_cache=val, samples=30, out=tmp_path, **FAST)
    with pytest.raises(ConfigError, match=r"samples=30: .* are mixed .* all 48 are needed\. Leave --samples out"):
        open_probe_caches(config)
    caches = open_probe_caches(replace(config, samples=None))
    assert (caches.subset, caches.num_samples) == (None, 48)


def test_more_samples_than_a_cache_has_are_refused(probed):
    config, _, _ = probed
    with pytest.raises(ConfigError, match=r"samples=49: the cache has 48 with a label"):
        probe(replace(config, samples=49, out=config.out.parent / "more"))


@pytest.fixture
def many_classes(tmp_path) -> Path:
    return tar_of_classes(tmp_path, [sample % 60 for sample in range(240)])


def tar_of_classes(folder: Path, labels: list[int]) -> Path:
    """A tar of an image for each label."""
    import webdataset

    path = folder / "classes.tar"
    with path.open("wb") as file, webdataset.TarWriter(file) as writer:
        for sample, label in enumerate(labels):
            png = io.BytesIO()
            Image.fromarray(np.full((8, 8, 3), sample, np.uint8)).save(png, format="PNG")
            writer.write({"__key__": f"s{sample:03d}", "png": png.getvalue(), "cls": str(label).encode()})
    return path


def test_validation_images_may_come_from_elsewhere(digits_tars, tiny_vit, tiny_weights, tmp_path):
    config = ProbeConfig(
        **{"teacher": tiny_vit, "weights": tiny_weights, "out": tmp_path / "p", "policy": "eval"},
        **{"data": str(digits_tars[0]), "val_data": str(digits_tars[1]), "val_samples": 5},
        **FAST,
    )
    config.out.mkdir()
    caches = open_probe_caches(config)
    keys = [atcache.open(place).samples.sample_key.values.tolist() for place in (caches.train, caches.val)]
    assert [len(part) for part in keys] == [16, 5]
    assert all(key.startswith("digits-0000.tar/") for key in keys[0])
    assert all(key.startswith("digits-0001.tar/") for key in keys[1])
    assert (caches.subset, caches.num_samples) == (None, 16)


def test_too_few_images_are_refused_before_anything_is_built(digits_tars, tiny_vit, tiny_weights, tmp_path):
    settings = {"teacher": tiny_vit, "weights": tiny_weights, "out": tmp_path / "p", **FAST}
    data = str(digits_tars[0].parent)
    with pytest.raises(ConfigError, match=r"has 48 usable samples, too few for samples=40, val_samples=20"):
        probe(ProbeConfig(**settings, data=data, samples=40, val_samples=20))
    with pytest.raises(SourceError):
        probe(ProbeConfig(**{**settings, "out": tmp_path / "q"}, data=str(tmp_path / "none.tar")))
    assert not (tmp_path / "p" / "train.zarr").exists()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, r"there is nothing to probe: give --cache and --val-cache, or --teacher and --data"),
        ({"teacher": "demo-mae"}, r"there is nothing to probe"),
        ({"cache": "c.zarr"}, r"cache without val_cache: .* `atcache build --policy eval`"),
        ({"val_cache": "v.zarr", "teacher": "demo-mae", "data": "d.tar"}, r"val_cache=v\.zarr without a cache"),
        ({"cache": "c.zarr", "val_cache": "v.zarr", "views": 2}, r"views=2 is for building small caches"),
        ({"cache": "c.zarr", "val_cache": "v.zarr", "seeds": 1}, r"seeds=1: expected"),
    ],
)
def test_options_that_do_not_go_together_are_refused(fields, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        ProbeConfig(out=tmp_path, **fields)


def test_options_of_caches_and_students_reach_them(tiny_vit, tiny_weights, tmp_path):
    jsons = [json.dumps({"kind": seed % 2}).encode() for seed in range(24)]
    samples = [{"png": picture(seed, kind="PNG"), "json": label} for seed, label in enumerate(jsons)]
    tar, student = write_tar(tmp_path / "train.tar", samples), f"{tiny_vit},mlp_ratio=2"
    settings = {"teacher": tiny_vit, "weights": tiny_weights, "data": tar, "out": tmp_path / "probe", **FAST}
    settings |= {"label_key": "kind", "student": student, "base_lr": 5e-3, "workers": 1, "minutes": 60}
    words = [word for name, value in settings.items() for word in (_option(name), str(value))]
    done = CliRunner().invoke(cli, ["probe", *words])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["num_classes"] == 2
    assert set(atcache.open(tmp_path / "probe/train.zarr").samples.label.values.tolist()) == {0, 1}
    for mode in ("copy", "scratch"):
        run = tmp_path / "probe" / "runs" / f"{mode}-0"
        assert settings_of(run)["base_lr"] == 5e-3
        assert settings_of(run)["student"] == student
        assert load_file(run / "model.safetensors")["blocks.0.mlp.fc1.weight"].shape == (64, 32)
    # Workers change nothing in a result: they are in the config of each student.
    config = ProbeConfig(cache="c.zarr", val_cache="v.zarr", out=tmp_path / "x", workers=3)
    assert config.training("copy", 0, tmp_path / "y", steps=1, subset=None, caches=("c.zarr", "v.zarr")).workers == 3
