"""What `atcache.open` returns: lazy maps equal to the teacher's, replayed images proved, misses named."""

from __future__ import annotations

import pickle
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import dask
import dask.array as da
import numpy as np
import pytest
import torch
import xarray as xr
from hypothesis import given, strategies as st
from made_records import made_attributes

import atcache
from atcache.attention.factors import LayerFactors
from atcache.attention.geometry import FactorGeometry
from atcache.attention.tokens import TokenLayout
from atcache.cache.cache import Cache
from atcache.cache.lazy_layers import plan_sample_chunks
from atcache.codecs.registry import parse_codec
from atcache.errors import CacheMismatchError, CacheMissError, CorruptCacheError, SourceError
from atcache.images.source import SampleIndex, Source, index_source
from atcache.stats import attention_entropy
from atcache.store.layout import Status, StoreLayout
from atcache.store.tables import write_array
from atcache.store.writer import TaskWriter, create_cache, encode_pixels, encode_view, finish_cache
from atcache.views.apply import library_versions
from atcache.views.policy import PARAMETER_NAMES, ViewPolicy
from atcache.views.rendering import Renderer

GEOMETRY = FactorGeometry(
    layers=(1, 4, 5),
    heads=(0, 2, 3, 7),
    num_model_heads=8,
    num_kv_heads=2,
    head_dim=8,
    tokens=TokenLayout(num_prefix_tokens=1, grid_height=2, grid_width=2),
    scale=0.35,
)
POLICY = ViewPolicy(name="crop-flip", seed=3, image_height=8, image_width=8)
BAD_SAMPLE = 6
NUM_VIEWS = 2


def draw_factors(num_samples: int, bias_LHQK: torch.Tensor) -> list[list[LayerFactors]]:
    """Random factors of each view and layer: grouped keys, and a bias of each layer and head."""
    generator = torch.Generator().manual_seed(0)

    def draw(num_heads):
        # Rounded to float16, so that codec exact gives them back bit for bit.
        return (2 * torch.randn(num_samples, num_heads, 5, 8, generator=generator)).half().float()

    return [
        [LayerFactors(q_BHTD=draw(4), k_BHTD=draw(2), scale=0.35, bias=bias_HQK[None]) for bias_HQK in bias_LHQK]
        for _ in range(NUM_VIEWS)
    ]


BIAS_LHQK = torch.linspace(-1, 1, 3 * 4 * 25).reshape(3, 4, 5, 5)


def build(path, tars, *, pixels=None, geometry=GEOMETRY, num_tasks=None, codec="exact"):
    """A cache of the digits with random attention; `num_tasks` stops early."""
    index = index_source(tars)
    source, coder = Source(index), parse_codec(codec).coder(geometry, {}, bias_LHQK=BIAS_LHQK)
    factors = draw_factors(index.num_samples, BIAS_LHQK)
    codes_VSLTC = [coder.encode(layers).numpy() for layers in factors]
    layout = StoreLayout(
        num_views=NUM_VIEWS,
        num_samples=index.num_samples,
        num_layers=3,
        num_tokens=5,
        num_components=coder.num_components,
        codes_dtype=str(coder.codes_dtype).removeprefix("torch."),
        samples_per_shard=10,
        layers_per_chunk=1,
        parameter_names=PARAMETER_NAMES,
        pixels=pixels,
    )
    attributes = made_attributes(layout, index, geometry, POLICY, parse_codec(codec).to_json())
    create_cache(path, layout, attributes, index, {}, BIAS_LHQK.numpy())
    renderer = Renderer(source, POLICY, skip_bad=False)
    for task in layout.tasks()[:num_tasks]:
        writer = TaskWriter(path, layout, task)
        for sample in range(task.start, task.stop):
            if sample == BAD_SAMPLE:
                writer.add(sample, status=Status.UNDECODABLE)
                continue
            view = renderer.render(sample, task.view)
            writer.add(
                sample,
                status=Status.STORED,
                parameters_P=view.parameters_P,
                pixel_hash=view.pixel_hash,
                chunks=encode_view(layout, codes_VSLTC[task.view][sample]),
                pixels_chunk=None if pixels is None else encode_pixels(layout, view.pixels_HWC),
            )
        writer.commit({"row_kl_nats": 0.0})
    if num_tasks is None:
        finish_cache(path)
    return path


@pytest.fixture(scope="module")
def path(digits_tars, tmp_path_factory):
    return build(tmp_path_factory.mktemp("cache") / "digits.zarr", digits_tars)


