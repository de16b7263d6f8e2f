"""A cache fetched from elsewhere, whole or in part, is a valid cache of its own."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
from builds import MIXED, differences, picture, write_tar
from click.testing import CliRunner
from range_server import FolderServer

import atcache
from atcache.cli.main import cli
from atcache.errors import CacheMismatchError, CacheMissError, ConfigError, CorruptCacheError
from atcache.pipelines.build.given_views import GivenViews
from atcache.pipelines.build.run import build
from atcache.store import layout as layouts
from atcache.store.manifest import delete_commits, list_commits, read_commits

HERE = "hf://datasets/lab/maps"
# huggingface_hub sends files in a way that its HTTP client calls old.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


def change_a_number(file):
    text = file.read_text()
    # The totals of a root are compared with each other, before its checksum is.
    name = '"crc32":' if file.name == "zarr.json" else '"num_stored":'
    before = f"{name} " if f"{name} " in text else name
    file.write_text(text.replace(before, f"{before}1", 1))


@pytest.fixture
def server(hub, tmp_path):
    (folder := tmp_path / "served").mkdir()
    with FolderServer(folder) as server:
        yield server


def test_a_web_server_and_another_folder_give_the_same_copy(server, tiny_cache, tmp_path):
    cache = tiny_cache(views=2)
    shutil.copytree(cache, server.folder / "digits.zarr")
    (tmp_path / "from-folder").mkdir()  # an empty folder is no obstacle
    for source, name in [(f"{server.url}/digits.zarr", "from-server"), (cache, "from-folder")]:
        atcache.pull(cache=source, out=tmp_path / name)
        assert differences(tmp_path / name, cache) == []


@pytest.mark.parametrize("fields", [{}, {"pixels": "store", **MIXED}], ids=["replayed", "stored and mixed"])
def test_the_first_views_are_the_cache_that_a_build_of_so_many_makes(hub, tiny_cache, tmp_path, fields):
    atcache.pull(cache=tiny_cache(views=2, **fields), out=tmp_path / "copy.zarr", views=1)
    assert differences(tmp_path / "copy.zarr", tiny_cache(views=1, **fields)) == []


def test_a_pulled_view_grows_back_to_what_it_was(hub, digits_build, tmp_path):
    config = replace(digits_build, codec="exact", views=2)
    build(config)
    atcache.pull(cache=config.out, out=tmp_path / "copy.zarr", views=1)
    build(replace(config, out=tmp_path / "copy.zarr", grow=True))
    assert differences(tmp_path / "copy.zarr", config.out) == []


def test_chosen_tars_give_the_same_samples(hub, tiny_cache, tmp_path, digits_tars):
    cache = atcache.open(tiny_cache(samples_per_shard=8, views=2))
    names = [tar.name for tar in digits_tars]
    pulled = atcache.pull(cache=cache.path, out=tmp_path / "copy.zarr", tars=(names[0], "*2.tar"), views=1)
    assert (pulled.num_samples, pulled.num_views, pulled.num_left_out) == (32, 1, 0)
    copy = atcache.open(tmp_path / "copy.zarr")
    assert [tar.name for tar in copy.source.index.tars] == [names[0], names[2]]
    rows = np.r_[0:16, 32:48]
    assert copy.samples.sample_key.values.tolist() == cache.samples.sample_key.values[rows].tolist()
    np.testing.assert_array_equal(copy.maps(layer=1)[0].compute(), cache.maps(layer=1)[0, rows].compute())
    np.testing.assert_array_equal(copy.image(20), cache.image(36))
    assert not atcache.verify(cache=copy.path, all=True).problems


def test_blocks_that_hold_other_tars_are_left_out_and_counted(hub, tiny_cache, tmp_path, digits_tars):
    cache = tiny_cache(samples_per_shard=20)
    pulled = atcache.pull(cache=cache, out=tmp_path / "copy.zarr", tars="digits-000{0,1}.tar")
    assert (pulled.num_samples, pulled.num_left_out) == (20, 12)
    assert not atcache.verify(cache=tmp_path / "copy.zarr", all=True).problems
    with pytest.raises(ConfigError, match=r"holds some of other tars too. Name these also: digits-0001.tar."):
        atcache.pull(cache=cache, out=tmp_path / "other.zarr", tars="digits-0000.tar")


def test_short_blocks_of_a_grown_cache_stay_the_ends_of_parts(hub, digits_build, digits_tars, tmp_path):
    config = replace(digits_build, codec="exact", samples_per_shard=6)
    for number, tar in enumerate(digits_tars):
        build(replace(config, data=str(tar), grow=number > 0))
    names = f"{digits_tars[0].name}", f"{digits_tars[2].name}"
    atcache.pull(cache=config.out, out=tmp_path / "copy.zarr", tars=names)
    copy, cache = atcache.open(tmp_path / "copy.zarr"), atcache.open(config.out)
    assert copy.reader.layout.part_stops == (16, 34)
    assert copy.describe()["num_samples"] == 32
    np.testing.assert_array_equal(copy.view(20).maps_LHQK, cache.view(38).maps_LHQK)
    assert copy.view(20).sample_key == cache.view(38).sample_key
    assert not atcache.verify(cache=copy.path, all=True).problems


def test_a_killed_pull_continues(hub, hub_settings, server, tiny_cache, tmp_path):
    cache, out = tiny_cache(views=2, samples_per_shard=5), tmp_path / "copy.zarr"
    shutil.copytree(cache, server.folder / "digits.zarr")
    server.delay_s = 0.05
    command = [sys.executable, "-m", "atcache.cli.main", "pull", f"{server.url}/digits.zarr", str(out)]
    child = subprocess.Popen(command, env=hub_settings, stderr=subprocess.PIPE)
    while not out.exists() or len(list_commits(out)) < 4:
        assert child.poll() is None, child.stderr.read()
        time.sleep(0.01)
    child.kill()
    child.communicate()
    server.delay_s = 0.0
    assert not atcache.open(out).reader.is_complete
    done = sum(commit.nbytes for commit in read_commits(out).values())
    pulled = atcache.pull(cache=f"{server.url}/digits.zarr", out=out)
    assert 0 < pulled.pulled_nbytes == pulled.complete["nbytes"] - done
    assert differences(out, cache) == []
    assert atcache.pull(cache=f"{server.url}/digits.zarr", out=out).pulled_nbytes == 0


def test_damage_on_the_way_is_refused_and_nothing_of_it_is_kept(server, tiny_cache, tmp_path):
    copy, out = shutil.copytree(tiny_cache(), server.folder / "digits.zarr"), tmp_path / "copy.zarr"
    shard = copy / "attention/codes/c/0/1/0/0/0"
    good = shard.read_bytes()
    for bad in (good[:-1], bytes([*good[:100], good[100] ^ 1, *good[101:]])):
        shard.write_bytes(bad)
        with pytest.raises(CorruptCacheError, match=r"codes/c/0/1/0/0/0 has \d+ bytes .*commit record says"):
            atcache.pull(cache=f"{server.url}/digits.zarr", out=out)
        assert not (out / "attention/codes/c/0/1/0/0/0").exists()
        assert "v0000-b000001" not in list_commits(out)
    shard.write_bytes(good)
    atcache.pull(cache=f"{server.url}/digits.zarr", out=out)
    assert differences(out, tiny_cache()) == []


def test_what_cannot_be_is_refused(hub, tiny_cache, tmp_path):
    cache = tiny_cache(views=2)
    with pytest.raises(ConfigError, match="views=3: this cache has 2"):
        atcache.pull(cache=cache, out=tmp_path / "copy.zarr", views=3)
    with pytest.raises(ConfigError, match=r"tars='x\*': this cache has no such tar. It has 3, from digits-0000.tar"):
        atcache.pull(cache=cache, out=tmp_path / "copy.zarr", tars="x*")
    with pytest.raises(ConfigError, match="unbalanced braces"):
        atcache.pull(cache=cache, out=tmp_path / "copy.zarr", tars="x{0")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/file").touch()
    with pytest.raises(CacheMismatchError, match="exists and is not a cache"):
        atcache.pull(cache=cache, out=tmp_path / "mine")
    atcache.pull(cache=cache, out=tmp_path / "copy.zarr", views=1)
    with pytest.raises(CacheMismatchError, match=r"another part of this one: layout.num_views is 1 in it and 2 in"):
        atcache.pull(cache=cache, out=tmp_path / "copy.zarr")
    incomplete = shutil.copytree(cache, tmp_path / "incomplete.zarr")
    delete_commits(incomplete, ["v0000-b000000"])
    with pytest.raises(CacheMismatchError, match="is not complete"):
        atcache.pull(cache=incomplete, out=tmp_path / "other.zarr")
    with pytest.raises(CacheMissError, match="no dataset lab/nothing with the revision main"):
        atcache.pull(cache="hf://datasets/lab/nothing", out=tmp_path / "other.zarr")
    assert not (tmp_path / "other.zarr").exists()


def test_a_student_trains_from_a_hub_as_from_the_disk(hub, tiny_cache, tmp_path):
    atcache.push(cache=tiny_cache(), to=HERE, create="private")
    common = {"mode": "copy", "steps": 3, "batch_size": 16, "workers": 0, "device": "cpu", "precision": "fp32"}
    losses = [
        atcache.train(cache=cache, out=tmp_path / f"run-{number}", **common).loss
        for number, cache in enumerate([HERE, tiny_cache()])
    ]
    assert losses[0] == losses[1]


def test_the_command_says_what_is_still_needed(hub, tiny_cache, tmp_path):
    arguments = ["pull", str(tiny_cache(samples_per_shard=20)), str(tmp_path / "copy.zarr"), "--tars"]
    result = CliRunner().invoke(cli, [*arguments, "digits-0000.tar", "--tars", "digits-0001.tar"])
    assert "12 samples of these tars were left out" in result.stderr
    assert "Commands that read images need --data." in result.stderr
    assert json.loads(result.stdout)["num_samples"] == 20


def test_a_cache_that_lacks_what_it_must_record_is_refused(tiny_cache, tmp_path):
    cache = shutil.copytree(tiny_cache(), tmp_path / "cache.zarr")
    root = json.loads((cache / "zarr.json").read_bytes())
    del root["attributes"]["atcache"]["views"]
    (cache / "zarr.json").write_text(json.dumps(root))
    with pytest.raises(CorruptCacheError, match="views"):
        atcache.pull(cache=cache, out=tmp_path / "copy.zarr")
    assert not (tmp_path / "copy.zarr").exists()


def test_an_empty_folder_that_cannot_be_replaced_is_named(tiny_cache, tmp_path, monkeypatch):
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    with pytest.raises(CacheMismatchError, match=r"link is a link, .* Give a folder in it, such as .*link/cache.zarr"):
        atcache.pull(cache=tiny_cache(), out=tmp_path / "link")
    monkeypatch.chdir(tmp_path / "disk")
    with pytest.raises(CacheMismatchError, match=r"the working folder.* such as cache.zarr"):
        atcache.pull(cache=tiny_cache(), out=".")
    atcache.pull(cache=tiny_cache(), out=tmp_path / "link/cache.zarr", views=1)


def test_a_part_of_mixed_views_has_the_partners_also_if_they_are_those_of_another_cache(
    hub, tiny_cache, digits_build, tmp_path, monkeypatch
):
    mixed = tiny_cache(samples_per_shard=16, **MIXED)
    config = replace(digits_build, data=None, views_from=mixed, samples_per_shard=None)
    build(replace(config, out=tmp_path / "again.zarr"))
    assert atcache.open(tmp_path / "again.zarr").reader.layout.samples_per_shard == 16
    atcache.pull(cache=tmp_path / "again.zarr", out=tmp_path / "part.zarr", tars="digits-0001.tar")
    part, whole = atcache.open(tmp_path / "part.zarr"), atcache.open(mixed)
    for row in range(16):
        np.testing.assert_array_equal(part.image(row), whole.image(16 + row))
    with pytest.raises(ConfigError, match=r"samples_per_shard=24: the views of .* are mixed within its shards of 16"):
        build(replace(config, out=tmp_path / "refused.zarr", samples_per_shard=24))
    # As an earlier version built it.
    monkeypatch.setattr(GivenViews, "shard_size", lambda _, asked: asked)
    build(replace(config, out=tmp_path / "old.zarr", samples_per_shard=8, pixels="store"))
    with pytest.raises(CacheMismatchError, match="is mixed with a sample of another shard, so no part of this cache"):
        atcache.pull(cache=tmp_path / "old.zarr", out=tmp_path / "bad.zarr", tars="digits-0001.tar")
    assert not atcache.open(tmp_path / "bad.zarr").reader.is_complete


def test_a_part_of_mixed_views_may_have_images_that_could_not_be_read(hub, digits_build, tmp_path):
    samples = [{"jpg": b"no image" if seed == 5 else picture(seed), "cls": 0} for seed in range(8)]
    tars = [write_tar(tmp_path / f"{name}.tar", samples) for name in "ab"]
    config = replace(digits_build, data=str(tmp_path / "{a,b}.tar"), samples_per_shard=8, on_bad_image="skip", **MIXED)
    build(config)
    pulled = atcache.pull(cache=config.out, out=tmp_path / "part.zarr", tars=tars[1].name)
    assert (pulled.num_samples, pulled.complete["num_bad"]) == (8, 1)
    np.testing.assert_array_equal(atcache.open(tmp_path / "part.zarr").image(6), atcache.open(config.out).image(14))


@pytest.mark.parametrize("num_joined", [9000, 2], ids=["a file each", "joined"])
def test_a_damaged_record_or_root_gets_no_new_checksum(digits_build, tmp_path, monkeypatch, num_joined):
    monkeypatch.setattr(layouts, "MAX_SINGLE_RECORDS", num_joined)
    build(replace(digits_build, codec="exact"))
    record = next(file for file in sorted((digits_build.out / "commits").iterdir()) if file.name != "zarr.json")
    for name in (f"commits/{record.name}", "zarr.json"):
        cache = shutil.copytree(digits_build.out, tmp_path / "damaged.zarr")
        change_a_number(cache / name)
        assert atcache.verify(cache=cache).problems
        with pytest.raises(CorruptCacheError, match=rf"{name}.* checksum does not match. It is damaged where it is"):
            atcache.pull(cache=cache, out=tmp_path / "copy.zarr")
        assert not (tmp_path / "copy.zarr").exists() or not atcache.open(tmp_path / "copy.zarr").reader.is_complete
        shutil.rmtree(cache)
        shutil.rmtree(tmp_path / "copy.zarr", ignore_errors=True)


def test_a_damaged_copy_is_repaired_by_the_same_pull(hub, tiny_cache, tmp_path):
    atcache.push(cache=tiny_cache(), to=HERE, create="private")
    for views in (None, 1):
        out = tmp_path / f"{views}.zarr"
        atcache.pull(cache=HERE, out=out, views=views)
        shard = out / "attention/codes/c/0/1/0/0/0"
        shard.write_bytes(bytes([shard.read_bytes()[0] ^ 1, *shard.read_bytes()[1:]]))
        change_a_number(out / "commits/v0000-b000002.json")
        assert atcache.verify(cache=out, all=True, repair=True).repaired_tasks == ("v0000-b000001", "v0000-b000002")
        atcache.pull(cache=HERE, out=out, views=views)
        assert differences(out, tiny_cache()) == []
