"""What caches and runs remember of a teacher, and checking that a loaded one is that teacher."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

from atcache.attention.geometry import FactorGeometry
from atcache.errors import CacheMismatchError
from atcache.teachers.devices import resolve_precision
from atcache.teachers.load import Teacher
from atcache.teachers.run import TeacherRun


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
        return {**asdict(self), "geometry": self.geometry.to_json()}

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> TeacherRecord:
        """The record `to_json` came from."""
        values: dict[str, Any] = {**fields, "geometry": FactorGeometry.from_json(fields["geometry"])}
        return cls(**values)

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
