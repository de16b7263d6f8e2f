"""A build into a bucket is the local build, byte for byte: through faults, kills, rivals, and simpler stores."""

from __future__ import annotations

import json
import multiprocessing
import random
import signal
import time
from dataclasses import replace

import numpy as np
import obstore
import pytest
from builds import files, run_cli
from click.testing import CliRunner
from disks import mounted
from processes import start
from s3_servers import faulty_proxy, moto_server, rclone_server, reached

import atcache
from atcache.cli.main import cli
from atcache.errors import ConfigError, DiskFullError, NotWritableError
from atcache.files.location import parse_location
from atcache.files.ranges import file_exists
from atcache.files.remote import putting
from atcache.pipelines.build.config import BuildConfig
from atcache.pipelines.build.run import build
from atcache.store import bucket


@pytest.fixture(scope="module")
def moto():
    with moto_server() as server:
        server.make_bucket("bucket")
        yield server


@pytest.fixture(autouse=True)
def own_folders(tmp_path, monkeypatch):
    """What is fetched and what is on its way lies in this test's own folders."""
    monkeypatch.setenv("ATCACHE_BLOCKS_DIR", str(tmp_path / "blocks"))
    monkeypatch.setenv("ATCACHE_BLOCKS_GIB", "0.05")
    (tmp_path / "spools").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "spools"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "spools"))


@pytest.fixture(scope="module")
def local(digits_tars, tiny_vit, tiny_weights, tmp_path_factory):
    """The config of a build in 6 tasks, and the files that it makes in a folder."""
    config = BuildConfig(
        teacher=tiny_vit,
        weights=tiny_weights,
        data=str(digits_tars[0].parent),
        out=tmp_path_factory.mktemp("local") / "cache.zarr",
        pixels="store",
        samples_per_shard=8,
        batch_size=3,
        workers=0,
        device="cpu",
        precision="fp32",
    )
    build(config)
    return config, files(config.out)


def into(local, name):
    """The same build, into a bucket."""
    return replace(local[0], out=parse_location(f"s3://bucket/{name}/cache.zarr"))


def assert_is_local(server, local, name):
    """All that is in the bucket below a name is the cache, as it is in a folder."""
    found = server.objects("bucket", name)
    expected = {f"cache.zarr/{file}": data for file, data in local[1].items()}
    assert found.keys() == expected.keys()
    assert found == expected


def options_of(config):
    names = ("teacher", "weights", "data", "out", "pixels", "samples_per_shard", "batch_size", "workers", "device")
    pairs = [(f"--{name.replace('_', '-')}", str(getattr(config, name))) for name in names]
    return ["build", *(word for pair in pairs for word in pair), "--precision", "fp32"]


def test_a_build_through_faults_is_the_local_one_and_leaves_nothing_else(local, moto, tmp_path):
    with faulty_proxy(moto, seed=1, faults=0.06) as proxy, reached(proxy):
        summary = build(into(local, "faults"))
        counts = proxy.counts()
    assert_is_local(moto, local, "faults")
    assert summary.num_built_views == 48
    assert sum(counts.get(fault, 0) for fault in ("500", "503", "429", "drop-before", "drop-after", "truncate")) > 5
    assert list((tmp_path / "spools").iterdir()) == []


def test_a_store_that_ignores_conditions_is_told_of_and_written_all_the_same(local, tmp_path, caplog):
    folder = tmp_path / "served"
    (folder / "bucket").mkdir(parents=True)
    with rclone_server(folder) as server, reached(server):
        assert run_cli(into(local, "simple"), pixels="store").exit_code == 0
        assert_is_local(server, local, "simple")
    assert files(folder / "bucket/simple/cache.zarr") == local[1], "real files"
    notes = [record.message for record in caplog.records if "ignores conditions" in record.message]
    assert len(notes) == 1
    assert "Run only one build of this cache at a time" in notes[0]


def test_a_build_killed_at_any_moment_continues_to_the_same_bytes(local, moto, tmp_path):
    """The proxy's counts say when: after so many puts, each of which may be of metadata, shards or a record."""
    config, moments, num_kills = into(local, "killed"), random.Random(0), 0
    with faulty_proxy(moto, seed=2) as proxy, reached(proxy):
        while num_kills < 5:
            stop = proxy.counts().get("PUT", 0) + moments.randrange(30)
            child = multiprocessing.get_context("fork").Process(target=build, args=(config,))
            child.start()
            while child.is_alive() and proxy.counts().get("PUT", 0) < stop:
                time.sleep(0.005)
            child.kill()
            child.join()
            if child.exitcode == 0:
                break
            num_kills += child.exitcode == -signal.SIGKILL
        build(config)
    assert num_kills >= 2
    assert_is_local(moto, local, "killed")
    assert list((tmp_path / "spools").glob("atcache-spool-*")) == [], "what the killed left was swept"


