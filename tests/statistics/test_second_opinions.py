"""Each statistic against plain loops or scipy, on numpy, torch and dask, and for all the maps that a cache may give."""

from __future__ import annotations

import math
import subprocess
import sys
from itertools import combinations

import dask.array as da
import numpy as np
import pytest
import scipy.linalg
import scipy.spatial.distance
import scipy.stats
import torch

from atcache import stats
from atcache.attention.tokens import TokenLayout
from atcache.errors import AttentionShapeError

MAKE = {
    "numpy": np.asarray,
    "torch": torch.from_numpy,
    # No axis in one piece: formulas must not need that.
    "dask": lambda attn: da.from_array(attn, chunks=(1, 1, 2, *(max(1, side // 2 + 1) for side in attn.shape[3:]))),
}
LAYOUTS = {
    "class token and register": TokenLayout(num_prefix_tokens=2, grid_height=2, grid_width=3),
    "no prefix": TokenLayout(num_prefix_tokens=0, grid_height=2, grid_width=4),
    "class token": TokenLayout(num_prefix_tokens=1, grid_height=7, grid_width=1),
}
ROWS = {"all": tuple(range(8)), "cls": (0,), "some": (0, 3, 5)}


def random_maps(seed: int, queries: tuple[int, ...] = ROWS["all"]) -> np.ndarray:
    """attn_SLHQK float32 with probabilities of 0, ties, and heads of different sharpness."""
    weights = np.random.default_rng(seed).exponential(size=(2, 2, 3, 8, 8)).astype(np.float32)
    weights **= np.array([0.5, 2, 6], np.float32)[:, None, None]
    weights[0, 0, 0, 3] = [0, 0, 1, 1, 1, 1, 0, 2]
    return (weights / weights.sum(axis=-1, keepdims=True))[..., list(queries), :]


def as_numpy(found) -> np.ndarray:
    return np.asarray(found.compute() if isinstance(found, da.Array) else found)


@pytest.fixture(params=MAKE)
def make(request):
    return MAKE[request.param]


@pytest.fixture(params=LAYOUTS)
def tokens(request):
    return LAYOUTS[request.param]


@pytest.fixture(params=ROWS)
def queries(request):
    return ROWS[request.param]


# One map after the other: what each statistic of a map is, in plain Python


def entropy_of(row) -> float:
    return float(scipy.stats.entropy(np.asarray(row, np.float64), base=2))


def largest_of(row, k) -> list[int]:
    return sorted(range(len(row)), key=lambda key: (-row[key], key))[:k]


def sinks_of(attn_QK, threshold=0.3) -> list[int]:
    return [key for key in range(attn_QK.shape[1]) if sum(map(float, attn_QK[:, key])) / len(attn_QK) > threshold]


def rank_of(attn_QK) -> float:
    values = scipy.linalg.svdvals(attn_QK.astype(np.float64))
    shares = [float(value / values.sum()) for value in values]
    return math.exp(-sum(share * math.log(share) for share in shares if share > 0))


def distance_of(attn_QK, queries, tokens) -> float:
    prefix, width = tokens.num_prefix_tokens, tokens.grid_width
    rows = []
    for row, query in zip(attn_QK, queries, strict=True):
        if query < prefix:
            continue
        lengths = [math.dist(divmod(query - prefix, width), divmod(key, width)) for key in range(tokens.num_patches)]
        weights = [float(weight) for weight in row[prefix:]]
        rows.append(sum(w * d for w, d in zip(weights, lengths, strict=True)) / sum(weights))
    return sum(rows) / len(rows)


def check(found, expected, attn, axes: int, *, atol: float = 2e-6) -> None:
    """Compare a statistic with what a function of the last `axes` axes of numpy maps gives."""
    leading = attn.shape[: attn.ndim - axes]
    wanted = np.array([expected(attn[place]) for place in np.ndindex(*leading)])
    wanted = wanted.reshape(*leading, *wanted.shape[1:])
    values = as_numpy(found)
    assert values.shape == wanted.shape == tuple(found.shape)
    np.testing.assert_allclose(values, wanted, rtol=1e-5, atol=atol)


def test_statistics_of_rows(make, tokens, queries):
    attn = random_maps(0, queries)
    given, prefix = make(attn), tokens.num_prefix_tokens
    check(stats.attention_entropy(given), entropy_of, attn, 1)
    check(stats.prefix_mass(given, tokens), lambda row: sum(row[:prefix]), attn, 1)
    check(stats.cls_mass(given, tokens), lambda row: row[0] if prefix else 0, attn, 1)
    check(stats.register_mass(given, tokens), lambda row: sum(row[1:prefix]), attn, 1)
    check(stats.self_mass(given, queries), lambda map_: [row[q] for row, q in zip(map_, queries, strict=True)], attn, 2)
    check(stats.largest_mass(given, 3), lambda row: sum(row[key] for key in largest_of(row, 3)), attn, 1)
    check(stats.largest_mass(given, 8), sum, attn, 1)


def test_statistics_of_maps(make, tokens, queries):
    attn = random_maps(1, queries)
    given = make(attn)
    check(stats.effective_rank(given), rank_of, attn, 2, atol=1e-4)
    found = stats.sink_tokens(given, threshold=0.3)
    check(found.is_sink_K, lambda map_: [key in sinks_of(map_) for key in range(8)], attn, 2)
    check(found.received_K, lambda map_: [sum(map_[:, key]) / len(map_) for key in range(8)], attn, 2)
    check(found.mass, lambda map_: sum(map_[:, key].mean() for key in sinks_of(map_)), attn, 2)
    if any(query >= tokens.num_prefix_tokens for query in queries):
        distance = stats.mean_attention_distance(given, tokens, queries)
        check(distance, lambda map_: distance_of(map_, queries, tokens), attn, 2)


def test_likeness_of_heads(make, queries):
    attn = random_maps(2, queries)
    given = make(attn)

    def divergences(attn_HQK):
        return [
            [
                np.mean(
                    [scipy.spatial.distance.jensenshannon(p, q, base=2) ** 2 for p, q in zip(one, other, strict=True)]
                )
                for other in attn_HQK.astype(np.float64)
            ]
            for one in attn_HQK.astype(np.float64)
        ]

    def from_the_mean(attn_HQK):
        mean_QK = attn_HQK.astype(np.float64).mean(axis=0)
        return [
            np.mean([scipy.stats.entropy(p, q, base=2) for p, q in zip(one, mean_QK, strict=True)]) for one in attn_HQK
        ]

    check(stats.head_jensen_shannon(given), divergences, attn, 3)
    check(stats.head_divergence(given), from_the_mean, attn, 3)


def test_cka_by_centred_kernels(make):
    attn = random_maps(3)

    def by_hsic(attn_HQK):
        # The definition of the paper: HSIC of linear kernels, each centred by a matrix.
        num_queries = attn_HQK.shape[1]
        centre = np.eye(num_queries) - 1 / num_queries
        kernels = [centre @ one.astype(np.float64) @ one.astype(np.float64).T @ centre for one in attn_HQK]
        hsic = [[np.trace(one @ other) for other in kernels] for one in kernels]
        return [
            [hsic[i][j] / math.sqrt(hsic[i][i] * hsic[j][j]) for j in range(len(kernels))] for i in range(len(kernels))
        ]

    check(stats.head_cka(make(attn)), by_hsic, attn, 3)


def test_cka_does_not_see_where_keys_are_and_is_zero_without_a_pattern():
    attn_QK = random_maps(4)[0, 0, 2]
    turned, flat = attn_QK[:, ::-1], np.full((8, 8), 1 / 8, np.float32)
    cka_HH = stats.head_cka(np.stack([attn_QK, turned, flat]))
    np.testing.assert_allclose(cka_HH, [[1, 1, 0], [1, 1, 0], [0, 0, 0]], atol=1e-5)


@pytest.mark.parametrize("num_tokens", [17, 50, 197, 257])
def test_heads_whose_rows_are_all_alike_are_like_no_other(make, num_tokens):
    """Also where the mean of equal rows is not exactly these, as with 197 tokens."""
    row_K = np.random.default_rng(0).dirichlet(np.ones(num_tokens)).astype(np.float32)
    flat_K = np.full(num_tokens, 1 / num_tokens, np.float32)
    attn_VLHQK = np.stack([np.tile(one, (num_tokens, 1)) for one in (row_K, flat_K)])[None, None]
    np.testing.assert_array_equal(as_numpy(stats.head_cka(make(attn_VLHQK))), np.zeros((1, 1, 2, 2)))


@pytest.mark.parametrize("heads", ["mean", "max"])
def test_rollout_layer_by_layer(make, heads):
    attn = random_maps(5)

    def by_hand(attn_LHQK):
        rollout = np.eye(8)
        for attn_HQK in attn_LHQK.astype(np.float64):
            mixed = attn_HQK.mean(axis=0) if heads == "mean" else attn_HQK.max(axis=0)
            mixed /= mixed.sum(axis=1, keepdims=True)
            rollout = (0.5 * mixed + 0.5 * np.eye(8)) @ rollout
        return rollout

    found = stats.attention_rollout(make(attn), heads=heads)
    check(found, by_hand, attn, 4)
    np.testing.assert_allclose(as_numpy(found).sum(axis=-1), 1, rtol=1e-5)


def test_agreement_of_two_sets_of_maps(make, queries):
    attn, other = random_maps(6, queries), random_maps(7, queries)
    given = make(attn), make(other)
    both = np.stack([attn, other], axis=-2).astype(np.float64)  # ..., (P, Q), key
    both /= both.sum(axis=-1, keepdims=True)

    def floored_kl(pair):
        p, q = (np.maximum(row, 1e-2) for row in pair)
        return sum(pair[0, key] * math.log(p[key] / q[key]) for key in range(8))

    check(stats.kl_divergence(*given), lambda pair: scipy.stats.entropy(*pair), both, 2)
    check(stats.kl_divergence(*given, base=2), lambda pair: scipy.stats.entropy(*pair, base=2), both, 2)
    check(stats.kl_divergence(*given, floor=1e-2), floored_kl, both, 2)
    check(stats.js_divergence(*given), lambda pair: scipy.spatial.distance.jensenshannon(*pair) ** 2, both, 2)
    check(stats.total_variation(*given), lambda pair: sum(abs(pair[0] - pair[1])) / 2, both, 2)
    check(stats.cosine_similarity(*given), lambda pair: 1 - scipy.spatial.distance.cosine(*pair), both, 2)
    overlap = stats.largest_overlap(*given, k=4)
    exact = np.stack([attn, other], axis=-2)
    check(overlap, lambda pair: len({*largest_of(pair[0], 4)} & {*largest_of(pair[1], 4)}) / 4, exact, 2)


def test_kl_is_infinite_where_only_the_second_is_zero(make):
    attn = np.full((1, 1, 1, 2, 2), 0.5, np.float32)
    other = np.array([[1, 0], [0.5, 0.5]], np.float32)[None, None, None]
    assert as_numpy(stats.kl_divergence(make(attn), make(other))).tolist() == [[[[math.inf, 0]]]]
    assert as_numpy(stats.kl_divergence(make(other), make(attn)))[0, 0, 0, 0] == pytest.approx(math.log(2))


# All of them, for maps that are missing, and for arrays that are no maps

TOKENS = LAYOUTS["class token and register"]
OF_ONE = {
    "attention_entropy": stats.attention_entropy,
    "prefix_mass": lambda attn: stats.prefix_mass(attn, TOKENS),
    "cls_mass": lambda attn: stats.cls_mass(attn, TOKENS),
    "register_mass": lambda attn: stats.register_mass(attn, TOKENS),
    "self_mass": stats.self_mass,
    "largest_mass": lambda attn: stats.largest_mass(attn, 3),
    "patch_grid": lambda attn: stats.patch_grid(attn, TOKENS),
    "mean_attention_distance": lambda attn: stats.mean_attention_distance(attn, TOKENS),
    "sink_tokens": lambda attn: stats.sink_tokens(attn).mass,
    "effective_rank": stats.effective_rank,
    "head_cka": stats.head_cka,
    "head_jensen_shannon": stats.head_jensen_shannon,
    "head_divergence": stats.head_divergence,
    "attention_rollout": stats.attention_rollout,
}
OF_TWO = {
    "kl_divergence": stats.kl_divergence,
    "js_divergence": stats.js_divergence,
    "total_variation": stats.total_variation,
    "cosine_similarity": stats.cosine_similarity,
    "largest_overlap": lambda attn, other: stats.largest_overlap(attn, other, 3),
}


def test_all_functions_are_tested_here():
    functions = {name for name in vars(stats) if name[0].islower() and callable(getattr(stats, name))}
    assert functions - {"patch_distances"} == {*OF_ONE, *OF_TWO}


@pytest.mark.parametrize("name", [*OF_ONE, *OF_TWO])
def test_missing_views_are_nan_and_leave_the_others_alone(make, name):
    attn, other = random_maps(8), random_maps(9)
    holed = attn.copy()
    holed[0] = np.nan
    if name in OF_ONE:
        whole, found = OF_ONE[name](make(attn)), OF_ONE[name](make(holed))
    else:
        whole, found = (OF_TWO[name](make(one), make(other)) for one in (attn, holed))
        assert np.isnan(as_numpy(OF_TWO[name](make(other), make(holed)))[0]).all()
    assert type(found) is type(make(attn))
    assert np.isnan(as_numpy(found)[0]).all()
    np.testing.assert_allclose(as_numpy(found)[1], as_numpy(whole)[1], rtol=1e-6)
    assert np.isfinite(as_numpy(whole)[1]).all()


@pytest.mark.parametrize("name", [*OF_ONE, *OF_TWO])
def test_float64_is_not_lost(make, name):
    attn, other = random_maps(8).astype(np.float64), random_maps(9).astype(np.float64)
    found = OF_ONE[name](make(attn)) if name in OF_ONE else OF_TWO[name](make(attn), make(other))
    assert as_numpy(found).dtype == np.float64 or name == "largest_overlap"  # a count, divided


def test_what_cannot_be_maps_is_refused_in_one_sentence():
    attn = random_maps(0)
    for wrong, message in (
        (lambda: stats.attention_entropy([[1.0]]), "type builtins.list: expected numpy arrays, torch tensors or dask"),
        (lambda: stats.attention_entropy(np.eye(2, dtype=int)), "dtype int64: expected floating-point probabilities"),
        (lambda: stats.largest_mass(attn, 9), "k=9: expected 1 to 8, the number of keys"),
        (lambda: stats.largest_overlap(attn, attn, 0), "k=0: expected 1 to 8"),
        (
            lambda: stats.kl_divergence(attn, attn[..., :7]),
            r"\(2, 2, 3, 8, 8\) and \(2, 2, 3, 8, 7\): expected the same",
        ),
        (
            lambda: stats.js_divergence(attn, torch.from_numpy(attn)),
            "numpy.ndarray and torch.Tensor: .* all of one kind",
        ),
        (lambda: stats.self_mass(attn, [0, 1]), "expected 2 rows, one for each token"),
        (lambda: stats.self_mass(attn[..., :2, :], [0, 8]), r"queries \[0, 8\]: expected tokens from 0 to 7"),
        (lambda: stats.head_cka(attn[0, 0, 0]), r"shape \(8, 8\): expected \(..., head, query, key\)"),
        (lambda: stats.attention_rollout(attn[0, 0]), r"expected \(..., layer, head, query, key\)"),
        (lambda: stats.attention_rollout(attn[..., :1, :]), "needs the rows of all 8 tokens, not of 1"),
        (lambda: stats.attention_rollout(attn, heads="median"), "heads='median': expected mean or max"),
        (lambda: stats.effective_rank(attn[:, :, :, :0]), "none of them empty"),
    ):
        with pytest.raises(AttentionShapeError, match=message):
            wrong()


def test_identical_maps_agree_fully():
    attn = random_maps(0).astype(np.float64)
    same = {name: function(attn, attn) for name, function in OF_TWO.items()}
    for name, value in (("kl_divergence", 0), ("js_divergence", 0), ("total_variation", 0), ("cosine_similarity", 1)):
        np.testing.assert_allclose(same[name], value, atol=1e-12)
    assert (same["largest_overlap"] == 1).all()
    assert (stats.kl_divergence(attn, attn, floor=0.2) == 0).all()


def test_maps_in_float16_are_not_lost_in_their_products(make):
    attn = np.repeat(random_maps(0), 32, axis=-1).astype(np.float32) / 32  # as small as those of 257 tokens
    half = make(attn.astype(np.float16))
    for name, function in (
        ("CKA", stats.head_cka),
        ("rank", stats.effective_rank),
        ("cosine", lambda maps: stats.cosine_similarity(maps, maps)),
    ):
        np.testing.assert_allclose(as_numpy(function(half)), as_numpy(function(make(attn))), rtol=0.01, err_msg=name)


@pytest.mark.parametrize("name", OF_TWO)
def test_maps_of_other_dtypes_are_compared_in_the_wider_one(make, name):
    # Logits that differ much give probabilities that float16 rounds to few bits, or to 0.
    logits = np.random.default_rng(0).normal(scale=4, size=(2, 1, 1, 1, 8, 65)).astype(np.float32)
    attn, other = (weights / weights.sum(axis=-1, keepdims=True) for weights in np.exp(logits))
    attn[..., 3] = other[..., 3] = 0  # a masked key
    for one_type, other_type in (("float16", "float16"), ("float32", "float16"), ("float16", "float64")):
        one_rounded, other_rounded = attn.astype(one_type), other.astype(other_type)
        expected = as_numpy(OF_TWO[name](make(one_rounded.astype("float64")), make(other_rounded.astype("float64"))))
        found = as_numpy(OF_TWO[name](make(one_rounded), make(other_rounded)))
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5, err_msg=f"{one_type}, {other_type}")
        assert not np.isnan(expected).any()


def test_maps_of_a_stored_shape_stay_lazy():
    attn = da.from_array(random_maps(0), chunks=1)
    other = da.from_array(random_maps(1), chunks=1)
    for found in (*(function(attn) for function in OF_ONE.values()), *(f(attn, other) for f in OF_TWO.values())):
        assert isinstance(found, da.Array)


def test_pairs_of_heads_are_symmetric():
    attn_HQK = random_maps(0)[0, 0].astype(np.float64)
    for likeness_HH in (stats.head_cka(attn_HQK), stats.head_jensen_shannon(attn_HQK)):
        for one, other in combinations(range(3), 2):
            assert likeness_HH[one, other] == pytest.approx(likeness_HH[other, one])


def test_the_statistics_import_neither_torch_nor_dask():
    code = "import sys, atcache.stats; print(sorted({'torch', 'dask', 'timm', 'zarr'} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
