"""A model's blocks and tokens, and why the attention of some models is not a token x token softmax of q and k."""

from __future__ import annotations

from typing import Any

from torch import nn

from atcache.attention.described import AttentionWay, DescribedModel
from atcache.attention.geometry import AttentionKind
from atcache.attention.tokens import TokenLayout
from atcache.choices import Queries
from atcache.errors import ConfigError, UnsupportedAttentionError

_WINDOWED = "attention is windowed: there is a map for each window, not one over all tokens"
_POOLED = "queries or keys are pooled, so the map is not square"
_CHANNELS = "the map is channel x channel, not token x token"
_CLASS_ONLY = "only the class token has a query, so the map is one row"
_TWO_SOFTMAXES = "its map is the difference of two softmaxes, so it can be negative and its rows do not sum to 1"
_MIXED = "heads are mixed before and after the softmax by convolutions"
_NO_SOFTMAX = "attention is not a softmax of q k^T"
_CHOOSE = "Choose a plain ViT (ViT, DeiT, DINO, CLIP, SigLIP, BEiT, EVA-02 and their like)."

# Names of timm 1.0 classes, as "module.Class" if another module has a different class of this name. Classes that are
# not listed are judged by what they do when the model runs.
_REASONS = {
    "WindowAttention": _WINDOWED,
    "WindowMultiHeadAttention": _WINDOWED,
    "WindowAttentionGlobal": _WINDOWED,
    "MaskUnitAttention": "tokens are grouped in mask units (windows) and queries are pooled",
    "LocallyGroupedAttn": _WINDOWED,
    "GlobalSubSampleAttn": _POOLED,
    "MultiScaleAttention": _POOLED,
    "MultiScaleAttentionPoolFirst": _POOLED,
    "pvt_v2.Attention": _POOLED,
    "XCA": _CHANNELS,
    "CrossCovarianceAttn": _CHANNELS,
    "ChannelAttention": _CHANNELS,
    "ChannelAttentionV2": _CHANNELS,
    "ClassAttn": _CLASS_ONLY,
    "CrossAttention": _CLASS_ONLY,
    "ClassAttention": _CLASS_ONLY,
    "DiffAttention": _TWO_SOFTMAXES,
    "DiffParallelScalingBlock": _TWO_SOFTMAXES,
    "efficientformer_v2.Attention2d": _MIXED,
    "GPSA": "its map mixes two softmaxes, one of content and one of position",
    "OutlookAttention": _NO_SOFTMAX,
    "LinearAttention": _NO_SOFTMAX,
    "LinearSelfAttention": _NO_SOFTMAX,
    "FactorAttnConvRelPosEnc": _NO_SOFTMAX,
}

# Classes that mix the heads' logits before the softmax, and the heads' probabilities after it. So no head's map is the
# softmax of its own q k^T. The softmax still returns one distribution for each head and row: that is the block's map.
_FORMING_MAPS = frozenset({"cait.TalkingHeadAttn"})

# Names that models give to the parameter of their class token. It is the first token wherever there is one.
_CLASS_TOKENS = frozenset({"cls_token", "class_token", "class_embedding"})


def find_blocks(model: nn.Module) -> nn.ModuleList:
    """The model's transformer blocks in the order they run; layer i of a cache is block i.

    Raises:
        UnsupportedAttentionError: the model has no `.blocks`, or their attention class is known not to compute one
            softmax of q k^T over all tokens. The message names model, class and reason.
    """
    if isinstance(model, DescribedModel):
        return nn.ModuleList(model.blocks_in_order)
    blocks = getattr(model, "blocks", None)
    if not isinstance(blocks, nn.ModuleList | nn.Sequential) or len(blocks) == 0:
        for module in model.modules():
            if (reason := _known_reason(module)) is not None:
                raise unsupported(model, module, reason)
        raise unsupported(
            model, _attention_in(model), "the model has no list of equal blocks (`.blocks`), which plain ViTs have"
        )
    for block in blocks:
        for module in block.modules():
            if (reason := _known_reason(module)) is not None:
                raise unsupported(model, module, reason)
    return nn.ModuleList(blocks)


