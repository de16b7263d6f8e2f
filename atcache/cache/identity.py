"""What two builds must have in common to make the same cache: teacher, source, views, selection and codec."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

from atcache.choices import Pixels, Queries
from atcache.fields import At, JsonFields, Omitted, Range
from atcache.teachers.inputs import InputConfig
from atcache.views.policy import ViewPolicy

Precision = Literal["float32", "bfloat16"]
"""The types a teacher may have computed in, by torch's names."""
_Indices = tuple[Annotated[int, Range(at_least=0)], ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Selection(JsonFields):
    """Which of the teacher's attention the user selected."""

    layers: _Indices | str | None
    """Block indices; None for all. The first versions recorded the text that was typed."""
    heads: _Indices | str | None
    """Head indices, in the same form."""
    store: Annotated[Literal["v", "x"] | None, Omitted] = None
    """Whether v, or x (what attention and MLP get), was to be stored too. Caches from before that was possible do not
    record it."""
    queries: Annotated[Queries, Omitted] = "all"
    """The tokens whose rows of the maps were to be kept."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheIdentity(JsonFields):
    """What two builds must have in common to make the same cache."""

    teacher: Annotated[str, At("teacher.name")]
    """The teacher's timm name with arguments."""
    weights_sha256: Annotated[str, At("teacher.weights_sha256")]
    """SHA-256 of the weights that its maps depend on."""
    input: Annotated[InputConfig, At("teacher.input")]
    """How images became the teacher's input."""
    precision: Annotated[Precision, At("teacher.precision")]
    """The type it computed in."""
    fingerprint: Annotated[str, At("source.fingerprint")]
    """Fingerprint of the sample table."""
    num_samples: Annotated[int, At("source.num_samples")]
    """Samples, with and without problems."""
    policy: Annotated[ViewPolicy, At("views.policy")]
    """How views were drawn."""
    num_views: Annotated[int, At("views.num_views"), Range(at_least=1)]
    """Views of each sample."""
    pixels: Annotated[Pixels, At("views.pixels")]
    """Whether the views' images are replayed or stored."""
    selection: Selection
    """Which layers, heads and rows were selected, and whether v."""
    codec: Mapping[str, str | float | bool | None]
    """The codec's name and fields, as JSON; `CacheRecord.make_codec` makes it."""
