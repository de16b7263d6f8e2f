"""Which codec a build uses: the one that was named, or the one that suits the teacher; with its target."""

from __future__ import annotations

import dataclasses

from torch import nn

from atcache.attention.blocks import attention_kind, attention_way
from atcache.codecs.base import Codec
from atcache.codecs.registry import parse_codec
from atcache.codecs.transform.codec import TransformCodec
from atcache.errors import ConfigError

from .config import CodecTarget


def check_has_values(model: nn.Module) -> None:
    """Refuse a teacher whose v cannot be captured.

    Raises:
        ConfigError: the teacher hands over maps, or multiplies them with v by hand.
    """
    if attention_way(model) == "softmax":
        raise ConfigError(
            "store=v: this teacher forms its maps by hand, so its v is not seen. Let it call "
            "scaled_dot_product_attention, or leave --store out."
        )
    if attention_kind(model) == "maps":
        raise ConfigError(
            "store=v: this teacher hands over maps, which are not a softmax of one q k^T, and no v. Leave --store out."
        )


def choose_codec(
    name: str | None, target: CodecTarget, model: nn.Module, num_views: int, *, with_values: bool = False
) -> Codec:
    """The codec for a teacher.

    Args:
        name: the codec that a user named; None takes `transform`, or `int8` if v is stored too, or `logmap` for
            teachers that hand over maps.
        target: what `transform` is to meet.
        model: the teacher.
        num_views: views that will be stored in all.
        with_values: whether v is to be stored too.

    Raises:
        CodecError: there is no such codec, or it cannot store v.
        ConfigError: a target is given for a codec that has none, or v is wanted of a teacher that hands over maps.
    """
    if with_values:
        check_has_values(model)
    if name is None:
        name = "logmap" if attention_kind(model) == "maps" else "int8" if with_values else "transform"
    codec = parse_codec(name)
    if with_values:
        codec.refuse_values()
    nbytes = target.nbytes_per_view(num_views)
    if target.kl is None and nbytes is None:
        return codec
    if not isinstance(codec, TransformCodec):
        raise ConfigError(f"codec {name} takes no target: its settings fix its size. Leave out the target, or --codec.")
    if nbytes is not None:
        return dataclasses.replace(codec, target_nbytes=nbytes)
    return dataclasses.replace(codec, target_kl=target.kl, target_nbytes=None)