@pytest.fixture
def cache(path):
    return atcache.open(path)


@pytest.fixture(scope="module")
def expected_LVSHQK():
    """The maps of the factors that were stored, NaN for the bad sample."""
    maps = np.stack([[layer.maps().numpy() for layer in view] for view in draw_factors(48, BIAS_LHQK)], axis=1)
    maps[:, :, BAD_SAMPLE] = np.nan
    return maps


# Maps


@pytest.mark.parametrize(("position", "layer"), list(enumerate(GEOMETRY.layers)))
def test_maps_equal_those_of_the_stored_factors(cache, expected_LVSHQK, position, layer):
    maps = cache.maps(layer=layer)
    assert isinstance(maps, da.Array)
    assert maps.dtype == np.float32
    assert np.allclose(maps.compute(), expected_LVSHQK[position], atol=1e-6, equal_nan=True)


def test_heads_are_the_teachers_and_come_in_the_order_asked_for(cache, expected_LVSHQK):
    assert np.allclose(
        cache.maps(4, heads=np.array([7, 2])).compute(), expected_LVSHQK[1][:, :, [3, 1]], atol=1e-6, equal_nan=True
    )


@pytest.mark.parametrize(
    "index",
    [
        np.s_[1, 13],
        np.s_[0, 3:30:4, 1:3, 0],
        np.s_[:, [2, 40, 7]],
        np.s_[..., 2],
        np.s_[1, ::-9, -1, :, 1:],
        np.s_[:, 20:20],
        np.s_[0, 12, [3, 0]],
    ],
)
def test_slicing_before_and_after_computing_are_the_same(cache, expected_LVSHQK, index):
    assert np.allclose(cache.maps(5)[index].compute(), expected_LVSHQK[2][index], atol=1e-6, equal_nan=True)


def test_a_slice_reads_only_the_samples_it_needs(path, tmp_path, expected_LVSHQK):
    """All shards but one are gone: what lies in that one can still be computed."""
    copy = Path(shutil.copytree(path, tmp_path / "copy.zarr"))
    for view, block in ((0, 0), (0, 1), (0, 2), (0, 4), (1, 0)):
        (copy / f"attention/codes/c/{view}/{block}/0/0/0").unlink()
    maps = atcache.open(copy).maps(1)
    assert np.allclose(maps[0, 30:40].compute(), expected_LVSHQK[0][0, 30:40], atol=1e-6)
    with pytest.raises(CorruptCacheError, match="it lacks sample 0, which was committed"):
        maps[0, 0].compute()


def test_maps_work_with_processes_as_with_threads(cache, expected_LVSHQK):
    maps = cache.maps(1)[0, 8:12]
    with dask.config.set(scheduler="processes", num_workers=1):
        assert np.allclose(maps.compute(), expected_LVSHQK[0][0, 8:12], atol=1e-6)


def test_statistics_stay_lazy_over_maps(cache, expected_LVSHQK):
    entropy = attention_entropy(cache.maps(1)).mean(axis=-1)
    assert isinstance(entropy, da.Array)
    assert np.allclose(
        entropy.compute(), attention_entropy(expected_LVSHQK[0]).mean(axis=-1), atol=1e-5, equal_nan=True
    )


def test_dask_chunks_follow_the_shards(cache):
    assert cache.maps(1).chunks == ((1, 1), (10, 10, 10, 10, 8), (4,), (5,), (5,))


@given(st.integers(1, 500), st.integers(1, 90), st.integers(1, 10_000), st.integers(1, 100_000))
def test_dask_chunks_never_cross_a_shard_and_stay_within_their_target(num_samples, block, nbytes, target):
    layout = StoreLayout(
        num_views=1,
        num_samples=num_samples,
        num_layers=1,
        num_tokens=1,
        num_components=1,
        codes_dtype="int8",
        samples_per_shard=block,
        layers_per_chunk=1,
        parameter_names=("p",),
    )
    chunks = plan_sample_chunks(layout, nbytes, target)
    ends = np.cumsum(chunks)
    assert ends[-1] == num_samples
    assert all(end in ends for end in range(block, num_samples, block))
    assert all(size == 1 or size * nbytes <= target for size in chunks)


