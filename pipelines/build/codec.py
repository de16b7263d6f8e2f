"""Which codec a build uses: the one that was named, or the one that suits the teacher; with its target."""

from __future__ import annotations

import dataclasses
from typing import Literal

from torch import nn

from atcache.attention.blocks import attention_kind, attention_way, check_has_queries, find_blocks, input_modules
from atcache.choices import Queries
from atcache.codecs.base import Codec
from atcache.codecs.registry import parse_codec
from atcache.codecs.transform.codec import TransformCodec
from atcache.errors import ConfigError

from .config import CodecTarget


def check_can_store(model: nn.Module, store: Literal["v", "x"]) -> None:
    """Refuse a teacher whose v, or whose blocks' inputs, cannot be captured.

    Raises:
        ConfigError: the teacher hands over maps, or multiplies them with v by hand, or its blocks have no attention and
            MLP of their own.
    """
    if store == "v" and attention_way(model) == "softmax":
        raise ConfigError(
            "store=v: this teacher forms its maps by hand, so its v is not seen. Let it call "
            "scaled_dot_product_attention, or leave --store out."
        )
    if attention_kind(model) == "maps":
        raise ConfigError(
            f"store={store}: this teacher hands over maps, which are not a softmax of one q k^T, and no {store}. Leave "
            "--store out."
        )
    if store == "x":
        for block in find_blocks(model):
            input_modules(model, block)


def choose_codec(
    name: str | None,
    target: CodecTarget,
    model: nn.Module,
    num_views: int,
    *,
    queries: Queries = "all",
    store: Literal["v", "x"] | None = None,
) -> Codec:
    """The codec for a teacher.

    Args:
        name: the codec that a user named; None takes `transform`, or `int8` if v or x is stored too, or `logmap` for
            teachers that hand over maps and if only some rows are kept.
        target: what `transform` is to meet.
        model: the teacher.
        num_views: views that will be stored in all.
        queries: the tokens whose rows of the maps are kept.
        store: what is to be stored beside q and k.

    Raises:
        CodecError: there is no such codec, or it cannot store v, x or single rows.
        ConfigError: a target is given for a codec that has none or names its own, v or x is wanted of a teacher that
            has none to give, or rows of tokens that the teacher lacks.
    """
    check_has_queries(model, queries)
    if store is not None:
        check_can_store(model, store)
    if name is None:
        of_maps = queries != "all" or attention_kind(model) == "maps"
        name = "logmap" if of_maps else "int8" if store is not None else "transform"
    codec = parse_codec(name)
    if queries != "all":
        codec.refuse_rows()
    if store is not None:
        codec.refuse_values(store)
    nbytes = target.nbytes_per_view(num_views)
    if target.kl is None and nbytes is None:
        return codec
    if not isinstance(codec, TransformCodec):
        raise ConfigError(f"codec {name} takes no target: its settings fix its size. Leave out the target, or --codec.")
    if (own := next((field for field in ("target_kl", "target_nbytes") if f"{field}=" in name), None)) is not None:
        options = {"target-kl": target.kl, "target-mb-per-view": target.mb_per_view, "budget": target.budget}
        other = next(f"--{option} {value}" for option, value in options.items() if value is not None)
        raise ConfigError(f"--codec {name} and {other}: a codec meets only one target. Leave out {other}, or {own}.")
    if nbytes is not None:
        return dataclasses.replace(codec, target_nbytes=nbytes)
    return dataclasses.replace(codec, target_kl=target.kl, target_nbytes=None)
