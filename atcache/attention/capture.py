"""Captures a model's factors: the q, k and, if wanted, v that any plain timm ViT passes to
`scaled_dot_product_attention`.

At this call the q/k norms, rotary embeddings and biases of every model family are already applied. The model keeps its
fused attention, so no map is formed. Blocks whose heads exchange logits (CaiT's talking heads) do not make this call.
From them the maps are captured, as their softmax returns them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from atcache.attention.blocks import (
    check_has_queries,
    find_blocks,
    input_modules,
    map_attention,
    model_label,
    token_layout,
    unsupported,
)
from atcache.attention.calls import SeenAttention
from atcache.attention.factors import LayerAttention, LayerFactors, LayerMaps
from atcache.attention.finite import NotFiniteError, find_not_finite
from atcache.attention.geometry import FactorGeometry, num_query_rows
from atcache.attention.indices import checked_indices
from atcache.attention.kernels import mixed_attention
from atcache.attention.projection import HeadProjection, InputRecipe
from atcache.attention.projection_search import FoundProjection, find_projection, reproduces
from atcache.attention.recorder import CaptureRequest, LastLayerSeen, Recorder
from atcache.choices import Queries
from atcache.errors import ConfigError, UnsupportedAttentionError


class CaptureCheck(NamedTuple):
    """What the checked first batch says about all later batches."""

    geometry: FactorGeometry
    """Layers, heads, tokens and scale."""
    bias_LHQK: Tensor | None
    """What is added to the logits of every image: float32, shape (layer, 1 or head, query, key), or None."""
    projections: tuple[HeadProjection, ...] | None = None
    """For each layer, how its kept heads of q and k are made out of its input. None if that was not asked for, or if
    there is a layer of which it is not known."""
    input_calls: tuple[int, ...] | None = None
    """For each layer, which call of `linear` takes that input: what `FactorCapture` needs to keep it. None where
    `projections` is."""

    @property
    def recipe(self) -> InputRecipe | None:
        """Both together, as codecs take them; None where they are."""
        if self.projections is None or self.input_calls is None:
            return None
        return InputRecipe(self.projections, self.input_calls)


class FactorCapture:
    """Runs a model up to the last wanted layer, and returns the factors or maps of the wanted layers.

    Between calls the model has no hooks. v and inputs are kept only if wanted, a map only if there are no factors. Only
    one thread may use an object.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[int] | None = None,
        heads: Sequence[int] | None = None,
        *,
        queries: Queries = "all",
        with_values: bool = False,
        with_block_inputs: bool = False,
        input_calls: Sequence[int] | None = None,
    ) -> None:
        """Choose what to capture.

        Args:
            model: a timm ViT, in eval mode or at least without attention dropout.
            layers: block indices, ascending; None for all.
            heads: head indices, ascending, the same in each layer; None for all.
            queries: the tokens whose rows of the maps are wanted: q is captured for these only.
            with_values: whether to capture v too.
            with_block_inputs: whether to capture what attention and MLP of each block get too.
            input_calls: to capture each layer's input too, `CaptureCheck.input_calls` of the same layers of this model.

        Raises:
            UnsupportedAttentionError: the model has no blocks, or its class is known not to work.
            ConfigError: a layer does not exist, or layers are repeated or not ascending, or there is not one input
                call for each; or the model lacks the tokens of `queries`.
        """
        blocks = find_blocks(model)
        checked_layers = checked_indices(range(len(blocks)) if layers is None else layers, len(blocks), "layer")
        if input_calls is not None and len(input_calls) != len(checked_layers):
            raise ConfigError(
                f"there are {len(input_calls)} input calls for {len(checked_layers)} layers: expected one for each."
            )
        check_has_queries(model, queries)
        if with_block_inputs:
            for layer in checked_layers:
                input_modules(model, blocks[layer])
        tokens = token_layout(model)
        self._queries: Queries = queries
        self.request = CaptureRequest(
            model=model,
            blocks=blocks,
            layers=checked_layers,
            heads=None if heads is None else tuple(heads),
            tokens=tokens,
            num_queries=None if queries == "all" else num_query_rows(queries, tokens),
            with_values=with_values,
            with_block_inputs=with_block_inputs,
            input_calls=None if input_calls is None else tuple(input_calls),
        )
        self._geometry: FactorGeometry | None = None

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers whose factors a call returns, in this order."""
        return self.request.layers

    @property
    def geometry(self) -> FactorGeometry:
        """The shapes that all captured factors share; known after the first call.

        Raises:
            RuntimeError: nothing has been captured yet.
        """
        if self._geometry is None:
            raise RuntimeError("FactorCapture.geometry is known after the first call.")
        return self._geometry

    def __call__(self, images: Tensor) -> list[LayerAttention]:
        """The factors or maps of each wanted layer for a batch of normalised images (batch, 3, height, width).

        They are detached, on the model's device, in the dtype of the attention call (under autocast, that of autocast).

        Raises:
            UnsupportedAttentionError: a wanted block does not attend exactly once, with one softmax over all tokens.
        """
        return self.run(images, Recorder(self.request, stop_at_call=self._geometry is not None, on_call=None))

    def run(self, images: Tensor, recorder: Recorder) -> list[LayerAttention]:
        """One forward pass under a recorder made from `self.request`. Most callers want `__call__`."""
        # Some timm models have no forward_features. LastLayerSeen stops them before their head too.
        forward: Callable[[Tensor], Any] = getattr(self.request.model, "forward_features", self.request.model)
        with torch.no_grad(), recorder.attached(), recorder, suppress(LastLayerSeen):
            forward(images)
        layers = recorder.wanted_layers()
        if self._geometry is None:
            self._geometry = self._geometry_of(layers, recorder)
        return layers

    def _geometry_of(self, layers: Sequence[LayerAttention], recorder: Recorder) -> FactorGeometry:
        kinds = {_shape_of(layer) for layer in layers}
        if len(kinds) > 1:
            raise unsupported(
                self.request.model,
                self.request.blocks[self.request.layers[0]],
                f"layers differ in heads, head dim or scale ({len(kinds)} kinds). Choose layers that agree in these",
            )
        (shape,) = kinds
        return FactorGeometry(
            layers=self.request.layers,
            heads=tuple(range(recorder.num_model_heads)) if self.request.heads is None else self.request.heads,
            num_model_heads=recorder.num_model_heads,
            num_kv_heads=shape.num_kv_heads,
            head_dim=shape.head_dim,
            tokens=self.request.tokens,
            scale=shape.scale,
            kind="maps" if isinstance(layers[0], LayerMaps) else "factors",
            v_head_dim=shape.v_head_dim,
            input_width=shape.input_width,
            queries=self._queries,
        )


class _Shape(NamedTuple):
    """What must be the same in all layers."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    v_head_dim: int
    scale: float
    input_width: int


