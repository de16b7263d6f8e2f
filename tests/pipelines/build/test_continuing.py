"""Kills, damage and full disks lose nothing: the same command continues to the same bytes."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from builds import MIXED, differences, files, in_a_child
from disks import largest_file, mounted

import atcache
from atcache.errors import CacheMismatchError, ConfigError, CorruptCacheError, DiskFullError
from atcache.pipelines.build.prepare import Prepared, prepare
from atcache.pipelines.build.run import build
from atcache.pipelines.build.wanted import load_teacher
from atcache.store.manifest import check_commit, delete_commits, list_commits, read_commits
from atcache.teachers.load import create_student
from atcache.teachers.names import parse_model_name

# Stopping and going on


def test_a_build_killed_at_20_moments_equals_one_in_one_go(config, tmp_path):
    config = replace(config, views=2, pixels="store", out=tmp_path / "whole.zarr", **MIXED)
    in_a_child(config)  # the first one also starts the server
    shutil.rmtree(config.out)
    start_s = time.monotonic()
    assert in_a_child(config) == 0
    whole_s = time.monotonic() - start_s
    moments, num_kills, num_partly_done, started = random.Random(0), 0, 0, 0
    while num_kills < 20 or num_partly_done < 3:
        killed = replace(config, out=tmp_path / "killed" / f"{started}.zarr")
        # Half at any moment, which may be before the first commit; half just after one, where the cache is half-built.
        next_commit = len(list_commits(killed.out)) + 1
        moment = {"after_s": moments.uniform(0, whole_s)} if num_kills < 10 else {"after_commits": next_commit}
        exit_code = in_a_child(killed, **moment)
        num_kills += exit_code == -signal.SIGKILL
        num_partly_done += 0 < len(list_commits(killed.out)) < 12
        if exit_code == 0:
            assert differences(killed.out, config.out) == []
            started += 1
    build(killed)
    for path in (tmp_path / "killed").iterdir():
        assert path.suffix == ".zarr", "temp folders are left"
        assert differences(path, config.out) == []


def test_ctrl_c_says_one_sentence_and_the_next_build_continues(config, tmp_path):
    config = replace(config, views=20, samples_per_shard=48, workers=2)
    arguments = [
        *("--teacher", config.teacher, "--weights", str(config.weights), "--data", config.data),
        *("--out", str(config.out), "--views", "20", "--samples-per-shard", "48", "--batch-size", "3"),
        *("--workers", "2", "--device", "cpu", "--precision", "fp32"),
    ]
    process = subprocess.Popen(
        [sys.executable, "-m", "atcache.cli.main", "build", *arguments],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # Whoever runs the tests in the background may have had it ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    while len(list_commits(config.out)) < 3 and process.poll() is None:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: workers get it too
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert "Traceback" not in stderr
    assert stderr.splitlines()[-1] == "Stopped. What was stored stays; type the same command again to continue."
    assert stdout == ""
    num_done = len(list_commits(config.out))
    assert 3 <= num_done < 20
    assert not [name for name in files(config.out) if name.endswith(".partial")]
    summary = build(config)
    assert summary.plan is not None
    assert summary.plan.num_done_tasks == num_done
    build(replace(config, out=tmp_path / "whole.zarr"))
    assert differences(config.out, tmp_path / "whole.zarr") == []


def test_a_finished_cache_asked_for_again_is_left_alone(config):
    first = build(config)
    before = {file: file.stat().st_mtime_ns for file in config.out.rglob("*")}
    again = build(config)
    assert again.plan is None
    assert again.num_built_views == 0
    assert again.complete == first.complete
    assert {file: file.stat().st_mtime_ns for file in config.out.rglob("*")} == before


def test_a_dry_run_writes_nothing(config, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    summary = build(replace(config, dry_run=True))
    assert summary.plan is not None
    assert (summary.plan.num_tasks, summary.plan.num_done_tasks, summary.complete) == (6, 0, None)
    assert sorted(tmp_path.rglob("*")) == before


def test_layers_are_measured_for_a_new_cache_only(config):
    """Each costs forwards of the teacher, and one that exists has the numbers in its record."""
    num_forwards = []
    for layers in ("0", "0-1"):
        begun = replace(config, layers=layers, codec="int8", out=config.out.with_name(f"{layers}.zarr"))
        build(begun)
        delete_commits(begun.out, ["v0000-b000000"])
        for fields in ({}, {"dry_run": True}, {"dry_run": True, "out": config.out, "calibration_samples": 8}):
            num_forwards.append(count_forwards(replace(begun, **fields)))
    assert len(set(num_forwards)) == 1, "however many layers there are"


def count_forwards(config) -> int:
    """How often the teacher runs before a build's tasks."""
    forwards = []

    def load(config):
        run = load_teacher(config)
        run.teacher.model.patch_embed.register_forward_hook(lambda *_: forwards.append(1))
        return run

    assert isinstance(prepare(config, load)[1], Prepared)
    return len(forwards)


