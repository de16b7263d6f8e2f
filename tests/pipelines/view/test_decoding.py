"""The page's decoder in a real browser: its numbers are those of `Cache.maps`, for every codec and token layout."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from made_caches import write_made_cache
from made_factors import make_geometry
from safetensors.torch import save_file
from web_folder import WebFolder

import atcache
from atcache.pipelines.build.run import build
from atcache.pipelines.view.site import BUILT
from atcache.teachers.load import create_student
from atcache.teachers.names import parse_model_name

GOLDEN = Path(__file__).parents[2] / "golden" / "format-1"
TOLERANCE = 1e-4
REGISTERS = (
    "vit_tiny_patch16_224:img_size=(8,12),patch_size=2,reg_tokens=3,embed_dim=32,depth=3,num_heads=4,num_classes=10"
)

READ = """async ([url, view, row]) => {
    const cache = await atcache.openCache(url);
    const last = cache.layers.length - 1;
    const maps = await cache.maps(view, row, { first: last });
    const all = [];
    for (let layer = 0; layer < maps.numLayers; layer++)
        for (let head = 0; head < maps.numHeads; head++) all.push(...await maps.map(layer, head));
    const query = maps.numQueries - 1;
    const layersSeen = [];
    const wall = await maps.wall([query], (layer) => layersSeen.push(layer));
    const { entropy, clsMass } = await maps.statistics();
    const result = {
        shape: [maps.numLayers, maps.numHeads, maps.numQueries, maps.numKeys],
        maps: all, wall: [...wall], row: [...await maps.row(last, 0, [0, query])], layersSeen,
        entropy: [...entropy], clsMass: [...clsMass],
        rollout: maps.numQueries === maps.numKeys ? [...await maps.rollout("mean", [query])] : null,
        rolloutMax: maps.numQueries === maps.numKeys ? [...await maps.rollout("max", [0, query])] : null,
        sample: (await cache.samples(row, row + 1))[0], parameters: await cache.parameters(view, row),
        about: { layers: cache.layers, heads: cache.heads, tokens: cache.tokens, codec: cache.codec },
        fetched: cache.bytesFetched(),
    };
    cache.close();
    return result;
}"""
FAIL = """async ([url, view, row]) => {
    try {
        const cache = await atcache.openCache(url);
        try { await (await cache.maps(view, row)).wall([0]); return null; } finally { cache.close(); }
    } catch (error) { return [error.kind ?? String(error), error.message]; }
}"""


@pytest.fixture(scope="module")
def page_server():
    with WebFolder(page=BUILT) as server:
        yield server


@pytest.fixture(scope="module")
def page(browser, page_server):
    """The page without a cache: it says so, and its decoder is there."""
    page = browser.new_page()
    page.goto(f"{page_server.url}/page/index.html")
    page.wait_for_function("globalThis.atcache !== undefined")
    yield page
    page.close()


@pytest.fixture
def served(tmp_path):
    """Serves what is in `tmp_path`, from another origin than the page's."""
    with WebFolder(caches=tmp_path) as server:
        yield server


def rollout(maps_LHQK, join):
    """By whole matrices, as in the paper."""
    product = np.eye(maps_LHQK.shape[-1])
    for attn_HQK in maps_LHQK.astype(float):
        joined_QK = join(attn_HQK, axis=0)
        joined_QK /= joined_QK.sum(axis=1, keepdims=True)
        product = (joined_QK + np.eye(len(joined_QK))) / 2 @ product
    return product


