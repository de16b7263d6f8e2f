"""Caches of parts of a dataset become one, whose files are those of the parts."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from builds import MIXED, differences, files
from click.testing import CliRunner
from disks import mounted

import atcache
from atcache.cache.record import CacheRecord, SampleChoice
from atcache.cli.main import cli
from atcache.errors import CacheMismatchError, ConfigError, CorruptCacheError, DiskFullError
from atcache.pipelines.build.run import build
from atcache.pipelines.merge.config import MergeConfig
from atcache.pipelines.merge.run import _check_is_part, merge
from atcache.store.reader import CacheReader


@pytest.fixture
def parts(digits_build, digits_tars, tmp_path):
    """A function: one cache for each of three tars, in shards of 6 samples, with the codec of the first."""

    def build_parts(**fields):
        config = replace(digits_build, samples_per_shard=6, batch_size=6, **fields)
        paths = [tmp_path / f"part-{number}.zarr" for number in range(3)]
        for number, path in enumerate(paths):
            codec = {"codec": None, "target_kl": None, "codec_from": paths[0]} if number else {}
            build(replace(config, data=str(digits_tars[number]), out=path, **codec))
        return config, paths

    return build_parts


@pytest.mark.parametrize(
    "fields",
    [{"codec": "int8"}, {"target_kl": 0.01, "views": 2, "pixels": "store", **MIXED}],
    ids=["int8", "transform, stored and mixed"],
)
def test_a_merged_cache_has_the_files_of_one_that_grew(parts, digits_tars, tmp_path, fields):
    config, paths = parts(**fields)
    before = [files(path) for path in paths]
    summary = merge(MergeConfig(caches=tuple(paths), out=tmp_path / "merged.zarr"))
    assert (summary.num_samples, summary.copied_nbytes, summary.notes) == (48, 0, ())
    assert [files(path) for path in paths] == before
    shutil.copytree(paths[0], config.out)
    for tar in digits_tars[1:]:
        build(replace(config, data=str(tar), grow=True))
    shutil.rmtree(config.out / "samples")  # tables of what it was before
    shutil.rmtree(config.out / "samples-2")
    assert differences(tmp_path / "merged.zarr", config.out) == []
    assert not atcache.verify(cache=tmp_path / "merged.zarr", all=True).problems
    assert not atcache.verify(
        cache=tmp_path / "merged.zarr", teacher=config.teacher, weights=config.weights, device="cpu"
    ).problems


def test_its_maps_and_images_are_those_of_the_parts(parts, tmp_path):
    _, paths = parts(**MIXED)
    atcache.merge(caches=paths, out=tmp_path / "merged.zarr")
    merged = atcache.open(tmp_path / "merged.zarr")
    assert merged.reader.layout.part_stops == (16, 34, 52)
    for path in paths:
        part = atcache.open(path)
        for sample_key in part.samples.sample_key.values:
            ours, theirs = merged.view(str(sample_key)), part.view(str(sample_key))
            assert np.array_equal(ours.image, theirs.image)
            assert np.array_equal(ours.maps_LHQK, theirs.maps_LHQK)
            assert (ours.label, ours.share) == (theirs.label, theirs.share)


def test_a_merged_cache_trains_grows_and_merges_again(parts, digits_tars, tmp_path):
    config, paths = parts(codec="int8")
    merge(MergeConfig(caches=(paths[0], paths[1]), out=tmp_path / "two.zarr"))
    merge(MergeConfig(caches=(tmp_path / "two.zarr", paths[2]), out=tmp_path / "again.zarr"))
    merge(MergeConfig(caches=tuple(paths), out=tmp_path / "all.zarr"))
    assert differences(tmp_path / "again.zarr", tmp_path / "all.zarr") == []
    everything = str(digits_tars[0].parent)
    summary = build(replace(config, data=everything, out=tmp_path / "all.zarr", views=2, grow=True))
    assert summary.complete["num_stored"] == 96
    common = {"cache": tmp_path / "all.zarr", "batch_size": 16, "device": "cpu", "workers": 0}
    assert np.isfinite(atcache.train(mode="distill", out=tmp_path / "run", epochs=1, **common).loss)
    assert not atcache.verify(cache=tmp_path / "all.zarr", all=True).problems
    assert not atcache.verify(cache=tmp_path / "again.zarr", all=True).problems, "its files are its own"


def test_the_command_prints_what_was_made(parts, tmp_path):
    _, paths = parts(codec="int8")
    arguments = ["merge", *map(str, paths), "--out", str(tmp_path / "merged.zarr")]
    result = CliRunner().invoke(cli, arguments)
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["num_samples"] == 48
    again = CliRunner().invoke(cli, arguments)
    assert again.exit_code == 1
    assert "merged.zarr exists already: give another --out, or remove it." in again.stderr


def test_what_are_not_parts_of_one_cache_is_refused(parts, digits_tars, tmp_path):
    config, paths = parts(codec="int8")
    out = tmp_path / "merged.zarr"
    (tmp_path / "others").mkdir()

    def refused(match, error=CacheMismatchError, **fields):
        other = tmp_path / f"others/{len(list((tmp_path / 'others').iterdir()))}.zarr"
        build(replace(config, data=str(digits_tars[1]), out=other, **fields))
        with pytest.raises(error, match=match):
            merge(MergeConfig(caches=(paths[0], other), out=out))

    refused(r"views.num_views is 1 in \S+ and 2 in \S+. Parts that are to be merged have the same options", views=2)
    refused(r"views.policy.seed is 0 in \S+ and 1 in \S+", seed=1)
    refused(r"layout.samples_per_shard is 6 in \S+ and 5 in \S+", samples_per_shard=5)
    refused(r"codec.name is 'int8' in \S+ and 'exact' in", codec="exact")
    with pytest.raises(CacheMismatchError, match=r"both hold a tar called digits-0000.tar, so its samples would be"):
        merge(MergeConfig(caches=(paths[0], paths[0]), out=out))
    with pytest.raises(ConfigError, match="name two or more to merge"):
        MergeConfig(caches=(paths[0],), out=out)
    (paths[1] / "commits/v0000-b000001.json").unlink()
    with pytest.raises(CacheMismatchError, match=r"part-1.zarr is not complete: 1 of 3 tasks are missing"):
        merge(MergeConfig(caches=tuple(paths), out=out))
    shard = paths[2] / "attention/codes/c/0/0/0/0/0"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(CorruptCacheError, match=r"were committed. Repair it with `atcache verify --repair`"):
        merge(MergeConfig(caches=(paths[0], paths[2]), out=out))
    assert not [path for path in tmp_path.iterdir() if "merged" in path.name], "nothing is left"


def test_how_samples_were_chosen_goes_along_if_all_parts_agree(digits_build, digits_tars, tmp_path):
    config = replace(digits_build, samples_per_shard=6, codec="int8", target_kl=None)
    paths = [tmp_path / f"{number}.zarr" for number in range(3)]
    for path, tar, max_samples in zip(paths, digits_tars, (9, 9, 5), strict=True):
        codec = {} if path == paths[0] else {"codec": None, "codec_from": paths[0]}
        build(replace(config, data=str(tar), out=path, max_samples=max_samples, **codec))
    alike, other = tmp_path / "alike.zarr", tmp_path / "other.zarr"
    merge(MergeConfig(caches=tuple(paths[:2]), out=alike))
    merge(MergeConfig(caches=tuple(paths[1:]), out=other))
    assert CacheRecord.of(CacheReader(alike)).choice == SampleChoice(labels="required", label_key=None, max_samples=9)
    assert CacheRecord.of(CacheReader(other)).choice is None


def test_codecs_that_were_fitted_apart_are_refused(digits_build, digits_tars, tmp_path):
    config = replace(digits_build, samples_per_shard=6, target_kl=0.01)
    paths = tmp_path / "a.zarr", tmp_path / "b.zarr"
    for path, tar in zip(paths, digits_tars, strict=False):
        build(replace(config, data=str(tar), out=path))
    with pytest.raises(CacheMismatchError, match=r"are not parts of one cache: .* --codec-from the first"):
        merge(MergeConfig(caches=paths, out=tmp_path / "merged.zarr"))


def test_of_all_parts_only_the_first_ones_state_stays_in_memory(parts):
    _, paths = parts(target_kl=0.01)
    readers = [CacheReader(path) for path in paths]
    for reader in readers[1:]:
        _check_is_part(readers[0], reader)
    assert ["state" in vars(reader) for reader in readers] == [True, False, False]


def test_on_another_disk_shards_are_copied_if_they_fit(parts, tmp_path):
    _, paths = parts(codec="exact:dtype=float32")
    merge(MergeConfig(caches=tuple(paths), out=tmp_path / "linked.zarr"))
    folder = tmp_path / "disk"
    with mounted(folder, "size=64k"):
        with pytest.raises(
            DiskFullError, match=r"[\d.]+ [kM]B of shards must be copied, [\d.]+ kB are free. Free some space, or"
        ):
            merge(MergeConfig(caches=tuple(paths), out=folder / "merged.zarr"))
        assert list(folder.iterdir()) == []
    with mounted(folder, "size=8m"):
        summary = merge(MergeConfig(caches=tuple(paths), out=folder / "merged.zarr"))
        assert summary.copied_nbytes == summary.complete["nbytes"] > 2**16
        assert differences(folder / "merged.zarr", tmp_path / "linked.zarr") == []


def test_names_of_classes_go_along_and_must_agree(digits_build, digits_tars, tmp_path):
    names = {"a": "digit", "b": "digit", "c": "number"}
    configs = {}
    for tar, (folder, name) in zip(digits_tars, names.items(), strict=True):
        (tmp_path / folder).mkdir()
        shutil.copy(tar, tmp_path / folder)
        (tmp_path / folder / "classes.txt").write_text("".join(f"{name} {label}\n" for label in range(10)))
        out = tmp_path / f"{folder}.zarr"
        configs[folder] = replace(digits_build, data=str(tmp_path / folder), out=out, codec="exact")
        build(configs[folder])
    first, second, third = (config.out for config in configs.values())
    merge(MergeConfig(caches=(first, second), out=tmp_path / "merged.zarr"))
    with pytest.raises(CacheMismatchError, match=r"class 0 is '(digit|number) 0' in .* and '(digit|number) 0' in "):
        merge(MergeConfig(caches=(first, third), out=tmp_path / "wrong.zarr"))
    build(replace(configs["b"], out=first, grow=True))
    with pytest.raises(CacheMismatchError, match="class 0 is"):
        build(replace(configs["c"], out=first, grow=True))
    for path in (first, tmp_path / "merged.zarr"):
        samples = atcache.open(path).samples
        assert samples.class_name.values.tolist() == [f"digit {label}" for label in samples.label.values]
        assert len(samples.label) == 32


@pytest.mark.parametrize("name", ["commits/v0000-b000001.json", "zarr.json"])
def test_a_part_with_a_damaged_record_or_root_gets_no_new_checksum(parts, tmp_path, name):
    _, paths = parts(codec="int8")
    text = (paths[1] / name).read_text()
    number = '"crc32": ' if name == "zarr.json" else '"num_stored": '
    (paths[1] / name).write_text(text.replace(number, f"{number}1", 1))
    with pytest.raises(CorruptCacheError, match=rf"part-1.zarr/{name}.* checksum does not match"):
        merge(MergeConfig(caches=tuple(paths), out=tmp_path / "merged.zarr"))
    assert not (tmp_path / "merged.zarr").exists()
