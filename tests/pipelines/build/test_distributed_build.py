"""Several processes build what one builds, byte for byte; a kill, an error or silence of one ends all, told once."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import sys
import threading
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch.distributed as dist
import webdataset
from click.testing import CliRunner
from PIL import Image
from processes import in_two_processes, rank_of, start, workers_of

from atcache.cli.main import cli
from atcache.errors import ConfigError
from atcache.pipelines.build.board import Board, Counts
from atcache.pipelines.build.config import BuildConfig
from atcache.pipelines.build.run import build
from atcache.pipelines.build.shared_folder import check_mark, marked
from atcache.pipelines.running.ranks import ProcessLostError, Ranks
from atcache.store.manifest import list_commits


@pytest.fixture
def config(digits_build) -> BuildConfig:
    """A build of 48 digits in 24 tasks."""
    return replace(digits_build, views=2, samples_per_shard=4)


def options_of(config: BuildConfig) -> list[str]:
    default = BuildConfig(teacher="", data="", out=Path())
    names = [name for name in BuildConfig.__dataclass_fields__ if getattr(config, name) != getattr(default, name)]
    pairs = [(f"--{name.replace('_', '-')}", str(getattr(config, name))) for name in names]
    return ["build", *(word for pair in pairs for word in pair)]


def files(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def write_tar(path: Path, images: list[bytes]) -> Path:
    with path.open("wb") as file, webdataset.TarWriter(file) as writer:
        for number, image in enumerate(images):
            writer.write({"__key__": f"sample-{number:03d}", "png": image, "cls": b"1"})
    return path


def png(pixels: np.ndarray) -> bytes:
    encoded = io.BytesIO()
    Image.fromarray(pixels).save(encoded, format="PNG")
    return encoded.getvalue()


def test_torchrun_builds_what_one_process_builds_and_its_leader_speaks_for_all(config, tmp_path):
    """Later images are unlike the only one that was calibrated on, so the views that all looked at make a warning."""
    noise = np.random.default_rng(0)
    flat = [png(np.full((8, 8, 3), number, np.uint8)) for number in range(12)]
    images = flat + [png(noise.integers(0, 256, (8, 8, 3), np.uint8)) for _ in range(36)]
    tar = write_tar(tmp_path / "unlike.tar", images)
    config = replace(config, data=str(tar), calibration_samples=1)
    one = build(replace(config, out=tmp_path / "one.zarr"))
    process = start(["-m", "atcache.cli.main", *options_of(config)])
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 0, stderr
    (line,) = stdout.splitlines()
    summary = json.loads(line)
    assert files(config.out) == files(tmp_path / "one.zarr")
    assert summary["num_built_views"] == 96
    assert (summary["complete"], summary["warning"]) == (one.complete, one.warning)
    assert stderr.count("24 of 24 tasks to do") == 1
    assert [int(done) for done in re.findall(r"^build: (\d+)/96 views", stderr, re.MULTILINE)][-1] == 96
    warnings = [line for line in stderr.splitlines() if line.startswith("Warning")]
    assert len(warnings) == 2, "once as soon as it shows, once at the end"
    assert warnings[1] == one.warning


def test_all_processes_take_the_codec_of_another_cache(config, tiny_cache, tmp_path):
    config = replace(config, codec_from=tiny_cache(codec=None, target_kl=0.02))
    build(replace(config, out=tmp_path / "one.zarr"))
    process = start(["-m", "atcache.cli.main", *options_of(config)])
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 0, stderr
    assert files(config.out) == files(tmp_path / "one.zarr")


def _build_and_count_bytes(config: BuildConfig, folder: Path) -> None:
    summary = build(config)
    rank = Ranks.from_environment().rank
    written = re.search(r"wchar: (\d+)", Path("/proc/self/io").read_text())
    assert written is not None
    (folder / str(rank)).write_text(json.dumps({"nbytes": int(written[1]), "built": summary.num_built_views}))


def test_each_process_does_a_part_and_knows_the_whole(config, tmp_path):
    config = replace(config, codec="exact:dtype=float32", views=10)
    assert in_two_processes(partial(_build_and_count_bytes, config, tmp_path)) == [0, 0]
    parts = [json.loads((tmp_path / str(rank)).read_text()) for rank in range(2)]
    codes_nbytes = sum(file.stat().st_size for file in (config.out / "attention/codes").rglob("*") if file.is_file())
    assert [part["built"] for part in parts] == [480, 480]
    assert min(part["nbytes"] for part in parts) > 0.1 * codes_nbytes


def test_a_killed_process_ends_all_with_a_sentence_and_one_process_goes_on(config, tmp_path):
    config = replace(config, views=8, workers=1)
    process = start(["-m", "atcache.cli.main", *options_of(config)])
    stop_s = time.monotonic() + 90
    while not config.out.exists() or len(list_commits(config.out)) < 3:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < stop_s
        time.sleep(0.005)
    (victim,) = [pid for pid in workers_of(process.pid) if rank_of(pid) == 1]
    os.kill(victim, signal.SIGKILL)
    _, stderr = process.communicate(timeout=30)
    assert process.returncode != 0
    assert stderr.count("Error: this process got SIGTERM, which torchrun sends when another process") == 1, stderr
    assert "What was stored stays; type the same command again to continue." in stderr
    num_done = len(list_commits(config.out))
    assert 3 <= num_done < 96
    summary = build(config)
    assert summary.plan is not None
    assert summary.plan.num_done_tasks == num_done
    build(replace(config, out=tmp_path / "whole.zarr"))
    assert files(config.out) == files(tmp_path / "whole.zarr")


def test_two_processes_go_on_with_what_one_began_and_leave_a_finished_cache_alone(config, tmp_path):
    build(config)
    shutil.copytree(config.out, tmp_path / "whole.zarr")
    for name in sorted(list_commits(config.out))[::2]:
        (config.out / "commits" / f"{name}.json").unlink()
    assert in_two_processes(partial(_build_and_count_bytes, config, tmp_path)) == [0, 0]
    assert json.loads((tmp_path / "1").read_text())["built"] == 48
    assert files(config.out) == files(tmp_path / "whole.zarr")
    assert in_two_processes(partial(_build_and_count_bytes, config, tmp_path)) == [0, 0]
    assert json.loads((tmp_path / "1").read_text())["built"] == 0


def test_an_error_is_told_once_whoever_has_it(config, tmp_path, capfd):
    images = [png(np.full((8, 8, 3), number, np.uint8)) for number in range(40)]
    images[30] = b"no image"
    broken = replace(config, data=str(write_tar(tmp_path / "bad.tar", images)), calibration_samples=1)
    assert sorted(in_two_processes(partial(build, broken))) == [1, 3]
    error = capfd.readouterr().err
    assert error.count("told:") == error.count("key 'sample-030': not a JPEG, PNG") == 1
    nowhere = replace(config, data="nowhere.tar")
    assert in_two_processes(partial(build, nowhere)) == [3, 1]
    assert capfd.readouterr().err.count("told:") == 1


def test_what_all_find_wrong_the_leader_tells():
    def refuse():
        raise ConfigError("views=0: expected at least 1.")

    with pytest.raises(ConfigError, match="views=0"):
        Ranks(rank=0, world_size=2).refused_once(refuse)
    with pytest.raises(SystemExit):
        Ranks(rank=1, world_size=2).refused_once(refuse)


def test_an_out_that_is_not_shared_is_refused(tmp_path):
    ours, theirs = tmp_path / "ours.zarr", tmp_path / "theirs.zarr"
    for folder in (ours, theirs):
        folder.mkdir()
    with marked(theirs) as mark:
        check_mark(theirs, mark, patience_s=0)
        with pytest.raises(ConfigError, match=r"ours\.zarr is not the folder .* --out on storage that all nodes share"):
            check_mark(ours, mark, patience_s=0)
        with pytest.raises(SystemExit):  # the leader has failed meanwhile, and told why
            check_mark(ours, mark, each_look=lambda: sys.exit(1))
    assert list(theirs.iterdir()) == []


# The board


@pytest.fixture
def boards() -> list[Board]:
    """The boards of three processes, over a store in memory."""
    store = dist.HashStore()
    return [Board(store, Ranks(rank=rank, world_size=3), silence_s=1.5) for rank in range(3)]


def test_every_task_is_claimed_once_by_whoever_comes_first(boards):
    slow, fast, _ = [board.claims(10) for board in boards]
    assert next(slow) == 0
    assert list(fast) == list(range(1, 10))
    assert list(slow) == []


def test_the_leader_waits_for_all_and_adds_up_what_they_did(boards):
    leader, *others = boards
    leader.report(Counts(num_views=1, nbytes=5))

    def others_work():
        time.sleep(1.2)
        for board in others:
            board.report(Counts(num_views=10, sum_nats=0.5, num_checked=2))
            board.finish(lambda: None)

    worker = threading.Thread(target=others_work)
    worker.start()
    looks: list[int] = []
    leader.finish(lambda: looks.append(leader.total().num_views))
    worker.join()
    assert leader.total() == Counts(num_views=21, nbytes=5, sum_nats=1.0, num_checked=4)
    assert looks[0] == 1


def test_who_is_silent_is_lost_unless_it_was_done(boards):
    leader, done, _silent = boards
    done.finish(lambda: None)
    with pytest.raises(ProcessLostError, match="process 2 of 3 has not reported for 2 s, so this one ends too"):
        leader.finish(lambda: None)


def test_what_runs_in_one_process_says_that_build_takes_several(monkeypatch):
    for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    done = CliRunner().invoke(cli, ["plan"])
    assert done.exit_code == 1
    assert "`atcache plan` runs in one process but was started in 2" in done.stderr
    assert "Only `atcache build` and `atcache train` of one student can use several." in done.stderr


def test_all_processes_help_a_cache_to_grow(config, digits_tars, tmp_path):
    config = replace(config, data=str(digits_tars[1]), codec="int8", samples_per_shard=5)
    build(replace(config, views=1))
    shutil.copytree(config.out, tmp_path / "one.zarr")
    config = replace(config, data=str(digits_tars[0].parent))
    grown = build(replace(config, out=tmp_path / "one.zarr", grow=True))
    process = start(["-m", "atcache.cli.main", *options_of(config), "--grow"])
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 0, stderr
    assert json.loads(stdout)["num_built_views"] == grown.num_built_views == 80
    assert files(config.out) == files(tmp_path / "one.zarr")
