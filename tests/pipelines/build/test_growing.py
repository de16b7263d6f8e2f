"""Caches grow: more views and more tars are added to what is there, which stays as it is, byte for byte."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import zarr
from builds import CHILDREN, MIXED, differences, files, in_a_child, picture, write_tar
from click.testing import CliRunner
from safetensors.numpy import load_file

import atcache
from atcache.cache.cache import Cache
from atcache.cli.main import cli
from atcache.errors import CacheMismatchError, ConfigError, CorruptCacheError, SourceError
from atcache.pipelines.build.config import BuildConfig
from atcache.pipelines.build.run import build
from atcache.store.growth import GROWTH, read_growth
from atcache.store.layout import Status
from atcache.store.manifest import list_commits
from atcache.teachers.load import load_teacher

GOLDEN = Path(__file__).parents[2] / "golden"
sys.path.insert(0, str(GOLDEN))
from make import BEIT, CACHES, CAIT, REGISTERS, ROPE, VIT  # noqa: E402 - what the golden caches were made of

# SHA-256 of the weights that `write_weights` wrote for the golden caches, see `plain_digest`.
GOLDEN_WEIGHTS = {
    VIT: "6a645fb164df4a2f6f34f1189d063761d3f1965ad8cbad9df40cf85cec5a3019",
    BEIT: "4bb629a6c70a802d4504c195a2d81f791df0f19f5925f4a0092afc76072b1ce8",
    REGISTERS: "5308808bf06db836e537e8af24d4b38bdafb1087a255cc52a085d7f88536340b",
    ROPE: "c8b4b99c49f89b2d669cbe9c2f3d955bc256ee87fce3c48109bad20a26fdd7b4",
    CAIT: "6a60c8c83cf001aeb23680e6d901bdfb1e071656caeebfdb67621624502ad893",
}


@pytest.fixture
def config(digits_build, digits_tars):
    """Two of the three tars: 32 samples in shards of 3, so that the last shard is partly filled."""
    return replace(digits_build, data=pattern(digits_tars[:2]), samples_per_shard=3, batch_size=4, codec="int8")


def pattern(tars):
    return f"{tars[0].parent}/{{{','.join(tar.name for tar in tars)}}}"


def shards(path):
    """All files of tasks: shards and commit records."""
    return {name: data for name, data in files(path).items() if "/c/" in name and not name.startswith("samples")}


# More views


@pytest.mark.parametrize("fields", [{}, {"pixels": "store", **MIXED}], ids=["replayed", "stored and mixed"])
def test_more_views_give_the_cache_that_has_them_from_the_start(config, tmp_path, fields):
    config = replace(config, **fields)
    build(config)
    before = shards(config.out)
    summary = build(replace(config, views=3, grow=True))
    assert (summary.num_built_views, summary.complete["num_stored"]) == (64, 96)
    assert before.items() <= shards(config.out).items()
    build(replace(config, views=3, out=tmp_path / "at-once.zarr"))
    assert differences(config.out, tmp_path / "at-once.zarr") == []
    assert not atcache.verify(cache=config.out, all=True).problems


def test_a_fitted_codec_is_kept(config):
    config = replace(config, codec=None, target_kl=0.01)
    build(config)
    state = {name: array.tobytes() for name, array in atcache.open(config.out).state.items()}
    assert state
    build(replace(config, views=2, grow=True, target_kl=None))
    assert {name: array.tobytes() for name, array in atcache.open(config.out).state.items()} == state
    assert not atcache.verify(cache=config.out, teacher=config.teacher, weights=config.weights, device="cpu").problems


# More samples


@pytest.fixture
def grown(config, digits_tars):
    """A function: builds from two tars, then adds the third."""

    def grow(**fields):
        begun = replace(config, **fields)
        build(begun)
        before = shards(begun.out)
        wanted = replace(begun, data=str(digits_tars[0].parent), grow=True)
        summary = build(wanted)
        assert before.items() <= shards(begun.out).items()
        return wanted, summary

    return grow


def test_more_samples_begin_a_shard_of_their_own(grown):
    config, summary = grown(views=2)
    assert (summary.num_built_views, summary.complete["num_stored"], summary.complete["num_bad"]) == (32, 96, 0)
    cache = atcache.open(config.out)
    layout = cache.reader.layout
    assert (layout.part_stops, layout.num_samples, layout.num_real_samples) == ((32, 49), 49, 48)
    status_VS = cache.samples.status.values
    assert (status_VS[:, 32:33] == Status.NO_SAMPLE).all()
    assert (np.delete(status_VS, slice(32, 33), axis=1) == Status.STORED).all()
    assert cache.samples.sample_key.values[33] == "digits-0002.tar/digit-00032"
    assert cache.describe()["num_samples"] == 48
    assert np.isnan(cache.maps(layer=0)[1, 31:34].compute()).all(axis=(1, 2, 3)).tolist() == [0, 1, 0]
    assert not atcache.verify(cache=config.out, all=True).problems


def test_the_new_samples_have_the_maps_and_images_of_a_cache_built_at_once(grown, tmp_path):
    config, _ = grown(codec="exact:dtype=float32")
    build(replace(config, grow=False, out=tmp_path / "at-once.zarr"))
    one, other = atcache.open(config.out), atcache.open(tmp_path / "at-once.zarr")
    for sample_key in other.samples.sample_key.values:
        ours, theirs = one.view(str(sample_key)), other.view(str(sample_key))
        assert np.array_equal(ours.image, theirs.image)
        np.testing.assert_allclose(ours.maps_LHQK, theirs.maps_LHQK, atol=1e-6)  # batches are others
        assert ours.label == theirs.label


def test_mixed_views_of_new_samples_have_partners_in_their_own_part(grown):
    config, _ = grown(**MIXED)
    cache = atcache.open(config.out)
    views = [cache.view(sample) for sample in (*range(32), *range(33, 49))]
    mixed = [view for view in views if view.partner is not None]
    assert len(mixed) > 30
    assert all((view.sample < 32) == (view.partner < 32) for view in mixed)


def test_a_cache_grows_again_and_the_same_command_is_content(config, digits_tars):
    build(replace(config, data=str(digits_tars[0])))
    for number in (1, 2):
        wanted = replace(config, data=str(digits_tars[number]), grow=True)  # those it has may be left out
        assert build(wanted).num_built_views == 16
    assert atcache.open(config.out).reader.layout.part_stops == (16, 34, 52)
    before = files(config.out)
    for again in (wanted, replace(config, data=str(digits_tars[0].parent))):
        summary = build(again)
        assert (summary.num_built_views, summary.plan) == (0, None)
    assert files(config.out) == before
    build(replace(config, data=str(digits_tars[0].parent), grow=True, views=2))
    assert atcache.open(config.out).describe()["num_stored"] == 96
    assert not atcache.verify(cache=config.out, all=True).problems


def test_a_zarr_library_reads_a_grown_cache_and_its_empty_rows(grown):
    config, _ = grown(views=2)
    group, cache = zarr.open_group(config.out, mode="r"), atcache.open(config.out)
    assert group["attention/codes"].shape[:2] == (2, 49)
    assert not group["attention/codes"][:, 32:33].any()
    assert np.array_equal(group["attention/codes"][1, 40], cache.reader.read_codes(1, 40))
    assert np.array_equal(group["samples-2/label"][...], cache.reader.labels_S)
    assert sorted(group.group_keys()) == ["attention", "commits", "samples-2", "views"]


def test_a_student_trains_from_a_grown_cache(grown, tmp_path):
    config, _ = grown(views=2)
    batches = list(atcache.batches(config.out, batch_size=16, epochs=1, device="cpu"))
    assert sum(len(batch.images) for batch in batches) == 48
    common = {"cache": config.out, "val_cache": config.out, "batch_size": 16, "device": "cpu", "workers": 0}
    summary = atcache.train(mode="copy", out=tmp_path / "run", epochs=1, **common)
    assert np.isfinite(summary.loss)


# Stops


@pytest.mark.timeout(900)  # each kill is a process that starts anew
def test_a_growth_killed_at_many_moments_equals_one_in_one_go(config, digits_tars, tmp_path):
    wanted = replace(config, data=str(digits_tars[0].parent), views=3, grow=True)
    build(config)
    start = tmp_path / "start.zarr"
    shutil.copytree(config.out, start)
    whole = replace(wanted, out=tmp_path / "whole.zarr")
    shutil.copytree(start, whole.out)
    in_a_child(replace(wanted, out=shutil.copytree(start, tmp_path / "first.zarr")))  # it also starts the server
    start_s = time.monotonic()
    assert in_a_child(whole) == 0
    whole_s = time.monotonic() - start_s
    moments, num_kills, num_partly_done, number = random.Random(0), 0, 0, 0
    before = shards(start)
    killed = replace(wanted, out=shutil.copytree(start, tmp_path / "killed-0.zarr"))
    while num_kills < 5 or num_partly_done < 2:
        # Two at any moment; the others in the middle of the growth, where a moment by the clock may never fall.
        next_commit = 12 + 8 * num_partly_done
        moment = {"after_s": moments.uniform(0, whole_s)} if num_kills < 2 else {"after_commits": next_commit}
        exit_code = in_a_child(killed, **moment)
        num_kills += exit_code == -signal.SIGKILL
        is_old = atcache.open(killed.out).reader.layout.num_views == 1
        num_partly_done += is_old and 11 < len(list_commits(killed.out)) < 51
        if is_old:  # what was there is whole, and usable
            cache = atcache.open(killed.out)
            assert cache.reader.is_complete
            assert cache.describe()["num_stored"] == 32
            assert not atcache.verify(cache=killed.out).problems
        if exit_code == 0:
            assert differences(killed.out, whole.out) == []
            number += 1
            killed = replace(wanted, out=shutil.copytree(start, tmp_path / f"killed-{number}.zarr"))
    build(killed)
    for path in tmp_path.glob("killed-*.zarr"):
        assert before.items() <= shards(path).items()
        assert differences(path, whole.out) == []


# While it grows


@pytest.fixture
def half_grown(config, digits_tars):
    """A complete cache that is growing: its build was killed after a few of the new tasks."""
    config = replace(config, batch_size=1)
    build(config)
    wanted = replace(config, data=str(digits_tars[0].parent), views=4, grow=True)
    child = CHILDREN.Process(target=build, args=(wanted,))
    child.start()
    while len(list_commits(config.out)) < 14 and child.is_alive():
        time.sleep(0.002)
    child.kill()
    child.join()
    assert read_growth(config.out) is not None, "it was too fast"
    return wanted


def test_readers_that_are_open_see_the_old_cache_to_the_end(half_grown, tmp_path):
    cache = atcache.open(half_grown.out)
    maps = cache.maps(layer=0)[0, 5].compute()
    assert cache.describe()["growth"] == {"num_samples": 48, "num_views": 4, "num_tasks": 68} | {
        "num_tasks_done": len(list_commits(half_grown.out))
    }
    assert cache.reader.is_complete
    build(half_grown)
    for reader in (cache, pickle.loads(pickle.dumps(cache))):
        assert reader.reader.layout.num_views == 1
        assert len(reader.samples.sample_key) == 32
        assert np.array_equal(reader.maps(layer=0)[0, 5].compute(), maps)
    new = Cache(half_grown.out)
    assert (new.reader.layout.num_views, new.describe()["growth"]) == (4, None)
    assert np.array_equal(new.maps(layer=0)[0, 5].compute(), maps)


def test_a_growing_cache_trains_and_its_old_command_is_content(half_grown, config, tmp_path):
    assert build(replace(config, batch_size=1)).num_built_views == 0
    common = {"cache": config.out, "batch_size": 16, "device": "cpu", "workers": 0}
    assert np.isfinite(atcache.train(mode="copy", out=tmp_path / "run", epochs=1, **common).loss)
    summary = atcache.verify(cache=config.out)
    assert not summary.problems
    shown = CliRunner().invoke(cli, ["info", str(config.out)])
    assert re.search(r"growing +to 48 x 4 views: \d+ tasks missing. Type the same `atcache build --grow`", shown.output)
    assert re.search(r"is growing: \d+ of 57 new tasks are not built yet", " ".join(summary.notes))


def test_a_growing_cache_is_repaired_as_it_was_before(half_grown, config):
    (config.out / "commits/v0000-b000002.json").unlink()
    num_done = len(list_commits(config.out))
    assert not atcache.open(config.out).reader.is_complete
    assert build(replace(config, batch_size=1)).num_built_views == 3
    assert atcache.open(config.out).reader.is_complete
    assert len(list_commits(config.out)) == num_done + 1
    build(half_grown)
    assert atcache.open(config.out).describe()["num_stored"] == 192


def test_a_growth_is_not_turned_into_another(half_grown, digits_tars, config):
    with pytest.raises(CacheMismatchError, match=r"is growing to 48 samples x 4 views, and this .* 48 samples x 3 vie"):
        build(replace(half_grown, views=3))
    growth = config.out / GROWTH
    growth.write_bytes(growth.read_bytes().replace(b'"num_views": 4', b'"num_views": 5'))
    with pytest.raises(CorruptCacheError, match=r"growth.json is damaged.*Delete it to give up the growth"):
        build(half_grown)
    growth.unlink()
    before = shards(config.out)
    # Given up: what it has left is not taken for tasks of another growth.
    build(replace(half_grown, data=str(digits_tars[2]), views=1))
    assert atcache.open(config.out).describe()["num_stored"] == 48
    assert len(list_commits(config.out)) == 17
    assert {name for name in before if name.startswith("commits/v0001")} & shards(config.out).keys() == set()
    assert not atcache.verify(cache=config.out, all=True).problems


def test_a_cache_that_is_not_finished_may_grow_too(config, digits_tars, tmp_path):
    config = replace(config, batch_size=1)
    child = CHILDREN.Process(target=build, args=(config,))
    child.start()
    while not config.out.exists() or len(list_commits(config.out)) < 2:
        time.sleep(0.002)
    child.kill()
    child.join()
    assert not atcache.open(config.out).reader.is_complete
    wanted = replace(config, data=str(digits_tars[0].parent), views=2, grow=True)
    build(wanted)
    build(replace(config, out=tmp_path / "other.zarr"))
    build(replace(wanted, out=tmp_path / "other.zarr"))
    assert differences(config.out, tmp_path / "other.zarr") == []


# What is refused


def test_more_is_added_only_where_it_was_asked_for(config, digits_tars):
    build(config)
    before = files(config.out)
    everything = str(digits_tars[0].parent)
    for fields in ({"views": 2}, {"data": everything}):
        with pytest.raises(CacheMismatchError, match=r"another cache: .* there and .* or --grow to add the"):
            build(replace(config, **fields))
    with pytest.raises(CacheMismatchError, match=r"codec.name is 'int8' there and 'exact' here[^;]*begun with\.$"):
        build(replace(config, views=2, grow=True, codec="exact"))
    assert files(config.out) == before


def test_a_cache_that_does_not_exist_does_not_grow(config):
    with pytest.raises(ConfigError, match=r"cache.zarr does not exist, so it cannot grow. Check --out, or leave out"):
        build(replace(config, grow=True))


def test_a_tar_that_has_changed_or_is_gone_is_refused_before_anything_is_written(config, digits_tars, tmp_path):
    folder = tmp_path / "tars"
    folder.mkdir()
    for tar in digits_tars:
        shutil.copy(tar, folder)
    config = replace(config, data=pattern([folder / tar.name for tar in digits_tars[:2]]))
    build(config)
    before = files(config.out)
    shutil.copy(digits_tars[2], folder / digits_tars[1].name)
    with pytest.raises(
        CacheMismatchError,
        match=r"holds digits-0001.tar with other samples than are named now.* tar has changed.*--keys",
    ):
        build(replace(config, data=str(folder), grow=True))
    (folder / digits_tars[0].name).unlink()
    with pytest.raises(SourceError, match=r"digits-0000.tar cannot be opened .* name its place in --data too"):
        build(replace(config, data=str(folder / digits_tars[2].name), views=2, grow=True))
    assert files(config.out) == before
    # Its samples get no new views, so it is not needed.
    assert build(replace(config, data=str(folder / digits_tars[2].name), grow=True)).num_built_views == 16


@pytest.mark.parametrize(
    ("begun", "asked", "message"),
    [
        ({}, {"max_samples": 40}, "--max-samples was not given and is 40 here"),
        ({"max_samples": 20}, {"max_samples": 20, "labels": "none"}, "--labels was required and is none here"),
        ({"labels": "optional"}, {"labels": "optional", "label_key": "id"}, "--label-key was not given and is id here"),
    ],
)
def test_samples_that_are_chosen_in_another_way_are_not_added(config, digits_tars, begun, asked, message):
    build(replace(config, **begun))
    before = files(config.out)
    with pytest.raises(CacheMismatchError, match=f"cannot grow by samples.*: {message}. Give"):
        build(replace(config, data=str(digits_tars[2]), grow=True, **asked))
    assert files(config.out) == before


def test_a_cache_that_does_not_record_how_samples_were_chosen_grows(config, digits_tars):
    build(config)
    path = config.out / "zarr.json"
    metadata = json.loads(path.read_text())
    del metadata["attributes"]["atcache"]["source"]["choice"], metadata["attributes"]["atcache"]["crc32"]
    path.write_text(json.dumps(metadata))
    assert build(replace(config, data=str(digits_tars[2]), labels="none", grow=True)).num_built_views == 16


# Caches of earlier versions


WRITE_WEIGHTS = """
import json, sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from make import write_weights
for path, teacher in json.load(sys.stdin).items():
    write_weights(Path(path), teacher)
