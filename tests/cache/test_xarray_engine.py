"""What `xr.open_dataset` gives of a cache: the maps that `Cache.maps` gives, named; and what it leaves to others."""

from __future__ import annotations

import json
import pickle
import shutil
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import dask
import numpy as np
import pytest
import xarray as xr
import zarr

import atcache
from atcache.attention.tokens import TokenLayout, token_kinds
from atcache.cache.xarray_engine import AtcacheBackend
from atcache.errors import CacheMissError
from atcache.store.layout import Status

CODECS = [{}, {"codec": "int8"}, {"codec": "logmap"}, {"codec": "transform"}, {"codec": None, "queries": "cls"}]


@pytest.fixture(scope="module")
def path(tiny_cache):
    return tiny_cache(policy="crop-flip", views=2)


@pytest.fixture
def dataset(path):
    return xr.open_dataset(path)


def whole(path) -> np.ndarray:
    """All maps of a cache, by `Cache.maps`: attn_VSLHQK."""
    cache = atcache.open(path)
    return np.stack([cache.maps(layer).compute() for layer in cache.geometry.layers], axis=2)


# What is in it


@pytest.mark.parametrize("fields", CODECS, ids=str)
def test_attention_is_that_of_the_cache_for_every_codec(tiny_cache, fields):
    path = tiny_cache(**fields)
    attention = xr.open_dataset(path)["attention"]
    expected_VSLHQK = whole(path)
    assert attention.dims == ("view", "sample", "layer", "head", "query", "key")
    assert attention.shape == expected_VSLHQK.shape
    assert attention.dtype == np.float32
    np.testing.assert_allclose(attention.values, expected_VSLHQK, atol=1e-6)
    np.testing.assert_allclose(xr.open_dataset(path, chunks={})["attention"].values, expected_VSLHQK, atol=1e-6)


def test_picks_are_those_of_numpy(dataset, path):
    attn_VSLHQK = whole(path)
    for picked in (
        {"sample": 3},
        {"view": 1, "sample": -1, "layer": 1, "head": 0, "query": 5, "key": 7},
        {"sample": [40, 3, 3, 21], "layer": [1, 0], "head": [1], "query": [0, 16], "key": [2, 1]},
        {"view": slice(None, None, -1), "sample": slice(45, 10, -9), "query": slice(1, None, 4), "key": slice(0, 0)},
        {"sample": np.arange(48) % 7 == 0, "layer": 0},
        {"view": [], "head": 1},
    ):
        expected = xr.DataArray(attn_VSLHQK, dims=dataset["attention"].dims).isel(picked)
        np.testing.assert_allclose(dataset["attention"].isel(picked).values, expected.values, atol=1e-6)
    points = {name: xr.DataArray([1, 0], dims="point") for name in ("view", "layer", "head")}
    expected = xr.DataArray(attn_VSLHQK, dims=dataset["attention"].dims).isel(points)
    np.testing.assert_allclose(dataset["attention"].isel(points).values, expected.values, atol=1e-6)


def test_a_sample_is_found_by_its_key_and_a_layer_and_head_by_the_teachers_index(tiny_cache, path, dataset):
    key = "digits-0001.tar/digit-00020"
    found = dataset.sel(sample=key, layer=1, head=1)
    np.testing.assert_allclose(found["attention"].values, whole(path)[:, 20, 1, 1], atol=1e-6)
    assert found["sample_key"].item() == key
    some = xr.open_dataset(tiny_cache(layers="1", heads="1"))
    assert (some["layer"].values.tolist(), some["head"].values.tolist()) == ([1], [1])
    np.testing.assert_allclose(
        some["attention"].sel(sample=key, layer=1, head=1).values, whole(tiny_cache())[:, 20, 1, 1], atol=1e-6
    )


