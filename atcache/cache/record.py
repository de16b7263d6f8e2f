"""CacheRecord: what a cache records about itself, with types. Only here are the attributes in its zarr.json checked.

The store itself keeps `format`, `layout`, the seal and whether the cache is complete; `docs/format.md` lists all
members. Reading a record does not import torch: the codec stays JSON until `make_codec`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, cast, get_args

from atcache.attention.geometry import AttentionKind, FactorGeometry
from atcache.attention.tokens import TokenLayout
from atcache.cache.identity import CacheIdentity, parse_identity
from atcache.cache.members import LARGEST_COUNT, Members
from atcache.errors import CodecError, ConfigError, CorruptCacheError
from atcache.files.location import Location
from atcache.store.layout import StoreLayout

if TYPE_CHECKING:
    from atcache.codecs.base import Codec
    from atcache.store.reader import CacheReader
    from atcache.teachers.record import TeacherRecord
    from atcache.views.policy import ViewPolicy

_MOST_LAYERS = 4096
_MOST_VALUES = 2**20
"""No count of heads, or of a head's components, comes near this."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerCard:
    """What the codec does to one layer, on held-back views."""

    layer: int
    nbytes: float
    """Bytes per view."""
    row_kl_nats: float
    injected_error: float
    """Relative error of the teacher's final features when this layer alone attends with decoded maps."""
    v_error: float | None
    """Relative error of decoded v; None if v is not stored."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CalibrationRecord:
    """What was measured before the build, on views the codec was not fitted to."""

    row_kl_nats: float
    """Mean row KL of decoded maps."""
    injected_error: float
    """Relative error of the teacher's features when it attends with decoded maps."""
    v_error: float | None = None
    """Relative error of decoded v; None if v is not stored."""
    num_held_back: int | None = None
    """Number of these views; None in the first caches, which do not record it."""
    layers: tuple[LayerCard, ...] | None = None
    """The same for each stored layer; None in the first caches, which do not record it."""

    def to_json(self) -> dict[str, Any]:
        """The fields as a JSON object, without those that the first caches do not record."""
        fields: dict[str, Any] = {
            "row_kl_nats": self.row_kl_nats,
            "injected_error": self.injected_error,
            "v_error": self.v_error,
        }
        if self.num_held_back is not None:
            fields["num_held_back"] = self.num_held_back
        if self.layers is not None:
            fields["layers"] = [asdict(card) for card in self.layers]
        return fields


