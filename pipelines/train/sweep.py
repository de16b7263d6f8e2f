"""The configs of a sweep's students: from settings for all, and settings for each."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from atcache.choices import Mode
from atcache.errors import ConfigError

from ..options import options_of
from .config import MODES_OF_OPTIONS, TrainConfig


def sweep_configs(
    students: Mapping[str, Mapping[str, Any]], common: Mapping[str, Any], drawn: Mapping[str, Any] | None = None
) -> list[TrainConfig]:
    """A config for each student of a sweep.

    Args:
        students: each student's own fields of `TrainConfig`, by its name, which also names its folder.
        common: fields of all students; `out` is the folder for the students' folders. A field that only some modes
            can use goes to the students of these modes.
        drawn: how students without a cache draw their views; wins over `common`, but not over `students`.

    Raises:
        ConfigError: a student has no mode, or fields that cannot be used; the message names the student.
    """
    order_seed = common.get("order_seed")
    shared = {**common, "order_seed": common.get("seed", 0) if order_seed is None else order_seed}
    modes: dict[str, Mode | None] = {name: own.get("mode", common.get("mode")) for name, own in students.items()}
    configs: list[TrainConfig] = []
    for name, own in students.items():
        mode = modes[name]
        if mode is None:
            raise ConfigError(f"student {name} has no mode. Give it one, or --mode for all.")
        if unknown := sorted((shared.keys() | own.keys()) - options_of(TrainConfig).keys()):
            raise ConfigError(f"student {name}: {unknown[0]} is not an option of `atcache train`.")
        if "out" not in shared:
            raise ConfigError("out is missing: give the folder for the students' folders.")
        views: Mapping[str, Any] = {} if own.get("cache", common.get("cache")) or drawn is None else drawn
        theirs = _without_other_modes(shared, mode, {mode for mode in modes.values() if mode is not None})
        fields: dict[str, Any] = {**theirs, **views, **own, "out": Path(shared["out"]) / name}
        try:
            configs.append(TrainConfig(**fields))
        except ConfigError as error:
            raise ConfigError(f"student {name}: {error}") from error
    return configs


def _without_other_modes(common: Mapping[str, Any], mode: Mode, modes: set[Mode]) -> dict[str, Any]:
    """The common fields, without those that this mode cannot use, if the mode of another student can."""
    others = {
        name
        for name, theirs in MODES_OF_OPTIONS.items()
        if mode not in theirs and modes.intersection(theirs) and not (name == "weights" and common.get("live_teacher"))
    }
    return {name: value for name, value in common.items() if name not in others}
