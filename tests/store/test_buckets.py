"""What the store writes into a bucket: the same bytes, whoever else writes there, and whatever is left of the dead."""

from __future__ import annotations

import json
import random
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import obstore
import pytest
from made_store import LAYOUT, all_bytes, build, make_index, write_task
from s3_servers import Server, faulty_proxy, moto_server, rclone_server, reached, restart_fetching

from atcache.errors import CacheMismatchError, CacheMissError, ConfigError, NotWritableError, RemoteError
from atcache.files.location import parse_location
from atcache.files.ranges import list_files, open_file, read_file
from atcache.files.remote import putting
from atcache.files.spool import Spool, sweep_spools
from atcache.store import bucket, records
from atcache.store.bucket import Piece, check_can_begin, put_together
from atcache.store.committed import check_commits
from atcache.store.layout import Status
from atcache.store.manifest import delete_commits, read_commit
from atcache.store.reader import CacheReader
from atcache.store.writer import TaskWriter, create_cache, encode_pixels, encode_view, finish_cache

JOINED = replace(LAYOUT, records_per_file=2)


@pytest.fixture(scope="module")
def moto():
    with moto_server() as server:
        server.make_bucket("bucket")
        yield server


@pytest.fixture
def url(moto, tmp_path, monkeypatch):
    """A place in a bucket for a cache. Other writers are waited for only briefly."""
    monkeypatch.setenv("ATCACHE_BLOCKS_DIR", str(tmp_path / "blocks"))
    monkeypatch.setenv("ATCACHE_BLOCKS_GIB", "0.05")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(bucket, "SECONDS_FOR_A_RIVAL", 0.3)
    with reached(moto):
        yield parse_location(f"s3://bucket/{tmp_path.name}/cache.zarr")


def objects(moto, url):
    return moto.objects("bucket", url.key)


def local_bytes(folder):
    return {name.as_posix(): data for name, data in all_bytes(folder).items()}


def make_empty(url, layout=LAYOUT, attributes=None):
    create_cache(url, layout, attributes or {"teacher": "tiny"}, make_index(layout.num_samples), {})


def write_other_bytes(url, task, number, layout=LAYOUT):
    """Write a task as another GPU would: the same views with other codes."""
    rng = np.random.default_rng(number)
    codes_LTC = rng.integers(-9, 9, LAYOUT.codes.shape[2:]).astype(LAYOUT.codes_dtype)
    pixels_HWC = rng.integers(0, 255, (6, 7, 3)).astype(np.uint8)
    writer = TaskWriter(url, layout, task)
    for sample in range(task.start, task.stop):
        chunks, pixels = encode_view(LAYOUT, codes_LTC), encode_pixels(LAYOUT, pixels_HWC)
        writer.add(sample, status=Status.STORED, pixel_hash=number, chunks=chunks, pixels_chunk=pixels)
    return writer.commit()


def deep_problems(url):
    from atcache.store.manifest import check_commit

    return [
        problem
        for checked in check_commits(url, LAYOUT).values()
        for problem in check_commit(url, checked.commit, LAYOUT, deep=True)
    ]


def test_a_cache_in_a_bucket_is_the_local_one_byte_for_byte(url, moto, pristine, tmp_path):
    build(url)
    assert objects(moto, url) == local_bytes(pristine)
    assert not list(tmp_path.glob("atcache-spool-*")), "nothing stays on the way"
    reader = CacheReader(url)
    assert reader.is_complete
    np.testing.assert_array_equal(reader.read_codes(1, 9), CacheReader(pristine).read_codes(1, 9))
    before = obstore.head(moto.store("bucket"), f"{url.key}/zarr.json")
    finish_cache(url)
    assert obstore.head(moto.store("bucket"), f"{url.key}/zarr.json") == before, "finishing again puts nothing"


