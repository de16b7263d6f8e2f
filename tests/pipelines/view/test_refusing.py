"""What the page's decoder refuses, each with its kind and a sentence: what is unknown, damaged or not answered."""

from __future__ import annotations

import json
import shutil
import socket
import struct
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from made_caches import write_made_cache
from made_factors import make_geometry
from web_folder import WebFolder

from atcache.pipelines.view.site import BUILT
from atcache.store.chunks import crc32c

CODES = "attention/codes/c/0/0/0/0/0"
SHOW = """async ([url, row]) => {
    try {
        const cache = await atcache.openCache(url);
        try { return [null, [...await (await cache.maps(0, row)).row(0, 0, [0])]]; } finally { cache.close(); }
    } catch (error) { return [error.kind ?? String(error), error.message]; }
}"""


@pytest.fixture(scope="module")
def page(browser):
    with WebFolder(page=BUILT) as server:
        page = browser.new_page()
        page.goto(f"{server.url}/page/index.html")
        page.wait_for_function("globalThis.atcache !== undefined")
        yield page
        page.close()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A sound cache; tests copy it before they spoil it."""
    return write_made_cache(tmp_path_factory.mktemp("made") / "made.zarr", "int8", make_geometry(), compressor="zstd")


@pytest.fixture(scope="module")
def whole_transform(tmp_path_factory):
    return write_made_cache(tmp_path_factory.mktemp("made") / "made.zarr", "transform", make_geometry())


@pytest.fixture
def path(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "made.zarr")


@pytest.fixture
def served(tmp_path):
    with WebFolder(caches=tmp_path) as server:
        yield server


@pytest.fixture
def show(page, served):
    """Kind and sentence of the error that showing a row gives; None and numbers if it is shown."""
    return lambda row=0, name="made.zarr": page.evaluate(SHOW, [f"{served.url}/caches/{name}", row])


def edit(path, change):
    file = path / "zarr.json"
    root = json.loads(file.read_text())
    change(root["attributes"]["atcache"])
    file.write_text(json.dumps(root))


def setter(*names, value):
    def change(members):
        for name in names[:-1]:
            members = members[name]
        members[names[-1]] = value

    return change


@pytest.mark.parametrize(
    ("change", "kind", "sentence"),
    [
        (setter("codec", value={"name": "nova"}), "unknown-codec", 'does not know the codec "nova", only exact, int8'),
        (setter("format", value=2), "unknown-format", '"format" is 2, expected 1'),
        (setter("geometry", "mask", value="causal"), "unknown-format", '"geometry.mask" is "causal", expected no such'),
        (setter("codec", "bits", value=4), "unknown-format", '"codec.bits" is 4, expected no such member'),
        (setter("geometry", "tokens", "grid_width", value=4), "damaged", '"layout.num_tokens" does not fit codec int8'),
        (setter("geometry", "heads", value=[0, 1]), "damaged", '"geometry.num_kv_heads" is 3, expected a divisor of 2'),
        (setter("layout", "num_components", value=2**40), "damaged", '"layout.num_components" is 1099511627776'),
        (setter("layout", "compressor", value="lzma"), "damaged", '"layout.compressor" is "lzma", expected one of'),
        (setter("layout", "samples_per_shard", value="2"), "damaged", '"layout.samples_per_shard" is "2", expected a'),
        # Python reads such a cache: it is not damaged.
        (setter("layout", "samples_per_shard", value=2**20), "too-large", "each shard has 2097152 chunks, more than"),
        (setter("geometry", "tokens", "grid_height", value=4097), "damaged", "is 4097, expected a whole number from 1"),
        (
            setter("geometry", "tokens", value={"num_prefix_tokens": 1, "grid_height": 4096, "grid_width": 64}),
            "damaged",
            '"grid_width":64}, expected at most 262144 tokens in all',
        ),
    ],
)
def test_what_it_does_not_know_is_refused(show, path, change, kind, sentence):
    edit(path, change)
    found, message = show()
    assert found == kind
    assert sentence in message
    assert "made.zarr/zarr.json" in message


def test_a_place_without_a_cache(show, tmp_path):
    assert show(name="nobody.zarr")[0] == "not-a-cache"
    (tmp_path / "page.zarr").mkdir()
    (tmp_path / "page.zarr" / "zarr.json").write_text("<!doctype html>")
    assert show(name="page.zarr")[0] == "not-a-cache"
    (tmp_path / "page.zarr" / "zarr.json").write_text('{"zarr_format": 3, "node_type": "group", "attributes": {}}')
    kind, sentence = show(name="page.zarr")
    assert kind == "not-a-cache"
    assert "is a Zarr group, but not a cache" in sentence


def flip(data, at):
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (lambda data: flip(data, 30), "a checksum does not match"),
        (lambda data: flip(data, len(data) - 20), "a checksum does not match"),
        (lambda data: data[:-7], "a checksum does not match"),
        (lambda data: data[-9:], "it is too short for its index"),
        (lambda data: b"", "it is too short for its index"),
    ],
    ids=["chunk", "index", "cut", "stump", "empty"],
)
def test_a_damaged_shard_is_named(show, path, spoil, sentence):
    file = path / CODES
    file.write_bytes(spoil(file.read_bytes()))
    kind, message = show()
    assert kind == "damaged"
    assert f"made.zarr/{CODES} is damaged: {sentence}. Run `atcache verify`" in message


def test_a_shard_that_is_not_there(show, path):
    (path / CODES).unlink()
    kind, message = show()
    assert kind == "damaged"
    assert f"{CODES} is damaged: it lacks row 0" in message
    assert show(row=2)[0] is None


def rewrite_first_chunk(file, spoil):
    """The shard with its first chunk spoilt and all checksums right again."""
    data = file.read_bytes()
    num_chunks = 2 * 2
    index = np.frombuffer(data[-16 * num_chunks - 4 : -4], "<u8").copy()
    offset, nbytes = map(int, index[:2])
    chunk = spoil(bytearray(data[offset : offset + nbytes - 4]), index)
    body = data[:offset] + chunk + crc32c(bytes(chunk)) + data[offset + nbytes : -16 * num_chunks - 4]
    file.write_bytes(body + index.tobytes() + crc32c(index.tobytes()))


def claims_much(chunk, _):
    """A zstd frame that states a tebibyte of content, all else as it was."""
    descriptor = chunk[4] & 0x1F | 0xE0
    return bytes(chunk[:4]) + bytes([descriptor]) + struct.pack("<Q", 2**40) + bytes(chunk[13:])


def points_outside(chunk, index):
    index[0] = 2**63
    return chunk


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (claims_much, "a chunk claims 1099511627776 bytes of content, expected"),
        (lambda chunk, _: bytes(len(chunk)), "a chunk is no zstd frame"),
        (lambda chunk, _: chunk[:7] + b"\xff" * (len(chunk) - 7), "a chunk cannot be decompressed"),
        (points_outside, "its index points outside of it"),
    ],
    ids=["claims", "zeros", "garbage", "outside"],
)
def test_hostile_chunks_are_refused_before_they_are_decompressed(show, path, spoil, sentence):
    rewrite_first_chunk(path / CODES, spoil)
    kind, message = show()
    assert kind == "damaged"
    assert sentence in message


def test_a_state_with_an_unknown_array_is_refused(show, whole_transform, tmp_path):
    path = shutil.copytree(whole_transform, tmp_path / "made.zarr")
    assert show()[0] is None
    file = path / "zarr.json"
    root = json.loads(file.read_text())
    arrays = root["consolidated_metadata"]["metadata"]
    arrays["attention/state/projection_mask_TT"] = arrays["attention/state/shrink_L3"]
    file.write_text(json.dumps(root))
    kind, message = show()
    assert kind == "unknown-format"
    assert "attention/state/projection_mask_TT: this page does not know such an array" in message


def test_state_of_another_shape_is_refused(show, whole_transform, tmp_path):
    path = shutil.copytree(whole_transform, tmp_path / "made.zarr")
    file = path / "zarr.json"
    root = json.loads(file.read_text())
    arrays = root["consolidated_metadata"]["metadata"]
    arrays["attention/state/mean_left_LTR"] = arrays["attention/state/shrink_L3"]
    file.write_text(json.dumps(root))
    assert show()[0] in ("damaged", "missing")


def test_an_array_that_is_too_large_is_not_fetched(show, served, path):
    file = path / "zarr.json"
    root = json.loads(file.read_text())
    bias = root["consolidated_metadata"]["metadata"]["samples/key"] | {"shape": [2**20, 2**14]}
    bias["chunk_grid"] = {"name": "regular", "configuration": {"chunk_shape": [1, 2**14]}}
    root["consolidated_metadata"]["metadata"]["attention/bias"] = bias
    file.write_text(json.dumps(root))
    kind, message = show()
    assert kind == "too-large"
    assert f"attention/bias has {2**34} bytes" in message
    assert not any("bias" in name for _, name, _ in served.log)


def test_a_server_that_ignores_suffixes_is_asked_for_the_size(show, path, served):
    assert path.exists()
    served.has_suffixes = False
    assert show()[0] is None
    assert any(method == "HEAD" for method, _, _ in served.log)


def test_a_server_without_ranges(show, path, served):
    assert path.exists()
    served.has_ranges = False
    kind, message = show()
    assert kind == "no-ranges"
    assert "sends the whole of attention/codes" in message


def test_pythons_own_server_has_no_ranges(browser, path, tmp_path):
    # Browsers keep small files whole and cut parts out of them themselves. This shard is too large for that.
    data = (path / CODES).read_bytes()
    with (path / CODES).open("wb") as file:
        file.write(data[: -16 * 4 - 4])
        file.seek(2**28)
        file.write(data[-16 * 4 - 4 :])
    shutil.copytree(BUILT, tmp_path / "page")
    handler = partial(SimpleHTTPRequestHandler, directory=str(tmp_path))
    handler.func.log_message = lambda *_: None
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        page = browser.new_page()
        page.goto(f"http://127.0.0.1:{server.server_port}/page/index.html")
        page.wait_for_function("globalThis.atcache !== undefined")
        kind, message = page.evaluate(SHOW, ["../made.zarr", 0])
        page.close()
        server.shutdown()
    assert path.exists()
    assert kind == "no-ranges"
    assert "not `python -m http.server`" in message


def test_a_server_without_cors(show, path, served):
    assert path.exists()
    served.has_cors = False
    kind, message = show()
    assert kind == "no-cors"
    assert "Its CORS rules must allow GET and HEAD with the header Range from http://127.0.0.1" in message


def test_a_server_that_fails_or_is_gone(page, path, tmp_path):
    assert path.exists()
    with WebFolder(caches=tmp_path) as served:
        served.status = 500
        kind, message = page.evaluate(SHOW, [f"{served.url}/caches/made.zarr", 0])
    assert kind == "network"
    assert "the server answers 500" in message
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        gone = f"http://127.0.0.1:{free.getsockname()[1]}/made.zarr"
    kind, message = page.evaluate(SHOW, [gone, 0])
    assert kind == "network"
    assert "cannot be reached. Is the server running?" in message
