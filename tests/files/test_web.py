"""Web servers: redirects are followed once and checked, `Retry-After` is honoured, connections are kept."""

from __future__ import annotations

import os
import time
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import numpy as np
import pytest
from range_server import FolderServer

from atcache.errors import RemoteError
from atcache.files.location import parse_location
from atcache.files.ranges import file_exists, open_file, read_file
from atcache.files.remote import web
from atcache.files.remote.block_cache import BLOCK_NBYTES
from atcache.files.remote.web import Found, Web, WebError
from atcache.files.remote.web_times import expiry

FAR = 12 * BLOCK_NBYTES  # reads this far apart are requests of their own


@pytest.fixture(autouse=True)
def _close_what_this_process_opened():
    """In use, the fetch process ends with its connections. Some of these tests ask without it."""
    yield
    for connections in web._idle.values():
        for connection in connections:
            connection.close()
    web._idle.clear()
    web._not_before.clear()


@pytest.fixture
def hub(server, tmp_path):
    """A server that redirects to signed addresses of another one, which has the bytes."""
    with FolderServer(server.folder) as store:
        store.signed_only, store.tag = True, "store-"
        server.redirects_to = store
        yield server


def put(server, name: str, nbytes: int, seed: int = 0) -> bytes:
    data = np.random.default_rng(seed).bytes(nbytes)
    (server.folder / name).write_bytes(data)
    return data


def asked(server) -> list[tuple[str, str]]:
    return [(one.method, one.range) for one in server.log]


@pytest.mark.parametrize("says_linked", [True, False])
def test_a_redirect_is_followed_once(says_linked, hub):
    hub.says_linked = says_linked
    data = put(hub, "file", 84 * BLOCK_NBYTES)
    url = parse_location(f"{hub.url}/file")
    file = open_file(url)
    assert file.nbytes == len(data)
    for offset in range(0, len(data), FAR):
        assert file.pread(10, offset) == data[offset : offset + 10]
    # The hub is asked when the file is opened. If it did not say the size, so is the store, by its first byte.
    if says_linked:
        assert [method for method, _ in asked(hub)] == ["HEAD"]
    else:
        assert (asked(hub)[0], asked(hub.redirects_to)[0]) == (("HEAD", ""), ("GET", "bytes=0-0"))
        assert len(hub.log) == 1
    assert hub.redirects_to.num_bytes <= 7 * BLOCK_NBYTES + 1
    assert read_file(url) == data


def test_a_redirect_that_has_expired_is_asked_for_again(hub):
    data = put(hub, "file", 84 * BLOCK_NBYTES)
    hub.link_life_s = 2
    file = open_file(parse_location(f"{hub.url}/file"))
    assert file.pread(10, 0) == data[:10]
    assert len(hub.log) == 1
    time.sleep(3.5)  # the life counts from the answer, which a busy machine gives late
    hub.link_life_s = 600
    for offset in range(FAR, len(data), FAR):
        assert file.pread(10, offset) == data[offset : offset + 10]
    assert len(hub.log) == 2
    assert all(one.method == "GET" for one in hub.redirects_to.log)


def test_a_redirect_that_is_refused_early_is_asked_for_again_once(hub):
    data = put(hub, "file", 84 * BLOCK_NBYTES)
    file = open_file(parse_location(f"{hub.url}/file"))
    store = hub.redirects_to
    store.refusals = [(403, "")]
    assert file.pread(10, 0) == data[:10]
    assert [len(hub.log), len(store.log)] == [2, 2]
    store.refusals = [(403, "")] * 2
    with pytest.raises(
        RemoteError, match=r"file may not be read: the server refuses access \(403 Forbidden\)\. Web servers are"
    ):
        file.pread(10, FAR)
    assert [len(hub.log), len(store.log)] == [3, 4]


@pytest.mark.parametrize("says_linked", [True, False])
def test_a_file_that_changes_behind_a_redirect_is_noticed(says_linked, hub):
    hub.says_linked = says_linked
    put(hub, "file", 84 * BLOCK_NBYTES)
    file = open_file(parse_location(f"{hub.url}/file"))
    file.pread(10, 0)
    new = put(hub, "file", 84 * BLOCK_NBYTES, seed=1)
    with pytest.raises(RemoteError, match=r"file has changed since it was opened"):
        file.pread(10, FAR)
    opened = open_file(parse_location(f"{hub.url}/file"))
    assert opened.version != file.version
    assert opened.pread(10, 2 * FAR) == new[2 * FAR : 2 * FAR + 10]