def test_zarr_python_reads_the_result_from_the_bucket(url, moto, pristine):
    import zarr
    from zarr.storage import ObjectStore

    build(url)
    group = zarr.open_group(ObjectStore(moto.store("bucket"), read_only=True), path=url.key, mode="r")
    local = zarr.open_group(pristine, mode="r")
    np.testing.assert_array_equal(group["attention/codes"][:], local["attention/codes"][:])
    np.testing.assert_array_equal(group["samples/key"][:], local["samples/key"][:])


def test_a_cache_that_is_there_is_not_created_again_and_missing_tasks_are_named(url, moto):
    make_empty(url)
    before = objects(moto, url)
    with pytest.raises(CacheMismatchError, match=r"s3://bucket/.*cache.zarr exists already"):
        make_empty(url, attributes={"teacher": "other"})
    make_empty(url)  # the same
    write_task(url, LAYOUT, LAYOUT.tasks()[0])
    with pytest.raises(CacheMissError, match=r"lacks 5 of 6 tasks, the first is v0000-b000001"):
        finish_cache(url)
    assert {name: data for name, data in objects(moto, url).items() if name in before} == before


def test_a_creation_that_was_stopped_does_not_open_and_is_replaced(url, moto):
    make_empty(url, attributes={"teacher": "other"})
    store = moto.store("bucket")
    obstore.delete(store, f"{url.key}/zarr.json")
    obstore.put(store, f"{url.key}/samples/zarr.json", b"of other images")
    with pytest.raises(CacheMissError):
        CacheReader(url)
    check_can_begin(url)
    make_empty(url)
    assert CacheReader(url).attributes["teacher"] == "tiny"
    assert CacheReader(url).samples.num_samples == LAYOUT.num_samples


def test_the_rest_of_a_deleted_cache_is_not_taken_over(url, moto):
    """Its records would vouch for its shards as tasks of the new cache."""
    build(url)
    check_can_begin(url)  # another build has just made it
    obstore.delete(moto.store("bucket"), f"{url.key}/zarr.json")
    before, sentence = objects(moto, url), r"only partly deleted.* there is .*commits/v0000-b000000.json. Delete all"
    with pytest.raises(ConfigError, match=sentence):
        check_can_begin(url)
    with pytest.raises(ConfigError, match=sentence):
        make_empty(url, attributes={"teacher": "other"})
    assert objects(moto, url) == before


def stop_a_creation(moto, url):
    """Create a cache of another teacher, with state and bias of its own, but for its last object, which is returned."""
    state = {"old": np.ones((3, 2), np.float32)}
    layout = replace(LAYOUT, num_samples=12, part_stops=(4, 8, 12))
    create_cache(url, layout, {"teacher": "other"}, make_index(12), state, np.ones((4, 2, 5, 5), np.float32))
    root = objects(moto, url)["zarr.json"]
    obstore.delete(moto.store("bucket"), f"{url.key}/zarr.json")
    return root


def test_state_and_bias_of_a_creation_that_was_stopped_do_not_get_into_the_next_cache(url, moto, tmp_path):
    stop_a_creation(moto, url)
    obstore.put(moto.store("bucket"), f"{url.key}/samples/holiday.jpg", b"of somebody else")
    check_can_begin(url)
    layout, state = replace(LAYOUT, pixels=None), {"new": np.zeros(2, np.float32)}
    for path in (url, tmp_path / "local.zarr"):
        create_cache(path, layout, {"teacher": "tiny"}, make_index(10), state)
        for task in layout.tasks():
            write_task(path, layout, task)
        finish_cache(path)
    reader = CacheReader(url)
    assert (list(reader.state), reader.bias_LHQK) == (["new"], None)
    found = objects(moto, url)
    assert found.pop("samples/holiday.jpg") == b"of somebody else"
    assert found == local_bytes(tmp_path / "local.zarr")


def test_a_creation_that_is_still_at_work_keeps_its_state(url, moto, monkeypatch):
    root = stop_a_creation(moto, url)
    before = objects(moto, url)
    monkeypatch.setattr(bucket, "SECONDS_FOR_A_RIVAL", 60.0)
    with ThreadPoolExecutor(1) as threads:
        second = threads.submit(make_empty, url)
        time.sleep(1)
        assert not second.done()
        obstore.put(moto.store("bucket"), f"{url.key}/zarr.json", root)
        with pytest.raises(CacheMismatchError, match="exists already"):
            second.result()
    assert objects(moto, url) == {**before, "zarr.json": root}