def _shape_of(layer: LayerAttention) -> _Shape:
    num_heads = layer.shape_BHT[1]
    if isinstance(layer, LayerMaps):
        return _Shape(num_heads, num_heads, 0, 0, 1.0, 0)
    v_head_dim = 0 if layer.v_BHTD is None else layer.v_BHTD.shape[3]
    input_width = 0 if layer.inputs_BNTC is None else layer.inputs_BNTC.shape[3]
    return _Shape(num_heads, layer.k_BHTD.shape[1], layer.q_BHTD.shape[3], v_head_dim, layer.scale, input_width)


def check_capture(
    model: nn.Module,
    images: Tensor,
    layers: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
    *,
    queries: Queries = "all",
    with_values: bool = False,
    with_block_inputs: bool = False,
    with_inputs: bool = False,
) -> CaptureCheck:
    """The geometry and the bias, once one batch has shown that capture gives the right factors or maps.

    It checks that every wanted block attends once, in order; that softmax(scale q k^T + bias) v equals the output of
    the model's own attention (for maps: that the maps times v do, with heads mixed as the model mixes them); that rows
    of the maps sum to 1; that nothing is NaN or infinite; and that the bias is the same for every image.

    Args:
        model: a timm ViT in eval mode.
        images: normalised, shape (batch, 3, height, width). Two to four are enough; maps are formed here, so
            more take much memory.
        layers: as in `FactorCapture`.
        heads: as in `FactorCapture`.
        queries: as in `FactorCapture`. The checks look at all rows.
        with_values: as in `FactorCapture`.
        with_block_inputs: as in `FactorCapture`.
        with_inputs: whether to find out how q and k are made out of each layer's input. A layer of which that is not
            known is no error.

    Raises:
        UnsupportedAttentionError: a check failed; the message says which one, and in which layer.
        NotFiniteError: the model computes NaN or infinity.
    """
    wanted: Any = {"queries": queries, "with_values": with_values, "with_block_inputs": with_block_inputs}
    capture = FactorCapture(model, layers, heads, **wanted)
    found: list[FoundProjection | None] = []

    def check(seen: SeenAttention) -> None:
        _check_against_model(model, seen)
        if with_inputs:
            found.append(find_projection(seen.linear_calls, seen.factors, capture.request.blocks[seen.layer]))

    layers_seen = capture.run(images, Recorder(capture.request, stop_at_call=False, on_call=check))
    if capture.geometry.kind == "maps":
        _check_mixed_maps(model, capture.request.blocks, capture.layers, images)
        return CaptureCheck(capture.geometry, None)
    factors = _only_factors(layers_seen)
    recipes = [recipe for recipe in found if recipe is not None]
    input_calls = tuple(recipe.input_call for recipe in recipes) if len(recipes) == len(capture.layers) else None
    if input_calls is not None:
        capture = FactorCapture(model, layers, heads, **wanted, input_calls=input_calls)
    # Other images show whether the bias depends on them, and the recipes too. Mirrored negatives have pixel values in
    # the same range.
    other_factors = _only_factors(capture(-images.flip(-1)))
    for layer, one, other in zip(capture.layers, factors, other_factors, strict=True):
        for bias in (one.bias, other.bias):
            if not _same_bias(one.bias, bias):
                raise unsupported(
                    model,
                    capture.request.blocks[layer],
                    f"in layer {layer} the bias on the logits depends on the image",
                )
    bias_LHQK = _stacked_bias(factors)
    projections = tuple(recipe.projection.select_heads(capture.geometry.heads) for recipe in recipes)
    if input_calls is None or not all(map(reproduces, projections, other_factors)):
        return CaptureCheck(capture.geometry, bias_LHQK)
    return CaptureCheck(capture.geometry, bias_LHQK, projections, input_calls)


