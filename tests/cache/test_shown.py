"""Caches and views in a notebook: sound HTML, with pictures if it can be, and no way in for what a cache says."""

from __future__ import annotations

import base64
import io
import shutil
from html.parser import HTMLParser

import numpy as np
import pytest
from builds import picture, write_tar
from PIL import Image

import atcache
from atcache.notebook import facts_html
from atcache.pipelines.show.config import ShowConfig
from atcache.pipelines.show.run import show

TAGS = {"div", "strong", "table", "tr", "td", "figure", "img", "figcaption"}
ATTRIBUTES = {"style", "src", "alt", "width", "height"}
HOSTILE = "</td><script>alert(1)</script>\"'onload=x $\\frac{$"


class Page(HTMLParser):
    """The text and pictures of a piece of HTML, which must be of a few harmless elements and well nested."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.text, self.pictures, self._open = "", [], []
        self.feed(html)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag, attrs):
        assert tag in TAGS, tag
        assert {name for name, _ in attrs} <= ATTRIBUTES, attrs
        if tag == "img":
            kind, _, data = dict(attrs)["src"].partition(",")
            assert kind == "data:image/png;base64"
            self.pictures.append(np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))))
        else:
            self._open.append(tag)

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        self.text += data + " "


def test_a_cache_says_what_it_is_and_shows_its_first_view(tiny_cache):
    cache = atcache.open(tiny_cache())
    page = Page(cache._repr_html_())
    assert str(cache.path) in page.text
    assert "2 layers x 2 heads x 17 x 17 (1 prefix tokens, 4 x 4 patches)" in page.text
    thumbnail, wall = page.pictures
    assert np.array_equal(thumbnail, cache.image(0))
    assert wall.shape[0] == wall.shape[1]


def test_a_view_shows_its_image_and_its_maps(tiny_cache):
    view = atcache.open(tiny_cache()).view(7)
    page = Page(view._repr_html_())
    assert f"{view.sample_key} (row 7)" in page.text
    assert np.array_equal(page.pictures[0], view.image)
    assert len(page.pictures) == 2


def test_a_cache_without_its_images_shows_text(tiny_cache, digits_tars, tmp_path):
    shutil.copytree(digits_tars[0].parent, tmp_path / "tars")
    path = tiny_cache(data=str(tmp_path / "tars"), seed=9)
    shutil.rmtree(tmp_path / "tars")
    page = Page(atcache.open(path)._repr_html_())
    assert "no picture" in page.text
    assert page.pictures == []


@pytest.fixture
def hostile(tiny_cache, tmp_path):
    """A cache whose sample and class are named to break out of HTML and of matplotlib's formulas."""
    key = HOSTILE.replace("/", "").replace("\\", "")  # what a name in a tar can be
    tars = tmp_path / "tars"
    tars.mkdir()
    samples = [{"__key__": f"{key}{number}", "png": picture(number, kind="PNG"), "cls": "0"} for number in range(8)]
    write_tar(tars / "a.tar", samples)
    (tars / "classes.txt").write_text(f"{HOSTILE}\n")
    return tiny_cache(data=str(tars)), key


def test_what_a_cache_says_is_shown_as_text_and_never_run(hostile):
    path, key = hostile
    cache = atcache.open(path)
    view = cache.view(0)
    assert view.class_name == HOSTILE
    page = Page(view._repr_html_())
    assert f"a.tar/{key}0" in page.text
    assert HOSTILE in page.text
    assert Page(cache._repr_html_()).pictures


def test_a_figure_of_hostile_names_is_drawn(hostile, tmp_path):
    path, _ = hostile
    out = tmp_path / "maps.svg"
    show(ShowConfig(cache=path, sample="0", out=out))
    assert b"<script" not in out.read_bytes()


def test_a_text_that_never_ends_is_cut():
    assert len(facts_html("x" * 10**6, {"y" * 10**6: "z" * 10**6})) < 1000
