"""The differences between two records, in words: the answer to "why can this not be resumed?"."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, cast

_SHA256 = re.compile(r"[0-9a-f]{64}")


def name_differences(
    stored: Mapping[str, Any], asked: Mapping[str, Any], places: tuple[str, str] = ("there", "here")
) -> list[str]:
    """One text for each leaf that differs between two JSON objects, by its dotted name.

    Args:
        stored: the first object.
        asked: the second object.
        places: where each of them is, in words.

    >>> name_differences({"codec": {"name": "int8"}, "seed": 0}, {"codec": {"name": "exact"}, "seed": 0})
    ["codec.name is 'int8' there and 'exact' here"]
    """
    return [
        f"{name} is {_shown(there)} {places[0]} and {_shown(here)} {places[1]}"
        for name, (there, here) in find_differences(stored, asked).items()
    ]


def _shown(value: object) -> str:
    """A value as text; of a SHA-256 only the beginning, which is enough to see that two differ."""
    return repr(f"{value[:12]}...") if isinstance(value, str) and _SHA256.fullmatch(value) else repr(value)


def find_differences(stored: Mapping[str, Any], asked: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Both values of each leaf that differs, by its dotted name; None stands for a missing leaf."""
    there, here = dict(_flatten(stored)), dict(_flatten(asked))
    return {
        name: (there.get(name), here.get(name)) for name in sorted({*there, *here}) if there.get(name) != here.get(name)
    }


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    leaves: list[tuple[str, Any]] = []
    for name, value in tree.items():
        if isinstance(value, Mapping):
            leaves += _flatten(cast("Mapping[str, Any]", value), f"{prefix}{name}.")
        else:
            leaves.append((prefix + name, value))
    return leaves
