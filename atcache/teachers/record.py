"""What caches and runs remember of a teacher, and a check that a loaded teacher is the same one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from atcache.attention.geometry import FactorGeometry
from atcache.errors import CacheMismatchError
from atcache.fields import JsonFields
from atcache.teachers.devices import resolve_precision
from atcache.teachers.foreign.names import OWN, TRANSFORMERS, hash_note
from atcache.teachers.load import Teacher
from atcache.teachers.run import TeacherRun


@dataclass(frozen=True, kw_only=True, slots=True)
class TeacherRecord(JsonFields):
    """What a run or a cache remembers of its teacher: enough to find and check it again."""

    is_strict: ClassVar[bool] = True
    name: str
    """Its timm name with arguments."""
    weights_sha256: str
    """sha256 of the weights that its maps depend on."""
    precision: Literal["float32", "bfloat16"]
    """torch's name of the float type it computed in."""
    geometry: FactorGeometry
    """Shapes of its factors."""

    def run(self, teacher: Teacher, device: torch.device) -> TeacherRun:
        """The loaded teacher, to run in the precision in which the cache was built.

        Raises:
            CacheMismatchError: its weights are not the recorded ones.
        """
        if teacher.weights_sha256 != self.weights_sha256:
            raise CacheMismatchError(
                f"teacher {teacher.name} from {teacher.source} has weights of sha256 {teacher.weights_sha256[:12]}..., "
                f"expected {self.weights_sha256[:12]}.... {self._what_to_give()}"
            )
        dtype = resolve_precision({"float32": "fp32", "bfloat16": "bf16"}[self.precision], device)
        return TeacherRun(teacher=teacher, device=device, dtype=dtype)

    def _what_to_give(self) -> str:
        if self.name.startswith(OWN):
            return "Hand over the module with the weights that the cache was built with."
        if self.name.startswith(TRANSFORMERS):
            return f"Give the teacher that the cache was built with: {self.name}.{hash_note(self.name)}"
        return "Give the --weights that the cache was built with."
