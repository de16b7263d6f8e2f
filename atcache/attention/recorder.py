"""Observes one forward pass of a model: which block runs, and which q, k and v, or which maps, it attends with."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from atcache.attention.blocks import input_modules, map_attention, model_label, unsupported
from atcache.attention.by_hand import Product, factors_by_hand, product
from atcache.attention.calls import (
    SDPA,
    AttentionCall,
    LinearCall,
    MapCall,
    SeenAttention,
    attention_call,
    linear_call,
    map_call,
)
from atcache.attention.chosen import chosen_factors, factors_of, owning
from atcache.attention.described import DescribedModel, QueryKey
from atcache.attention.factors import LayerAttention, LayerFactors, LayerMaps, take_heads
from atcache.attention.indices import checked_indices
from atcache.attention.multi_head import MULTI_HEAD, MultiHeadCall, multi_head_call
from atcache.attention.tokens import TokenLayout
from atcache.errors import UnsupportedAttentionError


class LastLayerSeen(Exception):
    """Ends a forward pass once the last wanted layer is captured. `FactorCapture` catches it."""


OnCall = Callable[[SeenAttention], None]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class CaptureRequest:
    """What to capture, and from which model."""

    model: nn.Module
    """The whole model."""
    blocks: nn.ModuleList
    """The model's blocks, as `find_blocks` returns them."""
    layers: tuple[int, ...]
    """Indices of the blocks whose attention is wanted, ascending."""
    heads: tuple[int, ...] | None
    """Indices of the wanted heads, ascending; None for all."""
    tokens: TokenLayout
    """The tokens that every block must have."""
    num_queries: int | None = None
    """The rows of the maps that are wanted: those of this many first tokens. None for all."""
    with_values: bool = False
    """Whether v is wanted too."""
    with_block_inputs: bool = False
    """Whether what attention and MLP of each block get is wanted too."""
    input_calls: tuple[int, ...] | None = None
    """For each wanted layer, which `linear` call of its block takes the input that is wanted too, counted from 0; None
    if no inputs are wanted."""