def test_the_second_writer_of_a_task_takes_what_the_first_has_committed(url, moto):
    make_empty(url)
    task = LAYOUT.tasks()[0]
    first = write_other_bytes(url, task, 1)
    before = objects(moto, url)
    assert write_other_bytes(url, task, 2) == first
    assert objects(moto, url) == before


def test_shards_of_a_dead_writer_are_taken_if_equal_and_replaced_if_not(url, moto, monkeypatch):
    make_empty(url)
    task = LAYOUT.tasks()[0]
    write_other_bytes(url, task, 1)
    store, record = moto.store("bucket"), f"{url.key}/commits/{task.name}.json"
    obstore.delete(store, record)  # as if killed just before
    # Equal bytes need no waiting: that would last longer than a test may.
    monkeypatch.setattr(bucket, "SECONDS_FOR_A_RIVAL", 10_000.0)
    before = objects(moto, url)
    write_other_bytes(url, task, 1)
    assert before.items() <= objects(moto, url).items()
    obstore.delete(store, record)
    monkeypatch.setattr(bucket, "SECONDS_FOR_A_RIVAL", 0.3)
    write_other_bytes(url, task, 2)
    assert deep_problems(url) == []
    assert objects(moto, url)[LAYOUT.codes.shard_file(task)] != before[LAYOUT.codes.shard_file(task)]


@pytest.mark.parametrize("number", [1, 2])
def test_a_late_writer_leaves_a_task_whose_record_was_joined(url, moto, number):
    make_empty(url, JOINED)
    commits = [write_other_bytes(url, task, 1, JOINED) for task in JOINED.tasks()]
    finish_cache(url)
    before = objects(moto, url)
    assert sorted(name for name in before if name.startswith("commits/v")) == [
        "commits/v0000-b000000-b000001.jsonl",
        "commits/v0000-b000002.json",
        "commits/v0001-b000000-b000001.jsonl",
        "commits/v0001-b000002.json",
    ]
    for commit in commits[:2]:  # the others' records are where they are looked for anyway
        assert write_other_bytes(url, commit.task, number, JOINED) == commit
    assert objects(moto, url) == before
    task = JOINED.tasks()[1]
    assert delete_commits(url, [task.name]) == [task.name]
    assert write_other_bytes(url, task, 2, JOINED) == read_commit(url, task.name)
    assert deep_problems(url) == []


def test_a_record_that_is_replaced_while_it_is_joined_is_joined_again(url, moto, monkeypatch):
    make_empty(url, JOINED)
    for task in JOINED.tasks():
        write_other_bytes(url, task, 1, JOINED)
    store, single = moto.store("bucket"), f"{url.key}/commits/{JOINED.tasks()[0].name}.json"
    record, write = json.loads(obstore.get(store, single).bytes().to_bytes()), records._write
    replaced = json.dumps({**record, "num_bad": 1}).encode()

    def write_while_a_rival_replaces(path, file, values):
        write(path, file, values)
        if values[0] == record:
            obstore.put(store, single, replaced)

    monkeypatch.setattr(records, "_write", write_while_a_rival_replaces)
    records.join_records(url, JOINED)
    left = objects(moto, url)
    assert not any(name.endswith("b000000.json") for name in left)
    assert json.loads(left["commits/v0000-b000000-b000001.jsonl"].split(b"\n")[0])["num_bad"] == 1


def test_a_slow_living_writer_is_waited_for_and_wins(url, moto, monkeypatch):
    make_empty(url)
    task = LAYOUT.tasks()[0]
    first = write_other_bytes(url, task, 1)
    whole, record = objects(moto, url), f"commits/{task.name}.json"
    obstore.delete(moto.store("bucket"), f"{url.key}/{record}")
    monkeypatch.setattr(bucket, "SECONDS_FOR_A_RIVAL", 60.0)
    with ThreadPoolExecutor(1) as threads:
        second = threads.submit(write_other_bytes, url, task, 2)
        time.sleep(1)
        assert not second.done()
        obstore.put(moto.store("bucket"), f"{url.key}/{record}", whole[record])
        assert second.result() == first
    assert objects(moto, url) == whole


