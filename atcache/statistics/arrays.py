"""What statistics need of arrays: numpy's, torch's (also on a GPU) and dask's, which stay lazy.

Most of it has the same name in all three, so that a formula is written once, with the namespace of its array. The rest
is here. Importing this imports neither torch nor dask.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from atcache.errors import AttentionShapeError

if TYPE_CHECKING:
    from atcache.attention.tokens import TokenLayout

Array = Any
"""A numpy array, a torch tensor or a dask array; results are of the same kind."""


def namespace_of(*arrays: Array) -> Any:  # noqa: ANN401 - a module
    """numpy, torch or dask.array: the module whose functions take these arrays. dask's also takes numpy's.

    Raises:
        AttentionShapeError: they are of another kind, or torch's and others are mixed.
    """
    kinds = {_kind_of(array) for array in arrays}
    if kinds == {"torch"}:
        return sys.modules["torch"]
    if kinds <= {"numpy", "dask"}:
        return sys.modules["dask.array"] if "dask" in kinds else np
    found = " and ".join(sorted({f"{type(array).__module__}.{type(array).__qualname__}" for array in arrays}))
    raise AttentionShapeError(
        f"maps of the type {found}: expected numpy arrays, torch tensors or dask arrays, all of one kind."
    )


def _kind_of(array: Array) -> str:
    if isinstance(array, np.ndarray | np.generic):
        return "numpy"
    # What is not imported cannot have made the array.
    for kind, module, name in (("torch", "torch", "Tensor"), ("dask", "dask.array", "Array")):
        if module in sys.modules and isinstance(array, getattr(sys.modules[module], name)):
            return kind
    return "other"


def is_torch(array: Array) -> bool:
    """Whether it is a tensor."""
    return _kind_of(array) == "torch"


def tiny(array: Array) -> float:
    """The smallest positive normal number of the array's dtype. Raises what `_limits_of` does."""
    return float(_limits_of(array).tiny)


def epsilon(array: Array) -> float:
    """The distance from 1 to the next number of the array's dtype. Raises what `_limits_of` does."""
    return float(_limits_of(array).eps)


def _limits_of(array: Array) -> Any:  # noqa: ANN401 - numpy's or torch's finfo
    """The limits of the array's dtype.

    Raises:
        AttentionShapeError: its numbers are no floating-point numbers.
    """
    namespace = sys.modules["torch"] if is_torch(array) else np
    try:
        return namespace.finfo(array.dtype)
    except (TypeError, ValueError):
        raise AttentionShapeError(
            f"maps of dtype {array.dtype}: expected floating-point probabilities, such as float32."
        ) from None


def at_least(array: Array, low: float) -> Array:
    """The numbers, those below `low` replaced by it; NaN stays."""
    return array.clamp_min(low) if is_torch(array) else namespace_of(array).clip(array, low, None)


def greatest(array: Array, axis: int) -> Array:
    """The largest numbers along an axis."""
    return array.amax(dim=axis) if is_torch(array) else array.max(axis=axis)


def in_float32(array: Array) -> Array:
    """The numbers in float32, if they have only 16 bits: products of small probabilities would be 0 in float16."""
    if array.dtype.itemsize != 2:
        return array
    return array.float() if is_torch(array) else array.astype(np.float32)


def in_one_dtype(*arrays: Array) -> list[Array]:
    """Arrays of one kind in the widest of their dtypes, and in float32 if all have only 16 bits.

    Raises:
        AttentionShapeError: the numbers of one are no floating-point numbers.
    """
    for array in arrays:
        _limits_of(array)
    dtypes = [array.dtype for array in arrays]
    if is_torch(arrays[0]):
        torch = sys.modules["torch"]
        widest = functools.reduce(torch.promote_types, dtypes, torch.float32)
        return [array.to(widest) for array in arrays]
    widest = np.result_type(np.float32, *dtypes)
    return [array if array.dtype == widest else array.astype(widest) for array in arrays]


def constant(values: np.ndarray, like: Array) -> Array:
    """A small array of our own for use with `like`: of its dtype, unless it is bool, and for torch on its device."""
    if not is_torch(like):
        return values.astype(like.dtype) if values.dtype.kind == "f" else values
    tensor = sys.modules["torch"].as_tensor(values, device=like.device)
    return tensor.to(like.dtype) if values.dtype.kind == "f" else tensor


