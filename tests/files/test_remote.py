"""Caches and tars over URLs read as local ones do, through a bounded local cache that nothing can spoil."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from range_server import FolderServer

import atcache
from atcache.cli.main import cli
from atcache.errors import AtcacheError, CacheMismatchError, CorruptCacheError, RemoteError, SourceError
from atcache.files.location import parse_location
from atcache.files.ranges import open_file
from atcache.files.remote import block_cache, remote_file
from atcache.files.remote.block_cache import BLOCK_NBYTES, BlockCache
from atcache.images.class_names import read_class_names
from atcache.images.source import Source, index_source, relocate
from atcache.pipelines.build.config import BuildConfig
from atcache.pipelines.build.run import build
from atcache.pipelines.running.metrics import read_metrics
from atcache.pipelines.train.config import TrainConfig
from atcache.pipelines.train.run import train
from atcache.pipelines.verify.config import VerifyConfig
from atcache.pipelines.verify.run import verify
from atcache.store.reader import CacheReader


def serve(server, path: Path) -> str:
    """Put a copy of a file or folder on the server."""
    copy = shutil.copytree if path.is_dir() else shutil.copy2
    copy(path, server.folder / path.name)
    return f"{server.url}/{path.name}"


def serve_bytes(server, name: str, nbytes: int, seed: int = 0) -> bytes:
    data = np.random.default_rng(seed).bytes(nbytes)
    (server.folder / name).write_bytes(data)
    return data


def open_url(server, name: str):
    return open_file(parse_location(f"{server.url}/{name}"))


def allocated_nbytes(folder: Path) -> int:
    return sum(file.stat().st_blocks * 512 for file in folder.iterdir())


def run_python(code: str, *arguments) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_any_place_of_a_file_is_read_and_blocks_are_fetched_once(server):
    data = serve_bytes(server, "file", 5 * BLOCK_NBYTES + 17)
    file = open_url(server, "file")
    assert file.nbytes == len(data)
    for offset, nbytes in ((0, 10), (BLOCK_NBYTES - 3, 7), (len(data) - 5, 5), (100, 4 * BLOCK_NBYTES), (0, len(data))):
        assert file.pread(nbytes, offset) == data[offset : offset + nbytes]
    assert file.pread(100, len(data) - 4) == data[-4:]
    assert file.pread(100, len(data)) == b""
    assert server.num_bytes == len(data)
    assert open_url(server, "file").pread(len(data), 0) == data
    assert server.num_bytes == len(data)


def test_neighbours_come_in_one_request_and_far_blocks_at_once(server):
    serve_bytes(server, "file", 60 * BLOCK_NBYTES)
    file = open_url(server, "file")
    before = server.num_requests
    file.pread(20 * BLOCK_NBYTES, 0)
    assert server.num_requests == before + 1
    server.answers_together = 3
    for block in (30, 40, 50):
        file.expect(1, block * BLOCK_NBYTES)
    for block in (30, 40, 50):
        file.pread(1, block * BLOCK_NBYTES)
    assert server.most_at_once == 3
    assert server.num_requests == before + 4


def test_a_pass_over_a_file_is_fetched_ahead(server, monkeypatch):
    monkeypatch.setenv("ATCACHE_BLOCKS_GIB", "0.1")
    data = serve_bytes(server, "file", 100 * BLOCK_NBYTES)
    file = open_url(server, "file")
    before = server.num_requests
    for offset in range(0, len(data), BLOCK_NBYTES // 2):
        assert file.pread(100, offset) == data[offset : offset + 100]
    assert server.num_requests - before < 10


def test_the_bound_holds_while_more_is_read(server, blocks_dir):
    data = serve_bytes(server, "file", 20 * 2**20)
    for _ in range(3):
        file = open_url(server, "file")
        for offset in range(0, len(data), 2**20):
            assert file.pread(2**20, offset) == data[offset : offset + 2**20]
            assert allocated_nbytes(blocks_dir) <= 0.01 * 2**30
    assert allocated_nbytes(blocks_dir) > 0.005 * 2**30  # it is used
    # And of use, although blocks between missing ones come again.
    assert 2 * len(data) < server.num_bytes < 2.95 * len(data)


def test_a_block_is_what_was_stored_or_is_not_there(tmp_path):
    blocks = BlockCache(tmp_path, 2**21)
    keys = [bytes([number]) * 16 for number in range(1, 60)]
    for number, key in enumerate(keys):
        blocks.put(key, bytes([number]) * BLOCK_NBYTES)
        assert blocks.get(key) == bytes([number]) * BLOCK_NBYTES
    stored = [blocks.get(key) for key in keys]
    assert 0 < sum(data is not None for data in stored) <= blocks.num_slots
    assert all(data in (None, bytes([number]) * BLOCK_NBYTES) for number, data in enumerate(stored))
    rng = np.random.default_rng(0)
    with (tmp_path / "blocks").open("r+b") as file:
        for place in rng.integers(4096, file.seek(0, 2), 3000).tolist():
            file.seek(place)
            file.write(b"\x5a")
    damaged = [blocks.get(key) for key in keys]
    assert all(data in (None, bytes([number]) * BLOCK_NBYTES) for number, data in enumerate(damaged))
    assert damaged != stored


def read_within_seconds(file, nbytes: int) -> bytes:
    """The first bytes of a file, or a failure if they do not come."""
    found: list[bytes] = []
    thread = threading.Thread(target=lambda: found.append(file.pread(nbytes, 0)), daemon=True)
    thread.start()
    thread.join(20)
    assert found, "the read does not end"
    return found[0]


@pytest.mark.parametrize("is_read_only", [False, True])
@pytest.mark.parametrize("place", [16, 20])
def test_a_damaged_row_is_fetched_again_also_if_nothing_can_be_written(place, is_read_only, server, monkeypatch):
    data = serve_bytes(server, "file", 100)
    file = open_url(server, "file")
    assert file.pread(100, 0) == data
    blocks, key = block_cache.shared_blocks(), file._keys[0]
    file._claims.wait(key, time.monotonic() + 60)  # until it is stored, which may be after its reader has it
    first, rows = blocks._rows_of(key)
    row = block_cache._HEADER_NBYTES + first * block_cache._ROW.size + rows.index(key)
    os.pwrite(blocks._fd, (2**31 + 1).to_bytes(4, "little"), row + place)  # its number of bytes, or its checksum
    if is_read_only:  # as on a full disk
        writable, reads_only = blocks._fd, os.open(f"/proc/self/fd/{blocks._fd}", os.O_RDONLY)
        monkeypatch.setattr(blocks, "_fd", reads_only)
        assert [read_within_seconds(file, 100) for _ in range(2)] == [data, data]
        monkeypatch.undo()
        os.close(reads_only)
        assert blocks._fd == writable
    assert read_within_seconds(file, 100) == data
    file._claims.wait(key, time.monotonic() + 60)
    assert blocks.get(key) == data


def test_a_good_block_is_read_also_if_nothing_can_be_written(tmp_path):
    key = b"k" * 16
    BlockCache(tmp_path, 2**21).put(key, b"data")
    blocks = BlockCache(tmp_path, 2**21)
    os.close(blocks._fd)
    blocks._fd = os.open(tmp_path / "blocks", os.O_RDONLY)
    assert blocks.get(key) == b"data"
    blocks.drop(key)


def test_another_size_begins_anew(tmp_path):
    key = b"k" * 16
    BlockCache(tmp_path, 2**22).put(key, b"data")
    assert BlockCache(tmp_path, 2**22).get(key) == b"data"
    assert BlockCache(tmp_path, 2**21).get(key) is None
    assert sorted(file.name for file in tmp_path.iterdir()) == ["blocks", "lock"]


_READER = """
import sys
from atcache.files.ranges import open_file
from atcache.files.location import parse_location
file = open_file(parse_location(sys.argv[1]))
print("open", flush=True)
for offset in range(0, file.nbytes, 2**18):
    file.pread(2**18, offset)
