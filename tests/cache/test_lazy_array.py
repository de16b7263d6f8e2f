"""The dask arrays of a cache: an index picks before anything is planned, and all else is dask's."""

from __future__ import annotations

import pickle
import shutil

import dask.array as da
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

import atcache
from atcache.cache.lazy_array import LazyArray
from atcache.store.manifest import delete_commits, list_commits


@pytest.fixture(scope="module")
def maps(tiny_cache):
    return atcache.open(tiny_cache(policy="crop-flip", views=2)).maps(1)


@pytest.fixture(scope="module")
def values(maps):
    return maps.compute()


def agree(found, expected, rtol=0.0) -> None:
    """Products of other shapes are rounded in another order."""
    np.testing.assert_allclose(found, expected, atol=1e-6, rtol=rtol)


def picks(length: int) -> st.SearchStrategy:
    bounds = st.none() | st.integers(-length - 2, length + 2)
    return st.integers(-length, length - 1) | st.builds(slice, bounds, bounds, st.sampled_from([None, 1, 3, -1, -2]))


@given(data=st.data())
@settings(max_examples=40)
def test_indexes_pick_as_in_numpy_in_however_many_steps(maps, values, data):
    picked, expected = maps, values
    for _ in range(data.draw(st.integers(1, 3))):
        index = tuple(data.draw(picks(side)) for side in picked.shape if side)
        if len(index) < picked.ndim:
            break  # something is empty
        picked, expected = picked[index], expected[index]
    assert isinstance(picked, LazyArray)
    assert picked.shape == expected.shape
    assert sum(picked.chunks[0]) == picked.shape[0] if picked.ndim else True
    agree(picked.compute(scheduler="sync"), expected)


@pytest.mark.parametrize("rows", [[3, 40, 3, -1], np.arange(48) % 5 == 0, np.array([7])], ids=str)
def test_a_list_picks_along_its_axis(maps, values, rows):
    picked = maps[1, rows, :, 2:4]
    assert isinstance(picked, LazyArray)
    agree(picked.compute(), values[1][rows][:, :, 2:4])


def test_what_is_picked_is_all_that_is_planned(maps):
    assert maps.npartitions == 6
    assert len(dict(maps[0, [1, 30, 47], :, 0].dask)) == 2  # a task, and the list that it needs
    assert maps[0].chunks[0] == (20, 20, 8)
    assert maps[0, 5:47].chunks[0] == (15, 20, 7)  # at the edges of shards


def test_other_indexes_are_left_to_dask(maps, values):
    mask = da.from_array(np.arange(48) % 2 == 0, chunks=10)
    for found, expected in (
        (maps[:, :, None], values[:, :, None]),
        (maps[0][mask], values[0][::2]),
        (maps.vindex[[0, 1], [2, 3]], values[[0, 1], [2, 3]]),
        (maps[0, []], values[0, :0]),
    ):
        assert not isinstance(found, LazyArray)
        agree(found.compute(), expected)
    with pytest.raises(IndexError):
        maps[2]
    with pytest.raises(IndexError):
        maps[0, [48]]
    with pytest.raises(IndexError):
        maps[0, [True]]
    for too_many in ((0, 0, 0, 0, 0, 0), (0, ..., 0, 0, 0, 0, 0), (..., 0, ...)):
        with pytest.raises(IndexError, match=r"does not fit an array of 5 axes"):
            maps[too_many]


def test_values_that_were_put_in_are_not_forgotten(maps, values):
    changed = maps.copy()[:]
    own = LazyArray(maps._layers)
    for array in (changed, own):
        array[0, 3] = 7.0
        assert (array[0, 3].compute() == 7).all()
        agree(array[1, 3].compute(), values[1, 3])
        assert (pickle.loads(pickle.dumps(array))[0, 3].compute() == 7).all()
    agree(maps[0, 3].compute(), values[0, 3])


def test_what_is_computed_with_it_is_a_plain_dask_array(maps, values):
    assert type(maps + 1) is da.Array
    agree(maps[:, ::7].sum(axis=(-1, -2)).compute(), values[:, ::7].sum(axis=(-1, -2)), rtol=1e-5)
    agree(maps[0, 3].persist().compute(), values[0, 3])
    agree(maps[0].rechunk((16, 1, 17, 17))[3:5].compute(), values[0, 3:5])


def test_it_is_pickled_as_what_was_picked(maps, values):
    picked = maps[0, 10:12]
    pickled = pickle.dumps(picked)
    assert len(pickled) < 8000
    again = pickle.loads(pickled)
    assert again.name == picked.name
    agree(again[1].compute(), values[0, 11])
    assert picked.name != maps[0, 11:13].name


def test_another_cache_at_the_same_place_has_other_dask_names(tiny_cache, tmp_path):
    path, names = tmp_path / "cache.zarr", []
    for fields in ({}, {"seed": 1}, {}):
        shutil.copytree(tiny_cache(policy="crop-flip", **fields), path)
        names.append(atcache.open(path).maps(1).name)
        assert atcache.open(path).maps(1).name == names[-1]
        if len(names) == 3:
            delete_commits(path, sorted(list_commits(path))[:1])
            names.append(atcache.open(path).maps(1).name)
            names.append(atcache.open(path).maps(1).name)
        shutil.rmtree(path)
    assert names[0] == names[2]
    assert len(set(names)) == 4
