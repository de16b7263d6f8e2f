"""Which attention of a teacher goes where in a student, by layer and by head, and what of it: maps, q, k or v."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

from atcache.attention.factors import LayerAttention, LayerFactors
from atcache.attention.geometry import FactorGeometry
from atcache.attention.indices import parse_ranges, write_out
from atcache.choices import OF_VALUES, What
from atcache.errors import ConfigError, TeacherError
from atcache.fields import JsonFields


@dataclass(frozen=True, kw_only=True, slots=True)
class Pairing(JsonFields):
    """Where a teacher's attention goes in a student: the `pairing` of what `make_student` made.

    Example:
        student = atcache.make_student("in1k.zarr", "copy", layers="0", heads=[1])
        student.pairing.layers  # ((0, 0),): the student's block 0 is given attention of the teacher's block 0
        student.pairing.heads  # ((1, 1),)
    """

    is_strict: ClassVar[bool] = True
    layers: tuple[tuple[int, int], ...]
    """(student's block, teacher's block), sorted; each block of the student comes only once."""
    heads: tuple[tuple[int, int], ...]
    """(student's head, teacher's head) in each of these layers, sorted; each head of either comes only once."""
    num_student_heads: int
    """Heads a layer of the student must have; those that are not in `heads` stay free."""
    what: What = "map"
    """What is transferred."""

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


class TeacherFactors(Protocol):
    """The teacher's side of one batch."""

    @property
    def heads(self) -> tuple[int, ...] | None:
        """The teacher's heads that `layer` gives, in this order; None if they are just those that are wanted."""
        ...

    def layer(self, block: int) -> LayerAttention:
        """The factors or maps of the teacher's block `block`, for all samples of the batch."""
        ...


