"""What caches and runs remember of a teacher, and starting that very teacher again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from atcache.attention.factors import FactorGeometry
from atcache.attention.pairing import Pairing
from atcache.errors import CacheMismatchError, CorruptCacheError
from atcache.precision import resolve_precision
from atcache.store.reader import CacheReader
from atcache.teachers import Teacher, load_teacher

from .calibrate import TeacherRun
from .students import LiveTeacher


@dataclass(frozen=True, kw_only=True, slots=True)
class TeacherRecord:
    """What a run or a cache remembers of its teacher: enough to find and check it again."""

    name: str
    """Its timm name with arguments."""
    weights_sha256: str
    """Of the weights its maps depend on."""
    precision: str
    """torch's name of the type it computed in."""
    geometry: FactorGeometry
    """Shapes of its factors."""

    def to_json(self) -> dict[str, Any]:
        """The fields as a JSON object."""
        return {
            "name": self.name,
            "weights_sha256": self.weights_sha256,
            "precision": self.precision,
            "geometry": self.geometry.to_json(),
        }

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> TeacherRecord:
        """The record `to_json` came from."""
        values: dict[str, Any] = {**fields, "geometry": FactorGeometry.from_json(fields["geometry"])}
        return cls(**values)

    @classmethod
    def of_cache(cls, reader: CacheReader) -> TeacherRecord:
        """The teacher a cache was built with.

        Raises:
            CorruptCacheError: the cache does not say.
        """
        try:
            teacher = reader.attributes["teacher"]
            return cls(
                name=teacher["name"],
                weights_sha256=teacher["weights_sha256"],
                precision=teacher["precision"],
                geometry=FactorGeometry.from_json(reader.attributes["geometry"]),
            )
        except (KeyError, TypeError) as error:
            raise CorruptCacheError(
                f"{reader.path}/zarr.json does not say what its teacher was ({error}). Was it written by atcache?"
            ) from error

    def start(self, weights: Path | None, pairings: Sequence[Pairing], device: torch.device) -> LiveTeacher:
        """The teacher itself, running.

        Args:
            weights: its weights; None takes timm's.
            pairings: what students are given of it.
            device: where it runs.

        Raises:
            CacheMismatchError: these are other weights than the recorded ones.
        """
        teacher = load_teacher(self.name, weights=weights, device=device)
        layers = sorted({layer for pairing in pairings for layer in pairing.teacher_layers})
        heads = sorted({head for pairing in pairings for head in pairing.teacher_heads})
        with_values = any(pairing.needs_values for pairing in pairings)
        return LiveTeacher(self.run(teacher, device), heads, layers, with_values=with_values)

    def run(self, teacher: Teacher, device: torch.device) -> TeacherRun:
        """A loaded teacher as it ran when the cache was built.

        Raises:
            CacheMismatchError: it has other weights than the recorded ones.
        """
        if teacher.weights_sha256 != self.weights_sha256:
            raise CacheMismatchError(
                f"teacher {self.name} from {teacher.source} has weights of sha256 {teacher.weights_sha256[:12]}..., "
                f"expected {self.weights_sha256[:12]}.... Give the --weights that the cache was built with."
            )
        dtype = resolve_precision({"float32": "fp32", "bfloat16": "bf16"}[self.precision], device)
        return TeacherRun(teacher=teacher, device=device, dtype=dtype)
