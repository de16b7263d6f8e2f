"""Whole blocks of chosen tars make a layout and a table that fit each other."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, strategies as st
from made_store import LAYOUT, make_index

from atcache.errors import ConfigError
from atcache.pipelines.publish.chosen import choose
from atcache.store.layout import Status
from atcache.store.parts import append_part


def made(parts, samples_per_shard):
    """A layout and a table of a cache that has grown; `parts` has the number of samples of each tar of each part."""
    tables, first = [], 0
    for counts in parts:
        table = replace(
            make_index(sum(counts)),
            tars=tuple(Path(f"/data/{first + number}.tar") for number in range(len(counts))),
            tar_nbytes=(10_240,) * len(counts),
            tar_S=np.repeat(np.arange(len(counts), dtype=np.int32), counts),
        )
        tables.append(replace(table, label_S=table.label_S + 1000 * first))
        first += len(counts)
    layout = replace(LAYOUT, num_samples=sum(parts[0]), samples_per_shard=samples_per_shard)
    samples = tables[0]
    for counts, table in zip(parts[1:], tables[1:], strict=True):
        samples, layout = append_part(samples, table, samples_per_shard), layout.with_part((sum(counts),))
    return layout, samples


@given(data=st.data(), samples_per_shard=st.integers(1, 7))
def test_a_chosen_part_has_exactly_the_blocks_of_chosen_tars_only(data, samples_per_shard):
    parts = data.draw(st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=4), min_size=1, max_size=3))
    layout, samples = made(parts, samples_per_shard)
    names = [tar.name for tar in samples.tars]
    wanted = data.draw(st.lists(st.sampled_from(names), min_size=1, unique=True))
    tar_of_row = [names[number] for number in samples.tar_S]
    blocks = [layout.task(0, block) for block in range(layout.num_blocks)]
    expected = [task for task in blocks if set(tar_of_row[task.start : task.stop]) <= set(wanted)]
    try:
        chosen = choose(layout, samples, num_views=1, tar_names=wanted)
    except ConfigError as error:
        assert "Name these also" in str(error)  # noqa: PT017 - most choices are possible
        assert not expected
        return
    rows = [row for task in expected for row in range(task.start, task.stop)]
    assert chosen.blocks == tuple(task.block for task in expected)
    is_sample_S = chosen.samples.problem_S != Status.NO_SAMPLE
    np.testing.assert_array_equal(chosen.samples.label_S[is_sample_S], samples.label_S[rows])
    kept = [chosen.samples.tars[number].name for number in chosen.samples.tar_S[is_sample_S]]
    assert kept == [tar_of_row[row] for row in rows]
    pairs = chosen.tasks(layout)
    assert [task.num_samples for task in pairs] == [whole.num_samples for whole in pairs.values()]
    assert len(chosen.samples.keys_S) == chosen.layout.num_samples
    is_real_S = np.zeros(chosen.layout.num_samples, bool)
    for task in pairs:
        is_real_S[task.start : task.stop] = True
    np.testing.assert_array_equal(is_real_S, is_sample_S)
    num_wanted = sum(tar in wanted for task in blocks for tar in tar_of_row[task.start : task.stop])
    assert chosen.num_left_out == num_wanted - len(rows)


def test_a_pattern_with_too_many_names_is_refused_before_it_is_expanded():
    layout, samples = made([[3, 2]], samples_per_shard=1)
    with pytest.raises(
        ConfigError, match=r"^tars='\{0\.\.999999999\}\.tar' stands for 1000000000 tars, expected at most"
    ):
        choose(layout, samples, tar_names=["{0..999999999}.tar"])


def test_a_tar_is_chosen_by_its_name_although_the_name_looks_like_a_pattern():
    layout, samples = made([[3, 2]], samples_per_shard=1)
    samples = replace(samples, tars=(Path("/data/a[1].tar"), Path("/data/a1.tar")))
    assert choose(layout, samples, tar_names=["a[1].tar"]).blocks == (0, 1, 2)
    assert choose(layout, samples, tar_names=["a[[1]*.tar"]).blocks == (0, 1, 2, 3, 4)
