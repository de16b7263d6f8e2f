"""Batches are a pure function of seed and step, whoever reads them, however often, and whatever is kept in memory."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from atcache.cache.stacking import Stack
from atcache.choices import SHUFFLES
from atcache.errors import ConfigError
from atcache.feed.batch import Batch, Codes
from atcache.feed.loader import BatchStream, validation_batches
from atcache.feed.order import (
    BLOCK_SAMPLES,
    WINDOW_BLOCKS,
    SampleOrder,
    choose_subset,
    epoch_permutation,
    step_seed,
)
from atcache.feed.prefetch import Prefetcher
from atcache.feed.sample_views import CachedViews, FreshViews
from atcache.images.source import Source, index_source
from atcache.store.reader import CacheReader
from atcache.views.apply import apply_view
from atcache.views.draw import draw_view
from atcache.views.kept import Kept
from atcache.views.mixing import NOT_MIXED, MixPolicy, mix_pixels, parse_mix
from atcache.views.policy import ViewPolicy

sample_sets = st.lists(st.integers(0, 10_000), min_size=1, max_size=60, unique=True).map(
    lambda samples: np.array(samples, np.int64)
)
seeds = st.integers(0, 2**63)


@given(sample_S=sample_sets, seed=seeds, batch_size=st.integers(1, 90), shuffle=st.sampled_from(SHUFFLES))
def test_every_sample_comes_once_an_epoch_across_the_borders_of_batches(sample_S, seed, batch_size, shuffle):
    order = SampleOrder(sample_S=sample_S, seed=seed, batch_size=batch_size, shuffle=shuffle)
    num_steps = -(-3 * len(sample_S) // batch_size)
    batches = [order.batch(step) for step in range(num_steps)]
    assert {len(batch) for batch in batches} == {batch_size}
    pairs = [pair for batch in batches for pair in batch][: 3 * len(sample_S)]
    for epoch in range(3):
        stretch = pairs[epoch * len(sample_S) : (epoch + 1) * len(sample_S)]
        assert {number for _, number in stretch} == {epoch}
        assert sorted(sample for sample, _ in stretch) == sorted(sample_S)


@given(
    sample_S=sample_sets,
    seed=seeds,
    batch_size=st.integers(1, 90),
    step=st.integers(0, 10**9),
    shuffle=st.sampled_from(SHUFFLES),
)
def test_a_batch_depends_on_its_step_alone(sample_S, seed, batch_size, step, shuffle):
    order, again = (SampleOrder(sample_S=sample_S, seed=seed, batch_size=batch_size, shuffle=shuffle) for _ in range(2))
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


@given(
    sample_S=sample_sets,
    part=st.integers(1, 30),
    num_ranks=st.integers(1, 4),
    step=st.integers(0, 9),
    shuffle=st.sampled_from(SHUFFLES),
)
def test_the_parts_of_all_ranks_are_the_batch_of_one_process(sample_S, part, num_ranks, step, shuffle):
    whole = SampleOrder(sample_S=sample_S, seed=1, batch_size=part * num_ranks, shuffle=shuffle)
    orders = [replace(whole, rank=rank, num_ranks=num_ranks) for rank in range(num_ranks)]
    assert [pair for order in orders for pair in order.batch(step)] == whole.batch(step)
    assert {place for order in orders for place in order.windows(step)} == set(whole.windows(step))
    assert all(order.identity == whole.identity for order in orders)


def test_block_orders_never_change():
    order = SampleOrder(sample_S=np.arange(6) * BLOCK_SAMPLES // 2, seed=0, batch_size=6, shuffle="block")
    assert [sample for sample, _ in order.batch(0)] == [16, 48, 64, 80, 0, 32]


@settings(deadline=None, max_examples=20)
@given(seed=seeds, num_samples=st.integers(1, 12_000), batch_size=st.integers(1, 3000), step=st.integers(0, 12))
def test_a_window_is_whole_blocks_and_holds_what_its_steps_read(seed, num_samples, batch_size, step):
    order = SampleOrder(sample_S=np.arange(7, 7 + num_samples), seed=seed, batch_size=batch_size, shuffle="block")
    windows = {place: order.window_samples(*place) for place in order.windows(step)}
    held = [(sample, epoch) for (epoch, _), samples in windows.items() for sample in samples.tolist()]
    assert len(held) == len(set(held))
    assert set(order.batch(step)) <= set(held)
    for (epoch, window), samples in windows.items():
        assert 0 < len(samples) <= BLOCK_SAMPLES * WINDOW_BLOCKS
        assert np.all(np.diff(samples) > 0)
        whole = np.isin(order.sample_S // BLOCK_SAMPLES, samples // BLOCK_SAMPLES)
        assert np.array_equal(order.sample_S[whole], samples)
        assert len(order.window_samples(epoch, window + 1000)) == 0
    assert SampleOrder(sample_S=order.sample_S, seed=seed, batch_size=batch_size).windows(step) == []


def test_blocks_are_far_apart_and_mixed_within_their_window():
    order = SampleOrder(sample_S=np.arange(60_000), seed=5, batch_size=BLOCK_SAMPLES * WINDOW_BLOCKS, shuffle="block")
    samples = np.array([sample for sample, _ in order.batch(0)])
    assert len(set(samples // BLOCK_SAMPLES)) == WINDOW_BLOCKS
    assert samples.max() - samples.min() > 50_000
    # Neighbours in the order are of one block as often as by chance, one in 128 times.
    assert np.mean(np.diff(samples // BLOCK_SAMPLES) == 0) < 0.02
    other = SampleOrder(sample_S=np.arange(60_000), seed=6, batch_size=order.batch_size, shuffle="block")
    assert set(samples.tolist()) != {sample for sample, _ in other.batch(0)}


def test_an_unknown_shuffle_is_refused():
    with pytest.raises(ConfigError, match="shuffle='rows': expected one of global, block"):
        SampleOrder(sample_S=np.arange(3), seed=0, batch_size=2, shuffle="rows")


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
    return CachedViews(reader, source, **{"code_layers": slice(None), **fields}), reader


def batches(views, labels_S, *, first=0, stop=7, workers=0, seed=3):
    order = SampleOrder(sample_S=np.arange(48), seed=seed, batch_size=20)
    return list(BatchStream(views, labels_S, order, first_step=first, num_steps=stop, workers=workers))


def codes_of(batch):
    """The codes of a batch from one cache."""
    (codes,) = batch.codes
    assert codes.part == 0
    assert codes.row_B.tolist() == list(range(len(batch.label_B)))
    return codes.codes_BLTC


def assert_equal_batches(found, expected):
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        assert all(itertools.starmap(torch.equal, zip(ours.tensors(), theirs.tensors(), strict=True)))
        assert ours.is_mixed == theirs.is_mixed
        for our_codes, their_codes in zip(ours.codes, theirs.codes, strict=True):
            assert our_codes.part == their_codes.part
            assert np.array_equal(our_codes.row_B, their_codes.row_B)
            assert torch.equal(our_codes.codes_BLTC, their_codes.codes_BLTC)


def test_a_batch_holds_each_samples_own_pixels_codes_and_label(tiny_cache):
    views, reader = cached(tiny_cache(views=2))
    order = SampleOrder(sample_S=np.arange(48), seed=3, batch_size=20)
    for step, batch in enumerate(batches(views, reader.labels_S)):
        for row, (sample, epoch) in enumerate(order.batch(step)):
            assert batch.sample_B[row] == sample
            assert batch.label_B[row] == reader.labels_S[sample]
            assert np.array_equal(codes_of(batch)[row].numpy(), reader.read_codes(epoch % 2, sample))
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
    second, _ = cached(tiny_cache(views=2), code_layers=slice(1, 2))
    neither, _ = cached(tiny_cache(views=2), code_layers=None)
    assert np.array_equal(second.read(5, 1)[1], views.read(5, 1)[1][1:])
    assert neither.read(5, 1)[1] is None


def stream_of(path, *, batch_size=20, num_steps=7, seed=3, shuffle="global", workers=0, **fields):
    views, reader = cached(path, **fields)
    order = SampleOrder(sample_S=np.arange(48), seed=seed, batch_size=batch_size, shuffle=shuffle)
    return BatchStream(views, reader.labels_S, order, num_steps=num_steps, workers=workers)


@settings(deadline=None, max_examples=25)
@given(batch_size=st.integers(1, 60), stops=st.lists(st.integers(1, 4), max_size=4), shuffle=st.sampled_from(SHUFFLES))
def test_a_stream_stopped_anywhere_continues_with_the_same_samples(batch_size, stops, shuffle, tiny_cache):
    fields = {"batch_size": batch_size, "num_steps": 9, "shuffle": shuffle}
    path = tiny_cache(views=2, pixels="store")
    whole = list(stream_of(path, **fields))
    state, found = stream_of(path, **fields).state_dict(), []
    for count in stops:
        stream = stream_of(path, **fields)
        stream.load_state_dict(json.loads(json.dumps(state)))
        assert len(stream) == 9 - len(found)
        found += itertools.islice(stream, count)
        state = stream.state_dict()
    last = stream_of(path, **fields)
    last.load_state_dict(state)
    assert_equal_batches(found + list(last), whole)


def test_a_streams_state_is_behind_the_batch_in_hand_whatever_was_read_ahead(tiny_cache):
    stream = stream_of(tiny_cache(views=2), workers=2)
    iterator = iter(stream)
    for step in range(3):
        assert stream.state_dict()["step"] == step
        next(iterator)
    again = stream_of(tiny_cache(views=2))
    again.load_state_dict(stream.state_dict())
    assert_equal_batches(list(again), list(iterator))
    assert len(stream) == 0


def test_a_state_of_another_stream_is_refused(tiny_cache):
    state = stream_of(tiny_cache(views=2)).state_dict()
    with pytest.raises(ConfigError, match="another stream of batches: order differ in batch_size, shuffle"):
        stream_of(tiny_cache(views=2), batch_size=21, shuffle="block").load_state_dict(state)
    with pytest.raises(ConfigError, match="another stream of batches: views differ in num_views"):
        stream_of(tiny_cache(views=1)).load_state_dict(state)
    with pytest.raises(ConfigError, match="at step 7, but this stream has 6 steps"):
        stream_of(tiny_cache(views=2), num_steps=6).load_state_dict({**state, "step": 7})


def test_block_shuffle_has_each_run_of_neighbours_read_ahead_once_an_epoch(tiny_cache, monkeypatch):
    stream, asked = stream_of(tiny_cache(views=2, pixels="store"), shuffle="block", batch_size=12, num_steps=8), []
    advise = os.posix_fadvise
    monkeypatch.setattr(
        os, "posix_fadvise", lambda fd, *rest: asked.append((os.fstat(fd).st_ino, *rest)) or advise(fd, *rest)
    )
    list(stream)
    for thread in threading.enumerate():
        if thread.name == "atcache-expect":
            thread.join()
    # Two epochs, each of 48 samples in one window over three shards of codes and three of pixels.
    assert len(asked) == len(set(asked)) == 12
    assert {advice for *_, advice in asked} == {os.POSIX_FADV_WILLNEED}
    reader = CacheReader(tiny_cache(views=2, pixels="store"))
    shards = [
        reader.path / spec.shard_file(task)
        for spec in (reader.layout.codes, reader.layout.rgb)
        for task in reader.layout.tasks()
    ]
    indexes = {
        file.stat().st_ino: spec
        for spec in (reader.layout.codes, reader.layout.rgb)
        for file in shards
        if spec.name in str(file)
    }
    sizes = {file.stat().st_ino: file.stat().st_size for file in shards}
    assert {(inode, 0, sizes[inode] - indexes[inode].index_nbytes) for inode in sizes} == {one[:3] for one in asked}


@given(
    values=st.lists(st.lists(st.integers(-(2**31), 2**31 - 1), min_size=6, max_size=6), min_size=1, max_size=5),
    is_swapped=st.booleans(),
)
def test_a_stack_holds_its_rows_in_their_memory_order(values, is_swapped):
    rows = [np.array(row, np.int32).reshape(1, 3, 2) for row in values]
    rows = [row.swapaxes(1, 2) if is_swapped else row for row in rows]
    stack = Stack(len(rows))
    for row in rows:
        stack.add(row)
    assert stack.tensor.dtype == torch.int32
    assert np.array_equal(stack.tensor.numpy(), np.stack(rows))
    assert stack.tensor.transpose(-1, -2).is_contiguous() or not is_swapped
    assert stack.tensor.is_contiguous() or is_swapped


def test_transforms_codes_travel_as_bytes_also_from_workers(start_method, tiny_cache):
    views, reader = cached(tiny_cache(codec="transform"))
    for workers in (0, 2):
        for batch in batches(views, reader.labels_S, stop=3, workers=workers):
            codes = np.stack([reader.read_codes(0, int(sample)) for sample in batch.sample_B])
            assert (codes.dtype, codes_of(batch).dtype) == (np.uint8, torch.uint8)
            assert np.array_equal(codes_of(batch).numpy(), codes)


def large_batch(seed) -> Batch:
    """A batch of random bytes, 50 MB large, as its worker process makes it: codes in their order in memory."""
    numbers = torch.Generator().manual_seed(seed)
    pixels_BHWC = torch.randint(0, 256, (256, 224, 224, 3), dtype=torch.uint8, generator=numbers)
    codes_BLCT = torch.randint(0, 9999, (256, 2, 96, 120), dtype=torch.int16, generator=numbers)
    sample_B, share_B = torch.arange(256), torch.ones(256)
    codes = Codes(part=0, row_B=np.arange(256), codes_BLTC=codes_BLCT.transpose(2, 3))
    return Batch(sample_B, pixels_BHWC, sample_B + 1, sample_B + 2, share_B, codes=(codes,), is_mixed=False)


@pytest.mark.gpu
def test_batches_arrive_whole_while_slow_steps_hold_the_stream():
    device = torch.device("cuda")
    prefetcher, factor = Prefetcher(device), torch.full((4096, 4096), 1 / 4096, device=device)
    batches = 5 * [large_batch(seed) for seed in range(4)]
    expected = 5 * [[float(tensor.sum()) for tensor in batch.tensors()] for batch in batches[:4]]
    for tensor in batches[0].to(device).tensors():
        tensor.sum()  # loads the kernels, which takes longer than a copy
    found, strides = [], []
    torch.cuda.synchronize()
    for number, batch in enumerate(batches):
        sent = prefetcher.send(batch.pin_memory())
        # The first is read at once: before it arrives, unless the step waits for it.
        early = [tensor.sum() for tensor in sent.tensors()]
        for _ in range(number % 3 * 5):  # so some steps are slow; each product takes a millisecond or more
            factor = factor @ factor
        late = [tensor.sum() for tensor in sent.tensors()]
        found.append((early, late))
        strides.append(sent.codes[0].codes_BLTC.stride() == batch.codes[0].codes_BLTC.stride())
        del sent  # its memory is given back while the device still has to read it
    torch.cuda.synchronize()
    for of_cpu, sums in zip(expected, found, strict=True):
        early, late = ([float(one) for one in each] for each in sums)
        assert early == late == of_cpu
    assert all(strides), "codes keep their order in memory"


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


# Views that show two samples

MIXING = {"views": 2, "mixup": 0.8, "cutmix": 1.0, "mix_prob": 0.8}


def test_a_mixed_batch_says_whose_labels_and_how_much_of_each(tiny_cache):
    views, reader = cached(tiny_cache(**MIXING))
    order = SampleOrder(sample_S=np.arange(48), seed=3, batch_size=20)
    shares = []
    for step, batch in enumerate(batches(views, reader.labels_S)):
        for row, (sample, epoch) in enumerate(order.batch(step)):
            mix = parse_mix(reader.parameters(epoch % 2, sample)[-6:], 8, 8)
            # Blocks of this cache are of 20 samples.
            assert sample // 20 == (sample + mix.partner) // 20
            assert batch.label_B[row] == reader.labels_S[sample]
            assert batch.mix_label_B[row] == reader.labels_S[sample + mix.partner]
            assert float(batch.mix_share_B[row]) == mix.share
            if mix.height:
                assert mix.share == 1 - mix.height * mix.width / 64
            shares.append(mix.share)
    assert min(shares) < 0.1
    assert max(shares) == 1


def test_unmixed_batches_are_all_their_own(tiny_cache):
    views, reader = cached(tiny_cache(views=2))
    for batch in batches(views, reader.labels_S, stop=2):
        assert batch.mix_share_B.tolist() == [1.0] * 20
        assert torch.equal(batch.mix_label_B, batch.label_B)


def test_mixed_views_are_the_same_replayed_stored_kept_and_from_workers(tiny_cache):
    views, reader = cached(tiny_cache(**MIXING))
    expected = batches(views, reader.labels_S)
    stored, kept = cached(tiny_cache(**MIXING, pixels="store"))[0], cached(tiny_cache(**MIXING), keep_nbytes=10**9)[0]
    for others, workers in ((stored, 0), (kept, 0), (kept, 2)):
        assert_equal_batches(batches(others, reader.labels_S, workers=workers), expected)


def test_fresh_views_are_mixed_with_the_samples_to_train_on(digits_tars):
    mixing = MixPolicy(mixup_alpha=0.8, cutmix_alpha=1.0)
    policy = ViewPolicy(name="crop-flip", seed=5, image_height=8, image_width=8, mixing=mixing)
    source, partner_S = Source(index_source(digits_tars)), np.array([3, 11, 12, 40])
    views, everyone = FreshViews(source, policy, partner_S=partner_S), FreshViews(source, policy)
    kept, unmixed = FreshViews(source, policy, partner_S=partner_S, keep_nbytes=10**6), fresh(digits_tars)
    partners, of_everyone = set(), set()
    for epoch in range(40):
        view = views.read(11, epoch)
        partners.add(11 + view.mix.partner)
        of_everyone.add(11 + everyone.read(11, epoch).mix.partner)
        own_HWC, partner_HWC = (unmixed.read(row, epoch).pixels_HWC for row in (11, 11 + view.mix.partner))
        assert np.array_equal(view.pixels_HWC, mix_pixels(own_HWC, partner_HWC, view.mix))
        again = kept.read(11, epoch)
        assert np.array_equal(again.pixels_HWC, view.pixels_HWC)
        assert again.mix == view.mix
    assert partners - {11} == {3, 12, 40}
    assert len(of_everyone) > 15


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
        pixels_HWC, codes, mix, _ = views.read(11, epoch)
        assert (codes, mix) == (None, NOT_MIXED)
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
        cached(tiny_cache(views=2), code_layers=None)[0].identity,
        cached(tiny_cache(views=1, policy="eval"))[0].identity,
        fresh(digits_tars).identity,
        fresh(digits_tars[:2]).identity,
        fresh(digits_tars, "eval").identity,
    ]
    assert all(a != b for number, a in enumerate([same[0], *others]) for b in others[number:] if a is not b)
