"""Attention's output with its log-sum-exp, alone or beside the distillation loss.

A program takes some queries of one head and goes through all keys. It keeps the largest logit so far, and the sums
that belong to it, as in FlashAttention (Dao et al. 2022, arXiv 2205.14135).
"""

from __future__ import annotations

import triton
import triton.language as tl

from atcache.attention.flash.tiles import LN_2, dot, finite_or_zero, load_rows, logits, store_rows


@triton.jit
def attend_kernel(
    q, k, v, bias, out, lse,
    q_batch, q_head, q_token, k_batch, k_head, k_token, v_batch, v_head, v_token,
    bias_batch, bias_head, bias_query, bias_key, out_batch, out_head, out_token,
    num_heads, queries_per_key_head, queries_per_value_head, num_tokens, scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_V: tl.constexpr,
    HAS_BIAS: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """softmax(scale * q k^T + bias) v, and the log-sum-exp of the logits, in nats."""
    num_tiles = tl.cdiv(num_tokens, M)
    sequence = tl.program_id(0) // num_tiles
    batch, head = (sequence // num_heads).to(tl.int64), (sequence % num_heads).to(tl.int64)
    query_M = (tl.program_id(0) % num_tiles) * M + tl.arange(0, M)
    k += batch * k_batch + head // queries_per_key_head * k_head
    v += batch * v_batch + head // queries_per_value_head * v_head
    bias += batch * bias_batch + head * bias_head
    q_MD = load_rows(q + batch * q_batch + head * q_head, query_M, q_token, num_tokens, HEAD_DIM, BLOCK_D)
    maximum_M = tl.full([M], float("-inf"), tl.float32)
    sum_M = tl.zeros([M], tl.float32)
    out_MV = tl.zeros([M, BLOCK_V], tl.float32)
    for first_key in range(0, num_tokens, N):
        key_N = first_key + tl.arange(0, N)
        k_ND = load_rows(k, key_N, k_token, num_tokens, HEAD_DIM, BLOCK_D)
        s_MN = logits(q_MD, k_ND, scale, bias, query_M, bias_query, key_N, bias_key, num_tokens, HAS_BIAS)
        s_MN = tl.where((key_N < num_tokens)[None, :], s_MN, float("-inf"))
        new_maximum_M = tl.maximum(maximum_M, tl.max(s_MN, 1))
        base_M = finite_or_zero(new_maximum_M)
        p_MN = tl.exp2(s_MN - base_M[:, None])
        shrink_M = tl.exp2(maximum_M - base_M)
        sum_M = sum_M * shrink_M + tl.sum(p_MN, 1)
        v_NV = load_rows(v, key_N, v_token, num_tokens, VALUE_DIM, BLOCK_V)
        out_MV = out_MV * shrink_M[:, None] + dot(p_MN.to(v_NV.dtype), v_NV)
        maximum_M = new_maximum_M
    store_rows(
        out + batch * out_batch + head * out_head,
        out_MV / sum_M[:, None], query_M, out_token, num_tokens, VALUE_DIM, BLOCK_V,
    )  # fmt: skip
    lse += sequence.to(tl.int64) * num_tokens + query_M
    tl.store(lse, (finite_or_zero(maximum_M) + tl.log2(sum_M)) * LN_2, mask=query_M < num_tokens)


@triton.jit
def compare_kernel(
    q, k, v, bias, given_q, given_k, given_bias, out, lse, given_lse, loss,
    q_batch, q_head, q_token, k_batch, k_head, k_token, v_batch, v_head, v_token,
    bias_batch, bias_head, bias_query, bias_key,
    given_q_batch, given_q_head, given_q_token, given_k_batch, given_k_head, given_k_token,
    given_bias_batch, given_bias_head, given_bias_query, given_bias_key, out_batch, out_head, out_token,
    num_heads, queries_per_key_head, queries_per_given_key_head, num_tokens, scale, given_scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_V: tl.constexpr,
    GIVEN_DIM: tl.constexpr, BLOCK_G: tl.constexpr,
    HAS_VALUES: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_GIVEN_BIAS: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """A student's attention, and for each query the cross-entropy of its row and the given teacher's, in nats.

    The cross-entropy is log-sum-exp(S) - sum_j A_j S_j, where S are the student's logits and A are the teacher's
    probabilities. The logits in the sum are counted from the largest one, since large ones would cancel.
    """
    num_tiles = tl.cdiv(num_tokens, M)
    sequence = tl.program_id(0) // num_tiles
    batch, head = (sequence // num_heads).to(tl.int64), (sequence % num_heads).to(tl.int64)
    query_M = (tl.program_id(0) % num_tiles) * M + tl.arange(0, M)
    k += batch * k_batch + head // queries_per_key_head * k_head
    v += batch * v_batch + head // queries_per_key_head * v_head
    bias += batch * bias_batch + head * bias_head
    given_k += batch * given_k_batch + head // queries_per_given_key_head * given_k_head
    given_bias += batch * given_bias_batch + head * given_bias_head
    q_MD = load_rows(q + batch * q_batch + head * q_head, query_M, q_token, num_tokens, HEAD_DIM, BLOCK_D)
    given_q += batch * given_q_batch + head * given_q_head
    given_q_MG = load_rows(given_q, query_M, given_q_token, num_tokens, GIVEN_DIM, BLOCK_G)
    maximum_M = tl.full([M], float("-inf"), tl.float32)
    given_maximum_M = tl.full([M], float("-inf"), tl.float32)
    sum_M = tl.zeros([M], tl.float32)
    given_sum_M = tl.zeros([M], tl.float32)
    cross_M = tl.zeros([M], tl.float32)
    out_MV = tl.zeros([M, BLOCK_V], tl.float32)
    for first_key in range(0, num_tokens, N):
        key_N = first_key + tl.arange(0, N)
        is_key_1N = (key_N < num_tokens)[None, :]
        k_ND = load_rows(k, key_N, k_token, num_tokens, HEAD_DIM, BLOCK_D)
        s_MN = logits(q_MD, k_ND, scale, bias, query_M, bias_query, key_N, bias_key, num_tokens, HAS_BIAS)
        s_MN = tl.where(is_key_1N, s_MN, float("-inf"))
        given_k_NG = load_rows(given_k, key_N, given_k_token, num_tokens, GIVEN_DIM, BLOCK_G)
        t_MN = logits(
            given_q_MG, given_k_NG, given_scale, given_bias,
            query_M, given_bias_query, key_N, given_bias_key, num_tokens, HAS_GIVEN_BIAS,
        )  # fmt: skip
        t_MN = tl.where(is_key_1N, t_MN, float("-inf"))
        new_maximum_M = tl.maximum(maximum_M, tl.max(s_MN, 1))
        new_given_maximum_M = tl.maximum(given_maximum_M, tl.max(t_MN, 1))
        base_M, given_base_M = finite_or_zero(new_maximum_M), finite_or_zero(new_given_maximum_M)
        s_MN -= base_M[:, None]
        p_MN, a_MN = tl.exp2(s_MN), tl.exp2(t_MN - given_base_M[:, None])
        shrink_M, given_shrink_M = tl.exp2(maximum_M - base_M), tl.exp2(given_maximum_M - given_base_M)
        sum_M = sum_M * shrink_M + tl.sum(p_MN, 1)
        # The sum so far was counted from the largest logit so far. A key that both mask adds nothing, not 0 * -inf.
        moved_M = tl.where(maximum_M == float("-inf"), 0.0, maximum_M - base_M)
        cross_M = (cross_M + given_sum_M * moved_M) * given_shrink_M
        cross_M += tl.sum(tl.where(a_MN == 0.0, 0.0, a_MN * s_MN), 1)
        given_sum_M = given_sum_M * given_shrink_M + tl.sum(a_MN, 1)
        if HAS_VALUES:
            v_NV = load_rows(v, key_N, v_token, num_tokens, VALUE_DIM, BLOCK_V)
            out_MV = out_MV * shrink_M[:, None] + dot(p_MN.to(v_NV.dtype), v_NV)
        maximum_M, given_maximum_M = new_maximum_M, new_given_maximum_M
    if HAS_VALUES:
        store_rows(
            out + batch * out_batch + head * out_head,
            out_MV / sum_M[:, None], query_M, out_token, num_tokens, VALUE_DIM, BLOCK_V,
        )  # fmt: skip
    is_query_M = query_M < num_tokens
    place_M = sequence.to(tl.int64) * num_tokens + query_M
    tl.store(lse + place_M, (finite_or_zero(maximum_M) + tl.log2(sum_M)) * LN_2, mask=is_query_M)
    given_lse_M = (finite_or_zero(given_maximum_M) + tl.log2(given_sum_M)) * LN_2
    tl.store(given_lse + place_M, given_lse_M, mask=is_query_M)
    tl.store(loss + place_M, (tl.log2(sum_M) - cross_M / given_sum_M) * LN_2, mask=is_query_M)
