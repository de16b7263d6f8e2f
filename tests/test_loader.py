"""Batches are a pure function of seed and step, whoever reads them, however often, and whatever is kept in memory."""

from __future__ import annotations

import multiprocessing

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from atcache.errors import ConfigError
from atcache.loader import CachedViews, FreshViews, Kept, training_batches, validation_batches
from atcache.order import SampleOrder, choose_subset, epoch_permutation, step_seed
from atcache.source import Source, index_source
from atcache.store.reader import CacheReader
from atcache.views import ViewPolicy, apply_view, draw_view

sample_sets = st.lists(st.integers(0, 10_000), min_size=1, max_size=60, unique=True).map(
    lambda samples: np.array(samples, np.int64)
)
seeds = st.integers(0, 2**63)


@given(sample_S=sample_sets, seed=seeds, batch_size=st.integers(1, 90))
def test_every_sample_comes_once_an_epoch_across_the_borders_of_batches(sample_S, seed, batch_size):
    order = SampleOrder(sample_S=sample_S, seed=seed, batch_size=batch_size)
    num_steps = -(-3 * len(sample_S) // batch_size)
    batches = [order.batch(step) for step in range(num_steps)]
    assert {len(batch) for batch in batches} == {batch_size}
    pairs = [pair for batch in batches for pair in batch][: 3 * len(sample_S)]
    for epoch in range(3):
        stretch = pairs[epoch * len(sample_S) : (epoch + 1) * len(sample_S)]
        assert {number for _, number in stretch} == {epoch}
        assert sorted(sample for sample, _ in stretch) == sorted(sample_S)


@given(sample_S=sample_sets, seed=seeds, batch_size=st.integers(1, 90), step=st.integers(0, 10**9))
def test_a_batch_depends_on_its_step_alone(sample_S, seed, batch_size, step):
    order, again = (SampleOrder(sample_S=sample_S, seed=seed, batch_size=batch_size) for _ in range(2))
    for other in range(3):
        order.batch(other)
    assert order.batch(step) == again.batch(step)


@given(seed=seeds, epoch=st.integers(-1, 10**6), other=seeds)
def test_orders_are_permutations_that_differ_between_seeds_and_epochs(seed, epoch, other):
    order = epoch_permutation(50, seed, epoch)
    assert sorted(order) == list(range(50))
    assert not np.array_equal(order, epoch_permutation(50, seed, epoch + 1))
    assert seed == other or not np.array_equal(order, epoch_permutation(50, other, epoch))
    with pytest.raises(ValueError, match="read-only"):
        order[0] = 1


def test_orders_and_step_seeds_never_change():
    # Written down once: a run that is continued with a later version must see the same batches.
    assert epoch_permutation(8, 0, 0).tolist() == [7, 1, 3, 4, 5, 6, 0, 2]
    assert [step_seed(0, 0), step_seed(0, 1), step_seed(1, 0)] == [
        632193058100965895,
        8249978818843933321,
        8673009375161035775,
    ]


@given(seed=seeds, step=st.integers(0, 10**9))
def test_step_seeds_are_fit_for_torch_and_tell_seed_and_step_apart(seed, step):
    torch.Generator().manual_seed(step_seed(seed, step))
    assert len({step_seed(seed, step), step_seed(seed, step + 1), step_seed(seed + 1, step)}) == 3


@given(
    label_S=st.lists(st.integers(0, 5), min_size=1, max_size=80).map(lambda labels: np.array(labels, np.int64)),
    seed=seeds,
    data=st.data(),
)
def test_a_subset_is_as_balanced_as_the_classes_allow(label_S, seed, data):
    eligible_S = np.array(sorted(data.draw(st.sets(st.integers(0, len(label_S) - 1), min_size=1))))
    num_samples = data.draw(st.integers(1, len(eligible_S)))
    subset = choose_subset(label_S, eligible_S, num_samples, seed)
    assert len(set(subset.tolist())) == num_samples
    assert set(subset.tolist()) <= set(eligible_S.tolist())
    assert subset.tolist() == sorted(subset)
    available, chosen = (np.bincount(label_S[rows], minlength=6) for rows in (eligible_S, subset))
    # A class may be behind the fullest one by more than one sample only where it has no more to give.
    assert all(chosen[c] == available[c] or chosen[c] >= chosen.max() - 1 for c in range(6))
    assert np.array_equal(subset, choose_subset(label_S, eligible_S, num_samples, seed))


def test_subsets_of_other_seeds_differ_and_too_large_ones_are_refused():
    label_S = np.arange(100) % 10
    subsets = {tuple(choose_subset(label_S, np.arange(100), 20, seed)) for seed in range(5)}
    assert len(subsets) == 5
    with pytest.raises(ConfigError, match="subset=101: only 100 samples can be used"):
        choose_subset(label_S, np.arange(100), 101, 0)


@settings(deadline=None)
@given(budget=st.integers(0, 100), reads=st.lists(st.integers(0, 20), max_size=60))
def test_what_is_kept_fits_its_budget_and_is_read_once(budget, reads):
    kept, counts = Kept[bytes](budget), dict.fromkeys(range(21), 0)

    def read(key):
        counts[key] += 1
        return bytes([key]) * (key + 1)

    for key in reads:
        assert kept.get(key, lambda key=key: read(key), len) == bytes([key]) * (key + 1)
    held = [key for key in range(21) if 0 < counts[key] < reads.count(key)]
    assert sum(key + 1 for key in held) <= budget
    assert all(counts[key] == 1 for key in held)
    if budget >= 231:
        assert max(counts.values()) <= 1


def cached(path, **fields):
    reader = CacheReader(path)
    source = None if reader.layout.pixels is not None else Source(reader.samples)
    return CachedViews(reader, source, **{"with_codes": True, **fields}), reader


def batches(views, labels_S, *, first=0, stop=7, workers=0, seed=3):
    order = SampleOrder(sample_S=np.arange(48), seed=seed, batch_size=20)
    return list(training_batches(views, labels_S, order, first_step=first, stop_step=stop, workers=workers))


def assert_equal_batches(found, expected):
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        for name in ours._fields:
            assert torch.equal(getattr(ours, name), getattr(theirs, name)), name


def test_a_batch_holds_each_samples_own_pixels_codes_and_label(tiny_cache):
    views, reader = cached(tiny_cache(views=2))
    order = SampleOrder(sample_S=np.arange(48), seed=3, batch_size=20)
    for step, batch in enumerate(batches(views, reader.labels_S)):
        for row, (sample, epoch) in enumerate(order.batch(step)):
            assert batch.sample_B[row] == sample
            assert batch.label_B[row] == reader.labels_S[sample]
            assert np.array_equal(batch.codes_BLTC[row].numpy(), reader.read_codes(epoch % 2, sample))
            # Second opinion on the pixels: the view drawn again from its policy.
            source, policy = Source(reader.samples), ViewPolicy.from_json(reader.attributes["views"]["policy"])
            image, key = source.read_image(sample), source.index.sample_key(sample)
            parameters_P = draw_view(policy, key, epoch % 2, image.height, image.width)
            assert np.array_equal(batch.pixels_BHWC[row].numpy(), apply_view(image, parameters_P, policy))


@pytest.mark.parametrize("first", [1, 3])
def test_a_stream_that_is_taken_up_again_gives_the_remaining_batches(first, tiny_cache):
    views, reader = cached(tiny_cache(views=2))
    whole = batches(views, reader.labels_S)
    assert_equal_batches(batches(views, reader.labels_S, first=first), whole[first:])
    other = batches(views, reader.labels_S, stop=1, seed=4)
    assert not torch.equal(other[0].sample_B, whole[0].sample_B)


@pytest.mark.parametrize("keep_nbytes", [1, 20_000, 10**9])
def test_keeping_views_in_memory_changes_nothing_that_is_read(keep_nbytes, tiny_cache):
    views, reader = cached(tiny_cache(views=2))
    expected = batches(views, reader.labels_S, stop=10)
    assert_equal_batches(
        batches(cached(tiny_cache(views=2), keep_nbytes=keep_nbytes)[0], reader.labels_S, stop=10), expected
    )


def test_replayed_and_stored_pixels_are_equal(tiny_cache):
    replayed, reader = cached(tiny_cache(views=2))
    stored, _ = cached(tiny_cache(views=2, pixels="store"))
    assert_equal_batches(batches(stored, reader.labels_S), batches(replayed, reader.labels_S))


def test_a_range_of_layers_is_all_that_is_read(tiny_cache):
    views, _ = cached(tiny_cache(views=2))
    second, _ = cached(tiny_cache(views=2), positions=slice(1, 2))
    neither, _ = cached(tiny_cache(views=2), with_codes=False)
    assert np.array_equal(second.read(5, 1)[1], views.read(5, 1)[1][1:])
    assert neither.read(5, 1)[1] is None


@pytest.fixture(params=["fork", "spawn"])
def start_method(request):
    before = multiprocessing.get_start_method(allow_none=True)
    multiprocessing.set_start_method(request.param, force=True)
    yield request.param
    multiprocessing.set_start_method(before, force=True)


def test_worker_processes_change_nothing(start_method, tiny_cache):
    views, reader = cached(tiny_cache(views=2), keep_nbytes=10**9)
    expected = batches(cached(tiny_cache(views=2))[0], reader.labels_S)
    assert_equal_batches(batches(views, reader.labels_S, workers=2), expected)


def test_validation_shows_each_sample_once_in_order(tiny_cache):
    views, reader = cached(tiny_cache(views=2))
    sample_S = np.array([4, 9, 2, 33, 40])
    found = list(validation_batches(views, reader.labels_S, sample_S, batch_size=2, workers=0))
    assert [batch.sample_B.tolist() for batch in found] == [[4, 9], [2, 33], [40]]
    assert np.array_equal(found[2].pixels_BHWC[0].numpy(), views.read(40, 0)[0])


def test_reading_leaves_torchs_global_generator_alone(tiny_cache):
    views, reader = cached(tiny_cache(views=2))
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    batches(views, reader.labels_S, stop=2)
    assert torch.equal(torch.rand(3), expected)


def fresh(digits_tars, name="crop-flip", **fields):
    policy = ViewPolicy(name=name, seed=5, image_height=8, image_width=8)
    return FreshViews(Source(index_source(digits_tars)), policy, **fields)


def test_fresh_views_differ_between_epochs_and_are_drawn_by_the_policy(digits_tars):
    views, kept = fresh(digits_tars), fresh(digits_tars, keep_nbytes=10**6)
    source = Source(index_source(digits_tars))
    policy = ViewPolicy(name="crop-flip", seed=5, image_height=8, image_width=8)
    image = source.read_image(11)
    seen = []
    for epoch in (0, 1, 2, 1):
        parameters_P = draw_view(policy, source.index.sample_key(11), epoch, image.height, image.width)
        pixels_HWC, codes = views.read(11, epoch)
        assert codes is None
        assert np.array_equal(pixels_HWC, apply_view(image, parameters_P, policy))
        assert np.array_equal(kept.read(11, epoch)[0], pixels_HWC)
        seen.append(pixels_HWC.tobytes())
    assert len(set(seen)) == 3


def test_fresh_eval_views_are_equal_in_all_epochs_kept_or_not(digits_tars):
    views, kept = fresh(digits_tars, "eval"), fresh(digits_tars, "eval", keep_nbytes=10**6)
    for epoch in (0, 1, 7):
        assert np.array_equal(views.read(3, epoch)[0], views.read(3, 0)[0])
        assert np.array_equal(kept.read(3, epoch)[0], views.read(3, 0)[0])


def test_views_that_were_read_differently_are_told_apart(tiny_cache, digits_tars):
    same = [cached(tiny_cache(views=2), keep_nbytes=keep)[0].identity for keep in (0, 10)]
    assert same[0] == same[1]
    others = [
        cached(tiny_cache(views=2), with_codes=False)[0].identity,
        cached(tiny_cache(views=1, policy="eval"))[0].identity,
        fresh(digits_tars).identity,
        fresh(digits_tars[:2]).identity,
        fresh(digits_tars, "eval").identity,
    ]
    assert all(a != b for number, a in enumerate([same[0], *others]) for b in others[number:] if a is not b)
