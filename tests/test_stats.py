"""Statistics of maps, each against a slow loop, and the same on numpy and dask."""

from __future__ import annotations

import math

import dask.array as da
import numpy as np
import pytest

from atcache.attention.tokens import TokenLayout
from atcache.errors import AttentionShapeError
from atcache.stats import attention_entropy, mean_attention_distance, patch_distances, patch_grid, prefix_mass

TOKENS = TokenLayout(num_prefix_tokens=2, grid_height=2, grid_width=3)


@pytest.fixture
def attn_SHQK():
    rng = np.random.default_rng(0)
    weights = rng.exponential(size=(3, 2, 8, 8)).astype(np.float32) ** 4
    weights[0, 0, 0, 3] = 0
    return weights / weights.sum(axis=-1, keepdims=True)


def test_entropy_equals_a_loop_over_rows(attn_SHQK):
    entropy_SHQ = attention_entropy(attn_SHQK)
    for place in np.ndindex(3, 2, 8):
        expected = -sum(float(p) * math.log2(p) for p in attn_SHQK[place] if p > 0)
        assert entropy_SHQ[place] == pytest.approx(expected, abs=1e-5)


def test_entropy_spans_zero_to_the_logarithm_of_keys():
    one_hot, uniform = np.eye(8, dtype=np.float32), np.full((8, 8), 1 / 8, np.float32)
    assert np.allclose(attention_entropy(one_hot), 0)
    assert np.allclose(attention_entropy(uniform), 3)
    assert np.allclose(attention_entropy(uniform, base=math.e), math.log(8))


def test_prefix_mass_equals_a_loop_over_prefix_keys(attn_SHQK):
    mass_SHQ = prefix_mass(attn_SHQK, TOKENS)
    for place in np.ndindex(3, 2, 8):
        assert mass_SHQ[place] == pytest.approx(sum(attn_SHQK[place][key] for key in range(2)), abs=1e-6)


def test_prefix_mass_is_zero_without_prefix_tokens(attn_SHQK):
    tokens = TokenLayout(num_prefix_tokens=0, grid_height=2, grid_width=4)
    assert np.array_equal(prefix_mass(attn_SHQK, tokens), np.zeros((3, 2, 8), np.float32))


def test_mean_distance_equals_a_loop_over_patch_pairs(attn_SHQK):
    distance_SH = mean_attention_distance(attn_SHQK, TOKENS)
    for place in np.ndindex(3, 2):
        rows = []
        for query in range(6):
            weights = [float(attn_SHQK[place][query + 2, key + 2]) for key in range(6)]
            lengths = [math.dist(divmod(query, 3), divmod(key, 3)) for key in range(6)]
            rows.append(sum(w * d for w, d in zip(weights, lengths, strict=True)) / sum(weights))
        assert distance_SH[place] == pytest.approx(sum(rows) / 6, rel=1e-5)


def test_a_head_that_attends_to_itself_has_distance_zero_and_uniform_has_the_mean():
    assert mean_attention_distance(np.eye(8), TOKENS) == 0
    assert mean_attention_distance(np.full((8, 8), 1 / 8), TOKENS) == pytest.approx(patch_distances(TOKENS).mean())


def test_a_head_that_attends_to_prefix_tokens_only_has_distance_zero():
    attn_QK = np.zeros((8, 8))
    attn_QK[:, 0] = 1
    assert mean_attention_distance(attn_QK, TOKENS) == 0


@pytest.mark.parametrize(
    "statistic",
    [
        attention_entropy,
        lambda attn: prefix_mass(attn, TOKENS),
        lambda attn: mean_attention_distance(attn, TOKENS),
    ],
)
def test_dask_stays_lazy_and_gives_what_numpy_gives(attn_SHQK, statistic):
    lazy = statistic(da.from_array(attn_SHQK, chunks=(1, 2, 8, 8)))
    assert isinstance(lazy, da.Array)
    assert lazy.dtype == statistic(attn_SHQK).dtype == np.float32
    assert np.allclose(lazy.compute(), statistic(attn_SHQK), rtol=1e-6)


@pytest.mark.parametrize(
    "statistic",
    [
        attention_entropy,
        lambda attn: prefix_mass(attn, TOKENS),
        lambda attn: mean_attention_distance(attn, TOKENS),
    ],
)
def test_views_that_are_not_stored_stay_nan(attn_SHQK, statistic):
    attn_SHQK[1] = np.nan
    values = statistic(attn_SHQK)
    assert np.isnan(values[1]).all()
    assert np.isfinite(values[[0, 2]]).all()


def test_maps_of_other_tokens_are_refused_with_both_shapes():
    with pytest.raises(AttentionShapeError, match=r"shape \(2, 7, 7\): expected \(..., query, 8\) for 2 prefix tokens"):
        prefix_mass(np.zeros((2, 7, 7)), TOKENS)
    with pytest.raises(AttentionShapeError, match="2 x 3 patches"):
        mean_attention_distance(np.zeros(8), TOKENS)


# Rows of some tokens


def test_statistics_of_rows_are_those_of_the_whole_maps(attn_SHQK):
    chosen = [0, 3, 5]
    rows_SHQK = attn_SHQK[:, :, chosen]
    assert np.array_equal(attention_entropy(rows_SHQK), attention_entropy(attn_SHQK)[:, :, chosen])
    assert np.array_equal(prefix_mass(rows_SHQK, TOKENS), prefix_mass(attn_SHQK, TOKENS)[:, :, chosen])
    assert np.array_equal(patch_grid(rows_SHQK, TOKENS), patch_grid(attn_SHQK, TOKENS)[:, :, chosen])


@pytest.mark.parametrize("make", [np.asarray, lambda attn: da.from_array(attn, chunks=(1, 2, 2, 8))])
def test_the_distance_of_rows_is_a_mean_over_the_patches_among_them(attn_SHQK, make):
    alone = [mean_attention_distance(attn_SHQK[:, :, [query]], TOKENS, [query]) for query in (3, 7)]
    of_rows = mean_attention_distance(make(attn_SHQK[:, :, [0, 3, 7]]), TOKENS, queries=[0, 3, 7])
    assert np.allclose(np.asarray(of_rows), np.mean(alone, axis=0), rtol=1e-5)


def test_prefix_tokens_have_no_distance():
    with pytest.raises(AttentionShapeError, match=r"rows of tokens \[0, 1\], none of them a patch.*`patch_grid` shows"):
        mean_attention_distance(np.full((2, 8), 1 / 8), TOKENS, queries=range(2))
    with pytest.raises(AttentionShapeError, match=r"shape \(2, 8\): expected 8 rows.*Say with `queries`"):
        mean_attention_distance(np.full((2, 8), 1 / 8), TOKENS)


def test_a_patch_grid_is_where_a_query_looks(attn_SHQK):
    grid_SHQYX = patch_grid(attn_SHQK, TOKENS)
    assert grid_SHQYX.shape == (3, 2, 8, 2, 3)
    assert grid_SHQYX[2, 1, 4, 1, 2] == attn_SHQK[2, 1, 4, 2 + 5]
    assert np.allclose(grid_SHQYX.sum(axis=(-1, -2)), 1 - prefix_mass(attn_SHQK, TOKENS), atol=1e-6)