print("done", flush=True)
"""


def test_two_processes_fetch_each_block_once_between_them(server, monkeypatch):
    monkeypatch.setenv("ATCACHE_BLOCKS_GIB", "0.05")
    data = serve_bytes(server, "file", 2**23)
    server.delay_s = 0.05
    readers = [run_python(_READER, f"{server.url}/file") for _ in range(2)]
    for reader in readers:
        out, errors = reader.communicate(timeout=60)
        assert (out.split(), reader.returncode) == (["open", "done"], 0), errors
    # A set of slots may overflow, and then a block is fetched again.
    assert len(data) <= server.num_bytes < 1.1 * len(data)


def reader_that_has_asked(server):
    """A process that reads the server's file, to which no answer came yet."""
    server.delay_s = 0.3
    reader = run_python(_READER, f"{server.url}/file")
    assert reader.stdout is not None
    assert reader.stdout.readline() == "open\n"
    time.sleep(0.15)
    return reader


def test_a_reader_killed_while_it_fetches_leaves_a_usable_folder(server, monkeypatch):
    monkeypatch.setenv("ATCACHE_BLOCKS_GIB", "0.05")
    data = serve_bytes(server, "file", 2**22)
    reader = reader_that_has_asked(server)
    reader.send_signal(signal.SIGKILL)
    reader.communicate()
    server.delay_s = 0
    # What the dead reader was to fetch is fetched at once: who waited for it would wait longer than a test may last.
    monkeypatch.setattr(remote_file, "_PATIENCE_S", 10_000.0)
    assert open_url(server, "file").pread(len(data), 0) == data