@dataclass(frozen=True, kw_only=True, slots=True)
class CreatedBy:
    """What a cache was made with."""

    atcache: str
    python: str
    torch: str
    timm: str
    device: str
    """The kind of device the teacher ran on: "cpu" or "cuda"."""
    views: Mapping[str, str]
    """Versions of the libraries that make pixels."""

    def to_json(self) -> dict[str, Any]:
        """The fields as a JSON object."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class Quality:
    """One quantity that was measured on the tasks."""

    mean: float
    max: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Completion:
    """The totals of a finished cache."""

    num_tasks: int
    num_stored: int
    """Views with codes."""
    num_bad: int
    """Views without codes."""
    nbytes: int
    """Bytes of all shards."""
    codes_nbytes: int
    """Bytes of the shards of codes."""
    quality: Mapping[str, Quality]
    """What the tasks measured, by name, such as "row_kl_nats"."""
    num_checked: int | None = None
    """Views that the quality was measured on; None if the tasks do not record it."""

    def to_json(self) -> dict[str, Any]:
        """The fields as a JSON object."""
        fields = asdict(self)
        if self.num_checked is None:
            del fields["num_checked"]
        return fields


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheRecord:
    """What a cache records about itself."""

    path: Location = field(compare=False)
    """The cache, for messages."""
    identity: CacheIdentity
    """What another build must have in common with it to make the same cache."""
    weights_from: str
    """Where the teacher's weights came from: a file's name, or "hub:" and a repository."""
    licence: str | None
    """Licence of the teacher's weights; None if it is not known."""
    depth: int
    """Number of the teacher's blocks."""
    geometry: FactorGeometry
    """Layers, heads and shapes of what is stored."""
    calibration: CalibrationRecord
    created_by: CreatedBy
    complete: Completion | None = None
    """None while the build is not finished."""

    @classmethod
    def of(cls, reader: CacheReader) -> CacheRecord:
        """The record of an open cache; see `from_attributes`."""
        return cls.from_attributes(reader.attributes, reader.path)

    @classmethod
    def from_attributes(cls, attributes: Mapping[str, Any], path: Location) -> CacheRecord:
        """The record in a cache's attributes.

        Args:
            attributes: `attributes["atcache"]` of its zarr.json.
            path: the cache, for messages.

        Raises:
            CorruptCacheError: a member is missing, has a wrong value, or contradicts another; the message names the
                file and the member, what was found and what was expected.
        """
        about = Members(dict(attributes), f"{path}/zarr.json")
        layout = _parse_layout(attributes, path)
        teacher = about.object("teacher")
        depth = teacher.count("depth", 1, _MOST_LAYERS)
        geometry = _parse_geometry(about.object("geometry"), depth, layout)
        return cls(
            path=path,
            identity=parse_identity(about, layout, path),
            weights_from=teacher.text("weights_from"),
            licence=teacher.optional_text("licence"),
            depth=depth,
            geometry=geometry,
            calibration=_parse_calibration(about.object("calibration"), geometry),
            created_by=_parse_created_by(about.object("created_by")),
            complete=None if attributes.get("complete") is None else _parse_complete(about.object("complete"), layout),
        )

    def to_attributes(self) -> dict[str, Any]:
        """The attributes that `from_attributes` reads: all that the store does not write itself, and the totals."""
        attributes = self.identity.to_json()
        made_from = {"weights_from": self.weights_from, "licence": self.licence, "depth": self.depth}
        return {
            **attributes,
            "teacher": {**attributes["teacher"], **made_from},
            "geometry": self.geometry.to_json(),
            "calibration": self.calibration.to_json(),
            "created_by": self.created_by.to_json(),
            **({} if self.complete is None else {"complete": self.complete.to_json()}),
        }

    @property
    def policy(self) -> ViewPolicy:
        """How the views were drawn."""
        return self.identity.policy

    @property
    def teacher_record(self) -> TeacherRecord:
        """What is needed to find and check the teacher again. Imports torch."""
        from atcache.teachers.record import TeacherRecord

        return TeacherRecord(
            name=self.identity.teacher,
            weights_sha256=self.identity.weights_sha256,
            precision=self.identity.precision,
            geometry=self.geometry,
        )

    def make_codec(self) -> Codec:
        """The codec that turned factors into integers. Imports torch.

        Raises:
            CorruptCacheError: this version does not know the codec, or not with these fields.
        """
        from atcache.codecs.registry import codec_from_json

        try:
            codec = codec_from_json(dict(self.identity.codec))
        except CodecError as error:
            raise CorruptCacheError(
                f'{self.path}/zarr.json: "codec" cannot be used: {error} Use the version that wrote the cache, or '
                "restore the file from a copy."
            ) from error
        # With a default in place of a missing field, the codes could decode to other maps.
        if missing := sorted(codec.to_json().keys() - self.identity.codec.keys()):
            raise CorruptCacheError(
                f'{self.path}/zarr.json has no "codec.{missing[0]}", which codec {codec.name} needs. Restore it from a '
                "copy, or build the cache again."
            )
        return codec


def _parse_layout(attributes: Mapping[str, Any], path: Location) -> StoreLayout:
    """The layout. The store has checked it already; it is read again here, as other members must agree with it."""
    try:
        return StoreLayout.from_json(attributes["layout"])
    except (KeyError, TypeError, ConfigError) as error:
        raise CorruptCacheError(f'{path}/zarr.json: "layout" cannot be used: {error}') from error


