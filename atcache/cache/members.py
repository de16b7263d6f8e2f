"""Read the members of a JSON object in a cache's zarr.json, and refuse those of a wrong type or out of range."""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Collection
from typing import Any, cast, final

from atcache.errors import CorruptCacheError

LARGEST_COUNT = 2**53
"""Whole numbers up to this one are exact in every JSON reader; no count of a real cache comes near."""


@final
class Members:
    """One JSON object of a file. Its methods return a member by name, and refuse values that it cannot have.

    All raise CorruptCacheError, which names the file, the member by its dotted place, what was found and what was
    expected. Numbers come back as JSON had them: 1 stays an int, 1.0 stays a float.
    """

    def __init__(self, values: object, file: str, place: str = "") -> None:
        """Take an object.

        Args:
            values: the parsed JSON.
            file: where it was read from, for messages.
            place: its dotted place in the file, for messages; empty for the outermost one.
        """
        self._file, self._place = file, place
        if not isinstance(values, dict):
            raise self._error(place, values, "an object")
        self._values = cast("dict[str, Any]", values)

    def __contains__(self, name: str) -> bool:
        return name in self._values

    def names(self) -> list[str]:
        """The members' names."""
        return list(self._values)

    def take(self, name: str, fits: Callable[[Any], bool], expected: str) -> Any:  # noqa: ANN401 - JSON
        """A member that `fits` accepts; `expected` says in words what that is."""
        if name not in self._values:
            raise CorruptCacheError(
                f'{self._file} has no "{self._where(name)}", expected {expected}. Restore it from a copy, or build '
                "the cache again."
            )
        value = self._values[name]
        if not fits(value):
            raise self._error(self._where(name), value, expected)
        return value

    def object(self, name: str) -> Members:
        """A member that is an object itself."""
        return Members(self.take(name, lambda _: True, "an object"), self._file, self._where(name))

    def objects(self, name: str) -> list[Members]:
        """A member that is a list of objects."""
        values = self.take(name, lambda value: isinstance(value, list), "a list of objects")
        return [Members(value, self._file, f"{self._where(name)}[{number}]") for number, value in enumerate(values)]

    def text(self, name: str, among: Collection[str] | None = None) -> str:
        """A text that is not empty, and is one of `among` if that is given."""
        if among is None:
            return self.take(name, lambda value: isinstance(value, str) and value != "", "a text")
        expected = f"one of {', '.join(among)}"
        return self.take(name, lambda value: isinstance(value, str) and value in among, expected)

    def optional_text(self, name: str) -> str | None:
        """A text or null."""
        return self.take(name, lambda value: value is None or isinstance(value, str), "a text or null")

    def count(self, name: str, least: int = 0, most: int | None = LARGEST_COUNT) -> int:
        """A whole number from `least` to `most`; None for no limit."""
        return self.take(name, lambda value: _is_count(value, least, most), _describe_count(least, most))

    def counts(self, name: str, most: int) -> tuple[int, ...]:
        """An ascending list of at least one whole number from 0 to `most`, without repeats."""

        def fits(value: Any) -> bool:  # noqa: ANN401 - JSON
            return (
                isinstance(value, list)
                and len(cast("list[Any]", value)) > 0
                and all(_is_count(item, 0, most) for item in cast("list[Any]", value))
                and value == sorted(set(cast("list[int]", value)))
            )

        return tuple(self.take(name, fits, f"ascending whole numbers from 0 to {most}"))

    def number(self, name: str, least: float = 0, most: float = 1e6) -> float:
        """A number from `least` to `most`."""
        return self.take(name, lambda value: _is_number(value, least, most), f"a number from {least:g} to {most:g}")

    def positive(self, name: str, most: float = 1e6) -> float:
        """A number above 0, up to `most`."""
        fits, expected = _is_number, f"a number above 0, up to {most:g}"
        return self.take(name, lambda value: fits(value, 0, most) and value > 0, expected)

    def optional_number(self, name: str) -> float | None:
        """A number of at least 0; None if the member is null or missing."""
        return None if self._values.get(name) is None else self.number(name)

    def numbers(self, name: str, size: int, fits: Callable[[float], bool], expected: str) -> tuple[float, ...]:
        """A list of `size` numbers that fit."""

        def all_fit(value: Any) -> bool:  # noqa: ANN401 - JSON
            items = cast("list[Any]", value) if isinstance(value, list) else []
            return len(items) == size and all(_is_number(item, -1e6, 1e6) and fits(item) for item in items)

        return tuple(self.take(name, all_fit, expected))

    def agree(self, name: str, expected: object, why: str) -> None:
        """Refuse a member that is not what another part of the file says.

        Args:
            name: the member, which is there.
            expected: what it must be.
            why: what says so, in words.
        """
        if self._values[name] != expected:
            raise self._error(self._where(name), self._values[name], f"{expected!r}, {why}")

    def refuse_others(self, known: Collection[str]) -> None:
        """Refuse members other than `known`: they may change what the others mean, so they cannot be ignored."""
        for name in self._values:
            if name not in known:
                raise CorruptCacheError(
                    f'{self._file}: "{self._where(name)}" is unknown to this version of atcache, which knows '
                    f"{', '.join(known)} there. Use the version that wrote the cache, or restore the file from a copy."
                )

    def _where(self, name: str) -> str:
        return f"{self._place}.{name}" if self._place else name

    def _error(self, where: str, found: object, expected: str) -> CorruptCacheError:
        return CorruptCacheError(
            f'{self._file}: "{where}" is {reprlib.repr(found)}, expected {expected}. Restore it from a copy, or build '
            "the cache again."
        )


def _is_count(value: object, least: int, most: int | None) -> bool:
    if not isinstance(value, int) or isinstance(value, bool):
        return False
    return value >= least and (most is None or value <= most)


def _describe_count(least: int, most: int | None) -> str:
    return f"a whole number from {least}" + ("" if most in (None, LARGEST_COUNT) else f" to {most}")


def _is_number(value: object, least: float, most: float) -> bool:
    """Whether this is a number in the range. NaN, which Python's JSON reader accepts, is in no range."""
    return isinstance(value, int | float) and not isinstance(value, bool) and least <= value <= most
