"""Caches with the samples and views of another one that has several parts."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from builds import MIXED, differences, picture, write_tar

import atcache
from atcache.pipelines.build.config import BuildConfig
from atcache.pipelines.build.run import build
from atcache.pipelines.merge.config import MergeConfig
from atcache.pipelines.merge.run import merge
from atcache.store.layout import Status
from atcache.store.manifest import delete_commits


@pytest.fixture
def config(digits_build, tmp_path) -> BuildConfig:
    """Two tars of 13 and 24 images, in shards of 8."""
    for name, num_samples in (("a", 13), ("b", 24)):
        samples = [{"jpg": picture(100 * num_samples + seed), "cls": b"1"} for seed in range(num_samples)]
        write_tar(tmp_path / f"{name}.tar", samples)
    return replace(digits_build, data=str(tmp_path / "a.tar"), codec="int8", calibration_samples=4)


def grow(config):
    """A cache of the first tar that has grown by the second."""
    build(config)
    build(replace(config, data=str(config.out.parent / "b.tar"), grow=True))
    return config.out


def merged(config):
    """The same cache, of one for each tar."""
    folder = config.out.parent
    build(config)
    build(replace(config, data=str(folder / "b.tar"), out=folder / "second.zarr", codec=None, codec_from=config.out))
    merge(MergeConfig(caches=(config.out, folder / "second.zarr"), out=folder / "merged.zarr"))
    return folder / "merged.zarr"


@pytest.mark.parametrize("make", [grow, merged])
def test_mixed_views_keep_the_shards_of_their_parts(config, tmp_path, make):
    given = make(replace(config, **MIXED))
    wanted = replace(config, data=None, views_from=given, samples_per_shard=None, out=tmp_path / "again.zarr")
    build(wanted)
    cache, known = atcache.open(wanted.out), atcache.open(given)
    layout = cache.reader.layout
    assert (layout.samples_per_shard, layout.part_stops, layout.num_real_samples) == (8, (13, 40), 37)
    real_S = np.flatnonzero(cache.samples.status.values[0] != Status.NO_SAMPLE)
    assert list(real_S) == [*range(13), *range(16, 40)]
    partners = {row: cache.view(row).partner for row in real_S.tolist()}
    assert sum(partner is not None for partner in partners.values()) > 30
    assert all(partner is None or partner // 8 == row // 8 for row, partner in partners.items())
    for row in partners:
        np.testing.assert_array_equal(cache.image(row), known.image(row))
    assert not atcache.verify(cache=wanted.out, all=True).problems
    atcache.pull(cache=wanted.out, out=tmp_path / "copy.zarr")
    assert differences(tmp_path / "copy.zarr", wanted.out) == []
    atcache.pull(cache=wanted.out, out=tmp_path / "part.zarr", tars="b.tar")
    np.testing.assert_array_equal(atcache.open(tmp_path / "part.zarr").image(20), known.image(36))
    delete_commits(wanted.out, ["v0000-b000001", "v0000-b000003"])
    assert build(replace(wanted, samples_per_shard=8)).num_built_views == 13
    assert differences(wanted.out, tmp_path / "copy.zarr") == []


def test_views_that_are_not_mixed_need_no_parts(config, tmp_path):
    given = grow(config)
    build(replace(config, data=None, views_from=given, out=tmp_path / "again.zarr"))
    assert atcache.open(tmp_path / "again.zarr").reader.layout.part_stops == ()
    np.testing.assert_array_equal(atcache.open(tmp_path / "again.zarr").image(36), atcache.open(given).image(39))
