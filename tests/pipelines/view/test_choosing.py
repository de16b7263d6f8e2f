"""Samples and views that are chosen while others are still on their way, rows that are none, and the strip's pictures.

Requests are held, so that answers come in the order that a test wants.
"""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import zarr
from builds import picture, write_tar
from page_driver import Page
from viewing import viewing
from web_folder import WebFolder

import atcache
from atcache.pipelines.build.run import build
from atcache.pipelines.view.config import ViewConfig
from atcache.pipelines.view.export import export

TOLERANCE = 1e-4
EPSILON = 1e-12
WHOLE = {"write_empty_chunks": True}  # as in the tables that atcache writes
FIELDS = {"views": 2, "policy": "crop-flip"}
COLUMNS = ("key", "tar", "label", "problem", "offset", "nbytes")
SEARCHES = """async (url) => {
    const cache = await atcache.openCache(url);
    const requests = [];
    for (let turn = 0; turn < 2; turn++) {
        await cache.search("digit-00047", undefined, 10);
        requests.push(cache.bytesFetched().requests);
    }
    cache.close();
    return requests;
}"""


class HeldPage(Page):
    """A page whose requests for some files wait until they are let go."""

    def __init__(self, browser, address, pattern, **options) -> None:
        super().__init__(browser, "about:blank", **options)
        self.held = []
        self._is_open = False
        if pattern:
            self.page.route(pattern, self._keep)
        self.page.goto(address)

    def _keep(self, route) -> None:
        if self._is_open:
            route.continue_()
        else:
            self.held.append(route)

    def let_go(self) -> None:
        self._is_open = True
        for route in self.held:
            route.continue_()

    def wait_for_error(self, words) -> None:
        self.wait_until("!document.querySelector('#error').hidden")
        assert words in self.text("#error")


@pytest.fixture
def open_page(browser):
    """A function: address, and the files that are held -> a page whose first picture is there."""
    opened = []

    def open_page(address, pattern=None, *, waits_for_picture=True, **options):
        page = HeldPage(browser, address, pattern, **options)
        opened.append(page)
        if waits_for_picture:
            page.wait_until("performance.getEntriesByName('first-picture').length > 0")
        return page

    yield open_page
    for page in opened:
        assert page.errors == []
        page.close()


def rechunk(path: Path, rows: int) -> Path:
    """Write the sample table again, in chunks of so many rows: that of a large cache has many."""
    root = json.loads((path / "zarr.json").read_text())
    group = zarr.open_group(path / "samples", mode="r+")
    for name in COLUMNS:
        old, values = group[name], group[name][:]
        chunks = (rows, *old.chunks[1:])
        common = {"compressors": old.compressors, "filters": old.filters, "serializer": old.serializer}
        names = old.metadata.dimension_names
        group.create_array(
            name, data=values, chunks=chunks, dimension_names=names, overwrite=True, config=WHOLE, **common
        )
        about = json.loads((path / "samples" / name / "zarr.json").read_text())
        root["consolidated_metadata"]["metadata"][f"samples/{name}"] = about
    (path / "zarr.json").write_text(json.dumps(root))
    return path


@pytest.fixture(scope="module")
def pair(tiny_cache, tmp_path_factory):
    """One teacher under two codecs; the second cache's sample table has chunks of 8 rows."""
    second = tmp_path_factory.mktemp("pair") / "second.zarr"
    shutil.copytree(tiny_cache(**FIELDS, codec="logmap:bits=4"), second)
    return tiny_cache(**FIELDS), rechunk(second, 8)


@pytest.fixture(scope="module")
def served_pair(pair):
    with viewing(*pair) as served:
        yield served.address


def divergence(pair, row, view, query):
    """KL(A || B) of layer 1, head 0, in nats."""
    a_K, b_K = (atcache.open(path).view(row, view).maps_LHQK[1, 0, query].astype(float) for path in pair)
    return float((a_K * np.log(a_K / np.maximum(b_K, EPSILON))).sum())


def shown_divergence(page):
    page.wait_until("document.querySelector('#comparison').dataset.kl !== undefined")
    page.settle()
    assert page.is_visible("#comparison")
    return page.number("document.querySelector('#comparison').dataset.kl")