@pytest.mark.parametrize("seed", range(4))
def test_rivals_that_meet_at_any_step_leave_a_record_of_what_is_there(url, moto, seed, tmp_path, monkeypatch):
    """Three impatient writers of the same names with other bytes, over a connection that delays and loses answers."""
    monkeypatch.setattr(bucket, "SECONDS_FOR_A_RIVAL", 0.05)
    monkeypatch.setattr(bucket, "_MOST_ROUNDS", 50)
    moments = random.Random(seed)

    def write(number, pause_s):
        time.sleep(pause_s)
        with Spool() as spool:
            data = [f"{number} {piece}".encode() * (4 - piece) for piece in range(3)]
            names = [f"shard{piece}" for piece in range(3)]
            pieces = [Piece.of(name, spool.write(name, text)) for name, text in zip(names, data, strict=True)]
            last = json.dumps({piece.name: piece.crc32 for piece in pieces}).encode()
            put_together(url, pieces, Piece.of("record", spool.write("record", last)))

    with faulty_proxy(moto, seed=seed, faults=0.15, delay_ms=5) as proxy, reached(proxy), ThreadPoolExecutor(3) as pool:
        list(pool.map(write, range(3), [moments.uniform(0, 0.5) for _ in range(3)]))
    left = objects(moto, url)
    assert left.keys() == {"record", "shard0", "shard1", "shard2"}
    for name, crc32 in json.loads(left["record"]).items():
        assert zlib.crc32(left[name]) == crc32


def test_a_store_without_if_match_replaces_what_the_dead_left_all_the_same(url, moto, caplog):
    with faulty_proxy(moto, lacks="If-Match") as proxy, reached(proxy):
        make_empty(url)
        task = LAYOUT.tasks()[0]
        write_other_bytes(url, task, 1)
        obstore.delete(moto.store("bucket"), f"{url.key}/commits/{task.name}.json")
        write_other_bytes(url, task, 2)
        assert deep_problems(url) == []
        for task in LAYOUT.tasks()[1:]:
            write_task(url, LAYOUT, task)
        finish_cache(url)
        assert CacheReader(url).is_complete
    assert "ignores conditions of requests (If-Match)" in caplog.text


def test_a_key_that_may_not_list_is_refused_at_once_with_what_it_lacks(url, moto):
    """S3 answers 403 to a look at an object that is not there, if the key may not list."""
    with faulty_proxy(moto, deny="GET") as proxy, reached(proxy):
        with pytest.raises(NotWritableError, match=r"may not be read.*list, read, put and delete.*s3:ListBucket"):
            check_can_begin(url)
        with pytest.raises(NotWritableError, match=r"s3:ListBucket"):
            make_empty(url)
        assert proxy.counts()["GET"] == 2, "no refusal is tried again"


def test_an_upload_that_takes_longer_than_the_patience_is_tried_again(monkeypatch):
    monkeypatch.setattr(putting, "_LONG_TRY_S", 0.01)
    tries = []

    def upload():
        time.sleep(0.3)
        tries.append(1)
        if len(tries) < 3:
            raise RemoteError("the connection was dropped.")
        return "stored"

    assert putting.patiently(upload, 0.8) == "stored"
    with pytest.raises(NotWritableError, match="dropped"):
        putting.patiently(lambda: tries.clear() or upload(), 0.8)


def test_places_where_no_cache_can_be_written_are_refused_in_a_sentence(url, moto):
    with pytest.raises(NotWritableError, match=r"there is no bucket s3://nowhere. Make it, or give another --out"):
        check_can_begin(parse_location("s3://nowhere/cache.zarr"))
    obstore.put(moto.store("bucket"), f"{url.key}/holiday.jpg", b"")
    with pytest.raises(ConfigError, match=r"is not a cache and not empty: there is s3://bucket/.*/holiday.jpg"):
        check_can_begin(url)


