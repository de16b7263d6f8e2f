"""Seeing a model's factors: q and k as they arrive at `scaled_dot_product_attention`, for any plain timm ViT.

Interception happens at the call: q/k norms, rotary embeddings and biases of every family are already in, and the model
keeps its fused attention, so no map is ever formed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from atcache.attention.blocks import find_blocks, model_label, token_layout, unsupported
from atcache.attention.factors import FactorGeometry, LayerFactors
from atcache.errors import ConfigError, UnsupportedAttentionError

__all__ = ["CaptureCheck", "FactorCapture", "check_capture", "find_blocks", "parse_indices", "token_layout"]


class CaptureCheck(NamedTuple):
    """What the checked first batch says about every later one."""

    geometry: FactorGeometry
    """Layers, heads, tokens and scale."""
    bias_LHQK: Tensor | None
    """What is added to the logits of every image, float32, shape (layer, 1 or head, token, token); None for none."""


class FactorCapture:
    """Runs a model up to its last wanted layer and returns the factors of the wanted layers.

    Nothing stays on the model between calls, and nothing of v or of a map is kept. One object is for one thread.
    """

    def __init__(
        self, model: nn.Module, layers: Sequence[int] | None = None, heads: Sequence[int] | None = None
    ) -> None:
        """Choose what to capture.

        Args:
            model: a timm ViT; in eval mode, or at least without attention dropout.
            layers: block indices, ascending; all when None.
            heads: head indices, ascending, the same in each layer; all when None.

        Raises:
            UnsupportedAttentionError: the model has no blocks, or is of a class that is known not to work.
            ConfigError: a layer index is outside the model, or repeated.
        """
        self.model = model
        self.blocks = find_blocks(model)
        self.tokens = token_layout(model)
        self.layers = _checked_indices(range(len(self.blocks)) if layers is None else layers, len(self.blocks), "layer")
        self.heads = None if heads is None else tuple(heads)
        self._geometry: FactorGeometry | None = None

    @property
    def geometry(self) -> FactorGeometry:
        """The shapes all captured factors share; known after the first call.

        Raises:
            RuntimeError: nothing has been captured yet.
        """
        if self._geometry is None:
            raise RuntimeError("FactorCapture.geometry is known after the first call.")
        return self._geometry

    def __call__(self, images: Tensor) -> list[LayerFactors]:
        """The factors of each wanted layer for a batch of normalised images (batch, 3, height, width).

        q and k come detached, in the type attention is computed in (under autocast, its type), on the model's device.

        Raises:
            UnsupportedAttentionError: a wanted block does not attend once, with one softmax, over all tokens.
        """
        return self.run(images, _Recorder(self, stop_at_call=self._geometry is not None, on_call=None))

    def run(self, images: Tensor, recorder: _Recorder) -> list[LayerFactors]:
        """One forward under a recorder of this object's; `__call__` is what callers want."""
        # Some timm models have no forward_features; the exception stops them before their head all the same.
        forward: Callable[[Tensor], Any] = getattr(self.model, "forward_features", self.model)
        with torch.no_grad(), recorder.attached(), recorder, suppress(_LastLayerSeen):
            forward(images)
        factors = recorder.factors_of_wanted_layers()
        if self._geometry is None:
            self._geometry = self._geometry_of(factors, recorder)
        return factors

    def _geometry_of(self, factors: Sequence[LayerFactors], recorder: _Recorder) -> FactorGeometry:
        shapes = {(tuple(f.q_BHTD.shape[1:]), tuple(f.k_BHTD.shape[1:]), f.scale) for f in factors}
        if len(shapes) > 1:
            raise unsupported(
                self.model,
                self.blocks[self.layers[0]],
                f"layers differ in heads, head dim or scale ({len(shapes)} kinds). Choose layers that are alike",
            )
        return FactorGeometry(
            layers=self.layers,
            heads=tuple(range(recorder.num_model_heads)) if self.heads is None else self.heads,
            num_model_heads=recorder.num_model_heads,
            num_kv_heads=factors[0].k_BHTD.shape[1],
            head_dim=factors[0].q_BHTD.shape[3],
            tokens=self.tokens,
            scale=factors[0].scale,
        )