def test_two_caches_are_compared_only_while_both_show_the_same_view(open_page, served_pair, pair):
    page = open_page(f"{served_pair}#sample=3&layer=1&head=0&wall=difference", "**/caches/1/views/parameters/c/1/**")
    assert shown_divergence(page) == pytest.approx(divergence(pair, 3, 0, 0), abs=TOLERANCE)
    page.press("v")
    page.wait_until("location.hash.includes('view=1')")
    a_QK = atcache.open(pair[0]).view(3, 1).maps_LHQK[1, 0]
    for row, column in ((1, 1), (3, 0)):
        page.point_at("#figure-a-canvas", row=row, column=column)
        page.wait_until(f"document.querySelector('#readout').textContent.startsWith('row {row}, column {column}: 0')")
        token = 1 + row * 4 + column
        page.wait_for_value(a_QK[token, token], TOLERANCE)
        assert not page.is_visible("#comparison")
        assert page.text("#wall-note") == ""
    page.let_go()
    assert shown_divergence(page) == pytest.approx(divergence(pair, 3, 1, 13), abs=TOLERANCE)


def test_the_second_cache_shows_the_sample_that_was_chosen_last(open_page, served_pair, pair):
    """Its search for the sample before ends last: only that one is in a part of the table that is slow to come."""
    page = open_page(f"{served_pair}#sample=39&layer=1&head=0", "**/caches/1/samples/key/c/5/**")
    page.press("n")
    page.wait_until("location.hash.includes('digit-00040')")
    page.wait_until("document.querySelector('#sample-name').textContent.includes('digit-00040')")
    page.press("p")
    assert shown_divergence(page) == pytest.approx(divergence(pair, 39, 0, 0), abs=TOLERANCE)
    assert page.held
    page.let_go()
    page.page.wait_for_timeout(1000)
    assert shown_divergence(page) == pytest.approx(divergence(pair, 39, 0, 0), abs=TOLERANCE)


def test_a_query_that_only_one_cache_stores_has_no_difference(open_page, pair, tiny_cache):
    with viewing(pair[0], tiny_cache(**FIELDS, codec="logmap:bits=4", queries="cls")) as served:
        page = open_page(f"{served.address}#sample=3&layer=1&head=0")
        shown_divergence(page)
        page.click_patch("#figure-a-canvas", row=1, column=1)
        page.wait_until("document.querySelector('#figure-b .picture').dataset.message.includes('does not store')")
        assert not page.is_visible("#comparison")


@pytest.fixture
def gapped(digits_build, tmp_path):
    """A cache in shards of 4, whose second image is damaged: its page reads the status of every sample."""
    samples = [{"png": b"no image" if row == 1 else picture(row, 64, "PNG"), "cls": "0"} for row in range(12)]
    write_tar(tmp_path / "noise.tar", samples)
    config = replace(digits_build, data=str(tmp_path / "noise.tar"), out=tmp_path / "gapped.zarr", samples_per_shard=4)
    build(replace(config, codec="int8", on_bad_image="skip"))
    return config.out


def test_of_two_choices_the_last_one_is_shown_in_whatever_order_they_come(open_page, gapped):
    with viewing(gapped) as served:
        page = open_page(f"{served.address}#sample=7", "**/views/status/c/0/2")
        page.press("n")
        page.press("p")
        page.wait_until("document.querySelector('#sample-name').textContent.includes('sample-007')")
        assert page.held
        page.let_go()
        page.wait_until("document.querySelectorAll('#samples .name').length === 12")
        page.settle()
        assert "sample-007" in page.address
        assert "sample-007" in page.text("#sample-name")


def test_a_view_that_is_not_stored_is_named_and_nothing_is_saved_for_it(open_page, gapped):
    with viewing(gapped) as served:
        page = open_page(f"{served.address}#sample=0")
        page.press("n")
        page.wait_for_error('View 0 of noise.tar/sample-001 has no stored attention: its status is "undecodable".')
        page.page.select_option("#save", "png")
        page.wait_until("document.querySelector('#said').textContent === 'There is no picture to save yet.'")