def test_a_reader_that_is_stopped_while_it_fetches_is_not_waited_for_without_end(server, monkeypatch):
    monkeypatch.setattr(remote_file, "_PATIENCE_S", 0.5)
    data = serve_bytes(server, "file", 2**20)
    reader = reader_that_has_asked(server)
    reader.send_signal(signal.SIGSTOP)
    server.delay_s = 0
    try:
        start_s = time.monotonic()
        assert open_url(server, "file").pread(len(data), 0) == data
        assert time.monotonic() - start_s > 0.4
    finally:
        reader.send_signal(signal.SIGCONT)
    assert reader.communicate(timeout=60)[0] == "done\n"


def test_forked_processes_and_threads_read(server):
    data = serve_bytes(server, "file", 40 * BLOCK_NBYTES)
    file = open_url(server, "file")
    assert file.pread(10, 0) == data[:10]
    wrong: list[int] = []

    def check(start):
        for block in range(start, 40, 4):
            if file.pread(100, block * BLOCK_NBYTES) != data[block * BLOCK_NBYTES :][:100]:
                wrong.append(block)

    threads = [threading.Thread(target=check, args=(start,)) for start in (1, 1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    child = os.fork()
    if child == 0:
        try:
            check(3)
            other = open_url(server, "file").pread(9, 38 * BLOCK_NBYTES)
            os._exit(0 if not wrong and other == data[38 * BLOCK_NBYTES :][:9] else 1)
        finally:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("ignore-ranges", r"http://127\S+/file cannot be read in parts: its server does not answer range requests"),
        ("truncate", r"http://127\S+/file cannot be read: .*body"),
        ("fail", r"http://127\S+/file cannot be read: .*500"),
    ],
)
def test_a_server_that_misbehaves_is_named_in_one_sentence(fault, message, server):
    data = serve_bytes(server, "file", 2 * BLOCK_NBYTES)
    file = open_url(server, "file")
    server.fault = fault
    with pytest.raises(RemoteError, match=message):
        file.pread(100, 0)
    server.fault = ""
    assert file.pread(100, 0) == data[:100]  # and nothing stays claimed or kept


def test_a_server_that_is_not_there_is_named(blocks_dir):
    with FolderServer(blocks_dir) as gone:
        url = gone.url
    with pytest.raises(RemoteError, match=f"{url}/cache.zarr/zarr.json cannot be read"):
        atcache.open(f"{url}/cache.zarr")


def test_a_file_that_changes_is_not_mixed_with_what_it_was(server):
    serve_bytes(server, "file", 8 * BLOCK_NBYTES)
    file = open_url(server, "file")
    file.pread(10, 0)
    new = serve_bytes(server, "file", 8 * BLOCK_NBYTES, seed=1)
    with pytest.raises(RemoteError, match=r"file has changed since it was opened"):
        file.pread(10, 5 * BLOCK_NBYTES)
    assert open_url(server, "file").pread(10, 0) == new[:10]