def test_samples_have_labels_and_names_of_classes(digits_tars, digits_build, tmp_path):
    from dataclasses import replace

    from atcache.pipelines.build.run import build

    tars = [shutil.copy(tar, tmp_path) for tar in digits_tars[:1]]
    (tmp_path / "classes.txt").write_text("\n".join(f"Ziffer «{digit}»" for digit in range(10)))
    build(replace(digits_build, data=str(tars[0])))
    dataset, samples = xr.open_dataset(digits_build.out), atcache.open(digits_build.out).samples
    for name in ("label", "class_name", "sample_key", "status"):
        assert np.array_equal(dataset[name].values, samples[name].values)
    label = int(dataset["label"][3])
    assert dataset["class_name"][3].item() == f"Ziffer «{label}»"
    of_class = dataset["attention"].isel(sample=(dataset["label"] == label).values)
    assert (of_class["label"] == label).all()
    means = dataset["attention"].isel(view=0, layer=0, head=0, query=0).groupby("label").mean()
    np.testing.assert_allclose(means.sel(label=label), of_class[0, :, 0, 0, 0].mean("sample"), atol=1e-6)


def test_a_views_box_and_flip_are_those_that_were_drawn(dataset, path):
    cache = atcache.open(path)
    for number, name in enumerate(cache.policy.parameter_names[:9]):
        drawn_VS = [[cache.reader.parameters(view, sample)[number] for sample in range(48)] for view in range(2)]
        assert np.array_equal(dataset[name].values, drawn_VS), name
    assert dataset["flip"].isel(view=1, sample=[7, 2]).values.tolist() == [
        cache.reader.parameters(1, sample)[8] for sample in (7, 2)
    ]
    assert set(dataset["flip"].values.ravel()) == {0.0, 1.0}


def test_tokens_have_a_kind_and_patches_a_place(dataset):
    assert dataset["key_token_kind"].values.tolist() == ["cls"] + ["patch"] * 16
    assert dataset["query_patch_row"].values[:6].tolist() == [-1, 0, 0, 0, 0, 1]
    assert dataset["query_patch_column"].values[:6].tolist() == [-1, 0, 1, 2, 3, 0]
    row = dataset["attention"].isel(view=0, sample=0, layer=0, head=0).sel(query=0)
    patches = row.isel(key=(row["key_token_kind"] == "patch").values)
    grid = patches.set_index(key=["key_patch_row", "key_patch_column"]).unstack("key")
    assert np.array_equal(grid.values, patches.values.reshape(4, 4))


def test_a_teacher_without_a_class_token_has_registers_only():
    tokens = TokenLayout(num_prefix_tokens=4, grid_height=1, grid_width=2)
    assert token_kinds(tokens, "vit_betwixt_patch16_reg4_gap_256")[:5] == ["register"] * 4 + ["patch"]
    assert token_kinds(tokens, "vit_small:class_token=False,reg_tokens=4")[0] == "register"
    assert token_kinds(tokens, "vit_small_patch14_reg4_dinov2")[:2] == ["cls", "register"]


def test_chunks_are_those_of_the_shards(dataset, path):
    chunked = xr.open_dataset(path, chunks={})["attention"].variable
    assert chunked.chunksizes["sample"] == (20, 20, 8)
    assert chunked.chunksizes["view"] == (1, 1)
    assert dataset["attention"].encoding["preferred_chunks"] == dict(chunked.chunksizes)


def test_maps_and_coordinates_have_chunks_that_xarray_can_compute_with(path):
    chunked = xr.open_dataset(path, chunks={"sample": 20})
    assert chunked.chunksizes["sample"] == (20, 20, 8)
    assert chunked.chunksizes["view"] == (1, 1)
    unified = xr.open_dataset(path, chunks={}).unify_chunks()["attention"].isel(layer=0)
    assert unified.chunksizes["sample"] == (20, 20, 8)
    np.testing.assert_allclose(unified.map_blocks(lambda block: 2 * block).values, 2 * whole(path)[:, :, 0], atol=1e-6)


# Caches of all kinds


def test_a_cache_without_all_its_views_is_nan_there_and_says_why(tiny_cache, tmp_path):
    unfinished = Path(shutil.copytree(tiny_cache(policy="crop-flip", views=2), tmp_path / "part.zarr"))
    for file in (unfinished / "commits").glob("v0001-b000001.json"):
        file.unlink()
    for array in ("attention/codes", "views/parameters", "views/pixel_hash", "views/status"):
        shutil.rmtree(unfinished / array / "c/1/1", ignore_errors=True)
        (unfinished / array / "c/1/1").unlink(missing_ok=True)
    dataset = xr.open_dataset(unfinished)
    is_missing_VS = np.zeros((2, 48), bool)
    is_missing_VS[1, 20:40] = True
    assert np.array_equal(dataset["status"].values, np.where(is_missing_VS, Status.PENDING, Status.STORED))
    assert np.array_equal(np.isnan(dataset["flip"].values), is_missing_VS)
    one = dataset["attention"].isel(layer=0, head=0, query=0)
    assert np.array_equal(np.isnan(one.values).all(axis=-1), is_missing_VS)
    assert dataset["status"].attrs["flag_meanings"].split()[:2] == ["pending", "stored"]