class PairedFactors:
    """A teacher's attention, by the student's blocks and in the order of the student's heads."""

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
        """The same as `layer`, for students that need q, k or v themselves.

        Raises:
            ConfigError: the teacher's side has only maps.
        """
        attention = self.layer(block)
        if not isinstance(attention, LayerFactors):
            raise ConfigError(
                "q, k or v is needed, but the teacher's side has only maps. Leave --what out, or use a cache with q "
                "and k."
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
    if student.tokens != geometry.tokens and len(differences) == 1:
        # No map of heads or layers can mend this.
        grid = f"{geometry.tokens.grid_height}x{geometry.tokens.grid_width}"
        mend = (
            f"give --student {student_name} with the img_size of the cache's views, if its patches then make a grid "
            f"of {grid}"
            if student.tokens.num_prefix_tokens == geometry.tokens.num_prefix_tokens
            else "choose one with as many tokens before its patches"
        )
        raise TeacherError(
            f"student {student_name} has {differences[0]}. Attention can only be transferred between equal tokens: "
            f"{mend}, or leave --student out to use the teacher's own architecture (if it is of timm)."
        )
    if differences:
        raise TeacherError(
            f"student {student_name} has {'; '.join(differences)}. Attention can only be transferred between equal "
            "heads and tokens: leave --student out to use the teacher's own architecture (if it is of timm), choose "
            "one that matches, or say with --head-map and --layer-map which of the teacher's heads and layers go where."
        )
    if pairing.what == "map":
        return
    if "maps" in (geometry.kind, student.kind):
        whose = "teacher" if geometry.kind == "maps" else "student"
        raise TeacherError(
            f"--what {pairing.what} needs factors, but the {whose}'s maps are not a softmax of one q k^T. Leave it out."
        )
    # The v of a live teacher is known only when it runs; in all of timm's ViTs, v is as wide as q.
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


def plan_pairing(
    geometry: FactorGeometry,
    *,
    layers: str | None = None,
    heads: str | None = None,
    layer_map: str | None = None,
    head_map: str | None = None,
    what: What = "map",
    copies: bool = False,
) -> Pairing:
    """The pairing that a user's options describe.

    Args:
        geometry: what the cache holds.
        layers: blocks, the same in teacher and student, such as "0-17"; None for all of the cache.
        heads: heads, the same in teacher and student, such as "0,3"; None for all of the cache.
        layer_map: pairs STUDENT:TEACHER of blocks, such as "0:0,1:2,2:4", instead of `layers`.
        head_map: for each head of the student, the teacher's head, such as "0,2,5", instead of `heads`.
        what: what is transferred.
        copies: whether the student copies it. Copying q and k is the same as copying the map that they make, in any
            basis, so "qk" becomes "map".

    Raises:
        ConfigError: the cache does not hold a layer, a head or rows that are needed, or a map cannot be read.
    """
    _check_rows(geometry, what, copies=copies)
    num_student_heads = geometry.num_model_heads
    if head_map is not None:
        head_pairs = _parse_head_map(head_map, geometry)
        num_student_heads = len(head_pairs)
    else:
        head_pairs = tuple((head, head) for head in _chosen(heads, geometry.heads, "head"))
    if layer_map is not None:
        layer_pairs = _parse_layer_map(layer_map, geometry)
    else:
        layer_pairs = tuple((layer, layer) for layer in _chosen(layers, geometry.layers, "layer"))
    given: What = "map" if copies and what == "qk" else what
    return Pairing(layers=layer_pairs, heads=head_pairs, num_student_heads=num_student_heads, what=given)


def _check_rows(geometry: FactorGeometry, what: What, *, copies: bool) -> None:
    """Refuse students that need whole maps of a cache that keeps some rows of them."""
    if geometry.keeps_all_queries or (what == "map" and not copies):
        return
    needs = "a student that copies needs the rows of all tokens" if copies else f"--what {what} needs q and k"
    raise ConfigError(
        f"{needs}, and the cache keeps only rows of maps (it was built with --queries {geometry.queries}). Build one "
        "without --queries, or distill: --mode distill without --what takes the rows that there are."
    )


def _chosen(text: str | None, stored: tuple[int, ...], what: str) -> tuple[int, ...]:
    """The layers or heads of `text`, or all that the cache holds."""
    if text is None or text.strip() == "all":
        return stored
    ranges = parse_ranges(text, what)
    for one in ranges:
        # The first that is missing ends it: the last index of a range may be any number.
        _check_stored(one, stored, what)
    return write_out(ranges)


def _check_stored(chosen: Sequence[int], stored: tuple[int, ...], what: str) -> None:
    missing = next((index for index in chosen if index not in stored), None)
    if missing is not None:
        raise ConfigError(f"{what} {missing} is not in the cache, which holds {what}s {', '.join(map(str, stored))}.")


def _parse_layer_map(text: str, geometry: FactorGeometry) -> tuple[tuple[int, int], ...]:
    """Pairs of (student's block, teacher's block) from "0:0,1:2,2:4", by the student's block."""
    pairs: dict[int, int] = {}
    for part in text.split(","):
        student, _, teacher = (word.strip() for word in part.partition(":"))
        if not (student.isdecimal() and teacher.isdecimal()):
            raise ConfigError(
                f"layer map {text!r}: {part.strip()!r} is not a pair. Write STUDENT:TEACHER blocks, such as "
                "0:0,1:2,2:4."
            )
        if int(student) in pairs:
            raise ConfigError(f"layer map {text!r}: the student's block {int(student)} comes twice. Name it once.")
        pairs[int(student)] = int(teacher)
    _check_stored(list(pairs.values()), geometry.layers, "layer")
    return tuple(sorted(pairs.items()))


def _parse_head_map(text: str, geometry: FactorGeometry) -> tuple[tuple[int, int], ...]:
    """Pairs of (student's head, teacher's head) from the teacher's heads "0,2,5" in the order of the student's."""
    words = [word.strip() for word in text.split(",")]
    if wrong := [word for word in words if not word.isdecimal()]:
        raise ConfigError(
            f"head map {text!r}: {wrong[0]!r} is not a head. Write the teacher's head for each head of the student: "
            "0,2,5."
        )
    heads = [int(word) for word in words]
    if len(set(heads)) < len(heads):
        raise ConfigError(f"head map {text!r}: a head of the teacher comes twice. Name each once.")
    _check_stored(heads, geometry.heads, "head")
    return tuple(enumerate(heads))