def test_torchrun_and_another_build_at_once_make_one_cache(local, moto):
    config = into(local, "twice")
    with reached(moto):
        together = start(["-m", "atcache.cli.main", *options_of(config)])
        while not file_exists(config.out / "zarr.json"):
            assert together.poll() is None
            time.sleep(0.05)
        assert build(config).complete is not None
        _, stderr = together.communicate(timeout=200)
    assert together.returncode == 0, stderr
    assert_is_local(moto, local, "twice")


def test_the_workers_of_a_cluster_build_into_a_bucket(local, moto):
    with reached(moto):
        summary = build(replace(into(local, "cluster"), scheduler="local"))
    assert summary.num_built_views == 48
    assert_is_local(moto, local, "cluster")


def test_training_and_verifying_read_what_was_built(local, moto, tmp_path):
    config = into(local, "read")
    with reached(moto):
        build(config)
        cache = atcache.open(str(config.out))
        np.testing.assert_array_equal(
            cache.maps(layer=1)[0, 40:48].compute(), atcache.open(local[0].out).maps(layer=1)[0, 40:48].compute()
        )
        checked = CliRunner().invoke(cli, ["verify", str(config.out)])
        assert checked.exit_code == 0, checked.output
        atcache.train(
            mode="copy", cache=str(config.out), out=tmp_path / "run", epochs=1, batch_size=16, device="cpu", workers=0
        )
        assert (tmp_path / "run" / "model.safetensors").exists()
        assert build(config).num_built_views == 0, "it is complete"


def test_a_lost_record_or_shard_is_built_again_and_a_damaged_one_repaired(local, moto, monkeypatch):
    config = into(local, "lost")
    with reached(moto):
        build(config)
        store, key = moto.store("bucket"), config.out.key
        obstore.delete(store, f"{key}/commits/v0000-b000001.json")
        obstore.delete(store, f"{key}/attention/codes/c/0/4/0/0/0")
        damaged = f"{key}/attention/codes/c/0/2/0/0/0"
        data = bytearray(obstore.get(store, damaged).bytes().to_bytes())
        data[40] ^= 1
        obstore.put(store, damaged, bytes(data))
        assert build(config).num_built_views == 16
        repaired = CliRunner().invoke(cli, ["verify", str(config.out), "--repair"])
        assert "v0000-b000002" in repaired.output
        monkeypatch.setattr(bucket, "SECONDS_FOR_A_RIVAL", 0.2)
        assert build(config).num_built_views == 8
    assert_is_local(moto, local, "lost")


def test_a_store_that_goes_away_is_told_and_the_same_command_continues(local, tmp_path, monkeypatch):
    monkeypatch.setattr(putting, "PATIENCE_S", 0.5)
    monkeypatch.setenv("AWS_TIMEOUT", "2s")
    folder = tmp_path / "served"
    (folder / "bucket").mkdir(parents=True)
    config = into(local, "gone")
    with rclone_server(folder) as server, reached(server):

        def end_server(_):
            server.process.kill()

        with pytest.raises(NotWritableError, match=r"s3://bucket/gone/.* cannot be .* type the same command to contin"):
            build(config, end_server)
    with rclone_server(folder) as server, reached(server):
        build(config)
        assert_is_local(server, local, "gone")


def test_what_cannot_be_is_refused_before_the_teacher_is_loaded(local, moto, tmp_path):
    config = replace(local[0], teacher="no-such-teacher")
    for out, sentence in (
        ("s3://nowhere/a.zarr", r"there is no bucket s3://nowhere. Make it, or give another --out"),
        ("https://host/a.zarr", r"out=https://host/a.zarr: a build writes to a folder or to an object store"),
        ("s3://bucket", r"out=s3://bucket is a whole bucket. Give a name in it, such as s3://bucket/in1k.zarr"),
    ):
        with reached(moto), pytest.raises((ConfigError, NotWritableError), match=sentence):
            build(replace(config, out=parse_location(out)))
    with pytest.raises(ConfigError, match=r"grow: s3://bucket/grow/cache.zarr is on an object store; only local cach"):
        replace(into(local, "grow"), grow=True)
    with reached(moto):
        told = run_cli(into(local, "a"), data=str(tmp_path / "none.tar"), out="s3://nowhere/a.zarr")
    assert told.exit_code == 1
    assert "Error: s3://nowhere/a.zarr/commits/" in told.output


def test_a_place_for_temp_files_that_holds_no_two_tasks_is_named(local, moto, monkeypatch, tmp_path):
    with mounted(tmp_path / "small", "size=16k"), reached(moto):
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "small"))
        with pytest.raises(
            DiskFullError,
            match=r"small: up to [\d.]+ kB lie there on their way to s3.* Set TMPDIR to a folder with more space",
        ):
            build(replace(into(local, "full"), samples_per_shard=48))


def test_a_dry_run_leaves_nothing_in_the_bucket(local, moto):
    with reached(moto):
        summary = build(replace(into(local, "dry"), dry_run=True))
    assert summary.plan is not None
    assert summary.plan.free_nbytes is None
    assert json.dumps(summary.to_json())
    assert moto.objects("bucket", "dry") == {}