def token_layout(model: nn.Module) -> TokenLayout:
    """The order of the model's tokens, at the image size that the model was made for.

    Raises:
        UnsupportedAttentionError: the model has no patch grid of a fixed size.
    """
    if isinstance(model, DescribedModel):
        return model.tokens
    grid: Any = getattr(getattr(model, "patch_embed", None), "grid_size", None)
    if grid is None:
        find_blocks(model)  # may raise with a better reason
        raise unsupported(model, _attention_in(model), "the model has no patch grid (`.patch_embed.grid_size`)")
    grid_height, grid_width = grid
    return TokenLayout(
        # CaiT adds its class token after the blocks, in separate layers.
        num_prefix_tokens=0 if hasattr(model, "blocks_token_only") else int(getattr(model, "num_prefix_tokens", 0)),
        grid_height=int(grid_height),
        grid_width=int(grid_width),
    )


def has_class_token(model: nn.Module) -> bool:
    """Whether the blocks of a model attend with a class token."""
    names = {name.rpartition(".")[2] for name, _ in model.named_parameters()}
    return token_layout(model).num_prefix_tokens > 0 and not names.isdisjoint(_CLASS_TOKENS)


def check_has_queries(model: nn.Module, queries: Queries) -> None:
    """Refuse a model that lacks the tokens whose rows are wanted.

    Raises:
        ConfigError: there are none of them before the patches.
    """
    if queries == "all":
        return
    num_prefix_tokens = token_layout(model).num_prefix_tokens
    if not num_prefix_tokens:
        raise ConfigError(
            f"queries={queries}: {model_label(model)} attends with no prefix tokens (class token, registers), only "
            "with patches. Leave --queries out."
        )
    if queries == "cls" and not has_class_token(model):
        raise ConfigError(
            f"queries=cls: {model_label(model)} has {num_prefix_tokens} prefix tokens, and none is a class token. Give "
            "--queries prefix for their rows."
        )


def input_modules(model: nn.Module, block: nn.Module) -> tuple[nn.Module, nn.Module]:
    """A block's attention and its MLP, whose inputs can be kept.

    Raises:
        ConfigError: they are not modules of their own.
    """
    attention, mlp = getattr(block, "attn", None), getattr(block, "mlp", None)
    if not (isinstance(attention, nn.Module) and isinstance(mlp, nn.Module)):
        raise ConfigError(
            f"store=x: a block of {model_label(model)} ({type(block).__name__}) has no `.attn` and `.mlp` of its own, "
            "whose inputs could be kept. Leave --store x out."
        )
    return attention, mlp


def map_attention(block: nn.Module) -> nn.Module | None:
    """The attention module of a block that gives maps instead of factors; None for a block that gives factors."""
    return next((module for module in block.modules() if _qualified_name(module) in _FORMING_MAPS), None)


def attention_kind(model: nn.Module) -> AttentionKind:
    """Whether a model that `find_blocks` accepts gives factors or maps."""
    if isinstance(model, DescribedModel):
        return "factors"
    return "maps" if any(map_attention(block) is not None for block in find_blocks(model)) else "factors"


def attention_way(model: nn.Module) -> AttentionWay:
    """How the model's blocks attend; timm's make calls, but for those that `map_attention` finds."""
    return model.way if isinstance(model, DescribedModel) else "call"


def model_label(model: nn.Module) -> str:
    """The model's name in messages: its timm name, its description's label, or its class."""
    if isinstance(model, DescribedModel):
        return model.label
    config: dict[str, Any] = getattr(model, "pretrained_cfg", None) or {}
    return str(config.get("architecture") or type(model).__name__)


def unsupported(model: nn.Module, attention: nn.Module, reason: str) -> UnsupportedAttentionError:
    """The error that `model` cannot be cached; `attention` is its attention, or a module that contains it."""
    found = _attention_in(attention)
    if found is model:
        return UnsupportedAttentionError(f"{model_label(model)} is no plain ViT: {reason}. {_CHOOSE}")
    if isinstance(model, DescribedModel):  # whose attention may be anywhere in the block
        where = f"in modules of class {type(found).__name__}"
        return UnsupportedAttentionError(f"{model_label(model)}: the attention {where} cannot be cached: {reason}.")
    sentence = f"{model_label(model)}: attention class {type(found).__name__} cannot be cached: {reason}."
    return UnsupportedAttentionError(f"{sentence} {_CHOOSE}")


def _known_reason(module: nn.Module) -> str | None:
    return _REASONS.get(_qualified_name(module), _REASONS.get(type(module).__name__))


def _qualified_name(module: nn.Module) -> str:
    return f"{type(module).__module__.rpartition('.')[2]}.{type(module).__name__}"


def _attention_in(module: nn.Module) -> nn.Module:
    """The first submodule whose class name says that it is attention, or `module` if there is none."""
    for child in module.modules():
        if any(word in type(child).__name__ for word in ("Attention", "Attn")):
            return child
    return module