def test_a_layer_or_head_that_is_not_stored_is_a_miss_that_lists_those_that_are(cache):
    with pytest.raises(CacheMissError, match=r"layer 2 of the teacher is not stored in .*, only layers 1, 4, 5 are\."):
        cache.maps(layer=2)
    with pytest.raises(CacheMissError, match=r"head 1 of the teacher is not stored in .*, only heads 0, 2, 3, 7 are\."):
        cache.maps(layer=1, heads=[0, 1])
    with pytest.raises(CacheMissError, match=r"view 2 is not in .*: it has 2 views"):
        cache.factors(layer=1, view=2)


def test_factors_give_the_maps_and_what_was_stored(cache, expected_LVSHQK):
    q_VSHTD, k_VSHTD, scale, bias_HQK, v_VSHTD = cache.factors(layer=4)
    assert v_VSHTD is None
    stored = draw_factors(48, BIAS_LHQK)[1][1]
    assert np.array_equal(q_VSHTD[1, 5].compute(), stored.q_BHTD[5].numpy())
    assert np.array_equal(k_VSHTD[1, 5].compute(), stored.k_BHTD[5].numpy())
    assert np.isnan(q_VSHTD[0, BAD_SAMPLE].compute()).all()
    keys_HTD = np.repeat(k_VSHTD[1, 5].compute(), 2, axis=0)
    logits_HQK = scale * q_VSHTD[1, 5].compute() @ keys_HTD.swapaxes(-1, -2) + bias_HQK
    maps_HQK = np.exp(logits_HQK) / np.exp(logits_HQK).sum(axis=-1, keepdims=True)
    assert np.allclose(maps_HQK, expected_LVSHQK[1, 1, 5], atol=1e-6)


def test_factors_of_one_view_keep_the_view_axis(cache):
    both, second = cache.factors(4), cache.factors(4, view=1)
    assert second.q_VSHTD.shape == (1, 48, 4, 5, 8)
    assert np.array_equal(second.k_VSHTD.compute(), both.k_VSHTD[1:].compute(), equal_nan=True)


def test_to_xarray_names_axes_and_finds_heads_by_the_teachers_index(cache, expected_LVSHQK):
    maps = cache.to_xarray(1)
    assert maps.dims == ("view", "sample", "head", "query", "key")
    assert np.allclose(maps.sel(head=7).isel(view=0, sample=9).to_numpy(), expected_LVSHQK[0, 0, 9, 3], atol=1e-6)
    assert maps.sample_key.to_numpy()[17] == "digits-0001.tar/digit-00017"


def test_heads_and_rows_of_grouped_keys_with_a_bias_are_picked_alone(path, expected_LVSHQK):
    expected_VSLHQK = np.moveaxis(expected_LVSHQK, 0, 2)
    attention = xr.open_dataset(path)["attention"]
    for picked in (
        {"head": 2, "query": 3},
        {"sample": [9, 6, 2], "layer": [2, 0], "head": [3, 1], "query": [4, 0], "key": [1, 2]},
    ):
        expected = xr.DataArray(expected_VSLHQK, dims=attention.dims).isel(picked)
        np.testing.assert_allclose(attention.isel(picked).values, expected.values, atol=1e-6)
    assert attention.sel(layer=4, head=7).isel(sample=BAD_SAMPLE).isnull().all()


# Single views


def test_a_view_holds_what_the_teacher_saw_and_where_it_looked(cache, digits_tars, expected_LVSHQK):
    source = Source(index_source(digits_tars))
    view = cache.view(20, view=1)
    assert np.array_equal(view.image, Renderer(source, POLICY, skip_bad=False).render(20, 1).pixels_HWC)
    assert np.allclose(view.maps_LHQK, expected_LVSHQK[:, 1, 20], atol=1e-6)
    assert (view.sample, view.view, view.status) == (20, 1, Status.STORED)
    assert view.sample_key == "digits-0001.tar/digit-00020"
    assert view.label == source.index.label_S[20]


def test_a_view_is_found_by_its_sample_key(cache):
    assert cache.view("digits-0002.tar/digit-00040").sample == 40
    with pytest.raises(
        CacheMissError, match=r"no sample has the key 'x/y' in .*; the first is 'digits-0000.tar/digit-0"
    ):
        cache.view("x/y")


def test_stored_pixels_are_the_replayed_ones_and_need_no_tars(cache, digits_tars, tmp_path):
    tars = [Path(shutil.copy(tar, tmp_path)) for tar in digits_tars]
    stored = atcache.open(build(tmp_path / "pixels.zarr", tars, pixels=(8, 8)))
    for tar in tars:
        tar.unlink()
    assert np.array_equal(stored.image(33, 1), cache.image(33, 1))


