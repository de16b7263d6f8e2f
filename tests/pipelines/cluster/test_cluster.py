"""Work is given in waves, and whatever keeps it from being done is told in a sentence."""

from __future__ import annotations

import os
import pickle
import signal
import time
from pathlib import Path

import dask
import pytest
from clusters import be_honest, die, note_once, place, pretend, threads
from distributed import Client, Scheduler, SpecCluster

from atcache import __version__
from atcache.attention.finite import NotFinite, NotFiniteError
from atcache.errors import AtcacheError, ConfigError, WorkerLostError
from atcache.images.tars import as_typed_in
from atcache.pipelines.cluster.cluster import Cluster
from atcache.pipelines.cluster.connect import check_scheduler, connected
from atcache.pipelines.stats.config import StatsConfig
from atcache.pipelines.verify.config import VerifyConfig


def name_of(item) -> str:
    return f"task {item}"


def test_a_worker_that_joins_later_gets_work_that_needs_a_gpu():
    with threads(1, resources={"GPU": 1}) as (local, client):
        cluster = Cluster.checked(client, is_local=True)
        assert cluster.has_gpus()
        places = []
        for number, found in cluster.waves(place, None, range(60), name_of=name_of, needs_gpu=True):
            places.append(found)
            if len(places) == 3:
                local.scale(2)
            assert number < 60
        assert len(places) == 60
        assert len(set(places)) == 2


def test_results_come_in_order():
    with threads(2) as (_, client):
        cluster = Cluster.checked(client, is_local=True)
        assert list(cluster.in_order(pow, 2, list(range(20)), name="powers")) == [2**number for number in range(20)]


def test_a_cluster_without_a_gpu_or_without_workers_says_so(caplog):
    with threads(1) as (_, client):
        cluster = Cluster(client, is_local=True, patience_s=1)
        assert not cluster.has_gpus()
        with pytest.raises(
            WorkerLostError, match=r"none of the cluster's 1 workers has the resource GPU: start workers"
        ):
            cluster.call(place, None, name="it", needs_gpu=True)
    assert caplog.messages.count("waiting up to 1 s for a worker with the resource GPU") == 1
    scheduler = {"cls": Scheduler, "options": {"dashboard_address": "127.0.0.1:0", "host": "127.0.0.1"}}
    with (
        SpecCluster(scheduler=scheduler) as empty,
        Client(empty, set_as_default=False) as client,
        pytest.raises(WorkerLostError, match="the cluster has had no worker for 1 s"),
    ):
        Cluster.checked(client, is_local=True, patience_s=1)


def test_a_task_that_ends_every_worker_is_named(client):
    cluster = Cluster.checked(client, is_local=False)
    with pytest.raises(WorkerLostError, match=r"task 7 ended 4 workers, one after the other.*smaller --batch-size"):
        list(cluster.waves(die, None, [7], name_of=name_of))
    client.wait_for_workers(4, timeout=60)


def test_a_worker_that_is_lost_with_its_answers_is_no_scheduler_that_is_gone(client):
    cluster, pids = Cluster.checked(client, is_local=False), client.run(os.getpid)
    victim = next(iter(pids))
    looks = []

    def look():
        """Once: let the first tasks end, and their worker then, before the client takes their results."""
        looks.append(1)
        if len(looks) == 1:
            while any(client.processing().values()) or not client.has_what()[victim]:
                time.sleep(0.05)
            time.sleep(0.2)  # so that the client has heard of it
            os.kill(pids[victim], signal.SIGKILL)
            while victim in client.scheduler_info(n_workers=-1)["workers"]:
                time.sleep(0.05)
            time.sleep(0.1)

    done = [item for item, _ in cluster.waves(place, 1.0, range(12), name_of=name_of, each_look=look)]
    assert sorted(done) == list(range(12))
    client.wait_for_workers(4, timeout=60)


def test_a_scheduler_that_ends_is_told():
    with dask.config.set({"distributed.comm.timeouts.connect": "2s"}), threads(1) as (local, client):
        cluster = Cluster.checked(client, is_local=True)
        results = cluster.waves(place, None, range(100), name_of=name_of)
        next(results)
        client.sync(local.scheduler.close)
        with pytest.raises(WorkerLostError, match=r"the scheduler at inproc://.* has ended or does not answer"):
            list(results)