def check_capture(
    model: nn.Module,
    images: Tensor,
    layers: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
) -> CaptureCheck:
    """The geometry and the bias, after checking on one batch all that capture relies on.

    Every wanted block attends once, in order; softmax(scale q k^T + bias) v is what the model's own attention gives;
    rows of the maps sum to 1; everything is finite; the bias is the same for every image.

    Args:
        model: a timm ViT in eval mode.
        images: normalised, shape (batch, 3, height, width). Two to four are enough: maps are formed here.
        layers: as in `FactorCapture`.
        heads: as in `FactorCapture`.

    Raises:
        UnsupportedAttentionError: one of these does not hold; the message says which, and of which layer.
    """
    capture = FactorCapture(model, layers, heads)
    factors = capture.run(images, _Recorder(capture, stop_at_call=False, on_call=_check_against_model))
    # Any other image will do; a mirrored negative keeps the range of pixel values.
    other_factors = capture(-images.flip(-1))
    for layer, one, other in zip(capture.layers, factors, other_factors, strict=True):
        _check_finite(model, layer, one)
        for bias in (one.bias, other.bias):
            if not _same_bias(one.bias, bias):
                raise unsupported(
                    model, capture.blocks[layer], f"in layer {layer} the bias on the logits depends on the image"
                )
    return CaptureCheck(capture.geometry, _stacked_bias(factors))


def parse_indices(text: str, limit: int, what: str = "layer") -> tuple[int, ...]:
    """Indices from text such as "0-5,11", ascending and without repeats; "all" is every index below `limit`.

    Args:
        text: indices and inclusive ranges, separated by commas.
        limit: how many there are; every index is below it.
        what: what is counted, for messages.

    Raises:
        ConfigError: the text cannot be read, or an index does not exist.

    >>> parse_indices("0-2,5", 6)
    (0, 1, 2, 5)
    """
    if text.strip() == "all":
        return tuple(range(limit))
    indices: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.partition("-")
        try:
            start = int(first)
            stop = int(last) if dash else start
        except ValueError:
            raise ConfigError(
                f"{what}s {text!r}: {part.strip()!r} is no index. Write indices and ranges, such as 0-5,11, or all."
            ) from None
        if stop < start:
            raise ConfigError(f"{what}s {text!r}: the range {part.strip()} runs backwards.")
        indices.update(range(start, stop + 1))
    return _checked_indices(sorted(indices), limit, what)


class _LastLayerSeen(Exception):
    """Ends a forward that has nothing more to show; never leaves this module."""


_OnCall = Callable[[nn.Module, int, LayerFactors, Tensor, Tensor], None]