def largest(array: Array, k: int) -> Array:
    """The k largest numbers along the last axis, in no order."""
    if is_torch(array):
        return array.topk(k, dim=-1, sorted=False).values
    if _kind_of(array) == "dask":
        return each_block(lambda block: largest(block, k), array, whole_axes=1, tail=(k,))
    return np.partition(array, array.shape[-1] - k, axis=-1)[..., array.shape[-1] - k :]


def singular_values(matrices: Array) -> Array:
    """Singular values of the last two axes, shape (..., smaller side); NaN for a matrix that has a NaN."""
    matrices = in_float32(matrices)  # LAPACK knows no other
    if _kind_of(matrices) == "dask":
        return each_block(singular_values, matrices, whole_axes=2, tail=(min(matrices.shape[-2:]),))
    xp = namespace_of(matrices)
    # LAPACK refuses NaN, and one view that is not stored must not take the others with it.
    is_bad = xp.isnan(matrices.sum(axis=(-1, -2)))[..., None]
    clean = xp.where(is_bad[..., None], 0.0, matrices)
    return xp.where(is_bad, float("nan"), xp.linalg.svdvals(clean))


def each_block(function: Callable[[Any], Any], array: Array, *, whole_axes: int, tail: tuple[int, ...]) -> Array:
    """A function of numpy arrays on each block of a dask array, lazily.

    Args:
        function: from (..., last axes) to (..., *tail).
        array: the dask array; its last axes are joined so that no block holds only a part of them.
        whole_axes: how many axes are the last ones.
        tail: the lengths of the axes that come in their place.
    """
    whole = array.rechunk({axis: -1 for axis in range(array.ndim - whole_axes, array.ndim)})
    chunks = (*whole.chunks[: array.ndim - whole_axes], *((side,) for side in tail))
    dropped = list(range(array.ndim - whole_axes + len(tail), array.ndim))
    return whole.map_blocks(
        function, dtype=array.dtype, chunks=chunks, drop_axis=dropped, meta=np.empty((0,) * len(chunks), array.dtype)
    )


def check_keys(attn_QK: Array, tokens: TokenLayout) -> None:
    """Refuse what cannot be maps of these tokens.

    Raises:
        AttentionShapeError: the last axis has not one key for each token.
    """
    if attn_QK.ndim < 2 or attn_QK.shape[-1] != tokens.num_tokens:
        raise AttentionShapeError(
            f"maps of shape {tuple(attn_QK.shape)}: expected (..., query, {tokens.num_tokens}) for "
            f"{tokens.num_prefix_tokens} prefix tokens and {tokens.grid_height} x {tokens.grid_width} patches."
        )


def check_axes(attn: Array, axes: str) -> None:
    """Refuse an array with fewer axes than these last ones, or with none of some kind.

    Args:
        attn: maps.
        axes: the names of the last axes, such as "head, query, key".

    Raises:
        AttentionShapeError: it has fewer axes.
    """
    if attn.ndim < axes.count(",") + 1 or 0 in attn.shape[-axes.count(",") - 1 :]:
        raise AttentionShapeError(f"maps of shape {tuple(attn.shape)}: expected (..., {axes}), none of them empty.")


def check_k(k: int, attn_QK: Array) -> None:
    """Refuse a number of keys that rows do not have.

    Raises:
        AttentionShapeError: it is below 1 or above the number of keys.
    """
    if not 1 <= k <= attn_QK.shape[-1]:
        raise AttentionShapeError(f"k={k}: expected 1 to {attn_QK.shape[-1]}, the number of keys in a row.")


def query_numbers(attn_QK: Array, queries: Any, num_tokens: int) -> np.ndarray:  # noqa: ANN401 - a sequence, or None
    """The token of each row.

    Args:
        attn_QK: maps.
        queries: the tokens whose rows they have; None for all.
        num_tokens: how many tokens there are.

    Raises:
        AttentionShapeError: there are other numbers of rows and of tokens, or a token does not exist.
    """
    query_Q = np.arange(num_tokens) if queries is None else np.asarray(queries, dtype=int)
    if attn_QK.shape[-2] != len(query_Q):
        raise AttentionShapeError(
            f"maps of shape {tuple(attn_QK.shape)}: expected {len(query_Q)} rows, one for each token whose rows they "
            "have. Say with `queries` which ones these are."
        )
    if ((query_Q < 0) | (query_Q >= num_tokens)).any():
        raise AttentionShapeError(f"queries {query_Q.tolist()}: expected tokens from 0 to {num_tokens - 1}.")
    return query_Q