@pytest.mark.parametrize("version", ["9.9.9", None])
def test_another_atcache_on_a_worker_is_refused(client, version):
    victim = next(iter(client.scheduler_info()["workers"]))
    client.run(pretend, version, workers=[victim])
    found = "9.9.9" if version else "none, or another one"
    try:
        with pytest.raises(ConfigError, match=rf"the worker {victim} has another atcache than {__version__}: {found}"):
            Cluster.checked(client, is_local=False)
    finally:
        client.run(be_honest, __version__, workers=[victim])


def test_a_worker_that_gets_another_atcache_later_is_refused(client):
    """As one that joins later, which was not there to be checked."""
    cluster = Cluster.checked(client, is_local=False)
    victim = next(iter(client.scheduler_info()["workers"]))
    client.run(pretend, "9.9.9", workers=[victim])
    sentence = rf"a worker has another atcache than {__version__}: 9\.9\.9\. .* \(This was on the worker {victim}\.\)"
    try:
        with pytest.raises(ConfigError, match=sentence):
            list(cluster.waves(place, None, range(40), name_of=name_of))
    finally:
        client.run(be_honest, __version__, workers=[victim])


def kinds(base: type) -> list[type]:
    return [base, *(kind for sub in base.__subclasses__() for kind in kinds(sub))]


def test_every_error_reaches_another_process_whole():
    found = NotFinite(where="layer 1", views=(2,), num_views=3, precision="float32")
    special = {NotFiniteError: NotFiniteError(found, lambda view: f"image of {view}")}
    for kind in kinds(AtcacheError):
        error = special.get(kind) or kind("one sentence.")
        again = pickle.loads(pickle.dumps(error))
        assert (type(again), str(again)) == (kind, str(error))


@pytest.mark.parametrize(
    ("scheduler", "reason"),
    [
        ("Local", "it is not an address with a port"),
        ("127.0.0.1:", "it is not an address with a port"),
        ("tcp://host:port", "it is not an address with a port"),
        ("ucx://host:8786", "its scheme is none of tcp, ws, tls, wss"),
        ("tls://127.0.0.1:8786", "dask's configuration names no certificates"),
    ],
)
def test_what_can_be_no_scheduler_is_refused_at_once(scheduler, reason):
    """A client of dask that fails to begin would wait for a minute at its end, so none is made."""
    with (
        pytest.raises(ConfigError, match=f"does not answer as a dask scheduler .{reason}"),
        connected(scheduler, None, device="cpu"),
    ):
        pass


def test_a_file_of_something_else_is_no_scheduler_file(tmp_path):
    for content in ("{}", "[]", "not json", '{"address": 5}'):
        (tmp_path / "scheduler.json").write_text(content)
        file = str(tmp_path / "scheduler.json")
        problem = r"is not a scheduler file|not an address"
        with pytest.raises(ConfigError, match=problem), connected(file, None, device="cpu"):
            pass


def test_notes_of_workers_in_this_process_are_not_forwarded_to_themselves(caplog):
    with threads(1) as (_, here), Cluster(here, is_local=True).forwarding_notes(), caplog.at_level("INFO", "atcache"):
        here.submit(note_once, pure=False).result()
        time.sleep(0.5)
    assert [record.message for record in caplog.records].count("a note") == 1


def test_a_client_that_was_closed_is_refused():
    with threads(1) as (_, client):
        pass
    with pytest.raises(ConfigError, match="the client is closed: it has no scheduler any more"):
        check_scheduler(None, client)


@pytest.mark.parametrize("config", [VerifyConfig, StatsConfig])
def test_threads_of_this_process_are_no_option_of_a_cluster(config, tmp_path):
    with pytest.raises(ConfigError, match="workers=2: a cluster's workers have their own number of threads"):
        config(cache=tmp_path, workers=2, scheduler="local")


@pytest.mark.parametrize(
    ("data", "sent"),
    [
        ("a/{0..3}.tar", "/here/a/{0..3}.tar"),
        ("{train,extra}-*.tar", "/here/{train,extra}-*.tar"),
        ("{/data/a,/data/b}/t.tar", "{/data/a,/data/b}/t.tar"),
        ("{/data/a,b}/t.tar", "{/data/a/t.tar,/here/b/t.tar}"),
        ("s3://bucket/t.tar", "s3://bucket/t.tar"),
    ],
)
def test_data_means_the_same_in_another_working_folder(data, sent, monkeypatch):
    monkeypatch.setattr("os.getcwd", lambda: "/here")
    assert as_typed_in(Path.cwd(), data) == sent