def test_a_task_is_committed_while_the_next_one_is_written(config, monkeypatch):
    """On a slow disk: it has the first shard only once those of the next task are begun."""
    waits, real = [], os.fsync

    def fsync(descriptor):
        name = str(Path(f"/proc/self/fd/{descriptor}").readlink())
        if not waits and name.endswith(".partial") and "/attention/codes/c/0/0/" in name:
            waits.append(name)
            stop_s = time.monotonic() + 100
            while not list((config.out / "attention/codes/c/0").glob("1/**/*.partial")):
                assert time.monotonic() < stop_s, "the next task waits for the disk"
                time.sleep(0.01)
            assert list_commits(config.out) == set()
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    assert build(config).num_built_views == 48
    assert waits


def test_going_on_with_other_parameters_names_each_difference(config):
    config = replace(config, codec="int8")
    build(config)
    before = files(config.out)
    other = replace(config, codec="exact", views=2, seed=1, layers="0", samples_per_shard=16, on_bad_image="skip")
    with pytest.raises(CacheMismatchError, match=r"cache.zarr exists and is another cache") as caught:
        build(other)
    message = str(caught.value)
    for difference in (
        "codec.name is 'int8' there and 'exact' here",
        "codec.dtype is None there and 'float16' here",
        "views.num_views is 1 there and 2 here",
        "views.policy.seed is 0 there and 1 here",
        "selection.layers is [0, 1] there and [0] here",
        "samples_per_shard is 8 there and 16 here",
    ):
        assert difference in message
    assert message.count(" there and ") == 6
    assert files(config.out) == before


def test_the_same_layers_written_otherwise_are_the_same_cache(config):
    build(config)
    for written in ("0-1", "0,1"):
        assert build(replace(config, layers=written)).num_built_views == 0


def test_going_on_with_other_weights_or_images_is_refused(config, digits_tars, tmp_path):
    build(config)
    with pytest.raises(
        CacheMismatchError, match=r"source.fingerprint is '\w{12}...' there .* source.num_samples is 48 "
    ):
        build(replace(config, data=str(digits_tars[0])))
    model = create_student(parse_model_name(config.teacher), num_classes=10)
    torch.save(model.state_dict(), tmp_path / "other.pth")
    with pytest.raises(
        CacheMismatchError, match=r"another cache: teacher.weights_sha256 is '\w{12}...' there and '\w{12}...' her"
    ):
        build(replace(config, weights=tmp_path / "other.pth"))


# Damage, and disks that are full