def test_a_cache_on_a_server_is_what_it_is_locally(server, tiny_cache):
    for fields in ({"views": 2}, {"codec": "int8", "pixels": "store"}):
        local = atcache.open(tiny_cache(**fields))
        shutil.rmtree(server.folder / local.path.name, ignore_errors=True)
        remote = atcache.open(serve(server, local.path))
        assert str(remote.path).startswith("http://")
        assert {**remote.describe(), "path": str(local.path)} == local.describe()
        assert np.array_equal(remote.maps(1).compute(), local.maps(1).compute(), equal_nan=True)
        assert np.array_equal(remote.view(3).image, local.view(3).image)
        assert remote.samples.equals(local.samples)
        assert remote.reader.missing_tasks() == []


@pytest.mark.parametrize("shuffle", ["global", "block"])
def test_training_from_a_server_has_the_losses_of_training_from_the_disk(
    shuffle, server, tiny_cache, digits_tars, tmp_path
):
    cache = tiny_cache(views=2)
    remote_cache = serve(server, cache)
    serve(server, digits_tars[0].parent)
    tars = f"{server.url}/{digits_tars[0].parent.name}/digits-{{0000..0002}}.tar"
    common = {"mode": "copy", "steps": 20, "batch_size": 24, "warmup_epochs": 1.0, "device": "cpu", "precision": "fp32"}
    local = TrainConfig(**common, shuffle=shuffle, cache=cache, out=tmp_path / "local", keep_mib=0)
    # Worker processes are forked while this one has servers to talk to.
    remote = replace(local, cache=parse_location(remote_cache), data=tars, out=tmp_path / "remote", workers=2)
    losses = []
    for config in (local, remote):
        train(config)
        losses.append([row["loss"] for row in read_metrics(config.out, "train")])
    assert losses[0] == losses[1]
    assert len(losses[0]) == 2


def test_a_build_from_tars_on_a_server_writes_the_same_bytes(
    server, tiny_cache, tiny_vit, tiny_weights, digits_tars, tmp_path
):
    serve(server, digits_tars[0].parent)
    local, out = tiny_cache(), tmp_path / "remote.zarr"
    tars = f"{server.url}/{digits_tars[0].parent.name}/digits-{{0000..0002}}.tar"
    build(
        BuildConfig(
            teacher=tiny_vit,
            weights=tiny_weights,
            data=tars,
            out=out,
            codec="exact",
            workers=2,
            device="cpu",
            precision="fp32",
            samples_per_shard=20,
        )
    )
    files = [file.relative_to(out) for file in out.rglob("*") if file.is_file() and "c" in file.parts]
    assert len(files) > 10
    for file in files:
        assert (out / file).read_bytes() == (local / file).read_bytes(), file
    folders = json.loads((out / "samples" / "zarr.json").read_bytes())["attributes"]["folders"]
    assert folders == [tars.rpartition("/")[0]] * 3
    assert np.array_equal(atcache.open(out).view(4).image, atcache.open(local).view(4).image)  # from where they were


def test_tars_that_change_after_they_were_indexed_are_noticed(server, digits_tars):
    urls = [serve(server, tar) for tar in digits_tars]
    index = index_source(urls)
    assert index.fingerprint == index_source(digits_tars).fingerprint
    tar = server.folder / digits_tars[1].name
    data = bytearray(tar.read_bytes())
    data[int(index.offset_S[20]) + 40] ^= 1
    tar.write_bytes(data)
    source = Source(index)
    assert source.read_bytes(3) == Source(index_source(digits_tars)).read_bytes(3)
    with pytest.raises(SourceError, match=rf"{urls[1]} has changed on the server since it was indexed"):
        source.read_bytes(20)
    tar.unlink()
    with pytest.raises(SourceError, match=rf"{urls[1]} cannot be opened: no such file on the server"):
        Source(index).read_bytes(20)
    with pytest.raises(SourceError, match=rf"{digits_tars[1].name} is missing"):
        relocate(index_source(digits_tars), urls)
    with pytest.raises(SourceError, match=rf"{urls[1]} does not exist. Check the pattern"):
        index_source(urls)


def test_names_of_classes_are_read_beside_tars_on_a_server(server, digits_tars):
    url = serve(server, digits_tars[0])
    assert index_source(url).classes.names == ()
    (server.folder / "classes.txt").write_text("".join(f"digit {label}\n" for label in range(10)))
    named = index_source(url).classes
    assert named.name(9) == "digit 9"
    server.fault = "fail"
    with pytest.raises(RemoteError, match=r"classes\.txt cannot be read: .*500"):
        read_class_names(parse_location(named.where))
    assert named.where == url.rpartition("/")[0] + "/classes.txt"