def test_what_killed_processes_left_on_their_way_is_swept_and_what_is_used_is_not(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with Spool() as used:
        used.write("a/b", b"1")
        (tmp_path / "atcache-spool-dead").mkdir()
        (tmp_path / "atcache-spool-dead" / "shard").write_bytes(b"2")
        (tmp_path / "atcache-spool-link").symlink_to(used.path)
        assert sweep_spools() == 1
        assert (used.path / "a/b").read_bytes() == b"1"
        assert list_files(used.path) == ["a/b"], "what is locked is not put with the others"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["atcache-spool-link"]


def test_parts_are_read_from_a_server_that_answers_them_in_a_way_of_its_own(tmp_path, monkeypatch, capfd):
    """`rclone serve s3` sends the right part with the status of a whole file, which obstore does not take."""
    monkeypatch.setenv("ATCACHE_BLOCKS_DIR", str(tmp_path / "blocks"))
    monkeypatch.setenv("ATCACHE_BLOCKS_GIB", "0.05")
    content = random.Random(0).randbytes(5_000_000)
    (tmp_path / "served/bucket").mkdir(parents=True)
    (tmp_path / "served/bucket/file").write_bytes(content)
    with rclone_server(tmp_path / "served") as server, reached(server):
        file = open_file(parse_location("s3://bucket/file"))
        for offset, nbytes in ((0, 10), (4_999_000, 1_000), (2_000_000, 700_000), (1_000_000, 1)):
            assert file.pread(nbytes, offset) == content[offset : offset + nbytes]
    assert capfd.readouterr().err.count("does not answer requests for parts of files as S3 does") == 1


def test_a_slow_connection_has_time_for_what_is_read(tmp_path, monkeypatch):
    """obstore by itself gives up after 30 seconds, however much was asked for."""
    monkeypatch.setenv("ATCACHE_BLOCKS_DIR", str(tmp_path / "blocks"))
    monkeypatch.setenv("ATCACHE_BLOCKS_GIB", "0.05")
    content = random.Random(0).randbytes(100_000)
    with a_slow_bucket(content, seconds=33) as server, reached(server), ThreadPoolExecutor(2) as pool:
        place = parse_location("s3://bucket/file")
        whole, part = pool.submit(read_file, place), pool.submit(lambda: open_file(place).pread(10, 500))
        assert (whole.result(), part.result()) == (content, content[500:510])


@contextmanager
def a_slow_bucket(content, seconds):
    """An S3 server with one file, which sends each body in this time."""

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args):
            """Say nothing."""

        def do_GET(self):
            start, _, stop = (
                self.headers.get("Range", f"bytes=0-{len(content) - 1}").removeprefix("bytes=").partition("-")
            )
            body = content[int(start) : int(stop) + 1]
            self.send_response(206 if "Range" in self.headers else 200)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Content-Range", f"bytes {start}-{stop}/{len(content)}")
            self.send_header("ETag", '"1"')
            self.send_header("Last-Modified", "Wed, 21 Oct 2015 07:28:00 GMT")
            self.end_headers()
            if self.command == "GET":
                for piece in range(10):
                    time.sleep(seconds / 10)
                    self.wfile.write(body[len(body) * piece // 10 : len(body) * (piece + 1) // 10])

        do_HEAD = do_GET

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield Server(server.server_port, None)
        server.shutdown()


def test_a_store_that_nobody_answers_for_is_named_with_what_to_look_at(moto):
    """`AWS_ALLOW_HTTP` is easily forgotten, and obstore's own words are "builder error"."""
    advice = r"http://127\.0\.0\.1:9 was asked: check the network and AWS_ENDPOINT_URL, and set AWS_ALLOW_HTTP=true\."
    with reached(moto), pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
        patch.delenv("AWS_ALLOW_HTTP")
        restart_fetching()
        with pytest.raises(RemoteError, match=advice):
            read_file(parse_location("s3://bucket/file"))