def test_several_caches_are_opened_as_one(digits_tars, tiny_cache, tmp_path):
    parts = [tiny_cache(data=str(tar)) for tar in digits_tars]
    both = xr.open_mfdataset(parts, engine="atcache", combine="nested", concat_dim="sample")
    alone = tiny_cache()
    assert both.sizes["sample"] == 48
    key = "digits-0002.tar/digit-00040"
    np.testing.assert_allclose(both["attention"].sel(sample=key).values, whole(alone)[:, 40], atol=1e-6)
    stacked = xr.concat([xr.open_dataset(part) for part in parts[:2]], dim="sample")
    np.testing.assert_allclose(stacked["attention"].isel(sample=20).values, whole(alone)[:, 20], atol=1e-6)
    assert np.array_equal(stacked["label"].values, both["label"].values[:32])


def test_rows_between_the_parts_of_a_merged_cache_have_labels_of_their_own(digits_tars, tiny_cache, tmp_path):
    merged = tmp_path / "merged.zarr"
    atcache.merge(caches=[tiny_cache(data=str(tar)) for tar in digits_tars], out=merged)
    dataset = xr.open_dataset(merged)
    assert dataset.sizes["sample"] == 56  # 16 samples, and 4 rows without, twice; then 16 samples
    assert dataset["sample"].values[16:20].tolist() == ["#16", "#17", "#18", "#19"]
    assert dataset.indexes["sample"].is_unique
    assert (dataset["status"].values[0, 16:20] == Status.NO_SAMPLE).all()
    keys = ["digits-0002.tar/digit-00040", "digits-0000.tar/digit-00001"]
    found = dataset["attention"].sel(sample=keys)
    np.testing.assert_allclose(found.values, whole(tiny_cache())[:, [40, 1]], atol=1e-6)
    assert np.isnan(dataset["attention"].isel(sample=17).values).all()
    mean = dataset["attention"].mean("sample")  # over the samples that there are
    np.testing.assert_allclose(mean.values, whole(tiny_cache()).mean(axis=1), atol=1e-6)


# Used as a dataset


@pytest.mark.parametrize("scheduler", ["synchronous", "threads", "processes"])
def test_every_scheduler_computes_the_same(path, scheduler):
    lazy = xr.open_dataset(path, chunks={})["attention"].sel(layer=1).mean(("query", "key", "sample"))
    with dask.config.set(scheduler=scheduler, num_workers=2):
        np.testing.assert_allclose(lazy.values, whole(path)[:, :, 1].mean(axis=(1, 3, 4)), rtol=1e-4)


@pytest.mark.parametrize("chunks", [None, {}])
def test_a_pickled_dataset_is_small_and_opens_the_cache_again(path, chunks):
    dataset = xr.open_dataset(path, chunks=chunks)
    dataset["attention"].isel(sample=0).values  # noqa: B018 - so that files, locks and the decoder are there
    fresh = dataset["attention"].isel(sample=slice(1, 4))
    pickled = pickle.dumps(fresh)
    assert len(pickled) < 60_000
    np.testing.assert_allclose(pickle.loads(pickled).values, whole(path)[:, 1:4], atol=1e-6)


def test_variables_can_be_left_out(path):
    assert "flip" not in xr.open_dataset(path, drop_variables="flip").coords
    fewer = xr.open_dataset(path, drop_variables=["attention", "status", "unheard_of"])
    assert not fewer.data_vars
    assert "status" not in fewer.coords
    assert "sample" not in xr.open_dataset(path, create_default_indexes=False).indexes


def test_a_group_is_opened_as_that_of_any_zarr_store(path):
    views = xr.open_dataset(path, group="views", consolidated=False, engine="zarr")
    ours = xr.open_dataset(path, group="views")
    assert ours["status"].dims == ("view", "sample")
    assert ours.equals(views)