def test_what_a_server_damaged_once_is_fetched_again_and_then_raised(server, tiny_cache):
    url = serve(server, tiny_cache(codec="int8"))
    expected = CacheReader(tiny_cache(codec="int8")).read_codes(0, 5)
    reader = CacheReader(url)
    server.fault = "garbage"
    with pytest.raises(CorruptCacheError, match=r"codes/c/0/0\S* is damaged: its index .* The file on the server is"):
        reader.read_codes(0, 5)
    server.fault = ""  # what is kept locally is garbage with a good checksum of its own
    assert np.array_equal(reader.read_codes(0, 5), expected)
    shard = server.folder / Path(url).name / "attention/codes/c/0/0/0/0/0"
    data = bytearray(shard.read_bytes())
    data[100] ^= 1
    shard.write_bytes(data)
    before = server.num_bytes
    with pytest.raises(CorruptCacheError, match=r"codes/c/0/0\S*, sample 0 is damaged: its checksum does not match"):
        CacheReader(url).read_codes(0, 0)
    assert server.num_bytes - before < 3 * len(data) + 2**14


def test_verify_reads_a_cache_on_a_server_whole(server, tiny_cache):
    url = serve(server, tiny_cache(codec="int8"))
    summary = verify(VerifyConfig(cache=parse_location(url)))
    assert (summary.problems, summary.is_complete, summary.num_views) == ((), True, 48)
    assert "web server, which cannot list" in summary.notes[0]
    shard = server.folder / Path(url).name / "attention/codes/c/0/1/0/0/0"
    data = bytearray(shard.read_bytes())
    data[200] ^= 1
    shard.write_bytes(data)
    (problem,) = verify(VerifyConfig(cache=parse_location(url))).problems
    assert problem.message.startswith(f"{url}/attention/codes/c/0/1/0/0/0 is damaged: 1 chunk of sample")


def test_a_web_server_must_have_a_complete_cache(server, tiny_cache):
    url = serve(server, tiny_cache(codec="int8"))
    file = server.folder / Path(url).name / "zarr.json"
    root = json.loads(file.read_bytes())
    del root["attributes"]["atcache"]["complete"]
    file.write_text(json.dumps(root))
    with pytest.raises(CacheMismatchError, match=rf"{url} is not complete, and a web server cannot list"):
        atcache.open(url)


_OBJECT_STORE = """
import json, sys
import atcache
from atcache.images.source import index_source
cache = atcache.open(sys.argv[1])
tars = [index_source(f"s3://bucket/{name}").num_samples for name in sys.argv[2:]]
missing = [task.name for task in cache.reader.missing_tasks()]
print(json.dumps([float(cache.maps(1)[0, 3].compute().sum()), missing, tars]))
"""


