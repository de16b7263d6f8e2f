"""How much the heads of a layer are alike."""

from __future__ import annotations

import numpy as np

from atcache.statistics.arrays import Array, at_least, check_axes, epsilon, in_float32, namespace_of, tiny
from atcache.statistics.rows import attention_entropy


def head_cka(attn_HQK: Array) -> Array:
    """Linear CKA of each pair of heads: are their maps alike, up to a rotation of the keys?

    CKA(X, Y) = |Y'X|^2 / (|X'X| |Y'Y|) in Frobenius norms, where X and Y are maps whose columns have mean 0 over the
    queries: Kornblith et al. 2019 (arXiv 1905.00414), section 3. It compares which queries attend in the same way, not
    which keys they attend to; `head_jensen_shannon` compares the keys.

    Args:
        attn_HQK: probabilities, shape (..., head, query, key).

    Returns:
        Shape (..., head, head), in [0, 1], symmetric, 1 on the diagonal. A head whose rows are all alike has no
        pattern to compare: its row and column are 0, also on the diagonal.

    >>> head_cka(np.array([[[1.0, 0.0], [0.0, 1.0]], [[0.0, 1.0], [1.0, 0.0]]])).round(6)
    array([[1., 1.],
           [1., 1.]])
    """
    check_axes(attn_HQK, "head, query, key")
    attn_HQK = in_float32(attn_HQK)
    centred_HQK = attn_HQK - attn_HQK.mean(axis=-2)[..., None, :]
    # A sum of n numbers is off by up to n roundings. Where rows are all alike, those are all that is left.
    centred_HQK = centred_HQK * (abs(centred_HQK) > attn_HQK.shape[-2] * epsilon(attn_HQK) * attn_HQK)
    # |Y'X|^2 is the inner product of the kernels XX' and YY', which needs one product of matrices for each head.
    kernel_HQQ = centred_HQK @ centred_HQK.swapaxes(-1, -2)
    num_queries = attn_HQK.shape[-2]
    kernel_HP = kernel_HQQ.reshape((*kernel_HQQ.shape[:-2], num_queries * num_queries))
    product_HH = kernel_HP @ kernel_HP.swapaxes(-1, -2)
    norm_H = (kernel_HP * kernel_HP).sum(axis=-1) ** 0.5
    return product_HH / at_least(norm_H[..., :, None] * norm_H[..., None, :], tiny(attn_HQK))


def head_jensen_shannon(attn_HQK: Array, *, base: float = 2.0) -> Array:
    """Jensen-Shannon divergence of each pair of heads, averaged over queries: do they look at the same tokens?

    JS(P, Q) = H((P + Q) / 2) - (H(P) + H(Q)) / 2: Lin 1991, "Divergence measures based on the Shannon entropy" (IEEE
    Transactions on Information Theory 37). Clark et al. 2019 (arXiv 1906.04341), section 6, compare heads with it.

    Args:
        attn_HQK: probabilities, shape (..., head, query, key).
        base: 2 gives bits, e gives nats.

    Returns:
        Shape (..., head, head), in [0, log_base(2)], symmetric, 0 on the diagonal.

    >>> head_jensen_shannon(np.array([[[1.0, 0.0]], [[0.0, 1.0]]]))
    array([[0., 1.],
           [1., 0.]])
    """
    check_axes(attn_HQK, "head, query, key")
    entropy_HQ = attention_entropy(attn_HQK, base=base)
    columns = []
    for head in range(attn_HQK.shape[-3]):  # one at a time: all pairs at once would hold num_heads times the maps
        middle_HQK = (attn_HQK + attn_HQK[..., head : head + 1, :, :]) / 2
        of_pair_HQ = (entropy_HQ + entropy_HQ[..., head : head + 1, :]) / 2
        columns.append((attention_entropy(middle_HQK, base=base) - of_pair_HQ).mean(axis=-1))
    return namespace_of(attn_HQK).stack(columns, -1)


def head_divergence(attn_HQK: Array, *, base: float = 2.0) -> Array:
    """How far each head is from the mean of the layer's heads: KL(A_h || mean over heads of A), averaged over queries.

    Its mean over heads is the generalised Jensen-Shannon divergence of all of them (Lin 1991, IEEE Transactions on
    Information Theory 37): how much the heads differ from each other. Takes one pass, where
    `head_jensen_shannon` compares all pairs.

    Args:
        attn_HQK: probabilities, shape (..., head, query, key).
        base: 2 gives bits, e gives nats.

    Returns:
        Shape (..., head), in [0, log_base(num_heads)]; 0 if all heads look at the same tokens.

    >>> head_divergence(np.array([[[1.0, 0.0]], [[0.0, 1.0]]]))
    array([1., 1.])
    """
    check_axes(attn_HQK, "head, query, key")
    mean_QK = attn_HQK.mean(axis=-3)[..., None, :, :]
    logarithm = namespace_of(attn_HQK).log2(at_least(mean_QK, tiny(attn_HQK)))
    cross_HQ = -(attn_HQK * logarithm).sum(axis=-1) / float(np.log2(base))
    return (cross_HQ - attention_entropy(attn_HQK, base=base)).mean(axis=-1)
