"""`atcache view` over real HTTP: parts of files, what is served and what is not, who may ask, and how it ends."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import numpy as np
import pytest
from PIL import Image
from range_server import FolderServer
from s3_servers import moto_server
from viewing import parse_answer, start_viewing, viewing

import atcache
from atcache.errors import AtcacheError

CODES = "attention/codes/c/0/0/0/0/0"
SHARD = f"caches/0/{CODES}"


@pytest.fixture(scope="module")
def cache(tiny_cache):
    return tiny_cache(views=2)


@pytest.fixture(scope="module")
def served(cache):
    with viewing(cache) as served:
        yield served


@pytest.fixture(scope="module")
def shard(cache):
    return (cache / CODES).read_bytes()


def error_of(answer):
    assert answer.headers["content-type"] == "application/json"
    return json.loads(answer.body)["error"]


@pytest.mark.parametrize(
    ("asked", "start", "stop"), [("0-99", 0, 100), ("100-", 100, None), ("-20", -20, None), ("5-5", 5, 6)]
)
def test_a_range_is_answered_with_these_bytes(served, shard, asked, start, stop):
    answer = served.get(SHARD, Range=f"bytes={asked}")
    expected = shard[start:stop]
    assert (answer.status, answer.body) == (206, expected)
    first = shard.index(expected) if start >= 0 else len(shard) + start
    assert answer.headers["content-range"] == f"bytes {first}-{first + len(expected) - 1}/{len(shard)}"
    assert answer.headers["content-length"] == str(len(expected))


def test_a_range_beyond_the_end_is_cut_and_one_behind_it_is_refused(served, shard):
    answer = served.get(SHARD, Range=f"bytes=10-{len(shard) + 50}")
    assert (answer.status, answer.body) == (206, shard[10:])
    assert served.get(SHARD, Range=f"bytes=-{len(shard) * 2}").body == shard
    for asked in (f"{len(shard)}-", "-0"):
        answer = served.get(SHARD, Range=f"bytes={asked}")
        assert (answer.status, answer.headers["content-range"]) == (416, f"bytes */{len(shard)}")


@pytest.mark.parametrize("asked", ["bytes=9-2", "bytes=a-b", "bytes=-", "items=0-1", "bytes=0-1,4-5"])
def test_what_is_not_one_range_gets_the_whole_file(served, shard, asked):
    answer = served.get(SHARD, Range=asked)
    assert (answer.status, answer.body) == (200, shard)


def test_head_says_what_get_would_without_a_body(served, shard):
    answer = served.get(SHARD, method="HEAD")
    assert (answer.status, answer.body, answer.headers["content-length"]) == (200, b"", str(len(shard)))
    for asked in ("bytes=-4", f"bytes={len(shard)}-"):  # only GET has ranges
        whole = served.get(SHARD, method="HEAD", Range=asked)
        assert (whole.status, whole.body, whole.headers["content-length"]) == (200, b"", str(len(shard)))
        assert "content-range" not in whole.headers
    assert served.get("caches/0/none", method="HEAD")[0] == 404


def test_conditions_hold_while_a_file_stays_as_it_is(served, shard):
    tag = served.get(SHARD).headers["etag"]
    assert served.get(SHARD, If_Range=tag, Range="bytes=0-3").status == 206
    assert served.get(SHARD, If_Range='"other"', Range="bytes=0-3").body == shard
    assert served.get(SHARD, If_None_Match=f'"other", W/{tag}').status == 304
    assert served.get(SHARD, If_Match='"other"').status == 412
    assert served.get(SHARD, If_Match=tag).status == 200


def test_a_browser_keeps_no_part_of_a_cache_and_asks_again_for_the_rest(served):
    assert served.get(SHARD).headers["cache-control"] == "no-store"
    assert served.get("caches/0/none").headers["cache-control"] == "no-store"
    assert served.get("index.html").headers["cache-control"] == "no-cache"
    assert served.get("images/0/3").headers["cache-control"] == "no-cache"


def test_the_page_comes_with_a_policy_that_names_no_other_server(served):
    answer = served.get("")
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    policy = answer.headers["content-security-policy"]
    assert policy.startswith("default-src 'self'; ")
    assert "http" not in policy
    assert answer.body == served.get("index.html").body
    assert {served.get(path).headers["x-content-type-options"] for path in ("", SHARD, "none")} == {"nosniff"}


def test_site_names_the_caches_and_their_places(served, cache):
    about = json.loads(served.get("site.json").body)
    place = {"name": cache.name, "root": "caches/0/", "images": "images/0/", "views": "views/0/"}
    assert about == {"version": 1, "caches": [place]}
    assert json.loads(served.get("caches/0/zarr.json").body)["attributes"]["atcache"]["format"] == 1


def test_every_array_of_the_cache_can_be_read(served, cache):
    files = [path.relative_to(cache).as_posix() for path in cache.rglob("*") if path.is_file()]
    wanted = [name for name in files if not name.startswith("commits/v")]
    assert len(wanted) > 30
    for name in wanted:
        assert served.get(f"caches/0/{name}").body == (cache / name).read_bytes(), name


@pytest.mark.parametrize(
    "path",
    [
        "",
        "attention",
        "attention/codes/c/0/0",
        "commits/v0000-b000000.json",
        f"../{'x' * 300}",
        "attention/codes/c/0/0/0/0/99999999999",
        f"attention/{'c' * 300}/zarr.json",
    ],
)
def test_folders_records_and_unknown_names_are_not_served(served, path):
    assert served.get(f"caches/0/{path}").status in (400, 404)


def test_locks_and_temp_files_are_not_served(cache, tmp_path):
    copy = shutil.copytree(cache, tmp_path / "copy.zarr")
    hidden = [".zarr.json.0123456789abcdef.partial", ".lock", "notes.txt", "attention/codes/c/0/0/0/0/.0.partial"]
    for name in hidden:
        (copy / name).write_text("secret")
    with viewing(copy) as served:
        assert [served.get(f"caches/0/{name}").status for name in hidden] == [404] * len(hidden)


@pytest.mark.parametrize(
    "target",
    [
        "/caches/0/../../../../etc/passwd",
        "/caches/0/%2e%2e/%2e%2e/etc/passwd",
        "/caches/0/..%2f..%2fetc%2fpasswd",
        "/caches/0/%2e%2e%5c%2e%2e%5cetc",
        "/caches/0/..\\..\\etc",
        "/caches/0//etc/passwd",
        "//etc/passwd",
        "/caches/0/zarr.json%00.png",
        "/caches/0/%ff",
        "/%2e%2e/%2e%2e/etc/passwd",
        "/assets/../../config.py",
        "/images/0/../../zarr.json",
        "http://127.0.0.1/caches/0/zarr.json",
        "/caches/-1/zarr.json",
        "/caches/1/zarr.json",
        "/caches/99999999999999999999/zarr.json",
        "/caches/0000001/zarr.json",
        "/images/0/-1",
        "/views/0/0/../0.png",
    ],
)
def test_no_path_leads_out_of_the_site(served, target):
    answer = served.ask(target)
    assert answer.status in (400, 404)
    assert "root:" not in error_of(answer)


def test_links_and_pipes_in_a_cache_lead_nowhere(cache, tmp_path):
    copy = shutil.copytree(cache, tmp_path / "copy.zarr")
    secret = tmp_path / "secret"
    secret.write_text("secret")
    (copy / "views/status/c/0/0").unlink()
    (copy / "views/status/c/0/0").symlink_to(secret)
    (copy / "views/status/c/1/0").unlink()
    os.mkfifo(copy / "views/status/c/1/0")
    shutil.move(copy / "pixels" if (copy / "pixels").exists() else copy / "samples/key", tmp_path / "moved")
    (copy / "samples/key").symlink_to(tmp_path / "moved")
    (copy / "views/parameters/c/0/0/0").unlink()
    (copy / "views/parameters/c/0/0/0").symlink_to(copy / "views/parameters/c/0/0/0")
    inside = copy / "attention/codes/c/0/1/0/0/1"
    inside.symlink_to(copy / CODES)
    with viewing(copy) as served:
        for name in ("views/status/c/0/0", "views/status/c/1/0", "views/parameters/c/0/0/0", "samples/key/zarr.json"):
            assert served.get(f"caches/0/{name}").status == 404, name
        assert served.get("caches/0/attention/codes/c/0/1/0/0/1").status == 200  # a link within the cache
    with viewing(_linked(cache, tmp_path / "link.zarr")) as served:
        assert served.get(SHARD).status == 200  # the cache itself may be one


def _linked(cache, place):
    place.symlink_to(cache)
    return place


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:80", "127.0.0.1.evil.example", "", "10.0.0.1", "localhost.", "[::2]", "a b"]
)
def test_a_host_that_is_not_this_machine_is_refused(served, host):
    answer = served.get("site.json", Host=host)
    assert answer.status == 403
    assert "--host" in error_of(answer)


@pytest.mark.parametrize("host", ["localhost:9000", "LOCALHOST", "127.0.0.1", "[::1]:80"])
def test_this_machine_is_known_by_any_port_as_tunnels_change_it(served, host):
    assert served.get("site.json", Host=host).status == 200


def test_pages_of_this_machine_may_read_and_others_may_not(served):
    for origin in ("http://localhost:5173", "http://127.0.0.1:1", "http://[::1]:2"):
        answer = served.get(SHARD, Origin=origin)
        assert answer.headers["access-control-allow-origin"] == origin
        assert {"Content-Range", "Content-Length", "ETag"} <= set(
            answer.headers["access-control-expose-headers"].split(", ")
        )
    for origin in (
        "https://evil.example",
        "null",
        "http://localhost.evil.example",
        "http://evil.example/localhost",
        "http://[",
    ):
        answer = served.get(SHARD, Origin=origin)
        assert "access-control-allow-origin" not in answer.headers
        assert answer.headers["vary"] == "Origin"
        assert answer.headers["cross-origin-resource-policy"] == "same-origin"


def test_an_origin_that_is_named_may_read_and_asks_first(cache):
    with viewing(cache, "--allow-origin", "https://viewer.example.org") as served:
        answer = served.get(
            SHARD,
            method="OPTIONS",
            Origin="https://viewer.example.org",
            Access_Control_Request_Method="GET",
            Access_Control_Request_Headers="range",
        )
        assert (answer.status, answer.body) == (204, b"")
        assert answer.headers["access-control-allow-origin"] == "https://viewer.example.org"
        assert "Range" in answer.headers["access-control-allow-headers"]
        assert "access-control-allow-origin" not in served.get("", Origin="https://evil.example").headers


def test_with_a_host_only_those_who_know_the_token_are_answered(cache):
    with viewing(cache, "--host", "0.0.0.0") as served:
        token = served.address.rstrip("/").rpartition("/")[2]
        assert len(token) >= 20
        for target in (
            "/",
            "/site.json",
            f"/{token[:-1]}/site.json",
            f"/{token}x/site.json",
            "/images/0/0",
            "/%c3%a9/",
        ):
            assert served.ask(target).status == 404, target
        answer = served.ask(f"/{token}")
        assert (answer.status, answer.headers["location"]) == (301, f"/{token}/")
        for host in (f"{socket.gethostname()}:1", "127.0.0.1", "192.168.1.7:8642"):
            assert served.get("site.json", Host=host).status == 200, host
        assert served.get("site.json", Host="evil.example").status == 403
        answer = served.get(SHARD, Origin="https://viewer.example.org")
        assert answer.headers["access-control-allow-origin"] == "https://viewer.example.org"
        assert answer.headers["referrer-policy"] == "no-referrer"


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "TRACE"])
def test_only_reading_is_allowed(served, method):
    answer = served.get("site.json", method=method)
    assert (answer.status, answer.headers["allow"]) == (405, "GET, HEAD, OPTIONS")


def test_large_and_malformed_requests_are_refused(served):
    assert served.ask("/" + "a" * 5000).status == 400
    assert served.ask("/" + "a" * 70_000).status == 414
    assert served.ask("/", X="a" * 70_000).status == 431
    assert served.ask("/", body=b"x" * 10, Content_Length="10").status == 413
    assert served.ask("/", Transfer_Encoding="chunked").status == 413
    assert served.ask("nowhere").status == 400
    assert served.get(f"images/0/0?{'a=1&' * 20}").status == 400
    for bytes_ in (b"\r\n\r\n", b"GET\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n"):
        with socket.create_connection(("127.0.0.1", served.port), timeout=10) as connection:
            connection.sendall(bytes_)
            connection.shutdown(socket.SHUT_WR)
            assert parse_answer(b"".join(iter(lambda: connection.recv(4096), b""))).status in (0, 400, 505)
    assert served.get("site.json").status == 200


def test_one_connection_carries_many_requests(served):
    with socket.create_connection(("127.0.0.1", served.port), timeout=10) as connection:
        for _ in range(3):
            connection.sendall(f"HEAD /{SHARD} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
            assert parse_answer(connection.recv(4096)).status == 200


def test_clients_that_read_slowly_or_say_nothing_do_not_hold_up_others(served, shard):
    with ExitStack() as idle:
        address = ("127.0.0.1", served.port)
        connections = [idle.enter_context(socket.create_connection(address)) for _ in range(30)]
        for number, connection in enumerate(connections):
            end = "\r\n\r\n" if number % 2 else "\r\n"  # half of them never finish asking, the others never read
            connection.sendall(f"GET /{SHARD} HTTP/1.1\r\nHost: localhost{end}".encode())
        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(lambda _: served.get(SHARD), range(40)))
    assert {answer.body for answer in answers} == {shard}


def test_images_are_the_files_of_the_tar(served, cache):
    opened = atcache.open(cache)
    answer = served.get("images/0/5")
    assert answer.headers["content-type"] == "image/png"
    assert answer.body == opened.source.read_bytes(5)
    assert served.get("images/0/5", If_None_Match=answer.headers["etag"]).status == 304


def test_views_are_what_the_teacher_saw(served, cache):
    answer = served.get("views/0/1/5.png")
    assert answer.headers["content-type"] == "image/png"
    pixels_HWC = np.asarray(Image.open(io.BytesIO(answer.body)))
    assert np.array_equal(pixels_HWC, atcache.open(cache).image(5, view=1))


def test_thumbnails_are_small(served):
    for path in ("images/0/5?size=16", "views/0/1/5.png?size=16"):
        answer = served.get(path)
        assert answer.headers["content-type"] == "image/jpeg"
        assert max(Image.open(io.BytesIO(answer.body)).size) <= 16
    for size in ("0", "99999999999999", "0000169999999", "x", ""):
        assert served.get(f"images/0/5?size={size}").status == (200 if size == "" else 404)


def test_what_is_not_there_is_said_in_a_sentence(served, tiny_cache, digits_tars, tmp_path):
    assert "samples 0 to 47" in error_of(served.get("images/0/48"))
    assert "samples 0 to 47" in error_of(served.get("views/0/0/48.png"))
    assert "views 0 to 1" in error_of(served.get("views/0/2/0.png"))
    copy = shutil.copytree(tiny_cache(views=2), tmp_path / "copy.zarr")
    with viewing(copy, "--data", tmp_path) as moved:
        answer = moved.get("images/0/0")
        assert answer.status == 404
        assert str(tmp_path) in error_of(answer)
    with viewing(copy, "--data", digits_tars[0].parent) as moved:
        assert moved.get("images/0/0").status == 200


def test_a_view_that_cannot_be_replayed_exactly_is_not_shown(cache, tmp_path):
    index = atcache.open(cache).source.index
    for tar in index.tars:
        shutil.copy(tar, tmp_path)
    tar = tmp_path / index.tars[0].name
    tar.write_bytes(_with_other_pixels(tar.read_bytes(), int(index.offset_S[0]), int(index.nbytes_S[0])))
    with viewing(cache, "--data", tmp_path) as served:
        answer = served.get("views/0/0/0.png")
        assert answer.status == 409
        assert "differs from the one the teacher saw" in error_of(answer)


def _with_other_pixels(tar, offset, nbytes):
    """The tar with another PNG of the same length: its image turned upside down, and padded behind its end."""
    image = Image.open(io.BytesIO(tar[offset : offset + nbytes])).transpose(Image.Transpose.FLIP_TOP_BOTTOM)
    for level in range(9, 0, -1):
        encoded = io.BytesIO()
        image.save(encoded, format="PNG", compress_level=level)
        if len(encoded.getvalue()) <= nbytes:
            break
    data = encoded.getvalue()[:nbytes].ljust(nbytes, b"\0")
    return tar[:offset] + data + tar[offset + nbytes :]


def test_a_cache_that_is_deleted_says_so_and_the_server_lives_on(cache, tmp_path):
    copy = shutil.copytree(cache, tmp_path / "copy.zarr")
    with viewing(copy, cache) as served:
        assert served.get("images/0/0").status == 200
        shutil.rmtree(copy)
        time.sleep(2.1)  # the server looks every two seconds
        assert served.get(SHARD).status == 404
        assert "not there any more" in error_of(served.get("images/0/0"))
        assert served.get("images/1/0").status == 200
        assert served.stop() == 0


def test_a_file_that_is_replaced_changes_its_tag(cache, tmp_path):
    copy = shutil.copytree(cache, tmp_path / "copy.zarr")
    with viewing(copy) as served:
        tag = served.get(SHARD).headers["etag"]
        (copy / "new").write_bytes((copy / CODES).read_bytes()[::-1])
        (copy / "new").rename(copy / CODES)
        answer = served.get(SHARD, If_Match=tag)
        assert answer.status == 412
        assert served.get(SHARD).headers["etag"] != tag


def test_a_cache_that_grows_is_served_as_it_is_then(digits_build, tmp_path):
    from dataclasses import replace

    from atcache.pipelines.build.run import build

    build(replace(digits_build, views=1))
    with viewing(digits_build.out) as served:
        assert "view 1 is not in" in error_of(served.get("views/0/1/0.png"))
        build(replace(digits_build, views=2, grow=True))
        time.sleep(2.1)
        assert served.get("views/0/1/0.png").status == 200
        about = json.loads(served.get("caches/0/zarr.json").body)["attributes"]["atcache"]
        assert about["layout"]["num_views"] == 2
        assert served.get("caches/0/attention/codes/c/1/0/0/0/0").status == 200


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_though_connections_are_open(cache, number):
    with viewing(cache) as served, ExitStack() as idle:
        address = ("127.0.0.1", served.port)
        connections = [idle.enter_context(socket.create_connection(address)) for _ in range(3)]
        connections[0].sendall(f"HEAD /{SHARD} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        assert connections[0].recv(100)
        assert served.stop(number) == 0  # it waits for less time than a connection may be idle
        assert "Traceback" not in served.process.stderr.read()


SIGNALLED = """
import os, signal, threading
from atcache.pipelines.view.run import signals_as_bytes

