"""`atcache stats`: its tables, files and choices, on real caches."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil

import matplotlib
import numpy as np
import pytest
import zarr
from click.testing import CliRunner
from made_teachers import tiny_teacher
from PIL import Image

import atcache
from atcache.cli.main import cli
from atcache.errors import CacheMissError, ConfigError, CorruptCacheError, NotWritableError
from atcache.pipelines.stats.config import StatsConfig
from atcache.pipelines.stats.kinds import KINDS
from atcache.pipelines.stats.looking import spread
from atcache.pipelines.stats.means import Means
from atcache.pipelines.stats.picture import draw_tables
from atcache.pipelines.stats.run import StatsSummary, stats
from atcache.pipelines.stats.tables import NamedTable, Report


def run_stats(*arguments: object):
    done = CliRunner().invoke(cli, ["stats", *map(str, arguments)])
    assert done.exit_code == 0, done.stderr
    return json.loads(done.stdout), done.stderr


@pytest.fixture
def cache(tiny_cache):
    return atcache.open(tiny_cache(views=2))


def test_all_statistics_are_means_over_views_with_their_standard_errors(cache):
    summary = stats(StatsConfig(cache=cache.path, sample=96, all=True, workers=2))
    assert (summary.num_views, summary.layers, summary.heads) == (96, (0, 1), (0, 1))
    tokens = cache.geometry.tokens
    for position, layer in enumerate(cache.geometry.layers):
        attn_VSHQK = cache.maps(layer).compute()
        cka_VSHH, js_VSHH = atcache.stats.head_cka(attn_VSHQK), atcache.stats.head_jensen_shannon(attn_VSHQK)
        sinks = atcache.stats.sink_tokens(attn_VSHQK)
        expected = {
            "entropy_bits": atcache.stats.attention_entropy(attn_VSHQK).mean(axis=-1),
            "prefix_mass": atcache.stats.prefix_mass(attn_VSHQK, tokens).mean(axis=-1),
            "self_mass": atcache.stats.self_mass(attn_VSHQK).mean(axis=-1),
            "largest_mass": atcache.stats.largest_mass(attn_VSHQK, 10).mean(axis=-1),
            "sink_mass": sinks.mass,
            "num_sinks": sinks.is_sink_K.sum(axis=-1),
            "mean_distance": atcache.stats.mean_attention_distance(attn_VSHQK, tokens),
            "head_divergence_bits": atcache.stats.head_divergence(attn_VSHQK),
            "effective_rank": atcache.stats.effective_rank(attn_VSHQK),
            "head_cka": cka_VSHH[..., [0, 1], [1, 0]],  # of two heads, each has one other
            "head_js_bits": js_VSHH[..., [0, 1], [1, 0]],
        }
        assert {table.name for table in summary.tables()} == expected.keys()
        for name, values_VSH in expected.items():
            views_NH = np.asarray(values_VSH, np.float64).reshape(96, 2)
            np.testing.assert_allclose(getattr(summary, name)[position], views_NH.mean(axis=0), rtol=1e-5, atol=1e-6)
            error_H = views_NH.std(axis=0, ddof=1) / np.sqrt(96)
            np.testing.assert_allclose(summary.standard_errors[name][position], error_H, rtol=1e-3, atol=1e-7)


def test_the_summary_has_a_member_for_each_statistic():
    assert KINDS.keys() <= StatsSummary.__dataclass_fields__.keys()


def test_statistics_that_make_no_sense_are_left_out(tiny_cache):
    summary = stats(StatsConfig(cache=tiny_cache(codec="logmap", queries="cls"), sample=3, all=True, heads="1"))
    assert {table.name for table in summary.tables()} == {"entropy_bits", "prefix_mass", "self_mass", "largest_mass"}
    single = stats(StatsConfig(cache=tiny_cache(), sample=1))
    assert single.standard_errors is None
    assert single.head_cka is None


def test_registers_are_told_from_the_class_token(tiny_cache, tmp_path):
    path = tiny_cache(**tiny_teacher(tmp_path, reg_tokens=2))
    summary = stats(StatsConfig(cache=path, sample=4))
    masses = [np.array(getattr(summary, name)) for name in ("prefix_mass", "cls_mass", "register_mass")]
    assert (masses[1] > 0).all()
    assert (masses[2] > 0).all()
    np.testing.assert_allclose(masses[1] + masses[2], masses[0], rtol=1e-6)


def test_layers_and_heads_are_chosen(cache):
    whole = stats(StatsConfig(cache=cache.path, sample=5))
    part = stats(StatsConfig(cache=cache.path, sample=5, layers="1", heads="1"))
    assert (part.layers, part.heads) == ((1,), (1,))
    assert part.entropy_bits[0][0] == pytest.approx(whole.entropy_bits[1][1], rel=1e-6)
    with pytest.raises(ConfigError, match="layer 2 does not exist: the model has 2"):
        stats(StatsConfig(cache=cache.path, layers="0-2"))


def test_a_layer_that_is_not_stored_is_named_with_those_that_are(tiny_cache):
    with pytest.raises(CacheMissError, match=r"layer 0 is not stored in .*, which has layers 1\."):
        stats(StatsConfig(cache=tiny_cache(layers="1"), layers="0,1"))


def test_files_hold_what_is_printed(cache, tmp_path):
    names = ("t.csv", "t.json", "t.png", "t.svg", "t.pdf")
    outputs = [argument for name in names for argument in ("--out", tmp_path / name)]
    found, text = run_stats(cache.path, "--sample", 6, *outputs, "--per-view", tmp_path / "views.csv")
    assert json.loads((tmp_path / "t.json").read_text()) == found
    with (tmp_path / "t.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["layer"], row["head"]) for row in rows] == [("0", "0"), ("0", "1"), ("1", "0"), ("1", "1")]
    assert float(rows[2]["entropy_bits"]) == found["entropy_bits"][1][0]
    assert float(rows[1]["self_mass_standard_error"]) == found["standard_errors"]["self_mass"][0][1]
    with (tmp_path / "views.csv").open() as file:
        views = list(csv.DictReader(file))
    assert len(views) == 6 * 4
    assert {row["sample_key"] for row in views} <= set(cache.samples.sample_key.values.tolist())
    mean = np.mean([float(row["mean_distance"]) for row in views if (row["layer"], row["head"]) == ("1", "0")])
    assert mean == pytest.approx(found["mean_distance"][1][0], rel=1e-5)
    with Image.open(tmp_path / "t.png") as picture:
        assert min(picture.size) > 300
        assert len(picture.convert("RGB").getcolors(2**24)) > 50  # not a blank page
    assert (tmp_path / "t.svg").read_text().startswith("<?xml")
    assert (tmp_path / "t.pdf").read_bytes().startswith(b"%PDF")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*names, "views.csv"])
    assert re.search(r"^standard errors are at most \d", text, re.MULTILINE)


def test_a_file_that_cannot_be_written_is_refused_before_the_work(cache, tmp_path):
    (tmp_path / "folder.csv").mkdir()
    (tmp_path / "closed").mkdir(mode=0o500)
    for fields, error, message in (
        ({"out": "tables.xlsx"}, ConfigError, r"out='tables.xlsx': expected a name that ends in .csv, .json, .png"),
        ({"per_view": "views.json"}, ConfigError, r"per_view='views.json': expected a name that ends in .csv\."),
        ({"out": tmp_path / "folder.csv"}, ConfigError, "is a folder: expected the name of a file"),
        ({"out": tmp_path / "none" / "t.csv"}, ConfigError, "there is no folder .*none. Make it first"),
        ({"out": "t.csv", "per_view": "t.csv"}, ConfigError, "t.csv would be written twice"),
    ):
        fields = {**fields, "out": (fields["out"],)} if "out" in fields else fields
        with pytest.raises(error, match=message):
            StatsConfig(cache=cache.path, **fields)
    if os.geteuid() != 0:  # root may write anywhere
        with pytest.raises(NotWritableError, match="closed is read-only"):
            StatsConfig(cache=cache.path, out=(tmp_path / "closed" / "t.csv",))


def test_an_error_in_between_leaves_no_half_table(tiny_cache, tmp_path):
    damaged = shutil.copytree(tiny_cache(), tmp_path / "damaged.zarr")
    shard = max((damaged / "attention/codes").rglob("*"), key=lambda file: file.is_file() and file.stat().st_size)
    content = bytearray(shard.read_bytes())
    content[len(content) // 3] ^= 1
    shard.write_bytes(content)
    (tmp_path / "views.csv").write_text("of an earlier run")
    done = CliRunner().invoke(cli, ["stats", str(damaged), "--per-view", str(tmp_path / "views.csv")])
    assert done.exit_code == 1
    assert (tmp_path / "views.csv").read_text() == "of an earlier run"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["damaged.zarr", "views.csv"]


def test_means_and_errors_are_those_of_numpy():
    values_NKLH = 1e6 + np.random.default_rng(0).normal(size=(50, 2, 3, 4))
    means = Means()
    means.add(values_NKLH[0])
    assert means.standard_error_KLH is None
    for value_KLH in values_NKLH[1:]:
        means.add(value_KLH)
    np.testing.assert_allclose(means.mean_KLH, values_NKLH.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(means.standard_error_KLH, values_NKLH.std(axis=0, ddof=1) / np.sqrt(50), rtol=1e-8)


@pytest.mark.parametrize(("count", "most"), [(10, 3), (3, 10), (96, 96), (1, 1), (0, 4)])
def test_views_are_spread_evenly_and_none_comes_twice(count, most):
    chosen = spread(np.arange(count), most).tolist()
    assert len(chosen) == len(set(chosen)) == min(count, most)
    assert all(abs(gap - count / len(chosen)) <= 1 for gap in np.diff(chosen))


def test_maps_that_are_no_numbers_are_refused_and_not_averaged(tiny_cache, tmp_path):
    path = shutil.copytree(tiny_cache(), tmp_path / "nan.zarr")
    codes = zarr.open_group(path, mode="r+", use_consolidated=False)["attention/codes"]
    codes[0, 3, 1] = 0x7E00  # NaN
    told = r"nan.zarr: the maps of layer 1 in view 0 of sample 'digits-0000.tar/.*' hold NaN or infinity"
    with pytest.raises(CorruptCacheError, match=told):
        stats(StatsConfig(cache=path, sample=48))
    assert np.isfinite(stats(StatsConfig(cache=path, sample=48, layers="0")).entropy_bits).all()
    with pytest.raises(CorruptCacheError, match=told):
        atcache.compare(a=tiny_cache(), b=path, sample=48)
    with pytest.raises(CorruptCacheError, match=told):
        atcache.show(cache=path, sample="3", out=tmp_path / "maps.png")


def test_a_path_is_drawn_as_it_is_and_equal_numbers_have_a_scale_from_0(tmp_path):
    table = NamedTable(name="sink_mass", title="share on sinks", mean=((0.0, 0.0),), standard_error=None)
    headline = "/data/$x^^$/" + "long-" * 20 + ".zarr: means over 3 views"
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        draw_tables(tmp_path / "t.svg", Report(headline=headline, layers=(0,), heads=(0, 1), tables=(table,)), "svg")
    drawn = (tmp_path / "t.svg").read_text()
    assert "/data/$x^^$/" in drawn
    assert headline not in drawn  # it has several lines
    assert "\N{MINUS SIGN}" not in drawn


def test_how_many_keys_count_as_the_largest_can_be_said(cache):
    found, printed = run_stats(cache.path, "--sample", 96, "--largest", 3)
    assert found["largest"] == 3
    expected_H = atcache.stats.largest_mass(cache.maps(1).compute(), 3).mean(axis=(0, 1, 3))
    np.testing.assert_allclose(found["largest_mass"][1], expected_H, rtol=1e-5)
    assert "share on the 3 largest keys of each row" in printed