def test_what_a_growing_cache_has_by_now_is_shown_without_a_new_page(open_page, gapped, tmp_path):
    status = gapped / "views/status/c/0/1"
    status.rename(tmp_path / "later")
    with viewing(gapped) as served:
        page = open_page(f"{served.address}#sample=3")
        page.press("n")
        page.wait_for_error("noise.tar/sample-004 has no stored attention: the build has not come to it yet.")
        (tmp_path / "later").rename(status)
        time.sleep(2.5)
        page.press("p")
        page.wait_until("location.hash.includes('sample-003')")
        page.press("n")
        page.wait_until("document.querySelector('#sample-name').textContent.includes('sample-004')")
        page.wait_until("document.querySelector('#facts').textContent.startsWith('entropy')")
        assert not page.is_visible("#error")


def test_rows_between_the_parts_of_a_grown_cache_are_no_samples(open_page, digits_build, digits_tars):
    first, *_, last = digits_tars
    config = replace(digits_build, codec="int8", samples_per_shard=6)
    build(replace(config, data=str(first)))
    build(replace(config, data=f"{first.parent}/{{{first.name},{last.name}}}", grow=True))
    assert atcache.open(config.out).reader.layout.part_stops == (16, 34)
    with viewing(config.out) as served:
        page = open_page(f"{served.address}#sample=15")
        page.press("n")
        page.wait_until(f"location.hash.includes('{last.name}/')")
        page.press("p")
        page.wait_until("location.hash.includes('digit-00015')")
        page.choose("#sort", "entropy")
        page.wait_until("document.querySelector('#samples-count').textContent === '32 of 32 samples'")
        wrong = open_page(f"{served.address}#sample=16", waits_for_picture=False)
        wrong.wait_for_error("There is no sample 16 in cache.zarr: its rows are 0 to 15 and 18 to 33.")
        # The strip's requests must end before the server does.
        wrong.wait_until("document.querySelectorAll('#samples canvas').length >= 16")
        wrong.settle()


def test_only_pictures_near_the_sight_are_kept(open_page, tiny_cache):
    with viewing(tiny_cache(**FIELDS)) as served:
        page = open_page(served.address, viewport={"width": 1440, "height": 600})
        for place, there, gone in ((0, 0, 47), (10**6, 47, 0), (0, 0, 47)):
            page.wait_until(
                f"document.querySelector('#samples').scrollTop = {place}, "
                f"document.querySelector('#sample-{there} canvas') && !document.querySelector('#sample-{gone} canvas')"
            )
        page.page.fill("#search", "digit-0003")
        page.wait_until("document.querySelectorAll('#samples .tile').length === 10")
        page.wait_until("document.querySelector('#sample-30 canvas')")


@pytest.mark.parametrize("pixels", ["replay", "store"])
def test_thumbnails_of_an_exported_page_are_small(open_page, digits_build, tmp_path, pixels):
    write_tar(tmp_path / "noise.tar", [{"png": picture(row, 500, "PNG"), "cls": "0"} for row in range(4)])
    path = tmp_path / "noise.zarr"
    build(replace(digits_build, data=str(tmp_path / "noise.tar"), out=path, pixels=pixels))
    export(ViewConfig(caches=(path,), export=tmp_path / "site"), print)
    with WebFolder(site=tmp_path / "site") as web:
        page = open_page(f"{web.url}/site/index.html")
        page.wait_until("document.querySelectorAll('#samples canvas').length === 4")
        sides = page.evaluate("[...document.querySelectorAll('#samples canvas')].map((canvas) => canvas.width)")
        assert max(sides) <= 160


def test_a_second_search_through_a_large_table_fetches_nothing(open_page, tiny_cache, tmp_path):
    path = rechunk(shutil.copytree(tiny_cache(**FIELDS), tmp_path / "many.zarr"), 1)
    with viewing(path) as served:
        page = open_page(served.address)
        first, second = page.page.evaluate(SEARCHES, f"{served.address}caches/0")
        assert first > 4 * 47
        assert second == first