def test_a_bad_sample_is_a_miss_that_says_why(cache):
    with pytest.raises(
        CacheMissError, match=r"sample 6 \('digits-0000.tar/digit-00006'\) is not stored .*: undecodable"
    ):
        cache.view(BAD_SAMPLE)


def test_moved_tars_are_named_and_found_with_data(path, digits_tars, tmp_path):
    copy = Path(shutil.copytree(path, tmp_path / "copy.zarr"))
    file = copy / "samples" / "zarr.json"
    file.write_text(file.read_text().replace(str(digits_tars[0].parent), "/gone"))
    with pytest.raises(SourceError, match=r"/gone/digits-0000.tar cannot be opened"):
        atcache.open(copy).view(0)
    moved = Cache(copy, data=digits_tars[0].parent)
    assert np.array_equal(moved.view(0).image, atcache.open(path).view(0).image)
    assert np.array_equal(pickle.loads(pickle.dumps(moved)).view(0).image, moved.view(0).image)


def test_an_image_that_is_not_the_one_the_teacher_saw_is_refused_with_both_library_versions(path, tmp_path):
    copy = Path(shutil.copytree(path, tmp_path / "copy.zarr"))
    shutil.copy(copy / "views/pixel_hash/c/0/1/".rstrip("/"), copy / "views/pixel_hash/c/0/0")
    with pytest.raises(CacheMismatchError, match=r"digit-00000.*differs from the one the teacher saw"):
        atcache.open(copy).view(0)
    root = copy / "zarr.json"
    root.write_text(root.read_text().replace(f'"pillow": "{library_versions()["pillow"]}"', '"pillow": "1.1.7"'))
    with pytest.raises(
        CacheMismatchError, match=rf"pillow 1\.1\.7 at build time and {library_versions()['pillow']} now"
    ):
        atcache.open(copy).view(0)


# What a cache says of itself


def test_the_sample_table_has_keys_labels_and_the_status_of_each_view(cache, digits_tars):
    samples, index = cache.samples, index_source(digits_tars)
    assert samples.sample_key.to_numpy().tolist() == [index.sample_key(row) for row in range(48)]
    assert samples.label.to_numpy().tolist() == index.label_S.tolist()
    assert samples.status.dims == ("view", "sample")
    assert np.flatnonzero(samples.status.to_numpy()[1] != Status.STORED).tolist() == [BAD_SAMPLE]


def test_describe_counts_and_measures(cache, path):
    said = cache.describe()
    shards = [file for name in ("attention/codes", "views") for file in (path / name).rglob("c/**/*") if file.is_file()]
    codes = [file for file in (path / "attention/codes").rglob("c/**/*") if file.is_file()]
    assert said["is_complete"]
    assert (said["num_stored"], said["num_bad"], said["num_tasks"], said["num_tasks_done"]) == (94, 2, 10, 10)
    assert said["nbytes"] == sum(file.stat().st_size for file in shards)
    assert said["codes_nbytes_per_view"] == round(sum(file.stat().st_size for file in codes) / 94)
    assert said["map_nbytes_per_view"] == 3 * 4 * 5 * 5 * 2
    assert said["layers"] == [1, 4, 5]
    assert (said["teacher"]["name"], said["teacher"]["depth"]) == ("random", 6)
    assert said["codec"] == {"name": "exact", "dtype": "float16"}
    assert said["quality"] == {"row_kl_nats": {"mean": 0.0, "max": 0.0}}


def test_an_unfinished_cache_can_be_looked_at(digits_tars, tmp_path, expected_LVSHQK):
    cache = atcache.open(build(tmp_path / "half.zarr", digits_tars, num_tasks=3))
    said = cache.describe()
    assert not said["is_complete"]
    assert (said["num_tasks_done"], said["num_tasks"], said["num_stored"], said["num_bad"]) == (3, 10, 29, 1)
    maps = cache.maps(1).compute()
    assert np.allclose(maps[0, :30], expected_LVSHQK[0, 0, :30], atol=1e-6, equal_nan=True)
    assert np.isnan(maps[0, 30:]).all()
    assert np.isnan(maps[1]).all()


def test_a_cache_nothing_was_built_into_can_be_described(digits_tars, tmp_path):
    said = atcache.open(build(tmp_path / "empty.zarr", digits_tars, num_tasks=0)).describe()
    assert said["num_stored"] == 0
    assert said["times_smaller_than_float16_maps"] is None


