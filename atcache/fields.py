"""What the fields of a dataclass take, as their annotations say; and dataclasses that are JSON objects.

    @dataclass(frozen=True, kw_only=True, slots=True)
    class Grid(JsonFields):
        height: Annotated[int, Range(at_least=1)]
        kind: Literal["patch", "pixel"] = "patch"

    Grid.from_json({"height": 0}, "grid.json", advice="Make it again.")
    # ConfigError: grid.json: "height" is 0, expected at least 1. Make it again.

Annotations may be bool, int, float, str, classes, `Any`, `Literal`, `X | None` and other unions, tuples, `Mapping[str,
X]` and other `JsonFields`. The options of commands (`pipelines/options.py`) are checked by the same `fit`.
"""

from __future__ import annotations

import dataclasses
import math
import reprlib
from collections.abc import Mapping
from functools import lru_cache
from pathlib import PurePath
from types import NoneType, UnionType
from typing import (
    Annotated,
    Any,
    ClassVar,
    Literal,
    NamedTuple,
    Self,
    Union,
    cast,
    get_args,
    get_origin,
    get_type_hints,
)

from atcache.errors import AtcacheError, ConfigError

LARGEST_COUNT = 2**53
"""Whole numbers up to here are exact in every JSON reader; the limit of those whose range has no other."""
_MISSING: Any = dataclasses.MISSING
_WORDS = {
    "bool": "True or False",
    "int": "a whole number",
    "float": "a number",
    "str": "text",
    "Path": "a path",
    "Url": "a URL",
    "OwnTeacher": "atcache.own_teacher(...)",
}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Range:
    """Which numbers a field takes: all within its limits. NaN and infinity are in no range."""

    at_least: float | None = None
    at_most: float | None = None
    above: float | None = None
    """The value must be greater than this."""
    below: float | None = None
    """The value must be less than this."""

    @property
    def limits(self) -> str:
        """The range in words, such as "at least 1"; empty where there is none."""
        if self.at_least is not None and self.at_most is not None and self.at_most < math.inf:
            return f"{self.at_least} to {self.at_most}"
        low = f"at least {self.at_least}" if self.at_least is not None else ""
        low = f"more than {self.above}" if self.above is not None else low
        high = f"at most {self.at_most}" if self.at_most is not None else ""
        high = f"less than {self.below}" if self.below is not None else high
        return " and ".join(part for part in (low, high) if part)

    def holds(self, value: float) -> bool:
        """Whether a number lies in the range."""
        return (
            (self.at_least is None or value >= self.at_least)
            and (self.at_most is None or value <= self.at_most)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
        )


class At(NamedTuple):
    """Where in the JSON object a field stands, if not under its own name."""

    place: str
    """Names with dots between them. Empty: the field's members stand among those of the object itself."""


class Omitted:
    """Marks a field that JSON leaves out where it has its default."""


class Misfit(ValueError):
    """A value that its field does not take."""

    def __init__(self, place: str, found: object, expected: str, reason: str | None = None) -> None:
        super().__init__(place, found, expected)
        self.place, self.found, self.expected = place, found, expected
        self._reason = reason

    def sentence(self, file: object) -> str:
        """What is wrong with the JSON object that was read from `file`."""
        if self.found is _MISSING:
            return f'{file} has no "{self.place}", expected {self.expected}.'
        subject = f'{file}: "{self.place}"' if self.place else str(file)
        if self._reason is not None:
            return f"{subject} cannot be used: {self._reason}"
        return f"{subject} is {reprlib.repr(self.found)}, expected {self.expected}."


class JsonFields:
    """Base of dataclasses that are written as JSON objects and read again."""

    __slots__ = ()
    is_strict: ClassVar[bool] = False
    """Whether unknown members are refused, and a default does not stand for a missing member unless it is `Omitted`:
    for objects of which every member changes the result."""

    def to_json(self) -> dict[str, Any]:
        """The fields as a JSON object."""
        return _to_object(self)

    @classmethod
    def from_json(
        cls, values: object, file: object = "the record", *, error: type[AtcacheError] = ConfigError, advice: str = ""
    ) -> Self:
        """What `to_json` came from.

        Args:
            values: what JSON gave.
            file: where it stood, for messages.
            error: what is raised.
            advice: what the user can do, as sentences.

        Raises:
            error: a member is missing, is not what it must be, or is unknown to a strict class.
        """
        try:
            return fit(values, cls)
        except Misfit as misfit:
            raise error(f"{misfit.sentence(file)} {advice}".rstrip()) from misfit

    @classmethod
    def known_members(cls, values: dict[str, Any]) -> dict[str, Any]:
        """The members that the fields are read from; a class that writes others too checks them here.

        Raises:
            AtcacheError: the others are not what they must be.
        """
        return values


class _Member(NamedTuple):
    """A field and its place in the JSON object."""

    name: str
    kind: Any
    names: list[str]
    default: Any
    is_omitted: bool


@lru_cache
def _members(cls: type) -> list[_Member]:
    hints = get_type_hints(cls, include_extras=True)
    members: list[_Member] = []
    for field in dataclasses.fields(cls):
        marks = getattr(hints[field.name], "__metadata__", ())
        place = next((mark.place for mark in marks if isinstance(mark, At)), field.name)
        names = place.split(".") if place else []
        members.append(_Member(field.name, hints[field.name], names, field.default, Omitted in marks))
    return members


