"""Whatever happens at a place during a push, each of its commits holds one whole cache or none."""

from __future__ import annotations

import shutil
import threading
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
from builds import differences

import atcache
from atcache.errors import CacheMismatchError
from atcache.pipelines.publish import push as pushing
from atcache.store.manifest import FileRecord, read_commits, write_commit
from atcache.store.writer import finish_cache

HERE = "hf://datasets/lab/maps"
WAIT_S = 60
# huggingface_hub sends files in a way that its HTTP client calls old.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


def rewrite_shards(cache):
    """Give all shards of codes other bytes that mean the same, as another machine might write them."""
    index_nbytes = atcache.open(cache).reader.layout.codes.index_nbytes
    for commit in read_commits(cache).values():
        name = next(name for name in commit.files if name.startswith("attention/codes"))
        data = (cache / name).read_bytes()
        data = data[:-index_nbytes] + b"gap" + data[-index_nbytes:]  # a place that no entry of the index names
        (cache / name).write_bytes(data)
        about = FileRecord(nbytes=len(data), crc32=zlib.crc32(data))
        write_commit(cache, replace(commit, files={**commit.files, name: about}))
    finish_cache(cache)


@pytest.fixture
def repaired(tiny_cache, tmp_path):
    """A cache of 12 tasks, and the same with other bytes in each shard of codes."""
    cache = tiny_cache(samples_per_shard=4)
    other = shutil.copytree(cache, tmp_path / "repaired.zarr")
    rewrite_shards(other)
    assert not atcache.verify(cache=other, all=True).problems
    return cache, other


def test_of_two_caches_that_are_pushed_to_a_free_place_one_is_published_whole(hub, tiny_cache, tmp_path):
    hub.create("lab/maps")
    first, second = tiny_cache(), tiny_cache(codec="int8")
    has_begun, is_sent, has_ended = threading.Event(), threading.Event(), threading.Event()

    def hold_the_second():
        has_begun.set()
        assert is_sent.wait(WAIT_S)

    def hold_the_first():
        is_sent.set()
        assert has_ended.wait(WAIT_S)

    # Both find the place free. Then the first sends its data, the second goes on to its end, and the first ends.
    hub.meanwhile = [hold_the_second, lambda: None, hold_the_first]
    with ThreadPoolExecutor(1) as pool:
        pushed = pool.submit(atcache.push, cache=second, to=HERE)
        pushed.add_done_callback(lambda _: has_ended.set())
        assert has_begun.wait(WAIT_S)
        atcache.push(cache=first, to=HERE)
        with pytest.raises(CacheMismatchError, match=r"has another cache than .*, left by a push that did not end"):
            pushed.result()
    atcache.pull(cache=HERE, out=tmp_path / "copy.zarr")
    assert differences(tmp_path / "copy.zarr", first) == []


def test_a_cache_that_is_published_during_the_push_of_another_stays(hub, tiny_cache, tmp_path):
    hub.create("lab/maps")
    first, second = tiny_cache(), tiny_cache(codec="int8")
    hub.meanwhile = [lambda: atcache.push(cache=first, to=HERE)]
    with pytest.raises(CacheMismatchError, match=r"another cache than .*codec.name is 'exact' in hf://.* 'int8' in"):
        atcache.push(cache=second, to=HERE)
    atcache.pull(cache=HERE, out=tmp_path / "copy.zarr")
    assert differences(tmp_path / "copy.zarr", first) == []


@pytest.mark.parametrize("num_commits_before", [0, 1])
def test_the_same_cache_may_be_pushed_twice_at_once(hub, tiny_cache, tmp_path, num_commits_before):
    hub.create("lab/maps")
    hub.meanwhile = [lambda: None] * num_commits_before + [lambda: atcache.push(cache=tiny_cache(), to=HERE)]
    pushed = atcache.push(cache=tiny_cache(), to=HERE)
    assert pushed.to == f"{HERE}@{hub.repositories['lab/maps'].heads['main']}"
    atcache.pull(cache=HERE, out=tmp_path / "copy.zarr")
    assert differences(tmp_path / "copy.zarr", tiny_cache()) == []


@pytest.mark.parametrize("is_removed", [False, True])
def test_a_file_that_others_change_in_a_published_cache_ends_the_push(hub, repaired, is_removed):
    cache, other = repaired
    atcache.push(cache=cache, to=HERE, create="private")
    repository = hub.repositories["lab/maps"]
    shard = next(name for name in hub.files("lab/maps") if name.startswith("views/status/c/0/1"))

    def change():
        tree = dict(repository.commits[repository.heads["main"]])
        tree[shard] = hub.keep(b"of\0another", is_lfs=True)
        if is_removed:
            del tree[shard]
        hub.add_commit(repository, "main", tree, "by another")

    hub.meanwhile = [change]
    with pytest.raises(
        CacheMismatchError, match=rf"has put or removed {shard} there during this push, so .* was not published"
    ):
        atcache.push(cache=other, to=HERE)
    assert repository.messages[-1] == "by another"


def test_each_commit_of_the_push_of_a_repaired_cache_is_whole(hub, repaired, tmp_path, monkeypatch):
    cache, other = repaired
    monkeypatch.setattr(pushing, "_FILES_A_COMMIT", 5)
    pushed = atcache.push(cache=cache, to=HERE, create="private")
    repository, before = hub.repositories["lab/maps"], len(hub.repositories["lab/maps"].commits)
    again = atcache.push(cache=other, to=HERE)
    assert again.num_sent == 25, "12 shards, 12 records and the totals"
    later = list(repository.commits)[before:]
    assert later
    for commit in later:
        assert not atcache.verify(cache=f"{HERE}@{commit}", all=True).problems
    atcache.pull(cache=HERE, out=tmp_path / "copy.zarr")
    assert differences(tmp_path / "copy.zarr", other) == []
    atcache.pull(cache=pushed.to, out=tmp_path / "old.zarr")
    assert differences(tmp_path / "old.zarr", cache) == []