class _Recorder(TorchFunctionMode):
    """Keeps the factors of each wanted block during one forward."""

    def __init__(self, capture: FactorCapture, *, stop_at_call: bool, on_call: _OnCall | None) -> None:
        super().__init__()
        self.capture = capture
        self.stop_at_call = stop_at_call
        """False lets the last block finish, so that a second attention call in it is seen."""
        self.on_call = on_call
        self.factors: dict[int, LayerFactors] = {}
        self.num_model_heads = 0
        self._running: tuple[int, int] | None = None

    @contextmanager
    def attached(self) -> Generator[None]:
        """While open, hooks on the blocks tell which one is running; they are removed whatever happens."""
        handles: list[Any] = []
        try:
            for layer, block in enumerate(self.capture.blocks):
                handles.append(block.register_forward_pre_hook(self._entering(layer)))
                handles.append(block.register_forward_hook(self._leaving(layer)))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _entering(self, layer: int) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def enter(_block: nn.Module, args: tuple[Any, ...]) -> None:
            if layer in self.factors:
                raise self._refusal(layer, f"block {layer} runs twice in one forward")
            self._running = (layer, args[0].shape[1])

        return enter

    def _leaving(self, layer: int) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
        def leave(_block: nn.Module, _args: tuple[Any, ...], _output: object) -> None:
            self._running = None
            if layer in self.capture.layers and layer not in self.factors:
                raise self._refusal(
                    layer,
                    f"block {layer} never calls scaled_dot_product_attention. Where it has an attribute `fused_attn`, "
                    "set that to True",
                )
            if layer == self.capture.layers[-1]:
                raise _LastLayerSeen

        return leave

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401 - torch's own signature
        arguments = dict(kwargs or {})
        if func is not functional.scaled_dot_product_attention or self._running is None:
            return func(*args, **arguments)
        layer, num_tokens = self._running
        if layer not in self.capture.layers:
            return func(*args, **arguments)
        call = _AttentionCall.of(args, arguments)
        if layer in self.factors:
            raise self._refusal(layer, f"block {layer} attends more than once")
        self._check_call(layer, num_tokens, call)
        self.num_model_heads = call.query.shape[1]
        self.factors[layer] = _factors_of(call, self.capture.heads)
        if self.stop_at_call and layer == self.capture.layers[-1]:
            raise _LastLayerSeen
        output = func(*args, **arguments)
        if self.on_call is not None:
            whole = self.factors[layer] if self.capture.heads is None else _factors_of(call, None)
            self.on_call(self.capture.model, layer, whole, call.value, output)
        return output

    def _check_call(self, layer: int, num_tokens: int, call: _AttentionCall) -> None:
        query, key = call.query, call.key
        if query.ndim != 4 or key.ndim != 4:
            raise self._refusal(layer, f"q of block {layer} has {query.ndim} axes, so attention is windowed or grouped")
        if query.shape[2] != key.shape[2]:
            raise self._refusal(layer, f"the map of block {layer} is {query.shape[2]} x {key.shape[2]}, not square")
        if query.shape[2] != num_tokens:
            raise self._refusal(
                layer, f"block {layer} has {num_tokens} tokens but a map of {query.shape[2]} x {key.shape[2]}"
            )
        if call.dropout_p > 0:
            raise UnsupportedAttentionError(
                f"{model_label(self.capture.model)}: block {layer} drops attention at random (dropout_p="
                f"{call.dropout_p:g}), so its maps are not softmax(q k^T). Call model.eval() first."
            )
        if num_tokens != self.capture.tokens.num_tokens:
            tokens = self.capture.tokens
            raise UnsupportedAttentionError(
                f"{model_label(self.capture.model)}: block {layer} has {num_tokens} tokens, expected "
                f"{tokens.num_prefix_tokens} prefix tokens + {tokens.grid_height} x {tokens.grid_width} patches. Give "
                "images of the size the model was made for, and no patch dropout."
            )
        limit = query.shape[1]
        if self.capture.heads is not None:
            _checked_indices(self.capture.heads, limit, "head")

    def _refusal(self, layer: int, reason: str) -> UnsupportedAttentionError:
        return unsupported(self.capture.model, self.capture.blocks[layer], reason)

    def factors_of_wanted_layers(self) -> list[LayerFactors]:
        """The factors in the order of the layers.

        Raises:
            UnsupportedAttentionError: a wanted block did not run, or blocks ran in another order.
        """
        if tuple(self.factors) != self.capture.layers:
            raise UnsupportedAttentionError(
                f"{model_label(self.capture.model)}: its forward ran the blocks {tuple(self.factors)}, expected "
                f"{self.capture.layers} in this order."
            )
        return list(self.factors.values())


class _AttentionCall(NamedTuple):
    """The arguments of `scaled_dot_product_attention`, under its own names and defaults."""

    query: Tensor
    key: Tensor
    value: Tensor
    attn_mask: Tensor | None = None
    dropout_p: float = 0.0
    is_causal: bool = False
    scale: float | None = None
    enable_gqa: bool = False

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> _AttentionCall:
        # In the function's own signature everything after is_causal is keyword-only.
        return cls(*args, **kwargs)