def test_forked_processes_find_a_redirect_of_their_own(hub):
    data = put(hub, "file", 84 * BLOCK_NBYTES)
    file = open_file(parse_location(f"{hub.url}/file"))
    assert file.pread(10, 0) == data[:10]
    child = os.fork()
    if child == 0:
        try:
            found = [file.pread(10, offset) == data[offset : offset + 10] for offset in range(FAR, len(data), FAR)]
            os._exit(0 if all(found) else 1)
        finally:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert len(hub.log) == 2


def test_other_hosts_get_no_credentials(hub):
    data = put(hub, "file", 100)
    asker = Web(hub.url, {"Authorization": "Bearer secret"})
    found = asker.head("file")
    assert asker.get("file", 10, 20, found) == data[10:20]
    assert {one.authorization for one in hub.log} == {"Bearer secret"}
    assert {one.authorization for one in hub.redirects_to.log} == {None}


@pytest.mark.parametrize("asks_first", ["HEAD", "GET"])
def test_several_redirects_are_followed_to_the_end(asks_first, server, tmp_path):
    data = put(server, "file", 100)
    with FolderServer(server.folder) as middle, FolderServer(server.folder) as store:
        server.redirects_to, middle.redirects_to, middle.says_linked, store.tag = middle, store, False, "store-"
        found = Found(100, server.entity_tag(server.folder / "file"))
        asker = Web(server.url, {})
        if asks_first == "HEAD":
            assert asker.head("file") == found
        for start in (0, 10, 20):
            assert asker.get("file", start, start + 10, found) == data[start : start + 10]
        # Each redirect is followed once.
        assert asked(server) == [("HEAD", "") if asks_first == "HEAD" else ("GET", "bytes=0-9")]
        assert asked(middle) == [("GET", "bytes=0-9")]
        assert len(store.log) == 3
        store.refusals = [(403, "")]
        assert asker.get("file", 30, 40, found) == data[30:40]
        assert [len(server.log), len(middle.log), len(store.log)] == [2, 2, 5]


def test_only_so_many_redirects_are_remembered(hub, monkeypatch):
    monkeypatch.setattr("atcache.files.remote.web._MAX_TARGETS", 2)
    asker = Web(hub.url, {})
    for name in "abc":
        put(hub, name, 10)
        asker.head(name)
    assert list(asker._targets) == ["b", "c"]
    assert asker.head("a").size == 10


@pytest.mark.parametrize(
    ("query", "life_s"),
    [
        ("X-Amz-Expires=60", 300),
        ("X-Amz-Date=20260101T000000Z&X-Amz-Expires=1e999", 300),
        ("X-Amz-Date=20260101T000000Z&X-Amz-Expires=99999999999999999999", 1e20),
        ("X-Amz-Date=20260101T000100Z&X-Amz-Expires=60", 120),
        ("X-Goog-Date=soon&X-Goog-Expires=60&Expires=1767225700", 100),
        ("se=2026-01-01T00%3A10%3A00Z", 600),
        ("se=2026-01-01T00:10:00", 600),
        ("se=2026-01-01T01:10:00%2B01:00", 600),
        (f"X-Amz-Date=20260101T000000Z&X-Amz-Expires={'9' * 400}", 300),
        ("se=never&Expires=x", 300),
    ],
)
@pytest.mark.parametrize("zone", ["UTC", "Asia/Tokyo"])
def test_a_signed_address_says_how_long_it_lives(zone, query, life_s, monkeypatch):
    now = datetime(2026, 1, 1, tzinfo=UTC).timestamp()
    monkeypatch.setenv("TZ", zone)
    time.tzset()
    monkeypatch.setattr("atcache.files.remote.web_times.time.time", lambda: now)
    try:
        until = expiry(f"https://host/file?{query}", "no-cache")
        assert until == pytest.approx(now + life_s - min(30, life_s / 10), rel=1e-12)
        assert expiry(f"https://host/file?{query}", "private, max-age=10") == now + 9
    finally:
        monkeypatch.undo()
        time.tzset()


