"""`atcache show`: its picture is made of the cache's own numbers, in three formats, with or without the images."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

import atcache
from atcache.cli.main import cli
from atcache.errors import CacheMissError, ConfigError, SourceError
from atcache.pipelines.show.config import ShowConfig
from atcache.pipelines.show.reading import read_shown
from atcache.stats import patch_grid


@pytest.fixture
def cache(tiny_cache):
    return tiny_cache()


@pytest.fixture
def moved(tiny_cache, tmp_path, digits_tars):
    """A function: fields of a build -> its cache, whose tars were moved away, and the folder where they are now."""

    def moved(**fields) -> tuple[Path, Path]:
        old, new = tmp_path / "old", tmp_path / "new"
        shutil.copytree(digits_tars[0].parent, old)
        path = tiny_cache(data=str(old), **fields)
        old.rename(new)
        return path, new

    return moved


def config_of(cache, out="maps.png", **fields) -> ShowConfig:
    return ShowConfig(**{"cache": cache, "sample": "3", "out": Path(out), **fields})


def run_show(*arguments):
    return CliRunner().invoke(cli, ["show", *map(str, arguments)])


def test_a_picture_is_drawn_and_the_result_says_what_of(cache, tmp_path):
    out = tmp_path / "new" / "maps.png"
    result = run_show(cache, 3, "--layer", 0, "--query", "1,2", "--query", "0,0", "-o", out)
    assert result.exit_code == 0, result.output
    summary = json.loads(result.stdout)
    assert (summary["layers"], summary["heads"], summary["queries"]) == ([0], ["0", "1"], ["1,2", "0,0"])
    opened = atcache.open(cache)
    maps_HQK = opened.maps(layer=0)[0, 3].compute()
    grids_Hhw = patch_grid(maps_HQK[:, [1 + 4 + 2, 1]].mean(axis=1, keepdims=True), opened.geometry.tokens)
    assert summary["top_of_scale"] == pytest.approx(np.quantile(grids_Hhw, 0.995), rel=1e-5)
    assert summary["largest"] == pytest.approx(grids_Hhw.max(), rel=1e-5)
    with Image.open(out) as picture:
        assert picture.width > 1000


def test_what_is_shown_are_the_caches_maps(tiny_cache):
    cache = tiny_cache(views=2)
    opened = atcache.open(cache)
    expected_LHQK = np.stack([opened.maps(layer=layer)[1, 3].compute() for layer in (0, 1)])
    grids_LHhw = patch_grid(expected_LHQK[:, :, :1], opened.geometry.tokens)[:, :, 0]
    shown = read_shown(opened, config_of(cache, layer="all", view=1))
    assert np.allclose(shown.maps_LHhw, grids_LHhw, atol=1e-6)
    assert np.allclose(shown.prefix_mass_LH, expected_LHQK[:, :, 0, 0], atol=1e-5)
    assert shown.image_HWC is not None
    assert np.array_equal(shown.image_HWC, opened.image(3, view=1))
    assert shown.notes == ()
    for head, expected_hw in (("1", grids_LHhw[:, 1]), ("mean", grids_LHhw.mean(1)), ("max", grids_LHhw.max(1))):
        one = read_shown(opened, config_of(cache, layer="all", view=1, head=head))
        assert np.allclose(one.maps_LHhw[:, 0], expected_hw, atol=1e-6)
    assert np.allclose(one.prefix_mass_LH[:, 0], expected_LHQK[:, :, 0, 0].max(axis=1), atol=1e-5)


def test_a_row_of_thousands_of_digits_is_no_row(cache, tmp_path):
    result = run_show(cache, "9" * 5000, "-o", tmp_path / "maps.png")
    assert (result.exit_code, "expected a row from 0 to 47" in result.stderr) == (1, True)


def test_what_was_pasted_is_named_as_the_hole_in_the_carried_map(tiny_cache):
    cache = atcache.open(tiny_cache(cutmix=1.0))
    placements = [atcache.pictures.placement(cache, sample=row) for row in range(48)]
    assert {bool(placement.hidden) for placement in placements} == {True, False}
    for is_hidden in (True, False):
        row = next(row for row, placement in enumerate(placements) if bool(placement.hidden) == is_hidden)
        notes = read_shown(cache, config_of(cache.path, sample=str(row))).notes
        assert any("pasted into it from another sample, is not carried back" in note for note in notes) == is_hidden


def test_a_cache_of_the_class_tokens_rows_shows_these(tiny_cache, tmp_path):
    cache = tiny_cache(queries="cls", codec="logmap")
    assert run_show(cache, 3, "-o", tmp_path / "maps.png").exit_code == 0
    result = run_show(cache, 3, "--query", "0,0", "-o", tmp_path / "none.png")
    assert result.exit_code == 1
    assert "the cache has the rows of the first 1 tokens only, and this is token 1" in result.stderr
    assert not (tmp_path / "none.png").exists()


@pytest.mark.parametrize("options", [["--layer", "all"], ["--head", "mean", "--scale", "each"], ["--clip", "1"]])
@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
def test_each_kind_of_file_is_written_the_same_each_time(cache, tmp_path, suffix, options):
    out = tmp_path / f"maps.{suffix}"
    assert run_show(cache, "digits-0000.tar/digit-00003", "-o", out, *options).exit_code == 0
    first = out.read_bytes()
    assert first.startswith({"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF"}[suffix])
    if suffix == "svg":
        assert b"digits-0000.tar/digit-00003" in first
        assert b"Attention says where a layer reads from" in first
    assert run_show(cache, "3", "-o", out, *options).exit_code == 0
    assert out.read_bytes() == first


def test_without_the_images_maps_are_shown_alone_with_a_note(moved, tmp_path):
    cache, now = moved(policy="crop-flip", seed=7)
    out = tmp_path / "maps.png"
    result = run_show(cache, 3, "-o", out)
    assert result.exit_code == 0, result.output
    assert "NOTE: Without the view: " in result.stderr
    shown = read_shown(atcache.open(cache), config_of(cache))
    assert (shown.image_HWC, shown.clean_HWC, shown.placement) == (None, None, None)
    there = read_shown(atcache.open(cache, data=str(now)), config_of(cache, data=str(now)))
    assert there.clean_HWC is not None
    assert there.notes == ()
    with pytest.raises(SourceError):
        read_shown(atcache.open(cache, data=str(tmp_path)), config_of(cache, data=str(tmp_path)))


def test_a_stored_view_is_shown_without_the_clean_image(moved, tmp_path):
    cache, _ = moved(pixels="store", seed=8)
    shown = read_shown(atcache.open(cache), config_of(cache))
    assert shown.image_HWC is not None
    assert shown.clean_HWC is None
    assert shown.notes[0].startswith("Without the clean image: ")
    assert run_show(cache, 3, "-o", tmp_path / "maps.png").exit_code == 0


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"sample": "48"}, CacheMissError, "sample 48 is not in .*: expected a row from 0 to 47"),
        ({"sample": "a.tar/x"}, CacheMissError, "no sample has the key 'a.tar/x'"),
        ({"layer": "7"}, CacheMissError, "layer 7 of the teacher is not stored in .*, only layers 0, 1 are"),
        ({"head": "2"}, CacheMissError, "head 2 of the teacher is not stored in .*, only heads 0, 1 are"),
        ({"view": 2}, CacheMissError, "view 2"),
        ({"query": "4,0"}, ConfigError, "query '4,0': expected cls, all, a patch as ROW,COLUMN from 0,0 to 3,3"),
        ({"layer": "last"}, ConfigError, "layer=last: expected the number of a block, or all"),
        ({"head": "first"}, ConfigError, "head=first: expected the number of a head, all, mean or max"),
        ({"out": "maps.jpg"}, ConfigError, "out=maps.jpg: expected a file that ends in .png, .svg, .pdf"),
        ({"clip": 0}, ConfigError, "clip=0"),
    ],
)
def test_what_cannot_be_shown_is_refused_in_a_sentence(cache, fields, error, message):
    with pytest.raises(error, match=message):
        read_shown(atcache.open(cache), config_of(cache, **fields))
