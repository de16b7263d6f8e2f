"""Packing: every integer comes back, wherever it lies and however large it is; few bytes are spent on small ones."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from atcache.codecs.transform.packing import Packing, choose_buckets
from atcache.codecs.transform.unpacking import num_open_slots
from atcache.store.chunks import compress

CPU = torch.device("cpu")
BANDS = (slice(0, 1), slice(1, 4), slice(4, 11))


def drawn_codes(mean_LBJ, num_views, seed=0):
    """Integers with these mean sizes, two-sided geometric, one list entry a layer."""
    numbers = np.random.default_rng(seed)
    layers = []
    for mean_BJ in mean_LBJ:
        mean_TJ = np.repeat(mean_BJ, [band.stop - band.start for band in BANDS], axis=0)
        size = numbers.exponential(mean_TJ, (num_views, *mean_TJ.shape))
        layers.append(torch.from_numpy((np.floor(size + 0.4) * numbers.choice([-1, 1], size.shape)).astype(np.int32)))
    return layers


def zeroed_where_not_stored(codes, is_stored_LBJ):
    width_B = torch.tensor([band.stop - band.start for band in BANDS])
    return [
        layer * is_stored_BJ.repeat_interleave(width_B, dim=0)
        for layer, is_stored_BJ in zip(codes, is_stored_LBJ, strict=True)
    ]


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**20), num_layers=st.integers(1, 3), num_components=st.integers(1, 9), scale=st.floats(0, 3)
)
def test_every_stored_integer_comes_back(seed, num_layers, num_components, scale):
    numbers = np.random.default_rng(seed)
    mean_LBJ = 10 ** numbers.uniform(-3, 2, (num_layers, len(BANDS), num_components))
    is_stored_LBJ = torch.from_numpy(numbers.random(mean_LBJ.shape) < 0.8)
    is_stored_LBJ[:, 0, 0] = True
    packing = Packing(choose_buckets(torch.from_numpy(mean_LBJ), is_stored_LBJ), BANDS, CPU)
    codes = drawn_codes(mean_LBJ * 10**scale, 3, seed)  # up to 1000 times as large as expected: most escape
    used = [layer[:, :, :count] for layer, count in zip(codes, packing.num_components, strict=True)]
    rows = packing.open(packing.pack(used))
    expected = zeroed_where_not_stored(codes, is_stored_LBJ)
    for number, count in reversed(list(enumerate(packing.num_components))):
        assert torch.equal(rows.layer(number), expected[number][:, :, :count])


@pytest.mark.parametrize("value", [127, -128, 128, 2**15, -(2**15), 2**22])
def test_one_large_integer_among_zeros_comes_back(value):
    packing = Packing(choose_buckets(torch.full((1, 3, 2), 0.1), torch.ones(1, 3, 2, dtype=torch.bool)), BANDS, CPU)
    codes = torch.zeros(2, 11, 2, dtype=torch.int32)
    codes[1, 7, 1] = value
    assert torch.equal(packing.open(packing.pack([codes])).layer(0), codes)


def test_escapes_far_apart_come_back():
    """Distances over 65535 cells take more than one step."""
    bands = (slice(0, 1000),)
    packing = Packing(choose_buckets(torch.full((1, 1, 300), 0.1), torch.ones(1, 1, 300, dtype=torch.bool)), bands, CPU)
    codes = torch.zeros(1, 1000, 300, dtype=torch.int32)
    for token, component in ((0, 0), (0, 1), (500, 7), (999, 299)):
        codes[0, token, component] = 1000 + token
    assert torch.equal(packing.open(packing.pack([codes])).layer(0), codes)


def test_where_more_escape_than_there_is_room_for_the_largest_come_back():
    bands = (slice(0, 300),)
    packing = Packing(choose_buckets(torch.full((1, 1, 100), 0.1), torch.ones(1, 1, 100, dtype=torch.bool)), bands, CPU)
    codes = torch.arange(30_000, dtype=torch.int32).view(1, 300, 100)
    back = packing.open(packing.pack([codes])).layer(0)
    num_slots = packing.row_nbytes // 5
    assert torch.equal(back.flatten()[-num_slots + 1 :], codes.flatten()[-num_slots + 1 :])
    assert int((back - codes).abs().max()) <= 30_000 - num_slots + 1


@pytest.mark.parametrize("num_escapes", [0, 1023, 1024, 1025, 3000])
def test_all_used_slots_are_looked_at_and_few_others(num_escapes):
    bands = (slice(0, 300),)
    packing = Packing(choose_buckets(torch.full((1, 1, 60), 0.1), torch.ones(1, 1, 60, dtype=torch.bool)), bands, CPU)
    codes = torch.zeros(2, 300, 60, dtype=torch.int32)
    codes[1].view(-1)[:num_escapes] = 1000
    rows = packing.pack([codes])
    num_open = num_open_slots(rows)
    assert num_escapes <= num_open <= max(1024, 2 * num_escapes)
    assert torch.equal(packing.open(rows, num_open).layer(0), codes)


def test_rows_of_a_hostile_cache_raise_nothing_and_touch_no_other_layer():
    mean_LBJ = torch.full((2, 3, 4), 0.5)
    packing = Packing(choose_buckets(mean_LBJ, torch.ones_like(mean_LBJ, dtype=torch.bool)), BANDS, CPU)
    rows = torch.randint(0, 256, (5, 2, packing.row_nbytes), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    opened = packing.open(rows)
    assert [opened.layer(number).shape for number in (0, 1)] == [(5, 11, 4)] * 2


def test_a_slot_of_distance_0_ends_the_list_of_escapes():
    packing = Packing(choose_buckets(torch.full((1, 3, 2), 0.1), torch.ones(1, 3, 2, dtype=torch.bool)), BANDS, CPU)
    codes = torch.zeros(2, 11, 2, dtype=torch.int32)
    codes[:, 2, 1], codes[:, 5, 0], codes[:, 9, 1] = 1000, 2000, 3000
    rows = packing.pack([codes])
    num_slots = rows.shape[2] // 5
    rows[1, 1, 1 : 2 * num_slots : num_slots] = 0  # the distance of the second slot of the second view
    back = packing.open(rows).layer(0)
    assert torch.equal(back[0], codes[0])
    assert back[1, 2, 1] == 1000
    assert back[1].abs().sum() < 1000 + 2 * 128, "cells of later slots hold all ones, and nothing is added"


def test_stored_bytes_are_near_the_entropy():
    """Within 5 % of order-0 entropy with a table a component, on integers like a teacher's."""
    numbers = np.random.default_rng(0)
    bands = (slice(0, 1), slice(1, 64), slice(64, 256))
    mean_LBJ = np.exp(numbers.uniform(np.log(0.08), np.log(6), (6, 3, 200)))
    mean_LBJ[:, 1:] = np.sort(mean_LBJ[:, 1:], axis=2)[..., ::-1]
    packing = Packing(
        choose_buckets(torch.from_numpy(mean_LBJ), torch.ones(mean_LBJ.shape, dtype=torch.bool)), bands, CPU
    )
    width_B = [band.stop - band.start for band in bands]
    codes, bits = [], 0.0
    for mean_BJ in mean_LBJ:
        size = numbers.exponential(np.repeat(mean_BJ, width_B, axis=0), (8, 256, 200))
        layer = (np.floor(size + 0.4) * numbers.choice([-1, 1], size.shape)).astype(np.int32)
        codes.append(torch.from_numpy(layer))
        for component in range(200):
            counts = np.unique(layer[:, :, component], return_counts=True)[1]
            share = counts / counts.sum()
            bits -= float((share * np.log2(share)).sum()) * layer[:, :, component].size
    rows = packing.pack(codes).numpy()
    stored = sum(len(compress(row[None], "gzip")) for view in rows for row in view)
    assert stored < 1.05 * bits / 8
    assert packing.row_nbytes < packing.num_cells  # less than one byte an integer