def test_attributes_that_do_not_make_sense_are_named(path, tmp_path):
    copy = Path(shutil.copytree(path, tmp_path / "copy.zarr"))
    root = copy / "zarr.json"
    root.write_text(root.read_text().replace('"geometry"', '"geometri"'))
    with pytest.raises(CorruptCacheError, match=r'zarr\.json has no "geometry"'):
        atcache.open(copy).maps(1)
    root.write_text(root.read_text().replace('"geometri"', '"geometry"').replace('"head_dim"', '"head_dimension"'))
    with pytest.raises(CorruptCacheError, match=r'zarr\.json has no "geometry\.head_dim"'):
        atcache.open(copy).maps(1)


def test_of_duplicate_keys_the_good_sample_is_meant(tmp_path, digits_tars):
    index = index_source(digits_tars)
    keys_S, problem_S = index.keys_S.copy(), index.problem_S.copy()
    keys_S[4], problem_S[3] = keys_S[3], 4
    index = replace(index, keys_S=keys_S, problem_S=problem_S)
    assert isinstance(index, SampleIndex)
    layout = atcache.open(build(tmp_path / "a.zarr", digits_tars, num_tasks=0)).reader.layout
    attributes = made_attributes(layout, index, GEOMETRY, POLICY, parse_codec("exact").to_json())
    create_cache(tmp_path / "b.zarr", layout, attributes, index, {})
    assert atcache.open(tmp_path / "b.zarr").find_sample("digits-0000.tar/digit-00003") == 4


def test_a_key_that_is_no_unicode_text_is_a_miss(cache):
    """As a shell gives one whose bytes are not UTF-8."""
    for key in ("digits-0000.tar/\udcff", "digits-0000.tar/\ud800"):
        with pytest.raises(CacheMissError, match="no sample has the key"):
            cache.find_sample(key)


@pytest.mark.parametrize(
    ("bias", "message"),
    [
        (np.zeros((3, 2, 5, 5), np.float32), r"has shape \(3, 2, 5, 5\) and type float32, expected \(3, 4, 5, 5\) or "),
        (np.zeros((3, 1, 5, 6), np.float32), r"has shape \(3, 1, 5, 6\) .* or \(3, 1, 5, 5\) and float32, as the"),
        (np.zeros((3, 4, 5, 5), np.float16), r"and type float16, expected .* and float32"),
        (np.full((3, 1, 5, 5), np.nan, np.float32), r"attention/bias holds a NaN, expected numbers"),
    ],
)
def test_a_bias_that_is_not_of_these_layers_and_heads_is_refused(path, tmp_path, bias, message):
    copy = Path(shutil.copytree(path, tmp_path / "copy.zarr"))
    shutil.rmtree(copy / "attention/bias")
    write_array(copy, "attention/bias", bias, None)
    with pytest.raises(CorruptCacheError, match=message):
        atcache.open(copy).maps(1)[0, 0].compute()


@pytest.mark.parametrize("num_heads", [1, 4])
def test_a_bias_of_all_heads_or_of_each_may_mask_keys(path, tmp_path, num_heads):
    copy = Path(shutil.copytree(path, tmp_path / "copy.zarr"))
    shutil.rmtree(copy / "attention/bias")
    bias = np.zeros((3, num_heads, 5, 5), np.float32)
    bias[..., 4] = -np.inf
    write_array(copy, "attention/bias", bias, None)
    attn_HQK = atcache.open(copy).maps(1)[0, 0].compute()
    assert (attn_HQK[..., 4] == 0).all()
    assert attn_HQK.sum(axis=-1) == pytest.approx(1, abs=1e-5)


def test_codec_int8_is_close(digits_tars, tmp_path, expected_LVSHQK):
    maps = atcache.open(build(tmp_path / "int8.zarr", digits_tars, codec="int8")).maps(4).compute()
    assert np.nanmax(np.abs(maps - expected_LVSHQK[1])) < 0.05


@pytest.mark.parametrize("codec", ["exact", "exact:dtype=float32", "int8"])
def test_the_documented_reader_gives_the_same_maps_without_atcache(digits_tars, tmp_path, codec):
    page = (Path(__file__).parent.parent.parent / "docs" / "format.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert "atcache import" not in code
    names: dict[str, Any] = {}
    exec(code, names)
    path = build(tmp_path / "cache.zarr", digits_tars, codec=codec, num_tasks=1)
    ours = atcache.open(path).view(2).maps_LHQK
    for position in range(3):
        assert np.allclose(names["read_maps"](path, 0, 2, position), ours[position], atol=1e-6)