with signals_as_bytes() as signals:
    for _ in range(20_000):  # the signal comes before, as and after the wait for it begins
        threading.Thread(target=os.kill, args=(os.getpid(), signal.SIGTERM)).start()
        assert signals.recv(1) == bytes([signal.SIGTERM])
"""


def test_a_signal_that_comes_as_the_wait_for_it_begins_ends_the_wait():
    done = subprocess.run([sys.executable, "-c", SIGNALLED], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_a_port_in_use_is_named_and_none_given_means_the_next(served, cache):
    process = start_viewing(cache, "--port", served.port)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 1
    assert f"port={served.port}: already in use. Give another --port, or 0" in said


def test_the_page_is_opened_in_the_browser_that_the_user_has(cache, tmp_path):
    opened, script = tmp_path / "opened", tmp_path / "browser"
    script.write_text(f'#!/bin/sh\necho "$1" > {opened}.part\nmv {opened}.part {opened}\n')
    script.chmod(0o755)
    with viewing(cache, "--browser", BROWSER=str(script)) as served:
        deadline_s = time.monotonic() + 30
        while not opened.exists() and time.monotonic() < deadline_s:
            time.sleep(0.05)
        assert opened.read_text().strip() == served.address


def test_what_cannot_be_served_is_refused_before_it_listens(cache, tmp_path):
    with pytest.raises(AtcacheError, match="is not a cache"), viewing(tmp_path / "none.zarr"):
        pass
    with pytest.raises(AtcacheError, match="3 are named; expected one to look at"), viewing("a", "b", "c"):
        pass
    with pytest.raises(AtcacheError, match="cannot be listened at"), viewing(cache, "--host", "8.8.8.8"):
        pass


def test_a_cache_on_a_web_server_is_passed_on_by_parts(cache, shard, tmp_path):
    shutil.copytree(cache, tmp_path / "served" / "digits.zarr")
    with (
        FolderServer(tmp_path / "served") as web,
        viewing(f"{web.url}/digits.zarr", ATCACHE_BLOCKS_DIR=str(tmp_path / "blocks")) as served,
    ):
        assert json.loads(served.get("site.json").body)["caches"][0]["name"] == "digits.zarr"
        assert served.get(SHARD, Range="bytes=-40").body == shard[-40:]
        assert served.get(SHARD, Range="bytes=3-9").headers["content-range"] == f"bytes 3-9/{len(shard)}"
        assert served.get("caches/0/attention/codes/c/9/9/0/0/0").status == 404
        assert served.get("views/0/1/5.png").status == 200
        (tmp_path / "served/digits.zarr" / CODES).write_bytes(shard[:-1])
        time.sleep(5.1)  # what a server said is believed for five seconds
        assert served.get(SHARD, Range="bytes=3-").headers["content-length"] == str(len(shard) - 4)
        web.fault = "fail"
        assert served.get("caches/0/zarr.json").status == 502


def test_a_cache_in_a_private_bucket_is_passed_on(cache, shard, tmp_path):
    import obstore

    with moto_server() as server:
        server.make_bucket("bucket")
        store = server.store("bucket")
        for file in cache.rglob("*"):
            if file.is_file():
                obstore.put(store, f"a/digits.zarr/{file.relative_to(cache).as_posix()}", file.read_bytes())
        environment = {**server.environment, "ATCACHE_BLOCKS_DIR": str(tmp_path / "blocks")}
        with viewing("s3://bucket/a/digits.zarr", **environment) as served:
            assert served.get(SHARD, Range="bytes=-40").body == shard[-40:]
            assert served.get(SHARD).body == shard
            assert served.get("images/0/5").body == atcache.open(cache).source.read_bytes(5)
            assert served.get("caches/0/none").status == 404