def _only_factors(layers: Sequence[LayerAttention]) -> list[LayerFactors]:
    return [layer for layer in layers if isinstance(layer, LayerFactors)]


def _check_mixed_maps(model: nn.Module, blocks: nn.ModuleList, layers: Sequence[int], images: Tensor) -> None:
    """The maps of all heads, mixed and times v, must equal what the block's attention gives to its last projection."""
    tokens: dict[int, Tensor] = {}
    projected: dict[int, Tensor] = {}

    def keep(into: dict[int, Tensor], layer: int) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _module, args: into.__setitem__(layer, args[0])

    modules: dict[int, Any] = {layer: map_attention(blocks[layer]) for layer in layers}
    handles: list[Any] = []
    try:
        for layer, attention in modules.items():
            handles.append(attention.register_forward_pre_hook(keep(tokens, layer)))
            handles.append(attention.proj.register_forward_pre_hook(keep(projected, layer)))
        seen = FactorCapture(model, layers)(images)
    finally:
        for handle in handles:
            handle.remove()
    for (layer, attention), maps in zip(modules.items(), seen, strict=True):
        _check_finite(layer, maps)
        attn_BHQK = maps.maps()
        _check_rows(model, layer, attn_BHQK)
        with torch.no_grad():
            value_BTC: Tensor = attention.qkv(tokens[layer]).chunk(3, dim=-1)[2]
            value_BHTD = value_BTC.view(*value_BTC.shape[:2], attn_BHQK.shape[1], -1).transpose(1, 2)
            expected_BHTD = mixed_attention(attn_BHQK, value_BHTD, attention.proj_w)
        _check_output(
            model, layer, "maps, mixed, times v", expected_BHTD.transpose(1, 2).flatten(2).float(), projected[layer]
        )


def _check_against_model(model: nn.Module, seen: SeenAttention) -> None:
    """The output of the model's own attention must equal what its maps give: this finds a wrong scale or bias."""
    _check_finite(seen.layer, seen.factors)
    attn_BHQK = seen.factors.maps()
    _check_rows(model, seen.layer, attn_BHQK)
    _check_output(model, seen.layer, seen.formula, seen.expected(attn_BHQK), seen.output)


def _check_rows(model: nn.Module, layer: int, attn_BHQK: Tensor) -> None:
    row_sums = attn_BHQK.sum(-1)
    if not float((row_sums - 1).abs().max()) <= 1e-3:  # which NaN is not either
        raise UnsupportedAttentionError(
            f"{model_label(model)}: rows of the maps of layer {layer} sum to {float(row_sums.min()):.3g} to "
            f"{float(row_sums.max()):.3g}, expected 1. Choose another model or layer."
        )


def _check_output(model: nn.Module, layer: int, formula: str, expected: Tensor, output: Tensor) -> None:
    tolerance = 1e-3 if output.dtype == torch.float32 else 3e-2
    squared_error, squared_norm = (output.float() - expected).square().sum(), expected.square().sum()
    error = math.sqrt(float(squared_error) / max(1e-24, float(squared_norm)))
    if not error < tolerance:
        raise UnsupportedAttentionError(
            f"{model_label(model)}: in layer {layer} {formula} differs from the model's own attention by {error:.1%}, "
            f"expected less than {tolerance:.1%}. Choose another model or layer."
        )


def _check_finite(layer: int, attention: LayerAttention) -> None:
    if (found := find_not_finite([layer], [attention])) is not None:
        raise NotFiniteError(found)


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
