"""Finds the blocks of any module by watching one forward pass: where it attends, and what runs at that time.

Layer i of a cache is the i-th time that the module attends over all its tokens. Its block is the largest submodule in
which this happens just once: `layers.3` rather than `layers.3.attn`, and never `layers`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from atcache.attention.calls import SDPA, attention_call, map_call
from atcache.attention.described import AttentionWay, DescribedModel, QueryKey, run_module
from atcache.attention.multi_head import MULTI_HEAD
from atcache.attention.tokens import TokenLayout
from atcache.errors import AtcacheError, TeacherError, UnsupportedAttentionError

_NUM_IMAGES = 2  # more than one, so that windows, which become part of the batch axis, are told from images


class _Attention(NamedTuple):
    """One time that the module attended."""

    way: AttentionWay
    shape: tuple[int, int, int]
    """Batch, queries, keys."""
    running: tuple[nn.Module, ...]
    """The submodules that were running, the outermost first."""

    def is_over(self, num_tokens: int) -> bool:
        return self.shape == (_NUM_IMAGES, num_tokens, num_tokens)


def describe(
    module: nn.Module,
    *,
    label: str,
    image_size: tuple[int, int],
    grid: tuple[int, int],
    num_prefix_tokens: int | None = None,
    attention: type[nn.Module] | None = None,
    query_key: QueryKey | None = None,
    forward: Callable[[nn.Module, Tensor], Any] | None = None,
) -> DescribedModel:
    """The description of a module, from one forward pass of two images of noise.

    Args:
        module: in eval mode. All of its attention over patches must be over the same tokens.
        label: its name in messages.
        image_size: height and width of its images, in pixels.
        grid: rows and columns of its patches.
        num_prefix_tokens: tokens before the patches; None takes all that are not patches.
        attention: the class of its attention modules, if they are to be the blocks. Only with `query_key`.
        query_key: gives q and k from an attention module and its inputs.
        forward: runs the module, as in `DescribedModel`.

    Raises:
        UnsupportedAttentionError: it does not attend, or not over prefix tokens and patches, or not once in each block.
    """
    seen = _watch(label, module, image_size, forward)
    ways = {one.way for one in seen}
    # A softmax beside calls of torch's own attention is something else, such as a pooling head.
    way: AttentionWay = "call" if "call" in ways and query_key is None else "softmax"
    seen = [one for one in seen if one.way == way]
    num_patches = grid[0] * grid[1]
    tokens = _count_tokens(label, seen, num_patches, num_prefix_tokens)
    layers = [one for one in seen if one.is_over(tokens)]
    blocks = _blocks(label, layers, seen) if attention is None else _of_class(label, attention, layers)
    return DescribedModel(
        module,
        blocks=blocks,
        tokens=TokenLayout(num_prefix_tokens=tokens - num_patches, grid_height=grid[0], grid_width=grid[1]),
        label=label,
        way=way,
        query_key=query_key,
        forward=forward,
    )


def _watch(
    label: str, module: nn.Module, image_size: tuple[int, int], forward: Callable[[nn.Module, Tensor], Any] | None
) -> list[_Attention]:
    parameter = next(module.parameters(), torch.empty(0))
    noise = torch.randn(_NUM_IMAGES, 3, *image_size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), _Watch().over(module) as watch:
        try:
            run_module(module, noise.to(parameter), forward)
        except AtcacheError:
            raise
        except Exception as error:  # a foreign module raises anything
            words = " ".join(str(error).split())
            raise TeacherError(
                f"{label}: it does not run on images of {image_size[0]} x {image_size[1]} pixels "
                f"({type(error).__name__}: {words[:300]}). Is that the size that it was made for?"
            ) from error
    return watch.seen


class _Watch(TorchFunctionMode):
    """Notes each attention, and the submodules that run meanwhile."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[_Attention] = []
        self._running: list[nn.Module] = []

    @contextmanager
    def over(self, module: nn.Module) -> Generator[_Watch]:
        """A context in which the submodules of `module` are noted."""
        handles: list[Any] = []
        try:
            for child in module.modules():
                handles.append(child.register_forward_pre_hook(lambda entered, _: self._running.append(entered)))
                handles.append(child.register_forward_hook(self._leave))
            with self:
                yield self
        finally:
            for handle in handles:
                handle.remove()

    def _leave(self, _module: nn.Module, _args: object, _output: object) -> None:
        self._running.pop()

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401 - torch's own signature
        kwargs = kwargs or {}
        if func is SDPA:
            call = attention_call(0, args, kwargs)
            self._note("call", call.query.shape[0], call.query.shape[-2], call.key.shape[-2])
        elif func is MULTI_HEAD:
            given = {**dict(zip(("query", "key"), args, strict=False)), **kwargs}
            self._note("call", given["query"].shape[-2], given["query"].shape[0], given["key"].shape[0])
        elif (softmax := map_call(0, func, args, kwargs)) is not None:
            num_batch, _, num_queries, num_keys = softmax.logits_BHQK.shape
            self._note("softmax", num_batch, num_queries, num_keys)
        return func(*args, **kwargs)

    def _note(self, way: AttentionWay, *shape: int) -> None:
        num_batch, num_queries, num_keys = shape
        self.seen.append(_Attention(way, (num_batch, num_queries, num_keys), tuple(self._running)))


