"""Which of a teacher's attention goes where in a student: layer by layer, head by head, and what of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, get_args

from atcache.attention.factors import FactorGeometry, LayerAttention, LayerFactors
from atcache.errors import ConfigError, TeacherError

What = Literal["map", "qk", "q", "k", "v", "qkv"]
"""The map; q and k; one of q, k and v, beside the student's own others; all three."""
WHATS: tuple[What, ...] = get_args(What)
OF_VALUES: frozenset[What] = frozenset({"v", "qkv"})
"""Those that need v."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Pairing:
    """Where a teacher's attention goes in a student."""

    layers: tuple[tuple[int, int], ...]
    """(student's block, teacher's block), by the student's, each of which comes once."""
    heads: tuple[tuple[int, int], ...]
    """(student's head, teacher's head) in each of these layers, by the student's; each of either comes once."""
    num_student_heads: int
    """Heads a layer of the student must have; those that are not in `heads` stay free."""
    what: What = "map"
    """What is transferred."""

    @classmethod
    def equal(
        cls,
        geometry: FactorGeometry,
        layers: Sequence[int] | None = None,
        heads: Sequence[int] | None = None,
        what: What = "map",
    ) -> Pairing:
        """Each layer and head to its like in a student of the teacher's shape; all that the geometry has for None."""
        return cls(
            layers=tuple((layer, layer) for layer in (geometry.layers if layers is None else layers)),
            heads=tuple((head, head) for head in (geometry.heads if heads is None else heads)),
            num_student_heads=geometry.num_model_heads,
            what=what,
        )

    @property
    def teacher_layers(self) -> tuple[int, ...]:
        """The teacher's blocks that are needed, ascending."""
        return tuple(sorted({teacher for _, teacher in self.layers}))

    @property
    def student_layers(self) -> tuple[int, ...]:
        """The student's blocks that are given attention."""
        return tuple(student for student, _ in self.layers)

    @property
    def teacher_heads(self) -> tuple[int, ...]:
        """The teacher's heads, in the order of `student_heads`."""
        return tuple(teacher for _, teacher in self.heads)

    @property
    def student_heads(self) -> tuple[int, ...]:
        """The student's heads that are given attention, ascending."""
        return tuple(student for student, _ in self.heads)

    @property
    def all_heads(self) -> bool:
        """Whether no head of the student is left free in these layers."""
        return len(self.heads) == self.num_student_heads

    @property
    def needs_values(self) -> bool:
        """Whether v is transferred, alone or with others."""
        return self.what in OF_VALUES

    def to_json(self) -> dict[str, Any]:
        """The fields as a JSON object."""
        return {
            "layers": [list(pair) for pair in self.layers],
            "heads": [list(pair) for pair in self.heads],
            "num_student_heads": self.num_student_heads,
            "what": self.what,
        }

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Pairing:
        """The pairing `to_json` came from."""
        pairs: dict[str, Any] = {name: tuple((s, t) for s, t in fields[name]) for name in ("layers", "heads")}
        return cls(**{**fields, **pairs})


class TeacherFactors(Protocol):
    """The teacher's side of one batch."""

    @property
    def heads(self) -> tuple[int, ...] | None:
        """Which of the teacher's heads `layer` gives, in this order; None for just those that are wanted."""
        ...

    def layer(self, block: int) -> LayerAttention:
        """The factors or maps of the teacher's block `block`, for all samples of the batch."""
        ...


class PairedFactors:
    """A teacher's attention as a student's blocks and heads ask for it."""

    def __init__(self, teacher: TeacherFactors, pairing: Pairing) -> None:
        self._teacher = teacher
        self._block_of = dict(pairing.layers)
        self._positions: list[int] | None = None
        if teacher.heads is not None and teacher.heads != pairing.teacher_heads:
            self._positions = [teacher.heads.index(head) for head in pairing.teacher_heads]

    def layer(self, block: int) -> LayerAttention:
        """What the student's block `block` is given, one head for each of the pairing's."""
        attention = self._teacher.layer(self._block_of[block])
        return attention if self._positions is None else attention.select_heads(self._positions)

    def factors(self, block: int) -> LayerFactors:
        """The same, where q, k or v themselves are wanted.

        Raises:
            ConfigError: the teacher's side has maps only.
        """
        attention = self.layer(block)
        if not isinstance(attention, LayerFactors):
            raise ConfigError(
                "factors are wanted, but only maps are there. Leave --what out, or take a cache with q and k."
            )
        return attention


def check_student(geometry: FactorGeometry, student: FactorGeometry, pairing: Pairing, *, student_name: str) -> None:
    """Refuse a student that the teacher's attention does not fit.

    Raises:
        TeacherError: heads, tokens or layers differ; the message names both sides.
    """
    differences: list[str] = []
    if student.num_model_heads != pairing.num_student_heads:
        whose = "the teacher" if pairing.num_student_heads == geometry.num_model_heads else "the head map"
        differences.append(f"{student.num_model_heads} heads a layer, {whose} {pairing.num_student_heads}")
    if student.tokens != geometry.tokens:
        differences.append(f"{_describe_tokens(student)}, the teacher {_describe_tokens(geometry)}")
    if missing := sorted(set(pairing.student_layers) - set(student.layers)):
        differences.append(f"{len(student.layers)} layers and so no layer {missing[0]}")
    if differences:
        raise TeacherError(
            f"student {student_name} has {'; '.join(differences)}. Attention can only be transferred between equal "
            "heads and tokens: leave --student out to use the teacher's own architecture, choose one that matches, or "
            "say with --head-map and --layer-map which of the teacher's go where."
        )
    if pairing.what == "map":
        return
    if "maps" in (geometry.kind, student.kind):
        whose = "teacher" if geometry.kind == "maps" else "student"
        raise TeacherError(
            f"--what {pairing.what} is for factors, but the {whose}'s maps are no softmax of one q k^T. Leave it out."
        )
    # What a live teacher hands over is known only when it runs; v is as wide as q in all of timm's ViTs.
    v_head_dim = geometry.v_head_dim or geometry.head_dim
    if pairing.needs_values and student.v_head_dim != v_head_dim:
        raise TeacherError(
            f"student {student_name} has a v of {student.v_head_dim} components a head, the teacher of {v_head_dim}. "
            f"--what {pairing.what} needs equal ones."
        )
    if pairing.what != "v" and (student.head_dim, student.scale) != (geometry.head_dim, geometry.scale):
        raise TeacherError(
            f"student {student_name} has heads of {student.head_dim} components (scale {student.scale:.4g}), the "
            f"teacher of {geometry.head_dim} ({geometry.scale:.4g}). --what {pairing.what} needs equal ones."
        )


def _describe_tokens(geometry: FactorGeometry) -> str:
    tokens = geometry.tokens
    return f"{tokens.num_prefix_tokens} + {tokens.grid_height}x{tokens.grid_width} tokens"
