"""From options to a pairing: which of a cache's layers and heads go where in a student, and what of them."""

from __future__ import annotations

from collections.abc import Sequence

from atcache.attention.capture import parse_indices
from atcache.attention.factors import FactorGeometry
from atcache.attention.pairing import Pairing
from atcache.errors import ConfigError

from .train_config import TrainConfig


def plan_pairing(config: TrainConfig, geometry: FactorGeometry) -> Pairing:
    """What a run's student is given, and where.

    Args:
        config: a run that transfers attention.
        geometry: what the cache holds.

    Raises:
        ConfigError: the cache does not hold a layer or head, or a map cannot be read.
    """
    num_student_heads = geometry.num_model_heads
    if config.head_map is not None:
        heads = _parse_head_map(config.head_map, geometry)
        num_student_heads = len(heads)
    else:
        heads = _equal(_chosen(config.heads, geometry.heads, "head"))
    if config.layer_map is not None:
        layers = _parse_layer_map(config.layer_map, geometry)
    else:
        layers = _equal(_chosen(config.layers, geometry.layers, "layer"))
    # Copying q and k is copying the map that is made of them, whatever basis they are in.
    what = "map" if config.mode == "copy" and config.what == "qk" else config.what
    return Pairing(layers=layers, heads=heads, num_student_heads=num_student_heads, what=what)


def _equal(indices: Sequence[int]) -> tuple[tuple[int, int], ...]:
    return tuple((index, index) for index in indices)


def _chosen(text: str | None, stored: tuple[int, ...], what: str) -> tuple[int, ...]:
    """The layers or heads of `text`, or all the cache holds."""
    if text is None or text.strip() == "all":
        return stored
    chosen = parse_indices(text, max(stored) + 1, what=what)
    _check_stored(chosen, stored, what)
    return chosen


def _check_stored(chosen: Sequence[int], stored: tuple[int, ...], what: str) -> None:
    if missing := sorted(set(chosen) - set(stored)):
        raise ConfigError(
            f"{what} {missing[0]} is not in the cache, which holds {what}s {', '.join(map(str, stored))}."
        )


def _parse_layer_map(text: str, geometry: FactorGeometry) -> tuple[tuple[int, int], ...]:
    """Pairs of (student's block, teacher's block) from "0:0,1:2,2:4", by the student's block."""
    pairs: dict[int, int] = {}
    for part in text.split(","):
        student, _, teacher = (word.strip() for word in part.partition(":"))
        if not (student.isdecimal() and teacher.isdecimal()):
            raise ConfigError(
                f"layer map {text!r}: {part.strip()!r} is no pair. Write STUDENT:TEACHER blocks, such as 0:0,1:2,2:4."
            )
        if int(student) in pairs:
            raise ConfigError(f"layer map {text!r}: the student's block {int(student)} is there twice.")
        pairs[int(student)] = int(teacher)
    _check_stored(list(pairs.values()), geometry.layers, "layer")
    return tuple(sorted(pairs.items()))


def _parse_head_map(text: str, geometry: FactorGeometry) -> tuple[tuple[int, int], ...]:
    """Pairs of (student's head, teacher's head) from the teacher's heads "0,2,5" in the order of the student's."""
    words = [word.strip() for word in text.split(",")]
    if wrong := [word for word in words if not word.isdecimal()]:
        raise ConfigError(
            f"head map {text!r}: {wrong[0]!r} is no head. Write the teacher's head for each of its own: 0,2,5."
        )
    heads = [int(word) for word in words]
    if len(set(heads)) < len(heads):
        raise ConfigError(f"head map {text!r}: a head of the teacher's is there twice.")
    _check_stored(heads, geometry.heads, "head")
    return tuple(enumerate(heads))