def _count_tokens(label: str, seen: Sequence[_Attention], num_patches: int, num_prefix_tokens: int | None) -> int:
    """How many tokens the module attends over."""
    counts = list(dict.fromkeys(one.shape[1] for one in seen if one.is_over(one.shape[1])))
    wanted = [count for count in counts if count >= num_patches]
    if num_prefix_tokens is not None:
        wanted = [count for count in counts if count == num_patches + num_prefix_tokens]
    if len(wanted) == 1:
        return wanted[0]
    expected = f"{num_patches} patches"
    if num_prefix_tokens is not None:
        expected = f"{num_prefix_tokens} prefix tokens and {expected}"
    if wanted:
        raise UnsupportedAttentionError(
            f"{label}: it attends over {' and over '.join(map(str, wanted))} tokens. Give num_prefix_tokens, so that "
            f"{expected} and these are all tokens of the layers to keep."
        )
    found = sorted({f"{one.shape[1]} x {one.shape[2]}" for one in seen})
    if not found:
        raise UnsupportedAttentionError(
            f"{label}: no attention was seen: it calls neither scaled_dot_product_attention nor nn.MultiheadAttention, "
            "and takes no softmax of logits (batch, head, query, key). Kernels of other libraries, and compiled "
            "modules, cannot be seen into: let the module use scaled_dot_product_attention."
        )
    raise UnsupportedAttentionError(
        f"{label}: its maps are {', '.join(found)}, expected square ones over {expected} of each image. Are the sizes "
        "of image and patches and the number of prefix tokens right? Attention in windows cannot be cached."
    )


def _blocks(label: str, layers: Sequence[_Attention], seen: Sequence[_Attention]) -> list[nn.Module]:
    """For each layer the outermost submodule that attends only once."""
    times = Counter(id(module) for one in seen for module in set(one.running))
    blocks: list[nn.Module] = []
    for number, layer in enumerate(layers):
        alone = [module for module in layer.running if times[id(module)] == 1]
        if not alone:
            inner = type(layer.running[-1]).__name__
            raise UnsupportedAttentionError(
                f"{label}: layer {number} attends in a {inner} that attends {times[id(layer.running[-1])]} times in "
                "one forward pass. Each layer needs a module of its own, which attends once."
            )
        blocks.append(alone[0])
    return blocks


def _of_class(label: str, attention: type[nn.Module], layers: Sequence[_Attention]) -> list[nn.Module]:
    """For each layer the submodule of this class."""
    blocks = [[module for module in layer.running if isinstance(module, attention)] for layer in layers]
    found = [modules[-1] for modules in blocks if modules]
    if len(found) < len(layers) or len(set(found)) < len(found):
        raise UnsupportedAttentionError(
            f"{label}: {len(layers)} layers take a softmax over all tokens, in {len(set(found))} modules of class "
            f"{attention.__name__}. Expected one module of the class given as `attention` for each layer."
        )
    return found
