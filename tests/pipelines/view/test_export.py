"""Exported samples are a whole cache of their own, and the exported page shows their numbers in a real browser."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from builds import MIXED, run_cli
from click.testing import CliRunner
from web_folder import WebFolder

import atcache
from atcache.cli.main import cli
from atcache.errors import CacheMissError, ConfigError
from atcache.pipelines.view.config import ViewConfig
from atcache.pipelines.view.export import export, inline_page
from atcache.pipelines.view.site import read_page

MAPS = """async ([root, view, row]) => {
    const cache = await atcache.openCache(root);
    const maps = await cache.maps(view, row);
    const all = [];
    for (let layer = 0; layer < maps.numLayers; layer++)
        for (let head = 0; head < maps.numHeads; head++) all.push(...await maps.map(layer, head));
    const image = await cache.pixels(view, row);
    cache.close();
    return [all, image && [...image.data]];
}"""


def write(out, *caches, **options):
    said: list[str] = []
    return export(ViewConfig(caches=caches, export=out, **options), said.append), said


def names_of(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("fields", [{"codec": "exact"}, {"codec": "transform"}, {"codec": "int8", "pixels": "store"}])
def test_exported_samples_are_a_whole_cache_with_the_same_maps_and_views(tiny_cache, tmp_path, fields):
    path = tiny_cache(views=2, **fields)
    summary, said = write(tmp_path / "site", path, samples="40,3-4,digits-0001.tar/digit-00020")
    assert (summary.num_samples, summary.has_images, summary.has_views) == ((4,), True, True)
    assert summary.nbytes == sum(file.stat().st_size for file in (tmp_path / "site").rglob("*") if file.is_file())
    told = re.fullmatch(r"4 samples, about ([0-9.]+) MiB", said[0])
    assert told is not None
    assert summary.nbytes < float(told[1]) * 2**20
    before, after = atcache.open(path), atcache.open(tmp_path / "site/caches/0")
    assert after.describe()["is_complete"]
    for new_row, row in enumerate((3, 4, 20, 40)):
        for view in range(2):
            moved, expected = after.view(new_row, view), before.view(row, view)
            assert (moved.sample_key, moved.label) == (expected.sample_key, expected.label)
            assert np.array_equal(moved.maps_LHQK, expected.maps_LHQK)
            assert np.array_equal(moved.image, expected.image)
            assert after.reader.pixel_hash(view, new_row) == before.reader.pixel_hash(view, row)
        assert (tmp_path / f"site/images/0/{new_row}").read_bytes() == before.source.read_bytes(row)
    verified = CliRunner().invoke(cli, ["verify", str(tmp_path / "site/caches/0")])
    assert verified.exit_code == 0, verified.output


def test_the_site_is_page_and_caches_and_names_no_path_of_this_machine(tiny_cache, digits_tars, tmp_path):
    path = tiny_cache(views=2)
    write(tmp_path / "site", path, samples="0")
    names = names_of(tmp_path / "site")
    assert {*read_page(), "site.json", "images/0/0", "caches/0/zarr.json"} <= names
    about = json.loads((tmp_path / "site/site.json").read_text())
    place = {"name": path.name, "root": "caches/0/", "images": "images/0/"}  # views are in the cache
    assert about == {"version": 1, "caches": [place]}
    secret = str(digits_tars[0].parent).encode()
    assert secret in (path / "samples/zarr.json").read_bytes()
    assert [name for name in names if secret in (tmp_path / "site" / name).read_bytes()] == []


def test_views_keep_the_samples_that_they_are_mixed_with(tiny_cache, tmp_path):
    path = tiny_cache(views=2, **MIXED)
    summary, _ = write(tmp_path / "site", path, samples="7")
    before, after = atcache.open(path), atcache.open(tmp_path / "site/caches/0")
    assert summary.num_samples[0] > 1
    keys = after.samples.sample_key.values.tolist()
    mixed = 0
    for new_row, key in enumerate(keys):
        for view in range(2):
            moved, expected = after.view(new_row, view), before.view(key, view)
            assert np.array_equal(moved.image, expected.image)
            if expected.partner is not None:
                assert keys[moved.partner] == before.reader.samples.sample_key(expected.partner)
                mixed += 1
    assert mixed


def test_a_second_cache_has_the_same_samples(tiny_cache, tmp_path):
    first, second = tiny_cache(views=2), tiny_cache(codec="int8", max_samples=20)
    common = atcache.open(second).samples.sample_key.values.tolist()
    summary, _ = write(tmp_path / "site", first, second, samples=f"0-39,{common[-1]}")
    keys = [atcache.open(tmp_path / f"site/caches/{n}").samples.sample_key.values.tolist() for n in range(2)]
    assert keys[1] == [key for key in keys[0] if key in common]
    assert summary.num_samples == (len(keys[0]), len(keys[1]))
    assert [cache["root"] for cache in json.loads((tmp_path / "site/site.json").read_text())["caches"]] == [
        "caches/0/",
        "caches/1/",
    ]


def test_without_its_tars_a_cache_is_exported_without_images_and_says_so(tiny_cache, tmp_path):
    path = shutil.copytree(tiny_cache(views=2), tmp_path / "copy.zarr")
    (tmp_path / "empty").mkdir()
    summary, said = write(tmp_path / "site", path, samples="0,1", data=str(tmp_path / "empty"))
    assert (summary.has_images, summary.has_views) == (False, False)
    assert said[0].startswith("without the views that the teacher saw: ")
    assert said[1].startswith("without the clean images: ")
    assert not (tmp_path / "site/images").exists()
    assert "images" not in json.loads((tmp_path / "site/site.json").read_text())["caches"][0]
    moved = atcache.open(tmp_path / "site/caches/0").maps(0)[0, 1].compute()
    assert np.array_equal(moved, atcache.open(path).maps(0)[0, 1].compute())


def test_the_first_32_stored_samples_are_exported_unless_others_are_named(tiny_cache, digits_build, tmp_path):
    path = tiny_cache(views=2)
    assert write(tmp_path / "site", path)[0].num_samples == (32,)
    done = run_cli(replace(digits_build, out=tmp_path / "part.zarr"), codec="exact")
    assert done.exit_code == 0, done.output
    for record in sorted((tmp_path / "part.zarr/commits").glob("v*"))[2:]:
        record.unlink()
    for shard in sorted((tmp_path / "part.zarr/views/status/c/0").iterdir())[2:]:
        shard.unlink()
    assert write(tmp_path / "half", tmp_path / "part.zarr")[0].num_samples == (16,)
    with pytest.raises(CacheMissError, match=r"view 0 of sample 20 in .* is not built yet. Choose other samples"):
        write(tmp_path / "more", tmp_path / "part.zarr", samples="3,20")


@pytest.mark.parametrize(
    ("samples", "sentence"),
    [
        ("48", "samples='48': .* has samples 0 to 47"),
        ("5-3", "samples='5-3': .* has samples 0 to 47"),
        ("0,digits-0000.tar/none", "no sample has the key 'digits-0000.tar/none'"),
        ("-1", "no sample has the key '-1'"),
        ("0,", "no sample has the key ''"),
    ],
)
def test_samples_that_are_none_are_named(tiny_cache, tmp_path, samples, sentence):
    with pytest.raises((ConfigError, CacheMissError), match=sentence):
        write(tmp_path / "site", tiny_cache(views=2), samples=samples)
    assert not list(tmp_path.iterdir())


def test_a_large_export_and_one_over_something_else_are_refused_before_they_begin(tiny_cache, tmp_path):
    path = tiny_cache(views=2)
    with pytest.raises(ConfigError, match=r"max_mib=1: the export would have about 2 MiB.* or raise --max-mib"):
        write(tmp_path / "site", path, max_mib=1)
    (tmp_path / "page.html").write_text("mine")
    with pytest.raises(ConfigError, match=r"page\.html' exists already"):
        write(tmp_path / "page.html", path)
    assert [file.name for file in tmp_path.iterdir()] == ["page.html"]


@pytest.mark.parametrize(
    ("name", "value", "read_by"),
    [
        ("port", 0, "serving"),
        ("host", "0.0.0.0", "serving"),
        ("allow_origin", "*", "serving"),
        ("browser", False, "serving"),
        ("samples", "0", "an export"),
        ("max_mib", 512.0, "an export"),
    ],
)
def test_options_that_nothing_would_read_are_refused_by_name(name, value, read_by):
    config = partial(ViewConfig, caches=("in1k.zarr",), **{name: value})
    unread, read = (None, "site") if read_by == "an export" else ("site", None)
    assert getattr(config(export=read), name) == value
    value = re.escape(repr(value))
    with pytest.raises(ConfigError, match=rf"^{name}={value} is only for {read_by}\. .*--export .*\.$"):
        config(export=unread)


def test_a_script_cannot_end_its_element():
    page = {
        "index.html": b'<head><script type="module" crossorigin src="./assets/page.js"></script>'
        b'<link rel="stylesheet" crossorigin href="./assets/page.css"></head><body></body>',
        "assets/page.js": b'a("</script><!--</SCRIPT>")',
        "assets/page.css": b"a{}",
    }
    inlined = inline_page(page, {"site.json": b"{}"}).decode()
    assert inlined == (
        r'<head><script type="module">a("\x3c/script>\x3c!--\x3c/SCRIPT>")</script><style>a{}</style></head><body>'
        '<script type="application/json" id="inlined">{"site.json": "e30="}</script>\n</body>'
    )
    with pytest.raises(ConfigError, match="make page"):
        inline_page({"index.html": b'<script src="./assets/other.js"></script><body></body>'}, {})


def check_in_browser(page, cache, rows):
    """What the page decodes, and the value that it shows under the pointer, against the package's."""
    for new_row, row in enumerate(rows):
        expected = cache.view(row, 1)
        maps, rgba = page.evaluate(MAPS, ["caches/0/", 1, new_row])
        shape_LHQK = expected.maps_LHQK.shape
        np.testing.assert_allclose(np.reshape(maps, shape_LHQK), expected.maps_LHQK, rtol=0, atol=1e-4)
        assert np.array_equal(np.reshape(rgba, (*expected.image.shape[:2], 4))[..., :3], expected.image)


