"""A cluster builds what one process builds, byte for byte, whatever happens to its workers."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import dask
import pytest
from builds import differences, picture, write_tar
from clusters import threads

from atcache.errors import BadImageError, ConfigError, SourceError, WorkerLostError
from atcache.files.durable import partial_path
from atcache.pipelines.build import on_worker
from atcache.pipelines.build.board import Counts
from atcache.pipelines.build.config import BuildConfig
from atcache.pipelines.build.joining import Job
from atcache.pipelines.build.on_cluster import _Tally, config_as_sent
from atcache.pipelines.build.on_worker import ClusterJob, run_task
from atcache.pipelines.build.prepare import Prepared, prepare
from atcache.pipelines.build.run import build
from atcache.pipelines.build.shared_folder import marked
from atcache.pipelines.cluster.cluster import Cluster
from atcache.pipelines.cluster.worker import answer
from atcache.store.manifest import list_commits
from atcache.store.writer import finish_cache


@pytest.fixture
def config(digits_build) -> BuildConfig:
    """A build of 48 digits in 24 tasks."""
    return replace(digits_build, views=2, samples_per_shard=4)


def wait_for_commits(out: Path, number: int) -> None:
    stop_s = time.monotonic() + 240
    while not out.exists() or len(list_commits(out)) < number:
        assert time.monotonic() < stop_s
        time.sleep(0.002)


def test_four_workers_build_what_one_process_builds_though_one_is_killed(config, client, tmp_path, capfd):
    config = replace(config, views=10, on_bad_image="skip")
    build(replace(config, out=tmp_path / "one.zarr"))
    capfd.readouterr()
    pids = client.run(os.getpid)

    def kill_one():
        wait_for_commits(config.out, 5)
        address = next(worker for worker, keys in client.processing().items() if keys)
        os.kill(pids[address], signal.SIGKILL)
        # At some moments a kill leaves temp files. So that there always is one:
        partial_path(config.out / "attention" / "zarr.json").touch()

    killer = threading.Thread(target=kill_one)
    killer.start()
    summary = build(replace(config, client=client))
    killer.join()
    assert differences(config.out, tmp_path / "one.zarr") == []
    assert summary.num_built_views == 480
    shown = re.findall(r"^build: (\d+)/480 views", capfd.readouterr().err, re.MULTILINE)
    assert int(shown[-1]) == 480
    client.wait_for_workers(4, timeout=60)
    assert set(client.run(os.getpid).values()) != set(pids.values()), "a worker was killed"


def test_a_cluster_goes_on_grows_and_leaves_a_finished_cache_alone(config, client, tmp_path):
    build(config)
    shutil.copytree(config.out, tmp_path / "whole.zarr")
    for name in sorted(list_commits(config.out))[::2]:
        (config.out / "commits" / f"{name}.json").unlink()
    assert build(replace(config, client=client)).num_built_views == 48
    assert differences(config.out, tmp_path / "whole.zarr") == []
    done = build(replace(config, client=client))
    assert (done.plan, done.num_built_views) == (None, 0)
    build(replace(config, out=tmp_path / "whole.zarr", views=3, grow=True))
    build(replace(config, views=3, grow=True, client=client))
    assert differences(config.out, tmp_path / "whole.zarr") == []


def test_a_dry_run_on_a_cluster_writes_nothing(config, client):
    plans = []
    summary = build(replace(config, client=client, dry_run=True), on_plan=plans.append)
    assert plans == [summary.plan]
    assert not config.out.exists()


def test_two_workers_at_the_same_task_leave_one_result(config, client, tmp_path):
    build(replace(config, out=tmp_path / "one.zarr"))
    _, prepared = prepare(config_as_sent(config))
    assert isinstance(prepared, Prepared)
    prepared.create()
    cache = prepared.begin()
    one, other = list(client.scheduler_info()["workers"])[:2]
    with marked(config.out) as mark:
        task = Job(mark=mark, attributes=cache.attributes, to_do=prepared.to_do)
        job = ClusterJob(id="by hand", config=prepared.config, job=task, workers_on_machine=4)
        with Cluster(client, is_local=True).giving(job) as given:
            answers = client.gather(
                [
                    client.submit(answer, run_task, given, number, workers=[worker], pure=False)
                    for number in prepared.to_do
                    for worker in (one, other)
                ]
            )
    assert [found.error for found in answers] == 48 * [None]
    assert {found.result.num_views for found in answers} == {4}
    finish_cache(config.out)
    assert differences(config.out, tmp_path / "one.zarr") == []


def test_a_build_that_has_ended_begins_no_task_and_leaves_those_of_others(config):
    """What a worker keeps; here, since a worker is a process like this one."""
    _, prepared = prepare(config_as_sent(config))
    assert isinstance(prepared, Prepared)
    prepared.create()
    cache = prepared.begin()
    with marked(config.out) as mark:
        task = Job(mark=mark, attributes=cache.attributes, to_do=prepared.to_do)
        with threads(1) as (_, client):
            for build_id in ("stopped", "other"):
                on_worker.forget("stopped")
                job = ClusterJob(id=build_id, config=prepared.config, job=task, workers_on_machine=1)
                with Cluster(client, is_local=True).giving(job) as given:
                    future = client.submit(answer, run_task, given, 0, pure=False)
                    if build_id == "stopped":
                        with pytest.raises(WorkerLostError, match="was stopped, so the task is, too"):
                            future.result()
                        assert on_worker._kept == {}
                    else:
                        assert future.result().result.num_views == 4
    on_worker.forget("stopped")
    assert sorted(on_worker._kept) == ["runner", "teacher"], "of the other build"
    on_worker.forget("other")
    assert on_worker._kept == {}


def test_what_is_wrong_with_an_image_is_raised_here_with_the_worker_that_found_it(config, client, tmp_path):
    samples = [{"jpg": picture(number), "cls": b"1"} for number in range(40)]
    samples[30]["jpg"] = b"no image"
    broken = replace(config, data=str(write_tar(tmp_path / "bad.tar", samples)), calibration_samples=1, client=client)
    with pytest.raises(BadImageError, match=r"key 'sample-030': not a JPEG.*This was on the worker tcp://127"):
        build(broken)
    with pytest.raises(SourceError, match=r"matches no file.*This was on the worker tcp://127"):
        build(replace(config, data=str(tmp_path / "nowhere.tar"), client=client))


def test_paths_are_sent_whole(config, client, tmp_path, monkeypatch):
    """Workers have other working folders."""
    monkeypatch.chdir(tmp_path)
    data, weights = os.path.relpath(config.data), Path(os.path.relpath(config.weights))
    config = replace(config, data=data, weights=weights)
    build(replace(config, out=Path("one.zarr")))
    build(replace(config, out=Path("two.zarr"), client=client))
    assert differences(Path("two.zarr"), Path("one.zarr")) == []


def test_a_client_that_stops_ends_its_tasks_and_the_same_command_goes_on(config, tmp_path):
    """On the command line, with a local cluster whose worker has processes of its own."""
    config = replace(config, views=20, workers=1)
    given = ("teacher", "weights", "data", "out", "views", "samples_per_shard", "batch_size", "workers", "device")
    options = [text for name in given for text in (f"--{name.replace('_', '-')}", str(getattr(config, name)))]
    command = [sys.executable, "-m", "atcache.cli.main", "build", "--scheduler", "local", "--precision", "fp32"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    listen = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a shell's background jobs ignore Ctrl-C
    process = subprocess.Popen([*command, *options], process_group=0, preexec_fn=listen, **pipes)
    try:
        wait_for_commits(config.out, 2)
        os.killpg(process.pid, signal.SIGINT)
        stdout, stderr = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 130, stderr
    assert (stdout, stderr.splitlines()[-1][:9]) == ("", "Stopped. ")
    assert "Traceback" not in stderr
    num_done = len(list_commits(config.out))
    summary = build(config)
    assert summary.plan is not None
    assert summary.plan.num_done_tasks == num_done < 240
    build(replace(config, out=tmp_path / "one.zarr"))
    assert differences(config.out, tmp_path / "one.zarr") == []


def test_what_can_be_no_cluster_is_refused_at_once(config, client):
    with pytest.raises(ConfigError, match="scheduler='local' and a client"):
        replace(config, scheduler="local", client=client)
    with pytest.raises(ConfigError, match=r"expected a distributed\.Client"):
        replace(config, client="tcp://127.0.0.1:1")
    with pytest.raises(ConfigError, match="device=cuda:1: would be every worker's"):
        replace(config, client=client, device="cuda:1")
    with pytest.raises(ConfigError, match=r"there is no such file\. It is written by `dask scheduler"):
        build(replace(config, scheduler="nowhere.json"))
    with (
        dask.config.set({"distributed.comm.timeouts.connect": "1s"}),
        pytest.raises(ConfigError, match=r"'tcp://127\.0\.0\.1:1' does not answer as a dask scheduler"),
    ):
        build(replace(config, scheduler="tcp://127.0.0.1:1"))
    with pytest.raises(ConfigError, match="torch sees 0 GPUs here"):
        build(replace(config, scheduler="local", device="cuda"))


def test_late_news_of_a_task_that_ended_is_not_counted_twice():
    tally = _Tally()
    tally.hear({"number": 1, "counts": {"num_views": 2}})
    tally.hear({"number": 2, "counts": {"num_views": 3}})
    assert tally.total().num_views == 5
    tally.finish(1, Counts(num_views=4))
    tally.hear({"number": 1, "counts": {"num_views": 2}})
    assert tally.total().num_views == 7
    assert list(tally._running) == [2], "only these are added up at each look"


def test_counts_pass_as_json():
    assert Counts(**json.loads(json.dumps({"num_views": 1}))) == Counts(num_views=1)


@pytest.mark.parametrize("kind", ["local-dir", "transformers"])
def test_a_teacher_in_a_folder_is_named_from_the_root(config, tmp_path, monkeypatch, kind):
    """A worker has another working folder, and would look on the hub for a name that it does not find there."""
    (tmp_path / "models/vit").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="name the folder from the root"):
        config_as_sent(replace(config, teacher=f"{kind}:models/vit"))
    absolute = f"{kind}:{tmp_path}/models/vit"
    assert config_as_sent(replace(config, teacher=absolute)).teacher == absolute
    assert config_as_sent(replace(config, teacher="transformers:org/model")).teacher == "transformers:org/model"
