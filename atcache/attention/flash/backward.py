"""Gradients of copying and of distillation, from the log-sum-exps that the forward pass kept.

With the student's probabilities P = exp(S - lse), the teacher's A = exp(T - given lse), and w, the gradient of the loss
divided by the number of rows: dS = P * (dO v^T - rowsum(dO * O)) + w (P - A), dq = scale dS k, dk = scale dS^T q, and
dv = P^T dO. The first part of dS is that of FlashAttention (Dao et al. 2022, arXiv 2205.14135, appendix B); the second
is cross-entropy's.
"""

from __future__ import annotations

import triton
import triton.language as tl

from atcache.attention.flash.tiles import LOG2_E, dot, load_rows, logits, store_rows


@triton.jit
def value_gradient_kernel(
    q, k, bias, lse, grad_out, grad_v,
    q_batch, q_head, q_token, k_batch, k_head, k_token, bias_batch, bias_head, bias_query, bias_key,
    grad_out_batch, grad_out_head, grad_out_token, grad_v_batch, grad_v_head, grad_v_token,
    num_value_heads, queries_per_key_head, queries_per_value_head, num_tokens, scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_V: tl.constexpr,
    HAS_BIAS: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """dv = P^T dO, the only gradient that copying needs. A program takes some keys, and goes through all queries."""
    num_tiles = tl.cdiv(num_tokens, N)
    sequence = tl.program_id(0) // num_tiles
    batch, value_head = (sequence // num_value_heads).to(tl.int64), (sequence % num_value_heads).to(tl.int64)
    key_N = (tl.program_id(0) % num_tiles) * N + tl.arange(0, N)
    grad_v_NV = tl.zeros([N, BLOCK_V], tl.float32)
    for member in range(0, queries_per_value_head):
        head = value_head * queries_per_value_head + member
        its_k = k + batch * k_batch + head // queries_per_key_head * k_head
        its_bias = bias + batch * bias_batch + head * bias_head
        its_q, its_grad = q + batch * q_batch + head * q_head, grad_out + batch * grad_out_batch + head * grad_out_head
        its_lse = lse + (batch * num_value_heads * queries_per_value_head + head) * num_tokens
        k_ND = load_rows(its_k, key_N, k_token, num_tokens, HEAD_DIM, BLOCK_D)
        for first_query in range(0, num_tokens, M):
            query_M = first_query + tl.arange(0, M)
            q_MD = load_rows(its_q, query_M, q_token, num_tokens, HEAD_DIM, BLOCK_D)
            grad_MV = load_rows(its_grad, query_M, grad_out_token, num_tokens, VALUE_DIM, BLOCK_V)
            # Probabilities of queries that do not exist are 0.
            lse_M = tl.load(its_lse + query_M, mask=query_M < num_tokens, other=float("inf"))
            s_NM = logits(k_ND, q_MD, scale, its_bias, key_N, bias_key, query_M, bias_query, num_tokens, HAS_BIAS)
            p_NM = tl.exp2(s_NM - lse_M[None, :] * LOG2_E)
            grad_v_NV += dot(p_NM.to(grad_MV.dtype), grad_MV)
    grad_v += batch * grad_v_batch + value_head * grad_v_head
    store_rows(grad_v, grad_v_NV, key_N, grad_v_token, num_tokens, VALUE_DIM, BLOCK_V)


@triton.jit
def row_dots_kernel(
    out, grad_out, dots, out_batch, out_head, out_token, grad_out_batch, grad_out_head, grad_out_token,
    num_heads, num_tokens, VALUE_DIM: tl.constexpr, BLOCK_V: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    """rowsum(dO * O) of each query, float32."""
    num_tiles = tl.cdiv(num_tokens, M)
    sequence = tl.program_id(0) // num_tiles
    batch, head = (sequence // num_heads).to(tl.int64), (sequence % num_heads).to(tl.int64)
    query_M = (tl.program_id(0) % num_tiles) * M + tl.arange(0, M)
    out += batch * out_batch + head * out_head
    grad_out += batch * grad_out_batch + head * grad_out_head
    out_MV = load_rows(out, query_M, out_token, num_tokens, VALUE_DIM, BLOCK_V).to(tl.float32)
    grad_MV = load_rows(grad_out, query_M, grad_out_token, num_tokens, VALUE_DIM, BLOCK_V).to(tl.float32)
    dots += sequence.to(tl.int64) * num_tokens + query_M
    tl.store(dots, tl.sum(out_MV * grad_MV, 1), mask=query_M < num_tokens)


@triton.jit
def _logits_gradient(
    left_MD, right_ND, given_left_MG, given_right_NG, value_left_MV, value_right_NV,
    row_M, column_N, lse, given_lse, dots, loss_weight,
    bias, bias_row, bias_column, given_bias, given_bias_row, given_bias_column, num_tokens, scale, given_scale,
    HAS_VALUES: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_GIVEN_BIAS: tl.constexpr,
):  # fmt: skip
    """The student's probabilities P and dS, (M, N). Left may be queries and right keys, or the reverse.

    Of values, the side of the queries is dO and the other one is v. `lse`, `given_lse` and `dots` belong to the
    queries, and are broadcast already.
    """
    s_MN = logits(left_MD, right_ND, scale, bias, row_M, bias_row, column_N, bias_column, num_tokens, HAS_BIAS)
    t_MN = logits(
        given_left_MG, given_right_NG, given_scale, given_bias,
        row_M, given_bias_row, column_N, given_bias_column, num_tokens, HAS_GIVEN_BIAS,
    )  # fmt: skip
    p_MN = tl.exp2(s_MN - lse * LOG2_E)
    grad_s_MN = loss_weight * (p_MN - tl.exp2(t_MN - given_lse * LOG2_E))
    if HAS_VALUES:
        grad_s_MN += p_MN * (dot(value_left_MV, tl.trans(value_right_NV)) - dots)
    return p_MN, grad_s_MN


@triton.jit
def key_gradients_kernel(
    q, k, v, bias, given_q, given_k, given_bias, grad_out, lse, given_lse, dots, weight, grad_k, grad_v,
    q_batch, q_head, q_token, k_batch, k_head, k_token, v_batch, v_head, v_token,
    bias_batch, bias_head, bias_query, bias_key,
    given_q_batch, given_q_head, given_q_token, given_k_batch, given_k_head, given_k_token,
    given_bias_batch, given_bias_head, given_bias_query, given_bias_key,
    grad_out_batch, grad_out_head, grad_out_token,
    num_key_heads, queries_per_key_head, queries_per_given_key_head, num_tokens, scale, given_scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_V: tl.constexpr,
    GIVEN_DIM: tl.constexpr, BLOCK_G: tl.constexpr,
    HAS_VALUES: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_GIVEN_BIAS: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """dk and dv of distillation. A program takes some keys, and goes through all queries of all heads that use them."""
    num_tiles = tl.cdiv(num_tokens, N)
    sequence = tl.program_id(0) // num_tiles
    batch, key_head = (sequence // num_key_heads).to(tl.int64), (sequence % num_key_heads).to(tl.int64)
    key_N = (tl.program_id(0) % num_tiles) * N + tl.arange(0, N)
    k_ND = load_rows(k + batch * k_batch + key_head * k_head, key_N, k_token, num_tokens, HEAD_DIM, BLOCK_D)
    loss_weight = tl.load(weight)
    grad_k_ND = tl.zeros([N, BLOCK_D], tl.float32)
    grad_v_NV = tl.zeros([N, BLOCK_V], tl.float32)
    v_NV = k_ND
    if HAS_VALUES:
        v_NV = load_rows(v + batch * v_batch + key_head * v_head, key_N, v_token, num_tokens, VALUE_DIM, BLOCK_V)
    for member in range(0, queries_per_key_head):
        head = key_head * queries_per_key_head + member
        its_q, its_given_q = q + batch * q_batch + head * q_head, given_q + batch * given_q_batch + head * given_q_head
        its_given_k = given_k + batch * given_k_batch + head // queries_per_given_key_head * given_k_head
        its_bias = bias + batch * bias_batch + head * bias_head
        its_given_bias = given_bias + batch * given_bias_batch + head * given_bias_head
        its_grad = grad_out + batch * grad_out_batch + head * grad_out_head
        first_row = (batch * num_key_heads * queries_per_key_head + head) * num_tokens
        given_k_NG = load_rows(its_given_k, key_N, given_k_token, num_tokens, GIVEN_DIM, BLOCK_G)
        for first_query in range(0, num_tokens, M):
            query_M = first_query + tl.arange(0, M)
            row_M, is_query_M = first_row + query_M, query_M < num_tokens
            # Probabilities of queries that do not exist are 0.
            lse_M = tl.load(lse + row_M, mask=is_query_M, other=float("inf"))
            given_lse_M = tl.load(given_lse + row_M, mask=is_query_M, other=float("inf"))
            q_MD = load_rows(its_q, query_M, q_token, num_tokens, HEAD_DIM, BLOCK_D)
            given_q_MG = load_rows(its_given_q, query_M, given_q_token, num_tokens, GIVEN_DIM, BLOCK_G)
            grad_MV, dots_M = q_MD, lse_M
            if HAS_VALUES:
                grad_MV = load_rows(its_grad, query_M, grad_out_token, num_tokens, VALUE_DIM, BLOCK_V)
                dots_M = tl.load(dots + row_M, mask=is_query_M, other=0.0)
            p_NM, grad_s_NM = _logits_gradient(
                k_ND, q_MD, given_k_NG, given_q_MG, v_NV, grad_MV,
                key_N, query_M, lse_M[None, :], given_lse_M[None, :], dots_M[None, :], loss_weight,
                its_bias, bias_key, bias_query, its_given_bias, given_bias_key, given_bias_query,
                num_tokens, scale, given_scale, HAS_VALUES, HAS_BIAS, HAS_GIVEN_BIAS,
            )  # fmt: skip
            if HAS_VALUES:
                grad_v_NV += dot(p_NM.to(grad_MV.dtype), grad_MV)
            grad_k_ND += dot(grad_s_NM.to(q_MD.dtype), q_MD)
    first_row = sequence.to(tl.int64) * num_tokens
    store_rows(grad_k + first_row * HEAD_DIM, grad_k_ND * scale, key_N, HEAD_DIM, num_tokens, HEAD_DIM, BLOCK_D)
    if HAS_VALUES:
        store_rows(grad_v + first_row * VALUE_DIM, grad_v_NV, key_N, VALUE_DIM, num_tokens, VALUE_DIM, BLOCK_V)


@triton.jit
def query_gradient_kernel(
    q, k, v, bias, given_q, given_k, given_bias, grad_out, lse, given_lse, dots, weight, grad_q,
    q_batch, q_head, q_token, k_batch, k_head, k_token, v_batch, v_head, v_token,
    bias_batch, bias_head, bias_query, bias_key,
    given_q_batch, given_q_head, given_q_token, given_k_batch, given_k_head, given_k_token,
    given_bias_batch, given_bias_head, given_bias_query, given_bias_key,
    grad_out_batch, grad_out_head, grad_out_token,
    num_heads, queries_per_key_head, queries_per_given_key_head, num_tokens, scale, given_scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_V: tl.constexpr,
    GIVEN_DIM: tl.constexpr, BLOCK_G: tl.constexpr,
    HAS_VALUES: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_GIVEN_BIAS: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """dq of distillation. A program takes some queries of one head, and goes through all keys."""
    num_tiles = tl.cdiv(num_tokens, M)
    sequence = tl.program_id(0) // num_tiles
    batch, head = (sequence // num_heads).to(tl.int64), (sequence % num_heads).to(tl.int64)
    query_M = (tl.program_id(0) % num_tiles) * M + tl.arange(0, M)
    k += batch * k_batch + head // queries_per_key_head * k_head
    v += batch * v_batch + head // queries_per_key_head * v_head
    given_k += batch * given_k_batch + head // queries_per_given_key_head * given_k_head
    bias += batch * bias_batch + head * bias_head
    given_bias += batch * given_bias_batch + head * given_bias_head
    given_q += batch * given_q_batch + head * given_q_head
    grad_out += batch * grad_out_batch + head * grad_out_head
    first_row = sequence.to(tl.int64) * num_tokens
    row_M, is_query_M = first_row + query_M, query_M < num_tokens
    lse_M = tl.load(lse + row_M, mask=is_query_M, other=float("inf"))
    given_lse_M = tl.load(given_lse + row_M, mask=is_query_M, other=float("inf"))
    q_MD = load_rows(q + batch * q_batch + head * q_head, query_M, q_token, num_tokens, HEAD_DIM, BLOCK_D)
    given_q_MG = load_rows(given_q, query_M, given_q_token, num_tokens, GIVEN_DIM, BLOCK_G)
    grad_MV, dots_M = q_MD, lse_M
    if HAS_VALUES:
        grad_MV = load_rows(grad_out, query_M, grad_out_token, num_tokens, VALUE_DIM, BLOCK_V)
        dots_M = tl.load(dots + row_M, mask=is_query_M, other=0.0)
    loss_weight = tl.load(weight)
    grad_q_MD = tl.zeros([M, BLOCK_D], tl.float32)
    for first_key in range(0, num_tokens, N):
        key_N = first_key + tl.arange(0, N)
        k_ND = load_rows(k, key_N, k_token, num_tokens, HEAD_DIM, BLOCK_D)
        given_k_NG = load_rows(given_k, key_N, given_k_token, num_tokens, GIVEN_DIM, BLOCK_G)
        v_NV = load_rows(v, key_N, v_token, num_tokens, VALUE_DIM, BLOCK_V) if HAS_VALUES else k_ND
        _, grad_s_MN = _logits_gradient(
            q_MD, k_ND, given_q_MG, given_k_NG, grad_MV, v_NV,
            query_M, key_N, lse_M[:, None], given_lse_M[:, None], dots_M[:, None], loss_weight,
            bias, bias_query, bias_key, given_bias, given_bias_query, given_bias_key,
            num_tokens, scale, given_scale, HAS_VALUES, HAS_BIAS, HAS_GIVEN_BIAS,
        )  # fmt: skip
        # Probabilities of keys that do not exist are not 0, and may be infinite.
        grad_s_MN = tl.where((key_N < num_tokens)[None, :], grad_s_MN, 0.0)
        grad_q_MD += dot(grad_s_MN.to(k_ND.dtype), k_ND)
    store_rows(grad_q + first_row * HEAD_DIM, grad_q_MD * scale, query_M, HEAD_DIM, num_tokens, HEAD_DIM, BLOCK_D)


@triton.jit
def _gradients_of_keys(
    k_ND, v_NV, given_k_NG, key_N, grad_k_ND, grad_v_NV,
    q_MD, given_q_MG, grad_MV, query_M, lse_M, given_lse_M, dots_M, loss_weight, bias, given_bias,
    bias_query, bias_key, given_bias_query, given_bias_key, num_tokens, scale, given_scale,
    HAS_VALUES: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_GIVEN_BIAS: tl.constexpr,
):  # fmt: skip
    """Add what some queries give to dk and dv of some keys; also what these keys give to dq, before the scale."""
    p_NM, grad_s_NM = _logits_gradient(
        k_ND, q_MD, given_k_NG, given_q_MG, v_NV, grad_MV,
        key_N, query_M, lse_M[None, :], given_lse_M[None, :], dots_M[None, :], loss_weight,
        bias, bias_key, bias_query, given_bias, given_bias_key, given_bias_query,
        num_tokens, scale, given_scale, HAS_VALUES, HAS_BIAS, HAS_GIVEN_BIAS,
    )  # fmt: skip
    if HAS_VALUES:
        grad_v_NV += dot(p_NM.to(grad_MV.dtype), grad_MV)
    # Probabilities of keys that do not exist are not 0, and may be infinite.
    grad_s_NM = tl.where((key_N < num_tokens)[:, None], grad_s_NM, 0.0).to(q_MD.dtype)
    grad_k_ND += dot(grad_s_NM, q_MD)
    return grad_k_ND, grad_v_NV, dot(tl.trans(grad_s_NM), k_ND)


@triton.jit
def all_gradients_kernel(
    q, k, v, bias, given_q, given_k, given_bias, grad_out, lse, given_lse, dots, weight, grad_q, grad_k, grad_v,
    q_batch, q_head, q_token, k_batch, k_head, k_token, v_batch, v_head, v_token,
    bias_batch, bias_head, bias_query, bias_key,
    given_q_batch, given_q_head, given_q_token, given_k_batch, given_k_head, given_k_token,
    given_bias_batch, given_bias_head, given_bias_query, given_bias_key,
    grad_out_batch, grad_out_head, grad_out_token,
    num_heads, queries_per_given_key_head, num_tokens, scale, given_scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_V: tl.constexpr,
    GIVEN_DIM: tl.constexpr, BLOCK_G: tl.constexpr,
    HAS_VALUES: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_GIVEN_BIAS: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """dq, dk and dv of one head at once, for sequences of at most N + TAIL tokens, whose keys all stay on the chip.

    Each probability is formed once, where the other two kernels form it twice. Each head of q has its own of k and v.
    A tile's side is a power of two, so keys are in two tiles: 257 tokens, of 16 x 16 patches and a class token, take
    256 and 16 in place of 512. TAIL may be 0.
    """
    sequence = tl.program_id(0)
    batch, head = (sequence // num_heads).to(tl.int64), (sequence % num_heads).to(tl.int64)
    q += batch * q_batch + head * q_head
    k += batch * k_batch + head * k_head
    v += batch * v_batch + head * v_head
    given_q += batch * given_q_batch + head * given_q_head
    given_k += batch * given_k_batch + head // queries_per_given_key_head * given_k_head
    bias += batch * bias_batch + head * bias_head
    given_bias += batch * given_bias_batch + head * given_bias_head
    grad_out += batch * grad_out_batch + head * grad_out_head
    first_row = sequence.to(tl.int64) * num_tokens
    grad_q += first_row * HEAD_DIM
    grad_k += first_row * HEAD_DIM
    grad_v += first_row * VALUE_DIM
    loss_weight = tl.load(weight)
    key_N = tl.arange(0, N)
    k_ND = load_rows(k, key_N, k_token, num_tokens, HEAD_DIM, BLOCK_D)
    given_k_NG = load_rows(given_k, key_N, given_k_token, num_tokens, GIVEN_DIM, BLOCK_G)
    v_NV = load_rows(v, key_N, v_token, num_tokens, VALUE_DIM, BLOCK_V) if HAS_VALUES else k_ND
    grad_k_ND, grad_v_NV = tl.zeros([N, BLOCK_D], tl.float32), tl.zeros([N, BLOCK_V], tl.float32)
    if TAIL > 0:
        key_R = N + tl.arange(0, TAIL)
        k_RD = load_rows(k, key_R, k_token, num_tokens, HEAD_DIM, BLOCK_D)
        given_k_RG = load_rows(given_k, key_R, given_k_token, num_tokens, GIVEN_DIM, BLOCK_G)
        v_RV = load_rows(v, key_R, v_token, num_tokens, VALUE_DIM, BLOCK_V) if HAS_VALUES else k_RD
        grad_k_RD, grad_v_RV = tl.zeros([TAIL, BLOCK_D], tl.float32), tl.zeros([TAIL, BLOCK_V], tl.float32)
    for first_query in range(0, num_tokens, M):
        query_M = first_query + tl.arange(0, M)
        row_M, is_query_M = first_row + query_M, query_M < num_tokens
        # Probabilities of queries that do not exist are 0.
        lse_M = tl.load(lse + row_M, mask=is_query_M, other=float("inf"))
        given_lse_M = tl.load(given_lse + row_M, mask=is_query_M, other=float("inf"))
        q_MD = load_rows(q, query_M, q_token, num_tokens, HEAD_DIM, BLOCK_D)
        given_q_MG = load_rows(given_q, query_M, given_q_token, num_tokens, GIVEN_DIM, BLOCK_G)
        grad_MV, dots_M = q_MD, lse_M
        if HAS_VALUES:
            grad_MV = load_rows(grad_out, query_M, grad_out_token, num_tokens, VALUE_DIM, BLOCK_V)
            dots_M = tl.load(dots + row_M, mask=is_query_M, other=0.0)
        grad_k_ND, grad_v_NV, grad_q_MD = _gradients_of_keys(
            k_ND, v_NV, given_k_NG, key_N, grad_k_ND, grad_v_NV,
            q_MD, given_q_MG, grad_MV, query_M, lse_M, given_lse_M, dots_M, loss_weight, bias, given_bias,
            bias_query, bias_key, given_bias_query, given_bias_key, num_tokens, scale, given_scale,
            HAS_VALUES, HAS_BIAS, HAS_GIVEN_BIAS,
        )  # fmt: skip
        if TAIL > 0:
            grad_k_RD, grad_v_RV, of_tail_MD = _gradients_of_keys(
                k_RD, v_RV, given_k_RG, key_R, grad_k_RD, grad_v_RV,
                q_MD, given_q_MG, grad_MV, query_M, lse_M, given_lse_M, dots_M, loss_weight, bias, given_bias,
                bias_query, bias_key, given_bias_query, given_bias_key, num_tokens, scale, given_scale,
                HAS_VALUES, HAS_BIAS, HAS_GIVEN_BIAS,
            )  # fmt: skip
            grad_q_MD += of_tail_MD
        store_rows(grad_q, grad_q_MD * scale, query_M, HEAD_DIM, num_tokens, HEAD_DIM, BLOCK_D)
    store_rows(grad_k, grad_k_ND * scale, key_N, HEAD_DIM, num_tokens, HEAD_DIM, BLOCK_D)
    if HAS_VALUES:
        store_rows(grad_v, grad_v_NV, key_N, VALUE_DIM, num_tokens, VALUE_DIM, BLOCK_V)
    if TAIL > 0:
        store_rows(grad_k, grad_k_RD * scale, key_R, HEAD_DIM, num_tokens, HEAD_DIM, BLOCK_D)
        if HAS_VALUES:
            store_rows(grad_v, grad_v_RV, key_R, VALUE_DIM, num_tokens, VALUE_DIM, BLOCK_V)


@triton.jit
def bias_gradient_kernel(
    q, k, v, bias, given_q, given_k, given_bias, grad_out, lse, given_lse, dots, weight, grad_bias,
    q_batch, q_head, q_token, k_batch, k_head, k_token, v_batch, v_head, v_token,
    bias_batch, bias_head, bias_query, bias_key,
    given_q_batch, given_q_head, given_q_token, given_k_batch, given_k_head, given_k_token,
    given_bias_batch, given_bias_head, given_bias_query, given_bias_key,
    grad_out_batch, grad_out_head, grad_out_token,
    num_heads, num_bias_heads, batches_each, heads_each, queries_per_key_head, queries_per_given_key_head,
    num_tokens, scale, given_scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_V: tl.constexpr,
    GIVEN_DIM: tl.constexpr, BLOCK_G: tl.constexpr,
    HAS_VALUES: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_GIVEN_BIAS: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """The gradient of a bias with a value for each query and key. A program sums one tile over all that share it."""
    num_tiles = tl.cdiv(num_tokens, M) * tl.cdiv(num_tokens, N)
    sequence, tile = tl.program_id(0) // num_tiles, tl.program_id(0) % num_tiles
    bias_row, first_head = sequence // num_bias_heads, sequence % num_bias_heads
    query_M = tile // tl.cdiv(num_tokens, N) * M + tl.arange(0, M)
    key_N = tile % tl.cdiv(num_tokens, N) * N + tl.arange(0, N)
    is_query_M = query_M < num_tokens
    loss_weight = tl.load(weight)
    grad_MN = tl.zeros([M, N], tl.float32)
    for member in range(0, batches_each * heads_each):
        batch = (bias_row * batches_each + member // heads_each).to(tl.int64)
        head = (first_head * heads_each + member % heads_each).to(tl.int64)
        row_M = (batch * num_heads + head) * num_tokens + query_M
        lse_M = tl.load(lse + row_M, mask=is_query_M, other=float("inf"))
        given_lse_M = tl.load(given_lse + row_M, mask=is_query_M, other=float("inf"))
        q_MD = load_rows(q + batch * q_batch + head * q_head, query_M, q_token, num_tokens, HEAD_DIM, BLOCK_D)
        its_k = k + batch * k_batch + head // queries_per_key_head * k_head
        k_ND = load_rows(its_k, key_N, k_token, num_tokens, HEAD_DIM, BLOCK_D)
        its_given_q = given_q + batch * given_q_batch + head * given_q_head
        given_q_MG = load_rows(its_given_q, query_M, given_q_token, num_tokens, GIVEN_DIM, BLOCK_G)
        its_given_k = given_k + batch * given_k_batch + head // queries_per_given_key_head * given_k_head
        given_k_NG = load_rows(its_given_k, key_N, given_k_token, num_tokens, GIVEN_DIM, BLOCK_G)
        grad_out_MV, v_NV, dots_M = q_MD, k_ND, lse_M
        if HAS_VALUES:
            its_grad = grad_out + batch * grad_out_batch + head * grad_out_head
            grad_out_MV = load_rows(its_grad, query_M, grad_out_token, num_tokens, VALUE_DIM, BLOCK_V)
            its_v = v + batch * v_batch + head // queries_per_key_head * v_head
            v_NV = load_rows(its_v, key_N, v_token, num_tokens, VALUE_DIM, BLOCK_V)
            dots_M = tl.load(dots + row_M, mask=is_query_M, other=0.0)
        _, grad_s_MN = _logits_gradient(
            q_MD, k_ND, given_q_MG, given_k_NG, grad_out_MV, v_NV,
            query_M, key_N, lse_M[:, None], given_lse_M[:, None], dots_M[:, None], loss_weight,
            bias + batch * bias_batch + head * bias_head, bias_query, bias_key,
            given_bias + batch * given_bias_batch + head * given_bias_head, given_bias_query, given_bias_key,
            num_tokens, scale, given_scale, HAS_VALUES, HAS_BIAS, HAS_GIVEN_BIAS,
        )  # fmt: skip
        grad_MN += grad_s_MN
    place_MN = (
        grad_bias + sequence.to(tl.int64) * num_tokens * num_tokens + query_M[:, None] * num_tokens + key_N[None, :]
    )
    tl.store(place_MN, grad_MN, mask=is_query_M[:, None] & (key_N < num_tokens)[None, :])
