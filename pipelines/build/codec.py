"""Which codec a build uses: what was named, or what suits the teacher, with the target that was asked for."""

from __future__ import annotations

import dataclasses
import math

from torch import nn

from atcache.attention.blocks import attention_kind
from atcache.codecs.base import Codec
from atcache.codecs.registry import parse_codec
from atcache.codecs.transform.codec import TransformCodec
from atcache.errors import ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class CodecTarget:
    """What the codec is to meet; at most one of them."""

    kl: float | None = None
    """Mean row KL, in nats."""
    mb_per_view: float | None = None
    """Megabytes a view's codes take."""
    budget: str | None = None
    """Bytes of all codes, such as "2TB"."""

    def __post_init__(self) -> None:
        options = {"target_kl": self.kl, "target_mb_per_view": self.mb_per_view, "budget": self.budget}
        given = [f"{name}={value}" for name, value in options.items() if value is not None]
        if len(given) > 1:
            raise ConfigError(f"{' and '.join(given)}: one target decides. Give one of them.")
        for name, value in options.items():
            if isinstance(value, float | int) and not 0 < value < math.inf:
                raise ConfigError(f"{name}={value}: expected more than 0.")
        if self.budget is not None:
            parse_nbytes(self.budget)

    def nbytes_per_view(self, num_views: int) -> int | None:
        """Bytes a view may take where `num_views` are stored in all; None where fidelity is the target."""
        if self.mb_per_view is not None:
            return max(1, round(self.mb_per_view * 1e6))
        return None if self.budget is None else max(1, parse_nbytes(self.budget) // num_views)


def parse_nbytes(text: str) -> int:
    """Bytes from words such as "2TB", "750 MB" or "1.5GiB".

    Raises:
        ConfigError: it is no number of bytes.
    """
    from dask.utils import parse_bytes

    try:
        # "TB" alone would be read as 1TB.
        nbytes = int(parse_bytes(text if any(character.isdigit() for character in text) else f"no number: {text}"))
    except (ValueError, OverflowError) as error:
        raise ConfigError(f"budget={text!r}: expected bytes, such as 2TB or 500GB.") from error
    if nbytes < 1:
        raise ConfigError(f"budget={text!r}: expected more than 0 bytes.")
    return nbytes


def check_has_values(model: nn.Module) -> None:
    """Refuse a teacher whose v is not seen.

    Raises:
        ConfigError: it hands over maps.
    """
    if attention_kind(model) == "maps":
        raise ConfigError(
            "store=v: this teacher hands over maps, which are no softmax of one q k^T, and no v. Leave --store out."
        )


def choose_codec(
    name: str | None, target: CodecTarget, model: nn.Module, num_views: int, *, with_values: bool = False
) -> Codec:
    """The codec for a teacher.

    Args:
        name: as a user named it; None takes `transform`, `int8` where v is stored too, or `logmap` for teachers that
            hand over maps.
        target: for `transform`.
        model: the teacher.
        num_views: views that will be stored in all.
        with_values: whether v is to be stored too.

    Raises:
        CodecError: there is no such codec, or it keeps no v.
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
        raise ConfigError(f"codec {name} meets no target: its size is what it is. Leave the target out, or --codec.")
    if nbytes is not None:
        return dataclasses.replace(codec, target_nbytes=nbytes)
    return dataclasses.replace(codec, target_kl=target.kl, target_nbytes=None)
