"""Passes each block's attention call to a handler, which answers it.

`torch.overrides.TorchFunctionMode` sees every call of `scaled_dot_product_attention`, whichever timm class makes it,
after q/k norm and rotary embedding. Hooks on the blocks tell which block is running. So one mechanism works for every
ViT built on this call, and the model is not changed. `nn.MultiheadAttention` is taken apart into the same call. Blocks
whose maps are not the softmax of one q k^T, or that form it by hand, make no such call. In them, the handler gets the
softmax over keys.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from atcache.attention.blocks import map_attention
from atcache.attention.calls import SDPA, AttentionCall, MapCall, attention_call, map_call
from atcache.attention.described import AttentionWay
from atcache.attention.multi_head import MULTI_HEAD, multi_head_call


class AttentionIntercept(TorchFunctionMode):
    """A context manager in which `handler` answers each block's attention call. Calls outside the blocks run as usual.

    It works for the thread that enters it. Leaving removes its hooks, even after an error.
    """

    def __init__(
        self,
        blocks: nn.ModuleList,
        handler: Callable[[AttentionCall | MapCall], Tensor],
        *,
        way: AttentionWay = "call",
    ) -> None:
        """Intercept the attention of these blocks.

        Args:
            blocks: as from `find_blocks`.
            handler: gives what a call returns.
            way: how the blocks attend; "softmax" makes all calls a `MapCall`.
        """
        super().__init__()
        self._blocks = blocks
        self._by_softmax = frozenset(
            index for index, block in enumerate(blocks) if way == "softmax" or map_attention(block) is not None
        )
        self._handler = handler
        self._running: int | None = None
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> AttentionIntercept:
        for index, block in enumerate(self._blocks):
            self._hooks.append(block.register_forward_pre_hook(self._make_enter(index)))
            self._hooks.append(block.register_forward_hook(self._leave))
        super().__enter__()
        return self

    def __exit__(self, *exc_info: Any) -> None:  # noqa: ANN401 - the base class's signature
        super().__exit__(*exc_info)
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._running = None

    def _make_enter(self, index: int) -> Callable[..., None]:
        def enter(*_: object) -> None:
            self._running = index

        return enter

    def _leave(self, *_: object) -> None:
        self._running = None

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401 - torch's own signature
        """See `TorchFunctionMode`."""
        del types
        kwargs = kwargs or {}
        block = self._running
        if block is None:
            return func(*args, **kwargs)
        if block in self._by_softmax:
            softmax = map_call(block, func, args, kwargs)
            return func(*args, **kwargs) if softmax is None else self._handler(softmax)
        if func is MULTI_HEAD:
            call = multi_head_call(block, args, kwargs)
            return call.finish(self._handler(call.attention))
        return self._handler(attention_call(block, args, kwargs)) if func is SDPA else func(*args, **kwargs)
