"""What reads a cache gives the same on a cluster as here: verify, stats, and dask arrays of maps."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
from click.testing import CliRunner

import atcache
from atcache.cli.main import cli
from atcache.errors import CacheMissError
from atcache.pipelines.compare.config import CompareConfig
from atcache.pipelines.compare.run import compare
from atcache.pipelines.stats.config import StatsConfig
from atcache.pipelines.stats.run import stats
from atcache.pipelines.verify.config import VerifyConfig
from atcache.pipelines.verify.run import verify


def test_a_cluster_finds_the_damage_that_is_found_here(tiny_cache, client, tmp_path, monkeypatch):
    damaged = shutil.copytree(tiny_cache(), tmp_path / "damaged.zarr")
    shard = max((damaged / "attention/codes").rglob("*"), key=lambda file: file.is_file() and file.stat().st_size)
    content = bytearray(shard.read_bytes())
    content[len(content) // 3] ^= 1
    shard.write_bytes(content)
    monkeypatch.chdir(tmp_path)  # workers have another working folder
    here = verify(VerifyConfig(cache=damaged))
    there = verify(VerifyConfig(cache=Path("damaged.zarr"), client=client))
    assert len(here.problems) > 0
    assert replace(there, seconds=0) == replace(here, seconds=0)
    assert verify(VerifyConfig(cache=tiny_cache(), client=client, all=True)).problems == ()


def test_statistics_are_those_of_the_maps_here_and_on_a_cluster(tiny_cache, client):
    cache = atcache.open(tiny_cache())
    tokens = cache.geometry.tokens
    summary = stats(StatsConfig(cache=cache.path, sample=48, workers=2))
    for position, layer in enumerate(cache.geometry.layers):
        maps_SHQK = cache.maps(layer)[0]
        for name, numbers in (
            ("entropy_bits", atcache.stats.attention_entropy(maps_SHQK).mean(axis=(0, 2))),
            ("prefix_mass", atcache.stats.prefix_mass(maps_SHQK, tokens).mean(axis=(0, 2))),
            ("mean_distance", atcache.stats.mean_attention_distance(maps_SHQK, tokens).mean(axis=0)),
        ):
            np.testing.assert_allclose(getattr(summary, name)[position], numbers.compute(), rtol=1e-5)
    there = stats(StatsConfig(cache=cache.path, sample=48, scheduler=client.scheduler.address))
    assert replace(there, seconds=0) == replace(summary, seconds=0)


def test_caches_are_compared_on_a_cluster_as_here(tiny_cache, client):
    config = CompareConfig(a=tiny_cache(), b=tiny_cache(codec="int8"), sample=12, match_heads=True)
    here, there = compare(config), compare(replace(config, scheduler=client.scheduler.address))
    assert replace(there, seconds=0) == replace(here, seconds=0)


def test_the_command_prints_a_table_and_one_line_of_json(tiny_cache):
    shown = CliRunner().invoke(cli, ["stats", str(tiny_cache()), "--sample", "5"])
    assert shown.exit_code == 0, shown.stderr
    found = json.loads(shown.stdout)
    assert (found["num_views"], found["layers"], found["heads"]) == (5, [0, 1], [0, 1])
    lines = shown.stderr.splitlines()
    start = lines.index("mean distance, patches")
    assert lines[start + 1 : start + 3] == [
        "layer  head 0  head 1",
        "    0" + "".join(f"{number:8.3f}" for number in found["mean_distance"][0]),
    ]


def test_rows_of_the_class_token_have_no_distance(tiny_cache):
    summary = stats(StatsConfig(cache=tiny_cache(codec="logmap", queries="cls"), sample=3))
    assert summary.mean_distance is None
    assert all(0 < number <= 1 for row in summary.prefix_mass for number in row)


def test_a_cache_without_views_has_no_statistics(tiny_cache, tmp_path):
    empty = shutil.copytree(tiny_cache(), tmp_path / "empty.zarr")
    shutil.rmtree(empty / "views/status/c")
    for file in (empty / "commits").glob("*.json"):
        if file.name != "zarr.json":
            file.unlink()
    with pytest.raises(CacheMissError, match="stores no view yet"):
        stats(StatsConfig(cache=empty))


def test_maps_are_decoded_by_the_workers(tiny_cache, client):
    cache = atcache.open(tiny_cache())
    lazy = cache.maps(layer=1)
    entropy = atcache.stats.attention_entropy(lazy)
    (there,) = client.gather(client.compute([entropy]))
    np.testing.assert_array_equal(there, entropy.compute(scheduler="sync"))
    labelled = cache.to_xarray(layer=0).isel(view=0).mean(("query", "key"))
    (found,) = client.gather(client.compute([labelled.data]))
    np.testing.assert_allclose(found, labelled.values)
    opened = xr.open_dataset(tiny_cache(), chunks={})["attention"].isel(view=0, layer=0).mean(("query", "key"))
    (found,) = client.gather(client.compute([opened.data]))
    np.testing.assert_allclose(found, labelled.values, rtol=1e-6)
