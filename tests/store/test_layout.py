"""The arithmetic of a cache: tasks partition the samples, shards divide into chunks, absurd numbers are refused."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given, strategies as st

from atcache.errors import ConfigError
from atcache.images.tar_samples import Problem
from atcache.store.layout import (
    CODES_DTYPES,
    COMPRESSORS,
    MAX_FOLDER_ENTRIES,
    Status,
    StoreLayout,
    Task,
)
from atcache.store.shard_size import plan_layers_per_chunk, plan_samples_per_shard

FIELDS = {
    "num_views": 2,
    "num_samples": 10,
    "num_layers": 4,
    "num_tokens": 5,
    "num_components": 6,
    "codes_dtype": "int8",
    "samples_per_shard": 4,
    "layers_per_chunk": 2,
    "parameter_names": ("top", "left"),
}


@st.composite
def layouts(draw):
    num_layers = draw(st.integers(1, 24))
    return StoreLayout(
        num_views=draw(st.integers(1, 3)),
        num_samples=draw(st.integers(1, 60)),
        num_layers=num_layers,
        num_tokens=draw(st.integers(1, 300)),
        num_components=draw(st.integers(1, 2000)),
        codes_dtype=draw(st.sampled_from(CODES_DTYPES)),
        samples_per_shard=draw(st.integers(1, 70)),
        layers_per_chunk=draw(st.sampled_from([n for n in range(1, num_layers + 1) if num_layers % n == 0])),
        parameter_names=tuple(draw(st.lists(st.text(min_size=1), min_size=1, max_size=9, unique=True))),
        pixels=draw(st.none() | st.tuples(st.integers(1, 300), st.integers(1, 300))),
        compressor=draw(st.sampled_from(sorted(COMPRESSORS))),
    )


@given(layouts())
def test_each_sample_of_each_view_belongs_to_exactly_one_task(layout):
    tasks = layout.tasks()
    owned = [(task.view, sample) for task in tasks for sample in range(task.start, task.stop)]
    assert owned == [(view, sample) for view in range(layout.num_views) for sample in range(layout.num_samples)]
    assert all(layout.task_of(view, sample) in tasks for view, sample in owned)
    assert all(layout.task_of(task.view, task.stop - 1) == task for task in tasks)
    assert len({task.name for task in tasks}) == len(tasks)


@given(layouts())
def test_shards_divide_into_chunks_and_every_sample_has_chunks_of_its_own(layout):
    for spec in layout.arrays():
        assert all(shard % chunk == 0 for shard, chunk in zip(spec.shard_shape, spec.chunk_shape, strict=True))
        assert len(spec.shape) == len(spec.shard_shape) == len(spec.chunk_shape) == len(spec.dimension_names)
        assert spec.shard_shape[:2] == (1, layout.samples_per_shard)
        assert spec.shard_shape[2:] == spec.shape[2:]
        assert spec.index_nbytes == 16 * math.prod(spec.chunks_per_shard) + 4
        assert spec.num_chunks_per_shard in (1, layout.samples_per_shard * spec.num_chunks_per_sample)
    assert (
        layout.codes.num_chunks_per_sample * layout.codes.chunk_nbytes
        == math.prod(layout.codes.shape[2:]) * np.dtype(layout.codes_dtype).itemsize
    )


@given(layouts())
def test_no_two_tasks_write_the_same_file(layout):
    files = [spec.shard_file(task) for task in layout.tasks() for spec in layout.arrays()]
    assert len(set(files)) == len(files)


@given(layouts())
def test_a_layout_survives_json(layout):
    assert StoreLayout.from_json(json.loads(json.dumps(layout.to_json()))) == layout


def test_status_is_placed_last_because_it_vouches_for_the_rest():
    assert [spec.name for spec in StoreLayout(**FIELDS, pixels=(8, 8)).arrays()] == [
        "attention/codes",
        "pixels/rgb",
        "views/parameters",
        "views/pixel_hash",
        "views/status",
    ]


def test_shard_file_is_the_default_chunk_key_of_zarr():
    assert StoreLayout(**FIELDS).codes.shard_file(Task(1, 2, 8, 10)) == "attention/codes/c/1/2/0/0/0"


def test_status_has_the_numbers_of_the_sources_problems():
    assert {problem.name: int(problem) for problem in Problem if problem} == {
        status.name: int(status) for status in Status if status > Status.STORED
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_samples": -1}, r"num_samples=-1: expected an integer from 1"),
        ({"num_samples": 2**40}, r"num_samples=1099511627776: expected"),
        ({"num_samples": True}, r'"num_samples" is True, expected a whole number'),
        ({"num_samples": "10"}, r'"num_samples" is .10., expected a whole number'),
        ({"num_samples": 1.5}, r'"num_samples" is 1\.5, expected a whole number'),
        ({"num_views": 10**9}, r"num_views"),
        ({"num_tokens": 2**20, "num_components": 2**24}, r"attention/codes would have chunks of 35184372088832 bytes"),
        (
            {"num_layers": 4096, "num_components": 2**20, "layers_per_chunk": 1},
            r"the codes of one view would be 21474836480 bytes \(4096 x 5 x 1048576 of int8\), over 4294967296\.",
        ),
        ({"num_samples": 2**31 - 1, "num_views": 5, "samples_per_shard": 2**20}, r"5 views of .* limit of 8589934592"),
        ({"num_samples": 2**31 - 1, "samples_per_shard": 1}, r"tasks, over 10000000\. Raise samples_per_shard"),
        ({"layers_per_chunk": 3}, r"layers_per_chunk=3 does not divide num_layers=4"),
        ({"codes_dtype": "object"}, r"codes_dtype='object': expected one of int8"),
        ({"codes_dtype": ["int8"]}, r'"codes_dtype" is \[.int8.\], expected text'),
        ({"compressor": "lzma"}, r"compressor='lzma': expected one of zstd, blosc"),
        ({"parameter_names": []}, r"parameter_names=\(\): expected one or more"),
        ({"parameter_names": "ab"}, r'"parameter_names" is .ab., expected a list'),
        ({"parameter_names": ["a", "a"]}, r"different names"),
        ({"pixels": [8]}, r'"pixels" is \[8\], expected a list of 2'),
        ({"pixels": [8, -8]}, r"pixels=-8"),
        ({"pixels": {"height": 8}}, r'"pixels" is \{.height.: 8\}, expected a list'),
        ({"surprise": 1}, r'"surprise" is 1, expected only num_views, .*Use the version'),
    ],
)
def test_a_layout_that_cannot_be_is_refused_by_name(change, message):
    fields = {**StoreLayout(**FIELDS).to_json(), **change}
    with pytest.raises(ConfigError, match=message):
        StoreLayout.from_json(fields)


def test_a_layout_without_a_field_is_refused():
    fields = StoreLayout(**FIELDS).to_json()
    del fields["num_tokens"]
    with pytest.raises(ConfigError, match=r'has no "num_tokens", expected a whole number'):
        StoreLayout.from_json(fields)


@given(st.integers(1, 10**8), st.integers(1, 10**7), st.integers(1, 2**30))
def test_shards_stay_within_their_target_unless_one_view_is_over_it(nbytes, num_samples, target):
    count = plan_samples_per_shard(nbytes, num_samples, target_nbytes=target)
    assert 1 <= count <= num_samples
    fewest = -(-num_samples // MAX_FOLDER_ENTRIES)
    assert count >= fewest, "or a view would have too many shards for one folder"
    assert count == fewest or count * nbytes <= target


@given(st.integers(1, 10**6), st.integers(1, 64), st.integers(1, 2**20))
def test_layers_per_chunk_is_the_largest_divisor_within_target(layer_nbytes, num_layers, target):
    count = plan_layers_per_chunk(layer_nbytes, num_layers, target_nbytes=target)
    assert num_layers % count == 0
    assert count == 1 or count * layer_nbytes <= target
    larger = [n for n in range(count + 1, num_layers + 1) if num_layers % n == 0]
    assert all(n * layer_nbytes > target for n in larger)


def test_a_large_vit_has_one_layer_a_chunk():
    assert plan_layers_per_chunk(197 * 2 * 16 * 66, 24) == 1
