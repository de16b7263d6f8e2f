"""What two builds must have in common to make the same cache: teacher, source, views, selection and codec."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

from atcache.cache.members import LARGEST_COUNT, Members
from atcache.errors import ConfigError, CorruptCacheError
from atcache.files.location import Location
from atcache.store.layout import StoreLayout
from atcache.teachers.inputs import InputConfig
from atcache.views.policy import INTERPOLATIONS, PolicyName, ViewPolicy

Precision = Literal["float32", "bfloat16"]
"""The types a teacher may have computed in, by torch's names."""
Pixels = Literal["replay", "store"]
"""Whether a cache's images are replayed from its tars, or stored."""
_MOST_PIXELS = 8192
"""Largest height or width; no ViT's input comes near."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Selection:
    """Which part of the teacher's attention the user chose."""

    layers: tuple[int, ...] | str | None
    """Block indices; None for all. The first versions recorded the text that was typed."""
    heads: tuple[int, ...] | str | None
    """Head indices, in the same form."""
    store: Literal["v"] | None = None
    """Whether v was to be stored too. Caches from before that was possible do not record it."""

    def to_json(self) -> dict[str, Any]:
        """The fields as a JSON object."""
        chosen = {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in (("layers", self.layers), ("heads", self.heads))
        }
        return chosen if self.store is None else {**chosen, "store": self.store}


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheIdentity:
    """What two builds must have in common to make the same cache."""

    teacher: str
    """The teacher's timm name with arguments."""
    weights_sha256: str
    """SHA-256 of the weights that its maps depend on."""
    input: InputConfig
    """How images became the teacher's input."""
    precision: Precision
    """The type it computed in."""
    fingerprint: str
    """Fingerprint of the sample table."""
    num_samples: int
    """Rows of the sample table."""
    policy: ViewPolicy
    """How views were drawn."""
    num_views: int
    """Views of each sample."""
    pixels: Pixels
    """Whether the views' images are replayed or stored."""
    selection: Selection
    """Which layers and heads were chosen, and whether v was."""
    codec: Mapping[str, Any]
    """The codec's name and fields, as JSON; `CacheRecord.make_codec` makes it."""

    def to_json(self) -> dict[str, Any]:
        """The identity as a JSON object, with the names and nesting of a cache's attributes."""
        return {
            "teacher": {
                "name": self.teacher,
                "weights_sha256": self.weights_sha256,
                "input": self.input.to_json(),
                "precision": self.precision,
            },
            "source": {"fingerprint": self.fingerprint, "num_samples": self.num_samples},
            "views": {"policy": self.policy.to_json(), "num_views": self.num_views, "pixels": self.pixels},
            "selection": self.selection.to_json(),
            "codec": dict(self.codec),
        }


def parse_identity(about: Members, layout: StoreLayout, path: Location) -> CacheIdentity:
    """The identity of a cache.

    Args:
        about: the cache's attributes.
        layout: the cache's layout, which the attributes must agree with.
        path: the cache, for messages.

    Raises:
        CorruptCacheError: as in `CacheRecord.from_attributes`.
    """
    teacher, source, views = (about.object(name) for name in ("teacher", "source", "views"))
    num_samples, num_views = source.count("num_samples", 1), views.count("num_views", 1)
    source.agree("num_samples", layout.num_samples, "as its layout says")
    views.agree("num_views", layout.num_views, "as its layout says")
    pixels = views.text("pixels", get_args(Pixels))
    views.agree("pixels", "replay" if layout.pixels is None else "store", "as its layout says")
    return CacheIdentity(
        teacher=teacher.text("name"),
        weights_sha256=teacher.text("weights_sha256"),
        input=_parse_input(teacher.object("input")),
        precision=cast("Precision", teacher.text("precision", get_args(Precision))),
        fingerprint=source.text("fingerprint"),
        num_samples=num_samples,
        policy=_parse_policy(views.object("policy"), layout, path),
        num_views=num_views,
        pixels=cast("Pixels", pixels),
        selection=_parse_selection(about.object("selection")),
        codec=_parse_codec(about.object("codec")),
    )


