"""Tables of layers x heads, as they are printed and written. Importing this loads nothing heavy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

Table = tuple[tuple[float, ...], ...]
"""One number for each layer and head."""


@dataclass(frozen=True, kw_only=True, slots=True)
class NamedTable:
    """One statistic of all layers and heads."""

    name: str
    """As in JSON and CSV."""
    title: str
    """What it is, with its unit, for people."""
    mean: Table
    standard_error: Table | None
    """None if it is the mean over a single view."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """Everything that is written to files."""

    headline: str
    """What was looked at, for pictures."""
    layers: tuple[int, ...]
    heads: tuple[int, ...]
    tables: tuple[NamedTable, ...]
    places: Mapping[str, tuple[tuple[int, ...], ...]] = field(default_factory=dict[str, tuple[tuple[int, ...], ...]])
    """Further columns of a CSV file that say what a row is about, by name: for each layer and head a number."""