def check_view(page, url, path, view, row):
    """All that the page's decoder says of a view, against the package's."""
    cache = atcache.open(path)
    read = page.evaluate(READ, [url, view, row])
    maps_LHQK = np.stack([cache.maps(layer)[view, row].compute() for layer in cache.geometry.layers])
    num_layers, num_heads, num_queries, num_keys = maps_LHQK.shape
    assert read["shape"] == list(maps_LHQK.shape)
    close = {"rtol": 0, "atol": TOLERANCE}
    np.testing.assert_allclose(np.reshape(read["maps"], maps_LHQK.shape), maps_LHQK, **close)
    np.testing.assert_allclose(
        np.reshape(read["wall"], (num_layers, num_heads, num_keys)), maps_LHQK[:, :, -1], **close
    )
    np.testing.assert_allclose(read["row"], (maps_LHQK[-1, 0, 0] + maps_LHQK[-1, 0, -1]) / 2, **close)
    assert read["layersSeen"] == [num_layers - 1, *range(num_layers - 1)]
    entropy_LH = atcache.stats.attention_entropy(maps_LHQK).mean(axis=-1)
    np.testing.assert_allclose(np.reshape(read["entropy"], (num_layers, num_heads)), entropy_LH, rtol=1e-3, atol=1e-3)
    tokens = cache.geometry.tokens
    cls_LH = maps_LHQK[..., 0].mean(axis=-1) * (tokens.num_prefix_tokens > 0)
    np.testing.assert_allclose(np.reshape(read["clsMass"], (num_layers, num_heads)), cls_LH, **close)
    if num_queries == num_keys:
        np.testing.assert_allclose(read["rollout"], rollout(maps_LHQK, np.mean)[-1], **close)
        np.testing.assert_allclose(read["rolloutMax"], rollout(maps_LHQK, np.max)[[0, -1]].mean(axis=0), **close)
    sample = cache.samples.isel(sample=row)
    assert (read["sample"]["key"], read["sample"]["label"]) == (str(sample.sample_key.values), int(sample.label))
    assert read["sample"]["status"] == sample.status.values.tolist()
    drawn = dict(zip(cache.reader.layout.parameter_names, cache.reader.parameters(view, row).tolist(), strict=True))
    assert read["parameters"] == drawn
    about = read["about"]
    assert (about["layers"], about["heads"]) == (list(cache.geometry.layers), list(cache.geometry.heads))
    assert (about["tokens"]["numPrefix"], about["codec"]) == (tokens.num_prefix_tokens, cache.codec.name)
    assert (about["tokens"]["gridHeight"], about["tokens"]["gridWidth"]) == (tokens.grid_height, tokens.grid_width)
    return read


@pytest.mark.parametrize("name", sorted(path.stem for path in GOLDEN.glob("*.zarr")))
def test_golden_caches(page, name):
    path = GOLDEN / f"{name}.zarr"
    with WebFolder(caches=GOLDEN) as served:
        url = f"{served.url}/caches/{name}.zarr"
        num_views = atcache.open(path).reader.layout.num_views
        for view, row in ((0, 0), (num_views - 1, 5)):
            check_view(page, url, path, view, row)
        kind, sentence = page.evaluate(FAIL, [url, 0, 2])
        assert kind == "unfinished-sample"
        assert sentence == "View 0 of row 2 is not stored: undecodable."


# Codecs, each with another token layout: no prefix, registers, one row of patches, heads of q that share those of k.
CODECS = ["exact", "exact:dtype=float32", "int8", "logmap", "logmap:bits=4", "transform"]
TRANSFORMS = ["transform:dct=false", "transform:predict=false", "transform:dct=false,predict=false,target_kl=0.05"]
LAYOUTS = [
    {"prefix": 0, "grid": (4, 3)},
    {"prefix": 5, "grid": (2, 5), "num_heads": 4, "num_kv_heads": 2},
    {"prefix": 1, "grid": (1, 7), "layers": (3, 4, 8), "head_dim": 6},
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=["no-prefix", "registers-grouped", "one-row"])
@pytest.mark.parametrize("codec", CODECS + TRANSFORMS)
def test_every_codec_and_token_layout(page, served, tmp_path, codec, layout):
    path = write_made_cache(tmp_path / "made.zarr", codec, make_geometry(**layout))
    check_view(page, f"{served.url}/caches/made.zarr", path, 0, 2)


@pytest.mark.parametrize("num_bias_heads", [1, 3])
@pytest.mark.parametrize("codec", ["int8", "transform"])
def test_a_bias_is_added(page, served, tmp_path, codec, num_bias_heads):
    geometry = make_geometry()
    bias = np.random.default_rng(0).normal(size=(2, num_bias_heads, 7, 7)).astype(np.float32)
    path = write_made_cache(tmp_path / "made.zarr", codec, geometry, bias_LHQK=bias)
    check_view(page, f"{served.url}/caches/made.zarr", path, 0, 1)


@pytest.mark.parametrize(
    "compressor",
    ["zstd", "gzip", "blosc-zstd-bitshuffle", "transpose-blosc-zstd-shuffle", "transpose-blosc-zstd-bitshuffle"],
)
@pytest.mark.parametrize("codec", ["exact", "exact:dtype=float32", "int8"])
def test_every_compressor(page, served, tmp_path, codec, compressor):
    path = write_made_cache(tmp_path / "made.zarr", codec, make_geometry(), compressor=compressor)
    check_view(page, f"{served.url}/caches/made.zarr", path, 0, 2)