def _factors_of(call: _AttentionCall, heads: tuple[int, ...] | None) -> LayerFactors:
    query, key = call.query.detach(), call.key.detach()
    if query.dtype != call.value.dtype:
        # Only autocast allows this: a q/k norm leaves float32, and the call itself casts to the type v has.
        query, key = query.to(call.value.dtype), key.to(call.value.dtype)
    bias = _additive_bias(call)
    if heads is not None:
        groups = query.shape[1] // key.shape[1]
        index = torch.tensor(heads, device=query.device)
        whole_groups = len(heads) == query.shape[1]
        query = query.index_select(1, index)
        key = key if whole_groups else key.index_select(1, index // groups)
        if bias is not None and bias.shape[1] > 1:
            bias = bias.index_select(1, index)
    return LayerFactors(
        q_BHTD=_owning(query),
        k_BHTD=_owning(key),
        scale=query.shape[-1] ** -0.5 if call.scale is None else float(call.scale),
        bias=bias,
    )


def _owning(tensor: Tensor) -> Tensor:
    """The tensor in storage of its own size: q and k are mostly views that would keep v alive."""
    if tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size():
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)


def _additive_bias(call: _AttentionCall) -> Tensor | None:
    num_tokens = call.query.shape[2]
    mask = call.attn_mask
    if call.is_causal:
        mask = torch.ones(num_tokens, num_tokens, dtype=torch.bool, device=call.query.device).tril()
    if mask is None:
        return None
    if mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, device=mask.device).masked_fill(~mask, float("-inf"))
    mask = mask.detach()
    return mask.reshape((1,) * (4 - mask.ndim) + tuple(mask.shape)).expand(-1, -1, num_tokens, num_tokens)


def _check_against_model(model: nn.Module, layer: int, factors: LayerFactors, value: Tensor, output: Tensor) -> None:
    """The model's own attention output must be maps @ v; this catches a wrong scale, bias or head order."""
    attn_BHQK = factors.maps()
    row_sums = attn_BHQK.sum(-1)
    if not bool(torch.isfinite(attn_BHQK).all()) or float((row_sums - 1).abs().max()) > 1e-3:
        raise UnsupportedAttentionError(
            f"{model_label(model)}: rows of the maps of layer {layer} sum to {float(row_sums.min()):.3g} to "
            f"{float(row_sums.max()):.3g}, expected 1. Is an image or a weight not finite?"
        )
    groups = attn_BHQK.shape[1] // value.shape[1]
    expected = attn_BHQK @ value.float().repeat_interleave(groups, dim=1)
    tolerance = 1e-3 if output.dtype == torch.float32 else 3e-2
    squared_error, squared_norm = (output.float() - expected).square().sum(), expected.square().sum()
    error = math.sqrt(float(squared_error) / max(1e-24, float(squared_norm)))
    if not error < tolerance:
        raise UnsupportedAttentionError(
            f"{model_label(model)}: in layer {layer} softmax(scale q k^T + bias) v differs from the model's own "
            f"attention by {error:.1%}, expected less than {tolerance:.1%}."
        )


def _check_finite(model: nn.Module, layer: int, factors: LayerFactors) -> None:
    if not bool(torch.isfinite(factors.q_BHTD).all() and torch.isfinite(factors.k_BHTD).all()):
        raise UnsupportedAttentionError(
            f"{model_label(model)}: q or k of layer {layer} is not finite. Try precision fp32."
        )


def _same_bias(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    return bool((one[:1] == one).all()) and torch.equal(one[:1], other[:1])


def _stacked_bias(factors: Sequence[LayerFactors]) -> Tensor | None:
    biases = [f.bias[0].float() for f in factors if f.bias is not None]
    if not biases:
        return None
    num_heads = max(bias.shape[0] for bias in biases)
    zeros_HQK = torch.zeros_like(biases[0][:1])
    rows = [zeros_HQK if f.bias is None else f.bias[0].float() for f in factors]
    return torch.stack([row.expand(num_heads, -1, -1) for row in rows])


def _checked_indices(indices: Sequence[int], limit: int, what: str) -> tuple[int, ...]:
    chosen = tuple(indices)
    outside = [index for index in chosen if not 0 <= index < limit]
    if outside:
        raise ConfigError(f"{what} {outside[0]} does not exist: the model has {limit}, numbered 0 to {limit - 1}.")
    if not chosen or any(a >= b for a, b in pairwise(chosen)):
        raise ConfigError(f"{what}s {chosen}: expected at least one, ascending, without repeats.")
    return chosen
