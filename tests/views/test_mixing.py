"""Mixup and CutMix: drawn by timm's law, by key alone, and equal to a slow computation in every bit."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from atcache.errors import ConfigError, CorruptCacheError
from atcache.views.mixing import (
    MIXING_NAMES,
    NOT_MIXED,
    Mix,
    MixPolicy,
    _cut_box,
    draw_mix,
    mix_pixels,
    mix_policy,
    parse_mix,
)

BOTH = MixPolicy(mixup_alpha=0.8, cutmix_alpha=1.0)
ROWS = np.arange(40, 60)


def draw(policy=BOTH, seed=3, key="a.tar/0", view=0, sample=45, partner_S=ROWS, height=24, width=32) -> Mix:
    sizes = {"image_height": height, "image_width": width}
    return draw_mix(policy, seed, key, view, sample=sample, partner_S=partner_S, **sizes)


def draw_many(policy=BOTH, count=4000, **fields) -> list[Mix]:
    return [draw(policy, key=f"a.tar/{number}", **fields) for number in range(count)]


def images(height=9, width=7) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(0)
    own_HWC, partner_HWC = generator.integers(0, 256, (2, height, width, 3), np.uint8)
    return own_HWC, partner_HWC


# The law


@pytest.mark.parametrize("alpha", [0.05, 0.4, 0.8, 1.0, 3.0, 50.0])
def test_mixup_shares_follow_numpys_beta(alpha):
    ours = np.sort([mix.share for mix in draw_many(MixPolicy(mixup_alpha=alpha))])
    theirs = np.sort(np.random.default_rng(0).beta(alpha, alpha, 400_000))
    places = np.searchsorted(theirs, ours) / len(theirs)
    # Kolmogorov and Smirnov's distance; below alpha 0.1 many shares round to the ends.
    inside = (ours > 0.001) & (ours < 0.999)
    assert np.abs(places - (np.arange(len(ours)) + 0.5) / len(ours))[inside].max() < 1.7 / len(ours) ** 0.5
    assert np.mean(ours) == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize("size", [(24, 32), (7, 7), (1, 5)])
def test_boxes_are_timms(size):
    from timm.data.mixup import rand_bbox

    height, width = size
    for seed in range(300):
        own_share = np.random.default_rng(seed).uniform()
        np.random.seed(seed)
        row, column = np.random.randint(0, height), np.random.randint(0, width)
        np.random.seed(seed)  # timm draws the same two numbers
        top, bottom, left, right = rand_bbox((3, height, width), own_share)
        found = _cut_box(own_share, (row + 0.5) / height, (column + 0.5) / width, height, width)
        expected = (top, left, bottom - top, right - left)
        assert found == (expected if expected[2] and expected[3] else (0, 0, 0, 0))


def test_cutmix_shares_are_what_the_box_leaves_and_follow_timms_law():
    from timm.data.mixup import cutmix_bbox_and_lam

    mixes = draw_many(MixPolicy(cutmix_alpha=1.0))
    for mix in mixes:
        assert mix.share == np.float32(1 - mix.height * mix.width / (24 * 32))
    np.random.seed(0)
    theirs = [cutmix_bbox_and_lam((3, 24, 32), np.random.beta(1.0, 1.0))[1] for _ in range(20_000)]
    quantiles = np.linspace(0.02, 0.98, 33)
    ours = [mix.share for mix in mixes]
    assert np.abs(np.quantile(ours, quantiles) - np.quantile(theirs, quantiles)).max() < 0.03


def test_as_many_views_are_mixed_and_cut_as_was_asked_for():
    def shares(policy):
        mixes = draw_many(policy)
        mixed = [mix for mix in mixes if mix != NOT_MIXED]
        return len(mixed) / len(mixes), sum(mix.height > 0 for mix in mixed) / len(mixed)

    # A few boxes are empty, and their views not mixed.
    assert shares(BOTH) == pytest.approx((1, 0.5), abs=0.03)
    assert shares(MixPolicy(mixup_alpha=0.8, cutmix_alpha=1.0, prob=0.3)) == pytest.approx((0.3, 0.5), abs=0.05)
    assert shares(MixPolicy(mixup_alpha=0.8, cutmix_alpha=1.0, switch_prob=0.9)) == pytest.approx((1, 0.9), abs=0.03)
    assert shares(MixPolicy(mixup_alpha=0.8)) == pytest.approx((1, 0), abs=0.001)
    assert shares(MixPolicy(cutmix_alpha=1.0)) == pytest.approx((1, 1), abs=0.02)


@pytest.mark.parametrize("sample", [40, 45, 59, 12, 99], ids=["first", "middle", "last", "before", "behind"])
def test_partners_are_the_other_rows_all_alike(sample):
    counts = np.bincount([sample + mix.partner for mix in draw_many(sample=sample) if mix.partner], minlength=100)
    expected = np.setdiff1d(ROWS, [sample])
    assert np.flatnonzero(counts).tolist() == expected.tolist()
    assert np.abs(counts[expected] / counts.sum() - 1 / len(expected)).max() < 0.02


@pytest.mark.parametrize("partner_S", [[45], []])
def test_who_is_alone_is_not_mixed(partner_S):
    assert draw(partner_S=np.array(partner_S, np.int64)) == NOT_MIXED


@given(seed=st.integers(0, 2**64), key=st.text(max_size=20), view=st.integers(0, 2**40))
def test_a_mix_depends_on_its_arguments_alone(seed, key, view):
    blend = MixPolicy(mixup_alpha=0.8)
    found = draw(blend, seed=seed, key=key, view=view)
    others = [
        draw(blend, seed=seed + 1, key=key, view=view),
        draw(blend, seed=seed, key=key + "x", view=view),
        draw(blend, seed=seed, key=key, view=view + 1),
    ]
    assert draw(blend, seed=seed, key=key, view=view) == found
    assert len({found, *others}) == 4


def test_drawn_mixes_are_those_of_spec_2():
    """Golden: new numbers here mean a new SPEC."""
    assert [tuple(draw(key=f"k{number}")) for number in range(3)] == [
        pytest.approx(expected, rel=1e-6) for expected in GOLDEN
    ]


GOLDEN = [(1, 0.53326416015625, 0, 0, 0, 0), (12, 0.91796875, 17, 0, 7, 9), (-4, 0.8675537109375, 0, 0, 0, 0)]


# The pixels


@given(weight=st.integers(0, 65535))
def test_blends_equal_a_slow_computation(weight):
    own_HWC, partner_HWC = images()
    found = mix_pixels(own_HWC, partner_HWC, Mix(1, weight / 65536))
    for own, partner, value in zip(own_HWC.ravel(), partner_HWC.ravel(), found.ravel(), strict=True):
        assert int(value) == (int(own) * weight + int(partner) * (65536 - weight) + 32768) // 65536
    exact = own_HWC * (weight / 65536) + partner_HWC * (1 - weight / 65536)
    assert np.abs(found - exact).max() <= 0.5


def test_blends_round_halves_up():
    own_HWC, partner_HWC = np.full((1, 1, 3), 4, np.uint8), np.full((1, 1, 3), 7, np.uint8)
    assert mix_pixels(own_HWC, partner_HWC, Mix(1, 0.5)).ravel().tolist() == [6, 6, 6]
    assert mix_pixels(partner_HWC, own_HWC, Mix(1, 0.0)).ravel().tolist() == [4, 4, 4]


def test_a_box_is_the_partners_and_the_rest_the_own():
    own_HWC, partner_HWC = images()
    before = own_HWC.copy(), partner_HWC.copy()
    found = mix_pixels(own_HWC, partner_HWC, Mix(1, 1 - 6 / 63, top=2, left=4, height=3, width=2))
    for row in range(9):
        for column in range(7):
            inside = 2 <= row < 5 and 4 <= column < 6
            assert np.array_equal(found[row, column], (partner_HWC if inside else own_HWC)[row, column])
    assert np.array_equal(own_HWC, before[0])
    assert np.array_equal(partner_HWC, before[1])


# The record


@settings(max_examples=200)
@given(
    size=st.tuples(st.integers(1, 300), st.integers(1, 300)),
    key=st.text(max_size=10),
    alpha=st.floats(0.01, 100),
    far=st.integers(1, 2**24 - 2),
)
def test_float32_holds_every_mix(size, key, alpha, far):
    policy = MixPolicy(mixup_alpha=alpha, cutmix_alpha=alpha)
    mix = draw(policy, key=key, sample=7, partner_S=np.array([7, 7 + far]), height=size[0], width=size[1])
    stored_P = np.array(mix, np.float32)
    assert parse_mix(stored_P, *size) == mix
    assert mix.partner in (0, far)


@settings(max_examples=300)
@given(
    position=st.integers(0, len(MIXING_NAMES) - 1),
    value=st.one_of(st.floats(width=32), st.integers(-3, 40).map(float)),
    mix=st.sampled_from([NOT_MIXED, Mix(-3, 0.25), Mix(2, 0.75, 2, 4, 4, 5)]),
)
def test_hostile_mixes_are_refused_or_harmless(position, value, mix):
    stored_P = np.array(mix, np.float32)
    assert parse_mix(stored_P, 8, 10) == mix
    stored_P[position] = value
    try:
        found = parse_mix(stored_P, 8, 10)
    except CorruptCacheError:
        return
    assert np.array_equal(np.array(found, np.float32), stored_P)
    own_HWC, partner_HWC = images(8, 10)
    assert mix_pixels(own_HWC, partner_HWC, found).shape == (8, 10, 3)


@pytest.mark.parametrize(
    ("mix", "message"),
    [
        (Mix(0, 0.5), "mix_partner 0, mix_share 0.5"),
        (Mix(1, 1.0), "mix_share 1,"),
        (Mix(1, 0.3), "mix_share 0.3"),  # no whole 65536th
        (Mix(1, 0.5, 0, 0, 4, 4), "mix_share 0.5, .* mix_height 4"),  # the box leaves 0.8
        (Mix(1, 0.8, 6, 0, 4, 4), "mix_top 6"),
        (Mix(1, float("nan")), "mix_share nan"),
    ],
)
def test_mixes_that_do_not_fit_say_so(mix, message):
    with pytest.raises(CorruptCacheError, match=f"does not fit views of 10 x 8: .*{message}"):
        parse_mix(np.array(mix, np.float32), 8, 10)
    with pytest.raises(CorruptCacheError, match=r"shape \(5,\), expected \(6,\)"):
        parse_mix(np.array(mix, np.float32)[:5], 8, 10)


def test_impossible_policies_are_refused():
    for fields, message in (
        ({"mixup_alpha": -1.0}, r"mixup=-1\.0: expected 0 or more"),
        ({"cutmix_alpha": float("nan")}, "cutmix=nan"),
        ({}, "mixup and cutmix are 0, so nothing is mixed"),
        ({"mixup_alpha": 1.0, "prob": 0.0}, r"mix_prob=0\.0: expected more than 0"),
        ({"mixup_alpha": 1.0, "switch_prob": 1.5}, r"mixing switch_prob 1\.5"),
    ):
        with pytest.raises(ConfigError, match=message):
            MixPolicy(**fields)
    with pytest.raises(ConfigError, match=r"mix_prob=0\.5 without mixup or cutmix"):
        mix_policy(0.0, 0.0, 0.5)
    assert mix_policy(0.0, 0.0) is None
    assert mix_policy(0.8, 0.0, 0.5) == MixPolicy(mixup_alpha=0.8, prob=0.5)