@pytest.fixture(scope="module")
def build_with(tiny_cache, tmp_path_factory):
    """`tiny_cache` with any teacher, which gets random weights."""

    def build_with(*, teacher=None, **fields):
        if teacher is None:
            return tiny_cache(**fields)
        torch.manual_seed(0)
        weights = create_student(parse_model_name(teacher), num_classes=10).state_dict()
        path = tmp_path_factory.mktemp("weights") / "random.safetensors"
        save_file({name: tensor * 8 if "qkv.weight" in name else tensor for name, tensor in weights.items()}, path)
        return tiny_cache(teacher=teacher, weights=path, **fields)

    return build_with


@pytest.mark.parametrize(
    "fields",
    [
        {"codec": None, "queries": "cls"},
        {"codec": "int8", "layers": "1", "heads": "1"},
        {"codec": "int8", "pixels": "store", "policy": "crop-flip", "views": 2},
        {"codec": "transform", "teacher": REGISTERS + ",qk_norm=True"},
        {"codec": "transform", "teacher": REGISTERS, "heads": "1,3", "layers": "0,2"},
    ],
    ids=["cls-rows", "one-head", "pixels", "transform-qk-norm", "transform-chosen"],
)
def test_built_caches(page, build_with, fields):
    path = build_with(**fields)
    with WebFolder(caches=path.parent) as served:
        url = f"{served.url}/caches/{path.name}"
        views = atcache.open(path).reader.layout.num_views
        check_view(page, url, path, views - 1, 21)
        pixels = page.evaluate(
            "async ([url, view, row]) => { const image = await (await atcache.openCache(url)).pixels(view, row);"
            " return image && [image.height, image.width, ...image.data]; }",
            [url, views - 1, 21],
        )
    if fields.get("pixels") != "store":
        assert pixels is None
        return
    expected = atcache.open(path).image(21, views - 1)
    assert pixels[:2] == list(expected.shape[:2])
    rgba = np.reshape(pixels[2:], (*expected.shape[:2], 4))
    assert np.array_equal(rgba[..., :3], expected)
    assert (rgba[..., 3] == 255).all()


@pytest.mark.parametrize("codec", ["int8", "transform"])
def test_an_unfinished_cache_shows_what_is_there(page, served, tmp_path, codec):
    path = write_made_cache(tmp_path / "made.zarr", codec, make_geometry(), finish=False)
    url = f"{served.url}/caches/made.zarr"
    read = check_view(page, url, path, 0, 1)
    assert read["sample"]["status"] == [1]
    kind, sentence = page.evaluate(FAIL, [url, 0, 2])
    assert (kind, sentence) == ("unfinished-sample", "View 0 of row 2 is not stored: pending.")


def test_a_cache_in_two_parts(page, served, digits_build, digits_tars, tmp_path):
    first, *_, last = digits_tars
    config = replace(digits_build, out=tmp_path / "grown.zarr", codec="int8", samples_per_shard=6)
    build(replace(config, data=str(first)))
    build(replace(config, data=f"{first.parent}/{{{first.name},{last.name}}}", grow=True))
    url = f"{served.url}/caches/grown.zarr"
    assert atcache.open(config.out).reader.layout.part_stops == (16, 34)
    for row in (15, 18, 33):
        check_view(page, url, config.out, 0, row)
    kind, sentence = page.evaluate(FAIL, [url, 0, 17])
    assert (kind, sentence) == ("unfinished-sample", "View 0 of row 17 is not stored: no sample.")
    kind, sentence = page.evaluate(FAIL, [url, 0, 34])
    assert kind == "no-such-sample"
    assert "There is no view 0 of row 34: the cache has 1 views of 34 rows." in sentence


def test_samples_are_found_by_key_and_class(page, build_with):
    path = build_with(codec="int8")
    cache = atcache.open(path)
    with WebFolder(caches=path.parent) as served:
        found, rows, few, none = page.evaluate(
            """async ([url, key]) => {
                const cache = await atcache.openCache(url);
                const missing = await cache.findSample("digits-0000.tar/nobody").catch((error) => error.message);
                return [await cache.findSample(key), await cache.search("DIGIT-0001", undefined, 100),
                        await cache.search("", undefined, 3), missing];
            }""",
            [f"{served.url}/caches/{path.name}", str(cache.samples.sample_key.values[17])],
        )
    keys = cache.samples.sample_key.values
    assert found == 17
    assert rows == [row for row, key in enumerate(keys) if "digit-0001" in key]
    assert few == [0, 1, 2]
    assert none == f'No sample has the key "digits-0000.tar/nobody"; the first is "{keys[0]}".'