def test_an_object_store_is_listed_so_caches_there_may_be_incomplete(server, tiny_cache, digits_tars, monkeypatch):
    """Against a server of our own that knows what of S3 is asked here; moto's whole S3 was tried by hand."""
    cache = tiny_cache(codec="int8")
    shutil.copytree(cache, server.folder / "bucket" / "my caches" / "digits.zarr")
    shutil.copytree(digits_tars[0].parent, server.folder / "bucket" / "tars-1.0")
    (server.folder / "bucket/tars-1.0/._digits-000000.tar").write_bytes(b"what macOS makes")
    settings = {"ENDPOINT_URL": server.url, "ALLOW_HTTP": "true", "ACCESS_KEY_ID": "id", "SECRET_ACCESS_KEY": "key"}
    for name, value in {**settings, "REGION": "us-east-1"}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    commits = server.folder / "bucket" / "my caches" / "digits.zarr" / "commits"
    expected = float(atcache.open(cache).maps(1)[0, 3].compute().sum())
    (commits / "v0000-b000001.json").unlink()
    named = ["tars-1.0", "tars-1.0/digits-*.tar", "tars-1.0/*.tar"]
    reader = run_python(_OBJECT_STORE, "s3://bucket/my caches/digits.zarr", *named)
    out, errors = reader.communicate(timeout=100)
    assert reader.returncode == 0, errors
    assert json.loads(out) == [expected, ["v0000-b000001"], [48, 48, 48]]


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("ftp://host/a.zarr", r"cannot be read: expected a path, or a URL that begins with http://"),
        ("file:///etc/passwd", r"cannot be read: expected a path"),
        ("pipe:cat /etc/passwd", r"cannot be read: expected a path"),
        ("ftp://me:secret@host/a.zarr", r"^'ftp://host/a.zarr' cannot be read: expected a path"),
        ("ftp://host/a.zarr?sig=secret", r"^'ftp://host/a.zarr' cannot be read: expected a path"),
        ("pipe:curl -u me:secret host", r"^'pipe:...' cannot be read"),
        ("https://me:secret/secret@host/a.zarr", r"^'https://host/a.zarr' is not a URL: its host or port"),
        ("https://me:secret?secret@host/a.zarr", r"^'https://...' is not a URL"),
        ("https://host/a.zarr?sig=1@secret", r"^https://...: a URL must have no password"),
        ("https:///me:secret@host", r"^'https://host' does not name a host"),
        ("https://me:secret@host/a.zarr", r"^https://host/a.zarr: a URL must have no password"),
        ("https://host/a.zarr?sig=secret", r"^https://host/a.zarr: a URL must have no password, query"),
        ("s3://bucket/../other/a.zarr", r"is not a path on a server"),
        ("https://host/a%2F..%2Fb", r"is not a path on a server"),
        ("s3:///a.zarr", r"does not name a host or bucket"),
        (Path("s3://bucket/a.zarr"), r"was a URL before it became a Path"),
    ],
)
def test_a_url_that_is_not_read_is_refused(url, message):
    with pytest.raises(AtcacheError, match=message) as caught:
        atcache.open(url)
    assert "secret" not in str(caught.value)


def test_a_build_takes_its_codec_from_a_server(server, tiny_cache, digits_build):
    other = tiny_cache(codec=None, target_kl=0.02)
    build(replace(digits_build, codec_from=parse_location(serve(server, other))))
    ours, theirs = CacheReader(digits_build.out).state, CacheReader(other).state
    assert ours.keys() == theirs.keys()
    assert all(ours[name].tobytes() == theirs[name].tobytes() for name in theirs)


def test_the_command_line_takes_urls_for_reading_only(server, tiny_cache):
    url = serve(server, tiny_cache(codec="int8"))
    run = CliRunner().invoke(cli, ["info", url, "--json"])
    assert run.exit_code == 0, run.output
    assert json.loads(run.stdout)["path"] == url
    run = CliRunner().invoke(cli, ["verify", url, "--repair"])
    assert run.exit_code == 1
    assert f"repair: {url} is on a web server, which is only read. Repair a copy." in run.output
    run = CliRunner().invoke(cli, ["train", "--mode", "copy", "--cache", url, "--out", "s3://bucket/run"])
    assert run.exit_code == 2
    assert "'s3://bucket/run' is a URL, but of all commands only build, maps, push and verify --repair" in run.output
    run = CliRunner().invoke(cli, ["info", "ftp://host/a.zarr"])
    assert "cannot be read: expected a path, or a URL that begins with http://" in run.output


def test_a_size_or_folder_that_cannot_be_is_refused(server, monkeypatch, tmp_path):
    serve_bytes(server, "file", 10)
    monkeypatch.setenv("ATCACHE_BLOCKS_GIB", "much")
    with pytest.raises(AtcacheError, match="ATCACHE_BLOCKS_GIB='much': expected a number of GiB"):
        open_url(server, "file")
    monkeypatch.setenv("ATCACHE_BLOCKS_GIB", "0")
    with pytest.raises(AtcacheError, match="0 bytes are too few for any block; expected at least 2 MiB"):
        open_url(server, "file")
    (tmp_path / "a file").write_text("")
    monkeypatch.setenv("ATCACHE_BLOCKS_GIB", "1")
    monkeypatch.setenv("ATCACHE_BLOCKS_DIR", str(tmp_path / "a file"))
    with pytest.raises(AtcacheError, match=r"a file cannot store what is read from servers: .*ATCACHE_BLOCKS_DIR"):
        open_url(server, "file")