class Recorder(TorchFunctionMode):
    """Keeps the factors or the maps of each wanted block during one forward pass of its model."""

    def __init__(self, request: CaptureRequest, *, stop_at_call: bool, on_call: OnCall | None) -> None:
        """Record what `request` asks for.

        Args:
            request: the model, and what to capture from it.
            stop_at_call: whether to end at the last block's attention call. False lets that block finish, so that a
                second attention call in it is noticed.
            on_call: called with each wanted layer's attention; not for maps.
        """
        super().__init__()
        self.request = request
        self.stop_at_call = stop_at_call
        self.on_call = on_call
        self.attention: dict[int, LayerAttention] = {}
        self.num_model_heads = 0
        self._running: tuple[int, int | None] | None = None
        """The block and its tokens; None for those of a described model, which may take anything as input."""
        described = request.model if isinstance(request.model, DescribedModel) else None
        self._is_described = described is not None
        self._by_hand = described is not None and described.way == "softmax"
        self._query_key: QueryKey | None = None if described is None else described.query_key
        # Of the running block, if it forms its logits itself: what the softmax may have come from.
        self._products: list[Product] = []
        # What the running block's attention got, until its MLP runs.
        self._attention_input_BTC: Tensor | None = None
        self._input_calls = dict(zip(request.layers, request.input_calls or (), strict=request.input_calls is not None))
        # Of the running block, before it attends.
        self._num_linear_calls = 0
        self._linear_calls: list[LinearCall] = []
        self._input_BTC: Tensor | None = None
        self._forming_maps = frozenset(
            layer for layer in request.layers if map_attention(request.blocks[layer]) is not None
        )

    @contextmanager
    def attached(self) -> Generator[None]:
        """A context in which hooks on the blocks tell which one is running. Leaving it always removes the hooks."""
        handles: list[Any] = []
        try:
            for layer, block in enumerate(self.request.blocks):
                handles.append(block.register_forward_pre_hook(self._entering(layer), with_kwargs=True))
                handles.append(block.register_forward_hook(self._leaving(layer)))
                if self.request.with_block_inputs and layer in self.request.layers:
                    attention, mlp = input_modules(self.request.model, block)
                    handles.append(attention.register_forward_pre_hook(self._attending))
                    handles.append(mlp.register_forward_pre_hook(self._entering_mlp(layer)))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _entering(self, layer: int) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def enter(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if layer in self.attention:
                raise self._refusal(layer, f"block {layer} runs twice in one forward pass")
            self._forget_calls()
            if self._query_key is not None and layer in self.request.layers:
                self._products.append(Product(*self._query_key(block, *args, **kwargs)))
            self._running = (layer, None if self._is_described else args[0].shape[1])

        return enter

    def _attending(self, _attention: nn.Module, args: tuple[Any, ...]) -> None:
        self._attention_input_BTC = args[0].detach()

    def _entering_mlp(self, layer: int) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def enter(_mlp: nn.Module, args: tuple[Any, ...]) -> None:
            attention = self.attention.get(layer)
            if not isinstance(attention, LayerFactors) or self._attention_input_BTC is None:
                raise self._refusal(layer, f"the MLP of block {layer} runs before its attention")
            inputs_BNTC = torch.stack([self._attention_input_BTC, args[0].detach()], dim=1)
            self.attention[layer] = replace(attention, inputs_BNTC=inputs_BNTC)
            self._attention_input_BTC = None
            if self.stop_at_call and layer == self.request.layers[-1]:
                raise LastLayerSeen

        return enter

    def _leaving(self, layer: int) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
        def leave(_block: nn.Module, _args: tuple[Any, ...], _output: object) -> None:
            self._running = None
            self._forget_calls()
            if layer in self.request.layers and layer not in self.attention:
                expected = "scaled_dot_product_attention"
                if layer in self._forming_maps or self._by_hand:
                    expected = "a softmax over keys"
                raise self._refusal(
                    layer,
                    f"block {layer} never calls {expected}. If it has an attribute `fused_attn`, set that to True",
                )
            if self.request.with_block_inputs and layer in self.request.layers:
                attention = self.attention[layer]
                if not isinstance(attention, LayerFactors) or attention.inputs_BNTC is None:
                    raise self._refusal(
                        layer, f"block {layer} runs no MLP after its attention, and its input is wanted"
                    )
            if layer == self.request.layers[-1]:
                raise LastLayerSeen

        return leave

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401 - torch's own signature
        arguments = dict(kwargs or {})
        if self._running is None or self._running[0] not in self.request.layers:
            return func(*args, **arguments)
        layer, num_tokens = self._running
        if layer in self._forming_maps:
            softmax = map_call(layer, func, args, arguments)
            return func(*args, **arguments) if softmax is None else self._record_maps(softmax, num_tokens)
        if func is functional.linear and layer not in self.attention and self._observes_linear(layer):
            return self._run_linear(layer, args, arguments)
        if self._by_hand:
            return self._run_by_hand(layer, func, args, arguments)
        if func is MULTI_HEAD:
            return self._run_multi_head(layer, num_tokens, args, arguments)
        if func is not SDPA:
            return func(*args, **arguments)
        call = attention_call(layer, args, arguments)
        self._record_call(layer, num_tokens, call)
        output = func(*args, **arguments)
        if self.on_call is not None:
            self._show(call, output, lambda attended_BHTD: attended_BHTD, "softmax(scale q k^T + bias) v")
        self._forget_calls()
        return output

    def _record_call(self, layer: int, num_tokens: int | None, call: AttentionCall) -> None:
        self._check_call(layer, num_tokens, call)
        factors = factors_of(call, self.request.heads, self.request.num_queries, with_values=self.request.with_values)
        self._record_factors(layer, call.query.shape[1], factors)

    def _record_factors(self, layer: int, num_heads: int, factors: LayerFactors) -> None:
        if layer in self._input_calls:
            factors = replace(factors, input_BTC=self._wanted_input(layer))
        self._record(layer, num_heads, factors)

    def _show(self, call: AttentionCall, output: Tensor, finish: Callable[[Tensor], Tensor], formula: str) -> None:
        assert self.on_call is not None
        factors = factors_of(call, None, with_values=True)

        def expected(attn_BHQK: Tensor) -> Tensor:
            with torch.autocast(attn_BHQK.device.type, enabled=False):
                attended_BHTD = attn_BHQK @ factors.repeated_v_BHTD().float()
            return finish(attended_BHTD)

        self.on_call(
            SeenAttention(
                layer=call.block,
                factors=factors,
                linear_calls=self._linear_calls,
                output=output,
                expected=expected,
                formula=formula,
            )
        )

    def _run_multi_head(
        self, layer: int, num_tokens: int | None, args: tuple[Any, ...], arguments: dict[str, Any]
    ) -> tuple[Tensor, Tensor | None]:
        """What `nn.MultiheadAttention` returns; if it is to be checked, what torch's own function makes of it."""
        call: MultiHeadCall = multi_head_call(layer, args, arguments, self._linear_in(layer))
        self._record_call(layer, num_tokens, call.attention)
        if self.on_call is None:
            output = call.finish(call.attention.run())
        else:
            output = MULTI_HEAD(*args, **arguments)
            self._show(
                call.attention,
                output[0],
                lambda attended_BHTD: call.finish(attended_BHTD)[0],
                "softmax(scale q k^T + bias) v, projected,",
            )
        self._forget_calls()
        return output

    def _linear_in(self, layer: int) -> Callable[[Tensor, Tensor, Tensor | None], Tensor]:
        """`linear`, observed if that is wanted."""
        if not self._observes_linear(layer):
            return functional.linear
        return lambda x, weight, bias: self._run_linear(layer, (x, weight, bias), {})

    def _run_by_hand(
        self, layer: int, func: Callable[..., Any], args: tuple[Any, ...], arguments: dict[str, Any]
    ) -> Any:  # noqa: ANN401 - what the model's own call returns
        output = func(*args, **arguments)
        call = map_call(layer, func, args, arguments)
        if call is None:
            if self._query_key is None and (found := product(func, args, arguments)) is not None:
                self._products.append(found)
            return output
        num_heads, *sides = call.logits_BHQK.shape[1:]
        if sides != [self.request.tokens.num_tokens] * 2:
            return output
        self._check_heads(num_heads)
        factors = self._factors_by_hand(call)
        self._record_factors(layer, num_heads, chosen_factors(factors, self.request.heads, self.request.num_queries))
        if self.on_call is not None:
            self.on_call(
                SeenAttention(
                    layer=layer,
                    factors=factors,
                    linear_calls=self._linear_calls,
                    output=output,
                    expected=lambda attn_BHQK: attn_BHQK,
                    formula="softmax(scale q k^T)",
                )
            )
        self._forget_calls()
        return output

    def _factors_by_hand(self, call: MapCall) -> LayerFactors:
        """The factors that this softmax came from."""
        if self.request.with_values:
            raise self._refusal(call.block, "it multiplies its maps with v by hand, so v is not seen")
        found = factors_by_hand(self._products, call.logits_BHQK, scale=1.0 if self._query_key is not None else None)
        if found is not None:
            return found
        shape = tuple(call.logits_BHQK.shape)
        raise self._refusal(
            call.block,
            f"block {call.block} takes the softmax of logits {shape} that are not scale * q k^T of one product. Give "
            "`attention` and `query_key`, which returns q and k of softmax(q k^T)",
        )

    def _observes_linear(self, layer: int) -> bool:
        return layer in self._input_calls or self.on_call is not None

    def _run_linear(self, layer: int, args: tuple[Any, ...], arguments: dict[str, Any]) -> Tensor:
        call = linear_call(args, arguments)
        if self._num_linear_calls == self._input_calls.get(layer):
            self._input_BTC = call.input_BTC
        if self.on_call is not None:
            self._linear_calls.append(call)
        self._num_linear_calls += 1
        return call.output_BTN

    def _wanted_input(self, layer: int) -> Tensor:
        if self._input_BTC is None:
            raise self._refusal(
                layer,
                f"block {layer} made {self._num_linear_calls} calls of linear before it attended, and the input of "
                f"call {self._input_calls[layer]} (from 0) is wanted",
            )
        return owning(self._input_BTC)

    def _forget_calls(self) -> None:
        self._num_linear_calls, self._linear_calls, self._input_BTC = 0, [], None
        self._products = []

    def _record_maps(self, call: MapCall, num_tokens: int | None) -> Tensor:
        logits_BHQK = call.logits_BHQK
        self._check_tokens(call.block, num_tokens, logits_BHQK.shape[2], logits_BHQK.shape[3])
        num_heads = logits_BHQK.shape[1]
        self._check_heads(num_heads)
        # Always in float32, because rows of a bfloat16 softmax do not sum to 1.
        attn_BHQK = torch.softmax(logits_BHQK.detach().float(), dim=-1)
        chosen = attn_BHQK if self.request.heads is None else take_heads(attn_BHQK, self.request.heads)
        if self.request.num_queries is not None:
            chosen = owning(chosen[:, :, : self.request.num_queries])
        self._record(call.block, num_heads, LayerMaps(attn_BHQK=chosen))
        return attn_BHQK if logits_BHQK.dtype == torch.float32 else call.run()

    def _record(self, layer: int, num_heads: int, attention: LayerAttention) -> None:
        if layer in self.attention:
            raise self._refusal(layer, f"block {layer} attends more than once")
        self.num_model_heads = num_heads
        self.attention[layer] = attention
        if self.stop_at_call and layer == self.request.layers[-1] and not self.request.with_block_inputs:
            raise LastLayerSeen

    def _check_call(self, layer: int, num_tokens: int | None, call: AttentionCall) -> None:
        query, key = call.query, call.key
        if query.ndim != 4 or key.ndim != 4:
            raise self._refusal(layer, f"q of block {layer} has {query.ndim} axes, so attention is windowed or grouped")
        self._check_tokens(layer, num_tokens, query.shape[2], key.shape[2])
        if call.dropout_p > 0:
            raise UnsupportedAttentionError(
                f"{model_label(self.request.model)}: block {layer} drops attention at random (dropout_p="
                f"{call.dropout_p:g}), so its maps are not softmax(q k^T). Call model.eval() first."
            )
        self._check_heads(query.shape[1])

    def _check_tokens(self, layer: int, num_tokens: int | None, num_queries: int, num_keys: int) -> None:
        if num_queries != num_keys:
            raise self._refusal(layer, f"the map of block {layer} is {num_queries} x {num_keys}, not square")
        num_tokens = num_queries if num_tokens is None else num_tokens
        if num_queries != num_tokens:
            raise self._refusal(layer, f"block {layer} has {num_tokens} tokens but a map of {num_queries} x {num_keys}")
        if num_tokens != self.request.tokens.num_tokens:
            tokens = self.request.tokens
            raise UnsupportedAttentionError(
                f"{model_label(self.request.model)}: block {layer} has {num_tokens} tokens, expected "
                f"{tokens.num_prefix_tokens} prefix tokens + {tokens.grid_height} x {tokens.grid_width} patches. Give "
                "images of the size the model was made for, and no patch dropout."
            )

    def _check_heads(self, num_heads: int) -> None:
        if self.request.heads is not None:
            checked_indices(self.request.heads, num_heads, "head")

    def _refusal(self, layer: int, reason: str) -> UnsupportedAttentionError:
        return unsupported(self.request.model, self.request.blocks[layer], reason)

    def wanted_layers(self) -> list[LayerAttention]:
        """The factors or maps in the order of the layers.

        Raises:
            UnsupportedAttentionError: a wanted block did not run, or blocks ran in another order.
        """
        if tuple(self.attention) != self.request.layers:
            raise UnsupportedAttentionError(
                f"{model_label(self.request.model)}: its forward pass ran the blocks {tuple(self.attention)}, expected "
                f"{self.request.layers} in this order. Choose other layers or another model."
            )
        return list(self.attention.values())
