"""CacheRecord: what a cache records about itself, with types. Only here are the attributes in its zarr.json checked.

The store itself keeps `format`, `layout`, the seal and whether the cache is complete; `docs/format.md` lists all
members. Reading a record does not import torch: the codec stays JSON until `make_codec`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from atcache.attention.geometry import FactorGeometry
from atcache.cache.identity import CacheIdentity
from atcache.choices import Labels
from atcache.errors import CodecError, CorruptCacheError
from atcache.fields import At, JsonFields, Misfit, Omitted, Range, fit
from atcache.files.location import Location
from atcache.store.layout import StoreLayout
from atcache.teachers.trained import Trained

if TYPE_CHECKING:
    from atcache.codecs.base import Codec
    from atcache.store.reader import CacheReader
    from atcache.teachers.record import TeacherRecord
    from atcache.views.policy import ViewPolicy

_ADVICE = "Restore it from a copy, or build the cache again."
_Count = Annotated[int, Range(at_least=0)]
_Positive = Annotated[int, Range(at_least=1)]
_Error = Annotated[float, Range(at_least=0, at_most=1e6)]


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerCard(JsonFields):
    """What the codec does to one layer, on held-back views."""

    layer: _Count
    nbytes: Annotated[float, Range(at_least=0)]
    """Bytes per view."""
    row_kl_nats: _Error
    injected_error: _Error
    """Relative error of the teacher's final features when this layer alone attends with decoded maps."""
    v_error: _Error | None = None
    """Relative error of decoded v; None if v is not stored."""
    x_error: Annotated[_Error | None, Omitted] = None
    """The same for what attention and MLP get."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CalibrationRecord(JsonFields):
    """What was measured before the build, on views held back from the fit; a codec may choose its step on them."""

    row_kl_nats: _Error
    """Mean row KL of decoded maps."""
    injected_error: _Error
    """Relative error of the teacher's features when it attends with decoded maps."""
    v_error: _Error | None = None
    """Relative error of decoded v; None if v is not stored."""
    x_error: Annotated[_Error | None, Omitted] = None
    """The same for what attention and MLP get."""
    num_held_back: Annotated[_Positive | None, Omitted] = None
    """Number of these views; None in the first caches, which do not record it."""
    layers: Annotated[tuple[LayerCard, ...] | None, Omitted] = None
    """Each kept layer alone; None in the first caches."""
    decode_operations: Annotated[_Error | None, Omitted] = None
    """Multiply-adds that decoding a view takes, as a share of the teacher's forward pass; None if next to none."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CreatedBy(JsonFields):
    """What a cache was made with."""

    atcache: str
    python: str
    torch: str
    timm: str
    device: str
    """The kind of device the teacher ran on: "cpu" or "cuda"."""
    views: Mapping[str, str]
    """Versions of the libraries that make pixels."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Quality(JsonFields):
    """One quantity that was measured on the tasks."""

    mean: _Error
    max: _Error


@dataclass(frozen=True, kw_only=True, slots=True)
class Completion(JsonFields):
    """The totals of a finished cache."""

    num_tasks: _Count
    num_stored: _Count
    """Views with codes."""
    num_bad: _Count
    """Views without codes."""
    nbytes: _Count
    """Bytes of all shards."""
    codes_nbytes: _Count
    """Bytes of the shards of codes."""
    quality: Mapping[str, Quality]
    """What the tasks measured, by name, such as "row_kl_nats"."""
    num_checked: Annotated[_Count | None, Omitted] = None
    """Views that the quality was measured on; None if the tasks do not record it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _ShownOfCodec(JsonFields):
    """Members of a codec that `atcache info` shows; the codec itself judges all when it is made."""

    name: str
    target_kl: float = 0.0
    target_nbytes: _Positive | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleChoice(JsonFields):
    """The options that say which samples of tars are taken and what their labels are; a cache grows by the same ones.

    Not the file of keys: samples that are added have other keys.
    """

    labels: Labels
    label_key: str | None
    max_samples: int | None


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheRecord(JsonFields):
    """What a cache records about itself."""

    identity: Annotated[CacheIdentity, At("")]
    """What another build must have in common with it to make the same cache."""
    weights_from: Annotated[str, At("teacher.weights_from")]
    """Where the teacher's weights came from: a file's name, or "hub:" and a repository."""
    licence: Annotated[str | None, At("teacher.licence")]
    """Licence of the teacher's weights; None if it is not known."""
    depth: Annotated[int, At("teacher.depth"), Range(at_least=1, at_most=4096)]
    """Number of the teacher's blocks."""
    trained: Annotated[Trained | None, At("teacher.trained"), Omitted] = None
    """The training that made the teacher's weights, if that was `atcache train`."""
    geometry: FactorGeometry
    """Layers, heads and shapes of what is stored."""
    calibration: CalibrationRecord
    created_by: CreatedBy
    choice: Annotated[SampleChoice | None, At("source.choice"), Omitted] = None
    """How samples were chosen; None in caches from before that was recorded, and merged of parts that differ in it."""
    complete: Annotated[Completion | None, Omitted] = None
    """None while the build is not finished."""

    @classmethod
    def of(cls, reader: CacheReader) -> CacheRecord:
        """The record of an open cache; see `from_attributes`."""
        return cls.from_attributes(reader.attributes, reader.layout, reader.path)

    @classmethod
    def from_attributes(cls, attributes: Mapping[str, Any], layout: StoreLayout, path: Location) -> CacheRecord:
        """What a cache's attributes say.

        Args:
            attributes: `attributes["atcache"]` of its zarr.json.
            layout: the cache's layout, with which the members must agree.
            path: the cache, for messages.

        Raises:
            CorruptCacheError: a member is missing, is not what it must be, or contradicts another; names both file
                and member, what was found and what was expected.
        """
        try:
            record: CacheRecord = fit(dict(attributes), cls)
            fit(record.identity.codec, _ShownOfCodec, "codec")
            _check_agreement(record, layout)
        except Misfit as misfit:
            raise CorruptCacheError(f"{misfit.sentence(f'{path}/zarr.json')} {_ADVICE}") from misfit
        return record

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

    def make_codec(self, path: Location) -> Codec:
        """How factors became integers. Imports torch.

        Args:
            path: the cache, for messages.

        Raises:
            CorruptCacheError: this version knows no such codec, or not with these fields.
        """
        from atcache.codecs.registry import codec_from_json

        try:
            codec = codec_from_json(dict(self.identity.codec))
        except CodecError as error:
            raise CorruptCacheError(
                f'{path}/zarr.json: "codec" cannot be used: {error} Use the version that wrote the cache, or '
                "restore the file from a copy."
            ) from error
        # A default in place of what is missing could decode to other maps.
        if missing := sorted(codec.to_json().keys() - self.identity.codec.keys()):
            raise CorruptCacheError(
                f'{path}/zarr.json has no "codec.{missing[0]}", which codec {codec.name} needs. {_ADVICE}'
            )
        return codec