"""


def plain_digest(path: Path) -> str:
    """SHA-256 over the names and bytes of a file's tensors, computed without atcache."""
    digest = hashlib.sha256()
    for name, array in sorted(load_file(path).items()):
        digest.update(name.encode() + array.tobytes())
    return digest.hexdigest()


@pytest.fixture(scope="module")
def golden_weights(tmp_path_factory):
    """A function: the name of a golden cache -> the file of its teacher's weights."""
    folder, teachers = tmp_path_factory.mktemp("weights"), dict.fromkeys(one["teacher"] for one in CACHES.values())
    paths = {teacher: folder / f"{number}.safetensors" for number, teacher in enumerate(teachers)}
    # Normal numbers are rounded differently by processors. With this switch, MKL draws on each those of the caches.
    subprocess.run(
        [sys.executable, "-c", WRITE_WEIGHTS, str(GOLDEN)],
        input=json.dumps({str(path): teacher for teacher, path in paths.items()}).encode(),
        env={**os.environ, "MKL_CBWR": "COMPATIBLE"},
        check=True,
    )
    return lambda name: paths[CACHES[name]["teacher"]]


@pytest.mark.parametrize("name", CACHES)
def test_a_cache_that_an_earlier_version_wrote_grows(name, golden_weights, tmp_path):
    fields, golden, weights = CACHES[name], GOLDEN / f"format-1/{name}.zarr", golden_weights(name)
    if plain_digest(weights) != GOLDEN_WEIGHTS[fields["teacher"]]:
        pytest.skip("torch draws other weights here than those of the cache")
    tar = write_tar(tmp_path / "more.tar", [{"jpg": picture(seed, side=12), "cls": b"1"} for seed in range(3)])
    config = BuildConfig(
        **{**fields, "views": fields.get("views", 1) + (fields["policy"] != "eval")},
        data=f"{{{GOLDEN / 'format-1/tars/waves.tar'},{tar}}}",
        weights=weights,
        out=Path(shutil.copytree(golden, tmp_path / "cache.zarr")),
        samples_per_shard=4,
        on_bad_image="skip",
        workers=0,
        device="cpu",
        precision="fp32",
        grow=True,
    )
    cache = atcache.open(config.out, data=golden.parent / "tars")
    recorded = cache.attributes["teacher"]["weights_sha256"]
    assert load_teacher(fields["teacher"], weights=weights).weights_sha256 == recorded
    layer = cache.geometry.layers[0]
    before, maps = shards(config.out), cache.maps(layer).compute()
    build(config)
    assert before.items() <= shards(config.out).items()
    grown = atcache.open(config.out, data=config.data)
    assert grown.reader.layout.part_stops == (6, 11)
    assert grown.describe()["num_stored"] == config.views * 8
    assert np.array_equal(grown.maps(layer)[: len(maps), :6].compute(), maps, equal_nan=True)
    data = None if config.pixels == "store" else config.data
    problems = [finding.message for finding in atcache.verify(cache=config.out, data=data, all=True).problems]
    replays = [problem for problem in problems if "the replayed image differs from" in problem]
    assert problems == replays, "Pillow may be another now"