def _parse_geometry(geometry: Members, depth: int, layout: StoreLayout) -> FactorGeometry:
    num_model_heads = geometry.count("num_model_heads", 1, _MOST_VALUES)
    heads = geometry.counts("heads", num_model_heads - 1)
    kind = geometry.text("kind", get_args(AttentionKind)) if "kind" in geometry else "factors"
    tokens = geometry.object("tokens")
    parsed = FactorGeometry(
        layers=geometry.counts("layers", depth - 1),
        heads=heads,
        num_model_heads=num_model_heads,
        num_kv_heads=geometry.take(
            "num_kv_heads",
            lambda value: type(value) is int and value > 0 and len(heads) % value == 0,
            f"a whole number that divides {len(heads)}, the heads that are kept",
        ),
        head_dim=geometry.count("head_dim", 1, _MOST_VALUES) if kind == "factors" else geometry.count("head_dim", 0, 0),
        tokens=TokenLayout(
            num_prefix_tokens=tokens.count("num_prefix_tokens", 0, _MOST_VALUES),
            grid_height=tokens.count("grid_height", 1, _MOST_VALUES),
            grid_width=tokens.count("grid_width", 1, _MOST_VALUES),
        ),
        scale=geometry.positive("scale"),
        kind=cast("AttentionKind", kind),
        v_head_dim=geometry.count("v_head_dim", 1, _MOST_VALUES) if "v_head_dim" in geometry else 0,
    )
    tokens.refuse_others(list(parsed.tokens.to_json()))
    geometry.refuse_others([*parsed.to_json(), "kind", "v_head_dim"])
    if parsed.tokens.num_tokens != layout.num_tokens:
        geometry.take("tokens", lambda _: False, f"{layout.num_tokens} tokens in all, as its layout says")
    return parsed


def _parse_calibration(calibration: Members, geometry: FactorGeometry) -> CalibrationRecord:
    def parse(card: Members) -> LayerCard:
        return LayerCard(
            layer=card.count("layer", 0, _MOST_LAYERS),
            nbytes=card.number("nbytes", 0, LARGEST_COUNT),
            row_kl_nats=card.number("row_kl_nats"),
            injected_error=card.number("injected_error"),
            v_error=card.optional_number("v_error"),
        )

    return CalibrationRecord(
        row_kl_nats=calibration.number("row_kl_nats"),
        injected_error=calibration.number("injected_error"),
        v_error=calibration.number("v_error") if geometry.v_head_dim else calibration.optional_number("v_error"),
        num_held_back=calibration.count("num_held_back", 1) if "num_held_back" in calibration else None,
        layers=tuple(map(parse, calibration.objects("layers"))) if "layers" in calibration else None,
    )


def _parse_created_by(created_by: Members) -> CreatedBy:
    names = ("atcache", "python", "torch", "timm", "device")
    views = created_by.object("views")
    return CreatedBy(
        **{name: created_by.text(name) for name in names},
        views={name: views.text(name) for name in views.names()},
    )


def _parse_complete(complete: Members, layout: StoreLayout) -> Completion:
    num_tasks, num_views = layout.num_views * layout.num_blocks, layout.num_views * layout.num_samples
    quality = complete.object("quality")
    measured = {name: quality.object(name) for name in quality.names()}
    parsed = Completion(
        num_tasks=complete.count("num_tasks"),
        num_stored=complete.count("num_stored", 0, num_views),
        num_bad=complete.count("num_bad", 0, num_views),
        nbytes=complete.count("nbytes"),
        codes_nbytes=complete.count("codes_nbytes"),
        quality={name: Quality(mean=value.number("mean"), max=value.number("max")) for name, value in measured.items()},
        num_checked=complete.count("num_checked", 0, num_views) if "num_checked" in complete else None,
    )
    complete.agree("num_tasks", num_tasks, "as its layout says")
    complete.agree("num_bad", num_views - parsed.num_stored, f"with {parsed.num_stored} of {num_views} views stored")
    return parsed