def _check_agreement(record: CacheRecord, layout: StoreLayout) -> None:
    """Check what the members must be because others are what they are.

    Raises:
        Misfit: two contradict each other.
    """
    identity, geometry, complete = record.identity, record.geometry, record.complete
    policy, num_heads, num_views = identity.policy, len(geometry.heads), layout.num_views * layout.num_real_samples
    sides = (policy.image_height, policy.image_width)
    of_layout: dict[str, tuple[object, object]] = {
        "source.num_samples": (identity.num_samples, layout.num_real_samples),
        "views.num_views": (identity.num_views, layout.num_views),
        "views.pixels": (identity.pixels, "replay" if layout.pixels is None else "store"),
        "views.policy.image_height": (sides, layout.pixels or sides),
        "views.policy": (policy.parameter_names, layout.parameter_names),
    }
    # Rows of bytes have all tokens together; there the codec's state says how many.
    if layout.num_tokens > 1 or not geometry.keeps_all_queries:
        place = "geometry.tokens" if geometry.keeps_all_queries else "geometry.queries"
        of_layout[place] = (geometry.num_queries, layout.num_tokens)
    for place, (found, wanted) in of_layout.items():
        _require(found == wanted, place, found, f"{wanted!r}, as its layout says")
    for name, limit in (("layers", record.depth), ("heads", geometry.num_model_heads)):
        indices: tuple[int, ...] = getattr(geometry, name)
        ascends = len(indices) > 0 and list(indices) == sorted(set(indices)) and indices[-1] < limit
        _require(ascends, f"geometry.{name}", list(indices), f"ascending whole numbers from 0 to {limit - 1}")
    num_kv_heads, head_dim, v_error = geometry.num_kv_heads, geometry.head_dim, record.calibration.v_error
    divides = num_heads % num_kv_heads == 0
    _require(divides, "geometry.num_kv_heads", num_kv_heads, f"a whole number that divides {num_heads}, the kept heads")
    fits_kind = (head_dim > 0) == (geometry.kind == "factors")
    _require(fits_kind, "geometry.head_dim", head_dim, "at least 1 for factors, 0 for maps")
    _require(
        identity.selection.queries == geometry.queries,
        "selection.queries",
        identity.selection.queries,
        f"{geometry.queries!r}, as its geometry says",
    )
    _require(v_error is not None or not geometry.v_head_dim, "calibration.v_error", v_error, "a number, as v is stored")
    x_error = record.calibration.x_error
    _require(
        x_error is not None or not geometry.input_width, "calibration.x_error", x_error, "a number, as x is stored"
    )
    if complete is not None:
        num_tasks, num_bad = layout.num_tasks, num_views - complete.num_stored
        _require(
            complete.num_tasks == num_tasks,
            "complete.num_tasks",
            complete.num_tasks,
            f"{num_tasks}, as its layout says",
        )
        words = f"{num_bad}, with {complete.num_stored} of {num_views} views stored"
        _require(complete.num_bad == num_bad, "complete.num_bad", complete.num_bad, words)
        least, most = min(1, complete.num_stored), complete.nbytes
        _require(
            least <= complete.codes_nbytes <= most,
            "complete.codes_nbytes",
            complete.codes_nbytes,
            f"{least} to {most}, with {complete.num_stored} views stored in {most} bytes",
        )
        _require(
            (complete.num_checked or 0) <= num_views,
            "complete.num_checked",
            complete.num_checked,
            f"at most {num_views}",
        )


def _require(holds: bool, place: str, found: object, expected: str) -> None:
    if not holds:
        raise Misfit(place, found, expected)