def test_the_array_of_a_cache_is_the_datasets(path, dataset):
    labelled = atcache.open(path).to_xarray()
    assert labelled.name == "attention"
    assert labelled.chunksizes == dataset["attention"].encoding["preferred_chunks"]
    assert labelled.identical(dataset["attention"])
    of_head = atcache.open(path).to_xarray(layer=1, heads=[1, 0])
    assert of_head.dims == ("view", "sample", "head", "query", "key")
    assert (of_head.name, of_head["layer"].item(), of_head["head"].values.tolist()) == ("attention_layer_1", 1, [1, 0])
    np.testing.assert_allclose(of_head.values, whole(path)[:, :, 1, ::-1], atol=1e-6)
    assert of_head.sel(sample="digits-0001.tar/digit-00020")["sample_key"].item() == "digits-0001.tar/digit-00020"


# Which engine opens what


def test_our_engine_is_asked_before_that_of_zarr(path):
    engines = list(xr.backends.list_engines())
    assert engines.index("atcache") < engines.index("zarr")
    (ours,) = entry_points(group="xarray.backends", name="atcache")
    assert ours.load() is AtcacheBackend
    assert xr.open_dataset(str(path)).sizes["layer"] == 2
    assert xr.open_dataset(f"{path}/").sizes["layer"] == 2


@pytest.mark.parametrize("zarr_format", [2, 3])
def test_other_zarr_stores_are_left_to_the_engine_of_zarr(tmp_path, zarr_format):
    other = tmp_path / "other.zarr"
    expected = xr.Dataset({"heat": ("row", np.arange(3.0))}, attrs={"note": "not of atcache"})
    expected.to_zarr(other, zarr_format=zarr_format, consolidated=False)
    assert not AtcacheBackend().guess_can_open(other)
    assert xr.open_dataset(other, consolidated=False).identical(expected)


def test_what_is_no_cache_is_refused_in_silence(path, tmp_path):
    guess = AtcacheBackend().guess_can_open
    assert guess(path)
    assert guess(str(path))
    (tmp_path / "file.nc").write_bytes(b"CDF\x01")
    for name, text in {
        "text": '{"attributes": {"note": "\\"atcache\\""}}',
        "list": '["atcache"]',
        "number": '{"attributes": {"atcache": 1}}',
        "broken": '{"attributes": {"atcache": {',
        "binary": "\xff\x00",
        "nested": '"atcache"' + "[" * 100_000,
        "deep": "[" * 100_000 + '"atcache"',
    }.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "zarr.json").write_text(text, encoding="latin-1")
        assert not guess(tmp_path / name), name
    for other in (tmp_path, tmp_path / "file.nc", tmp_path / "absent", path / "views", "", "\0", "~nobody/x", 7, None):
        assert not guess(other), other
    for other in (b"CDF\x01", memoryview(b"CDF"), zarr.storage.MemoryStore(), "https://user:pw@example.org/x.zarr"):
        assert not guess(other), other


def test_a_path_without_a_cache_is_an_error_that_names_it(tmp_path):
    with pytest.raises(CacheMissError, match=r"absent\.zarr is not a cache: .* does not exist"):
        xr.open_dataset(tmp_path / "absent.zarr", engine="atcache")
    with pytest.raises(FileNotFoundError):
        xr.open_dataset(tmp_path / "absent.zarr")


def test_guessing_imports_nothing_heavy(path):
    """xarray asks every engine about every file that anybody opens."""
    script = (
        "import json, sys, xarray as xr\n"
        "before = set(sys.modules)\n"
        "from atcache.cache.xarray_engine import AtcacheBackend\n"
        "answers = [AtcacheBackend().guess_can_open(place) for place in sys.argv[1:]]\n"
        "print(json.dumps([answers, sorted(set(sys.modules) - before)]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(path), str(path / "views")], capture_output=True, text=True, check=True
    )
    answers, imported = json.loads(done.stdout)
    assert answers == [True, False]
    heavy = {name.partition(".")[0] for name in imported} & {"torch", "timm", "zarr", "dask", "numcodecs", "obstore"}
    assert heavy == set()
    assert len(imported) < 60