def test_a_damaged_shard_is_named_and_rebuilt_as_it_was(config, tmp_path):
    build(config)
    shutil.copytree(config.out, tmp_path / "before.zarr")
    shard = config.out / "attention/codes/c/0/2/0/0/0"
    data = bytearray(shard.read_bytes())
    data[len(data) // 3] ^= 0x10
    shard.write_bytes(data)
    with pytest.raises(CorruptCacheError, match=r"codes/c/0/2/0/0/0, sample \d+ is damaged: .* Delete \S*b000002.json"):
        atcache.open(config.out).maps(layer=0)[0, 16:24].compute()
    (config.out / "commits/v0000-b000002.json").unlink()
    assert not atcache.open(config.out).reader.is_complete
    summary = build(config)
    assert summary.num_built_views == 8
    assert differences(config.out, tmp_path / "before.zarr") == []


def test_a_lost_shard_is_built_again_unasked(config, tmp_path):
    build(config)
    shutil.copytree(config.out, tmp_path / "before.zarr")
    (config.out / "commits/v0000-b000000.json").unlink()
    (config.out / "attention/codes/c/0/4/0/0/0").unlink()
    assert build(config).num_built_views == 16
    assert differences(config.out, tmp_path / "before.zarr") == []


def test_a_full_disk_loses_nothing_that_was_stored(config, small_disk, tmp_path):
    config = replace(config, codec="int8")  # the larger files
    whole = build(replace(config, out=tmp_path / "whole.zarr"))
    config = replace(config, out=small_disk / "cache.zarr")
    ballast = small_disk / "ballast"

    def fill_disk(_):
        # All but enough for the metadata and about three tasks; the plan has already looked at the free space.
        ballast.write_bytes(bytes(shutil.disk_usage(small_disk).free - 260 * 1024))

    with pytest.raises(DiskFullError, match=r"No space left on device.*command again to continue"):
        build(config, fill_disk)
    commits = read_commits(config.out)
    layout = atcache.open(config.out).reader.layout
    assert 0 < len(commits) < 6
    assert all(check_commit(config.out, commit, layout, deep=True) == [] for commit in commits.values())
    assert not [name for name in files(config.out) if name.endswith(".partial")]
    ballast.unlink()
    summary = build(config)
    assert summary.plan is not None
    assert summary.plan.num_done_tasks == len(commits)
    assert summary.complete == whole.complete
    assert differences(config.out, tmp_path / "whole.zarr") == []


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 2 MiB."""
    folder = tmp_path / "small"
    with mounted(folder, "size=2m"):
        yield folder


def test_a_write_that_is_refused_loses_nothing_that_was_stored(config, tmp_path):
    config = replace(config, codec="int8")  # the larger files
    build(config)
    shutil.copytree(config.out, tmp_path / "before.zarr")
    for task in (1, 3, 4):
        (config.out / f"commits/v0000-b{task:06d}.json").unlink()
    with largest_file(nbytes=4096), pytest.raises(DiskFullError, match=r"File too large.*Free some space"):
        build(config)
    assert len(list_commits(config.out)) == 3
    build(config)
    assert differences(config.out, tmp_path / "before.zarr") == []


def test_what_cannot_fit_is_refused_before_anything_is_written(config, small_disk):
    with pytest.raises(
        DiskFullError, match=r"[\d.]+ MB are still to be written, 2\.1 MB are free.*smaller --budget or"
    ):
        build(replace(config, out=small_disk / "cache.zarr", views=30, codec="int8"))
    assert list(small_disk.iterdir()) == []


def test_a_dry_run_notes_what_cannot_fit(config, small_disk, caplog):
    summary = build(replace(config, out=small_disk / "cache.zarr", views=30, codec="int8", dry_run=True))
    assert summary.plan is not None
    (note,) = [message for message in caplog.messages if message.startswith("NOTE: this build would be refused. ")]
    assert "MB are still to be written, 2.1 MB are free. Free some space" in note
    caplog.clear()
    build(replace(config, dry_run=True))
    assert "would be refused" not in caplog.text


def test_what_another_build_has_done_meanwhile_is_not_done_again(config):
    build(replace(config, views=2))
    shutil.copytree(config.out, kept := config.out.with_name("kept.zarr"))
    delete_commits(config.out, list_commits(config.out))
    _, waiting = prepare(replace(config, views=2))
    build(replace(config, views=2))
    assert isinstance(waiting, Prepared)
    with pytest.raises(ConfigError, match=r"another process has built \d+ tasks of .* Run the same command again"):
        waiting.begin()
    assert differences(config.out, kept) == []