def test_a_search_finds_all_classes_of_a_name(page, build_with, tmp_path):
    path = shutil.copytree(build_with(codec="int8"), tmp_path / "named.zarr")
    root = json.loads((path / "zarr.json").read_text())
    # ImageNet has two cranes, the bird and the machine.
    root["consolidated_metadata"]["metadata"]["samples"]["attributes"]["classes"] = ["zero", "crane", "two", "crane"]
    (path / "zarr.json").write_text(json.dumps(root))
    label_S = atcache.open(path).samples.label.values
    with WebFolder(caches=tmp_path) as served:
        cranes, two, none = page.evaluate(
            """async (url) => {
                const cache = await atcache.openCache(url);
                return Promise.all(["crane", "two", "nobody"].map((name) => cache.search("", name, 100)));
            }""",
            f"{served.url}/caches/named.zarr",
        )
    assert cranes == [row for row, label in enumerate(label_S) if label in (1, 3)] != []
    assert two == [row for row, label in enumerate(label_S) if label == 2]
    assert none == []


def test_only_what_is_needed_is_fetched(page, build_with):
    path = build_with(codec="int8")
    layout = atcache.open(path).reader.layout
    with WebFolder(caches=path.parent) as served:
        fetched = page.evaluate(
            """async (url) => {
                const cache = await atcache.openCache(url);
                const maps = await cache.maps(0, 7);
                await maps.wall([3]); await maps.map(1, 1); await maps.statistics();
                return cache.bytesFetched();
            }""",
            f"{served.url}/caches/{path.name}",
        )
        asked = [(name.partition(".zarr/")[2], part) for method, name, part in served.log if method == "GET"]
    shard, index_nbytes = "attention/codes/c/0/0/0/0/0", layout.codes.index_nbytes
    assert [name for name, _ in asked] == ["zarr.json", shard, shard]  # the index, then all layers in one request
    assert asked[1][1] == f"bytes=-{index_nbytes}"
    first, last = map(int, asked[2][1].removeprefix("bytes=").split("-"))
    codes_nbytes = last + 1 - first
    assert codes_nbytes <= layout.codes.num_chunks_per_sample * layout.codes.max_encoded_nbytes
    assert fetched == {"requests": 3, "bytes": (path / "zarr.json").stat().st_size + index_nbytes + codes_nbytes}


def test_a_view_that_is_not_wanted_any_more_is_given_up(page, build_with):
    path = build_with(codec="transform", teacher=REGISTERS)
    with WebFolder(caches=path.parent) as served:
        url = f"{served.url}/caches/{path.name}"
        ends = page.evaluate(
            """async (url) => {
                const cache = await atcache.openCache(url);
                const leaving = new AbortController();
                const left = cache.maps(0, 1, { first: 2, signal: leaving.signal }).catch((error) => error.name);
                const waiting = cache.maps(0, 1, { first: 2 });  // the same view, for somebody else
                leaving.abort();
                const row = await (await waiting).row(2, 0, [0]);
                const late = cache.maps(0, 2, { signal: leaving.signal }).catch((error) => error.name);
                return [await left, await late, [...row]];
            }""",
            url,
        )
    assert ends[:2] == ["AbortError", "AbortError"]
    np.testing.assert_allclose(ends[2], atcache.open(path).maps(2)[0, 1, 0, 0].compute(), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("folder", ["{url}/tars", "../tars", "/data/tars", "s3://bucket/tars"])
def test_an_image_comes_from_its_tar_if_that_is_on_the_web(page, build_with, digits_tars, tmp_path, folder):
    path = shutil.copytree(build_with(codec="int8"), tmp_path / "moved.zarr")
    with WebFolder(caches=tmp_path, tars=digits_tars[0].parent) as served:
        file = path / "zarr.json"
        root = json.loads(file.read_text())
        folders = root["consolidated_metadata"]["metadata"]["samples"]["attributes"]["folders"]
        folders[:] = [folder.format(url=served.url)] * len(folders)
        file.write_text(json.dumps(root))
        image = page.evaluate(
            """async (url) => {
                const cache = await atcache.openCache(url);
                const blob = await cache.imageBlob(20);
                return blob && [...new Uint8Array(await blob.arrayBuffer())];
            }""",
            f"{served.url}/caches/moved.zarr",
        )
    source = atcache.open(build_with(codec="int8"), data=str(digits_tars[0].parent)).source
    assert image == (list(source.read_bytes(20)) if "tars" in folder and folder[0] in "{." else None)