def _parse_input(config: Members) -> InputConfig:
    return InputConfig(
        height=config.count("height", 1, _MOST_PIXELS),
        width=config.count("width", 1, _MOST_PIXELS),
        mean=config.numbers("mean", 3, lambda _: True, "three numbers"),
        std=config.numbers("std", 3, lambda value: value > 0, "three numbers above 0"),
        interpolation=config.text("interpolation"),
        crop_pct=config.positive("crop_pct"),
    )


def _parse_policy(policy: Members, layout: StoreLayout, path: Location) -> ViewPolicy:
    fields: dict[str, Any] = {
        "spec": policy.count("spec", 1),
        "operations": policy.take("operations", lambda value: isinstance(value, dict), "an object"),
        "name": policy.text("name", get_args(PolicyName)),
        "seed": policy.count("seed", 0, None),
        "image_height": policy.count("image_height", 1, _MOST_PIXELS),
        "image_width": policy.count("image_width", 1, _MOST_PIXELS),
        "interpolation": policy.text("interpolation", INTERPOLATIONS),
        "crop_pct": policy.positive("crop_pct", 1),
    }
    policy.refuse_others([*fields, "mixing"])
    if "mixing" in policy:
        mixing, names = policy.object("mixing"), ("mixup_alpha", "cutmix_alpha", "prob", "switch_prob")
        mixing.refuse_others(names)
        fields["mixing"] = {name: mixing.number(name) for name in names}
    if layout.pixels is not None:
        for name, side in zip(("image_height", "image_width"), layout.pixels, strict=True):
            policy.agree(name, side, "as its layout says")
    try:
        parsed = ViewPolicy.from_json(fields)
    except ConfigError as error:
        raise CorruptCacheError(f'{path}/zarr.json: "views.policy" cannot be used: {error}') from error
    if parsed.parameter_names != layout.parameter_names:
        raise CorruptCacheError(
            f'{path}/zarr.json: "views.policy" draws {len(parsed.parameter_names)} parameters for a view, which are '
            f"not the {len(layout.parameter_names)} of its layout. Restore it from a copy, or build the cache again."
        )
    return parsed


def _parse_selection(selection: Members) -> Selection:
    def fits(value: Any) -> bool:  # noqa: ANN401 - JSON
        if isinstance(value, list):
            return all(type(item) is int and 0 <= item <= LARGEST_COUNT for item in cast("list[Any]", value))
        return value is None or isinstance(value, str)

    def parse(name: str) -> tuple[int, ...] | str | None:
        value: Any = selection.take(name, fits, "whole numbers from 0, a text or null")
        return tuple(cast("list[int]", value)) if isinstance(value, list) else value

    store = selection.text("store", ["v"]) if "store" in selection else None
    return Selection(layers=parse("layers"), heads=parse("heads"), store=cast("Literal['v'] | None", store))


def _parse_codec(codec: Members) -> dict[str, Any]:
    """The codec's name and fields. Only that they can be shown is checked here; the codec checks the rest when made."""

    def is_plain(value: object) -> bool:
        if isinstance(value, float | int) and not isinstance(value, bool):
            return -LARGEST_COUNT <= value <= LARGEST_COUNT
        return value is None or isinstance(value, str | bool)

    kinds: dict[str, tuple[Callable[[object], bool], str]] = {
        "name": (lambda value: isinstance(value, str), "a text"),
        "target_kl": (lambda value: type(value) in (int, float) and is_plain(value), "a number"),
        "target_nbytes": (lambda value: value is None or (type(value) is int and value > 0), "a whole number or null"),
    }
    plain = is_plain, "a text, a number, true, false or null"
    return {name: codec.take(name, *kinds.get(name, plain)) for name in {"name": None, **dict.fromkeys(codec.names())}}