@pytest.fixture
def errors_of():
    """Collects what goes wrong in a page, and which addresses it asks for."""

    def watch(page):
        page.wrong, page.asked = [], []
        page.on("pageerror", lambda error: page.wrong.append(str(error)))
        page.on("console", lambda message: page.wrong.append(message.text) if message.type == "error" else None)
        page.on("request", lambda request: page.asked.append(request.url))
        return page

    return watch


def test_the_exported_folder_on_a_plain_server_shows_the_same_numbers(browser, errors_of, tiny_cache, tmp_path):
    path = tiny_cache(views=2, codec="transform")
    write(tmp_path / "site", path, samples="2,30")
    with WebFolder(site=tmp_path / "site") as web:
        page = errors_of(browser.new_page())
        page.goto(f"{web.url}/site/index.html#view=1&layer=1&head=1")
        page.wait_for_selector("#figure-a canvas")
        page.wait_for_function("location.hash.includes('sample=digits-0000.tar/digit-00002')")
        check_in_browser(page, atcache.open(path), (2, 30))
        assert page.wrong == []
        assert [url for url in page.asked if not url.startswith((web.url, "blob:", "data:"))] == []
        page.close()


def test_one_file_shows_the_same_numbers_without_a_server(browser, errors_of, tiny_cache, tmp_path):
    path = tiny_cache(views=2, codec="transform")
    summary, _ = write(tmp_path / "page.html", path, samples="2,30")
    assert summary.nbytes == (tmp_path / "page.html").stat().st_size
    assert names_of(tmp_path) == {"page.html"}
    page = errors_of(browser.new_page())
    page.goto((tmp_path / "page.html").as_uri() + "#view=1&layer=1&head=1")
    page.wait_for_selector("#figure-a canvas")
    page.wait_for_function("location.hash.includes('sample=digits-0000.tar/digit-00002')")
    check_in_browser(page, atcache.open(path), (2, 30))
    assert page.wrong == []
    assert [url for url in page.asked if not url.startswith(("file:", "blob:", "data:"))] == []
    assert len([url for url in page.asked if url.startswith("file:")]) == 1
    page.close()
