"""Passes each block's attention call to a handler, which answers it.

`torch.overrides.TorchFunctionMode` sees every call of `scaled_dot_product_attention`, whichever timm class makes it,
after q/k norm and rotary embedding. Hooks on the blocks tell which block is running. So one mechanism works for every
ViT built on this call, and the model is not changed. Blocks whose maps are not the softmax of one q k^T do not make
this call. In them, the handler gets the softmax over keys.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from atcache.attention.blocks import map_attention

_SDPA = F.scaled_dot_product_attention
_SOFTMAXES = (F.softmax, torch.softmax, Tensor.softmax)
_POSITIONAL = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class AttentionCall:
    """One intercepted call of scaled_dot_product_attention, with its arguments."""

    block: int
    """Index of the block that made it."""
    query: Tensor
    key: Tensor
    value: Tensor
    attn_mask: Tensor | None
    """As the block passed it: float and added to the logits, or boolean (True keeps the key)."""
    dropout_p: float
    is_causal: bool
    scale: float
    """Multiplies query key^T. If the block gave none, this is the default of the call."""
    enable_gqa: bool

    def run(self) -> Tensor:
        """What the call would have returned."""
        return _SDPA(
            self.query,
            self.key,
            self.value,
            attn_mask=self.attn_mask,
            dropout_p=self.dropout_p,
            is_causal=self.is_causal,
            scale=self.scale,
            enable_gqa=self.enable_gqa,
        )

    def bias(self) -> Tensor | None:
        """The mask as a float bias on the logits, which broadcasts to (batch, head, query, key); None if no mask."""
        if self.is_causal:
            keep = torch.ones(
                self.query.shape[-2], self.key.shape[-2], dtype=torch.bool, device=self.query.device
            ).tril()
        elif self.attn_mask is not None and self.attn_mask.dtype == torch.bool:
            keep = self.attn_mask
        else:
            mask = self.attn_mask
            return None if mask is None else mask.reshape((1,) * (4 - mask.ndim) + mask.shape)
        bias = torch.zeros_like(keep, dtype=self.query.dtype).masked_fill_(~keep, float("-inf"))
        return bias.reshape((1,) * (4 - bias.ndim) + bias.shape)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class MapCall:
    """One intercepted softmax, of a block that forms its own maps. The softmax returns the maps."""

    block: int
    """Index of the block that made it."""
    logits_BHQK: Tensor

    def run(self) -> Tensor:
        """What the call would have returned: attn_BHQK."""
        return torch.softmax(self.logits_BHQK, dim=-1)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class LinearCall:
    """One observed call of torch.nn.functional.linear, with its output."""

    input_BTC: Tensor
    """What is projected; any number of axes, but (batch, token, width) where q and k are made."""
    weight_NC: Tensor
    bias_N: Tensor | None
    output_BTN: Tensor
    """What the call returned. The model may have changed it in place since."""


class AttentionIntercept(TorchFunctionMode):
    """A context manager in which `handler` answers each block's attention call. Calls outside the blocks run as usual.

    It works for the thread that enters it. Leaving removes its hooks, even after an error.
    """

    def __init__(self, blocks: nn.ModuleList, handler: Callable[[AttentionCall | MapCall], Tensor]) -> None:
        super().__init__()
        self._blocks = blocks
        self._forming_maps = frozenset(index for index, block in enumerate(blocks) if map_attention(block) is not None)
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
        call = None if self._running is None else self._call(self._running, func, args, kwargs)
        return func(*args, **kwargs) if call is None else self._handler(call)

    def _call(
        self, block: int, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> AttentionCall | MapCall | None:
        if block in self._forming_maps:
            return map_call(block, func, args, kwargs)
        return attention_call(block, args, kwargs) if func is _SDPA else None


def attention_call(block: int, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> AttentionCall:
    """The call of `scaled_dot_product_attention` that block `block` made with these arguments."""
    given = {**dict(zip(_POSITIONAL, args, strict=False)), **kwargs}
    scale = given.get("scale")
    return AttentionCall(
        block=block,
        query=given["query"],
        key=given["key"],
        value=given["value"],
        attn_mask=given.get("attn_mask"),
        dropout_p=given.get("dropout_p", 0.0),
        is_causal=given.get("is_causal", False),
        scale=given["query"].shape[-1] ** -0.5 if scale is None else scale,
        enable_gqa=given.get("enable_gqa", False),
    )


def linear_call(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> LinearCall:
    """Runs `linear` with these arguments, and returns the call."""
    given = {**dict(zip(("input", "weight", "bias"), args, strict=False)), **kwargs}
    bias = given.get("bias")
    return LinearCall(
        input_BTC=given["input"].detach(),
        weight_NC=given["weight"].detach(),
        bias_N=None if bias is None else bias.detach(),
        output_BTN=F.linear(*args, **kwargs),
    )


def map_call(block: int, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> MapCall | None:
    """The call, if `func` is a softmax over the last axis of (batch, head, query, key); None for anything else."""
    if func not in _SOFTMAXES:
        return None
    given = {**dict(zip(("input", "dim"), args, strict=False)), **kwargs}
    logits_BHQK: Tensor = given["input"]
    over_keys = logits_BHQK.ndim == 4 and given.get("dim") in (-1, 3)
    return MapCall(block=block, logits_BHQK=logits_BHQK) if over_keys else None