def test_empty_and_missing_files_behind_a_redirect(hub):
    hub.says_linked = False
    put(hub, "empty", 0)
    assert open_file(parse_location(f"{hub.url}/empty")).nbytes == 0
    assert not file_exists(parse_location(f"{hub.url}/other"))


def test_a_redirect_in_a_circle_is_refused(server):
    put(server, "file", 10)
    server.redirects_to, server.says_linked = server, False
    with pytest.raises(RemoteError, match=r"file cannot be read: its server answered 302"):
        open_file(parse_location(f"{server.url}/file"))


@pytest.mark.parametrize("status", [429, 503])
def test_a_server_that_asks_for_time_gets_it_from_all_threads(status, server):
    data = put(server, "file", 84 * BLOCK_NBYTES)
    file = open_file(parse_location(f"{server.url}/file"))
    server.refusals = [(status, "1")]
    start = len(server.log)
    for offset in (0, FAR, 2 * FAR, 3 * FAR):
        file.expect(10, offset)
        time.sleep(0.05)  # so that the first one is refused before the others are asked
    for offset in (0, FAR, 2 * FAR, 3 * FAR):
        assert file.pread(10, offset) == data[offset : offset + 10]
    refused, *others = server.log[start:]
    assert len(others) == 4
    assert min(one.when_s for one in others) >= refused.when_s + 1


def test_a_long_wait_is_said_and_has_a_limit(server, capsys, monkeypatch):
    monkeypatch.setattr("atcache.files.remote.web._MAX_WAIT_S", 0.2)
    monkeypatch.setattr("atcache.files.remote.web._SILENT_WAIT_S", 0.1)
    data = put(server, "file", 10)
    server.refusals = [(429, "3600"), (503, format_datetime(datetime.now(UTC) + timedelta(hours=1), usegmt=True))]
    start_s = time.monotonic()
    assert Web(server.url, {}).read("file", 10) == data
    assert time.monotonic() - start_s >= 0.4
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith(f"atcache: {server.url}: its server answered 503 Service Unavailable, and asks to wait 3")
    assert (
        second == f"atcache: {server.url}: its server answered 429 Too Many Requests, and asks to wait 3600 s. Waiting."
    )


def test_a_server_that_refuses_for_ever_is_given_up(server, monkeypatch):
    monkeypatch.setattr("atcache.files.remote.web._PATIENCE_S", 0.5)
    put(server, "file", 10)
    server.refusals = [(429, "0")] * 10_000
    with pytest.raises(WebError, match="its server answered 429 Too Many Requests"):
        Web(server.url, {}).read("file", 10)
    assert len(server.log) <= 6 + web._MAX_FAILURES  # it asks for no time at all, but gets more each time


def test_failures_that_pass_are_not_seen(server):
    data = put(server, "file", 10)
    server.refusals = [(500, ""), (502, ""), (503, "")]
    assert Web(server.url, {}).read("file", 10) == data
    assert len(server.log) == 4


def test_what_a_server_sends_is_bounded_and_checked(server):
    put(server, "file", 3 * 2**20)
    asker = Web(server.url, {})
    found = asker.head("file")
    with pytest.raises(WebError, match="its server sends 3145728 bytes, expected at most 1000"):
        asker.read("file", 1000)
    server.fault = "ignore-ranges"
    with pytest.raises(WebError) as caught:
        asker.get("file", 0, 10, found)
    assert caught.value.kind == "no ranges"
    server.fault = ""
    with pytest.raises(WebError) as caught:
        asker.get("file", 0, 10, Found(found.size, '"another"'))
    assert caught.value.kind == "changed"


def test_a_proxy_of_the_environment_is_used(server, monkeypatch):
    data = put(server, "file", 100)
    monkeypatch.setenv("http_proxy", server.url)  # which takes the path of a whole address for its own
    monkeypatch.setenv("no_proxy", "")
    asker, before = Web("http://data.example.org", {}), web._proxy.cache_info().currsize
    assert asker.read("file", 100) == data
    put(server, "other", 100)
    asker.read("other", 100)
    assert web._proxy.cache_info().currsize == before + 1  # one for a server, not for an address