def fit(value: Any, kind: Any, place: str = "", limits: Range = Range()) -> Any:  # noqa: ANN401 - any type
    """A value as its field holds it: lists become tuples, JSON objects dataclasses, all else stays as it is.

    Args:
        value: what was given.
        kind: the field's annotation.
        place: where the value stands, for messages.
        limits: the range of numbers, where the annotation does not say it.

    Raises:
        Misfit: the annotation does not allow it.
    """
    if kind in (int, float, str):  # the most common by far, as in the records of 40,000 tasks
        return _fit_plain(value, kind, place, limits)
    origin, parts = get_origin(kind), get_args(kind)
    if kind is Any:
        return _checked(place, value, object, "a value")
    if origin is Annotated:
        return fit(value, parts[0], place, next((mark for mark in parts if isinstance(mark, Range)), limits))
    if origin in (Union, UnionType):
        return _fit_one_of(value, parts, place, limits)
    if origin is Literal:
        if value not in parts:
            raise Misfit(place, value, f"one of {', '.join(parts)}")
        return value
    if origin is tuple:
        items: list[Any] = _checked(place, value, (list, tuple), "a list")
        kinds = [parts[0]] * len(items) if parts[-1] is Ellipsis else parts
        if len(items) != len(kinds):
            raise Misfit(place, value, f"a list of {len(kinds)}")
        return tuple(fit(items[i], kinds[i], f"{place}[{i}]", limits) for i in range(len(items)))
    if origin in (Mapping, dict):
        members = _checked(place, value, Mapping, "an object")
        return {name: fit(one, parts[1], f"{place}.{name}", limits) for name, one in members.items()}
    if issubclass(kind, JsonFields) and not isinstance(value, kind):
        return _fit_members(value, kind, place)
    return _fit_plain(value, kind, place, limits)


def _fit_one_of(value: Any, kinds: tuple[Any, ...], place: str, limits: Range) -> Any:  # noqa: ANN401 - any type
    if value is None and NoneType in kinds:
        return None
    misfits: list[Misfit] = []
    for kind in kinds:
        if kind is not NoneType:
            try:
                return fit(value, kind, place, limits)
            except Misfit as misfit:
                misfits.append(misfit)
    # What came furthest is what was meant: a list whose second item is wrong, rather than one that is not text.
    deepest = max(misfits, key=lambda misfit: len(misfit.place))
    if len(misfits) == 1 or deepest.place != place:
        raise deepest
    raise Misfit(place, value, " or ".join(dict.fromkeys(misfit.expected for misfit in misfits)))


def _fit_plain(value: Any, kind: type, place: str, limits: Range) -> Any:  # noqa: ANN401 - any type
    words = _WORDS.get(kind.__name__, f"a {kind.__name__}")
    _checked(place, value, (int, float) if kind is float else kind, words)
    # To Python, True is also the number 1.
    if kind in (int, float) and isinstance(value, bool):
        raise Misfit(place, value, words)
    if kind in (int, float):
        if not -math.inf < value < math.inf:
            raise Misfit(place, value, "a finite number")
        if not limits.holds(value):
            raise Misfit(place, value, limits.limits)
        if isinstance(value, int) and limits.at_most is None and abs(value) > LARGEST_COUNT:
            raise Misfit(place, value, f"a number from -{LARGEST_COUNT} to {LARGEST_COUNT}")
    return value


def _checked(place: str, value: Any, kind: Any, words: str) -> Any:  # noqa: ANN401 - any type
    if value is _MISSING or not isinstance(value, kind):
        raise Misfit(place, value, words)
    return value


def _fit_members(values: Any, cls: type[JsonFields], place: str) -> JsonFields:  # noqa: ANN401 - JSON
    _checked(place, values, dict, "an object")
    members, given = _members(cls), {}
    try:
        values = cls.known_members(values)
        for member in members:
            found, where = _find(values, member.names, place)
            if found is _MISSING and member.default is not _MISSING and (member.is_omitted or not cls.is_strict):
                continue
            given[member.name] = fit(found, member.kind, where)
        known = [member.name for member in members]
        if unknown := [name for name in values if cls.is_strict and name not in known]:
            expected = (
                f"only {', '.join(known)} there: this version of atcache knows no others. Use the version that wrote it"
            )
            raise Misfit(_join(place, unknown[0]), values[unknown[0]], expected)
        return cls(**given)
    except AtcacheError as error:
        raise Misfit(place, values, "", str(error)) from error


def _find(values: Any, names: list[str], place: str) -> tuple[Any, str]:  # noqa: ANN401 - JSON
    """The member with these names, one within the other, and its place."""
    for name in names:
        values, place = _checked(place, values, dict, "an object").get(name, _MISSING), _join(place, name)
    return values, place


def _join(place: str, name: str) -> str:
    return f"{place}.{name}" if place else name


def to_json(value: Any) -> Any:  # noqa: ANN401 - any type
    """A value as JSON has it: dataclasses and mappings as objects, tuples as lists, paths as text."""
    if isinstance(value, JsonFields):
        return value.to_json()
    if dataclasses.is_dataclass(value):
        return _to_object(value)
    if isinstance(value, Mapping):
        return {name: to_json(one) for name, one in cast("Mapping[str, Any]", value).items()}
    if isinstance(value, list | tuple):
        return [to_json(one) for one in cast("list[Any]", value)]
    return str(value) if isinstance(value, PurePath) else value


def _to_object(value: Any) -> dict[str, Any]:  # noqa: ANN401 - a dataclass
    result: dict[str, Any] = {}
    for member in _members(cast("type[Any]", type(value))):
        item = getattr(value, member.name)
        if member.is_omitted and item == member.default:
            continue
        if not member.names:
            result.update(to_json(item))
            continue
        outer = result
        for name in member.names[:-1]:
            outer = outer.setdefault(name, {})
        outer[member.names[-1]] = to_json(item)
    return result
