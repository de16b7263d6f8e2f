"""Dataclasses as JSON objects: members are checked as annotations say, and what is wrong is one sentence."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import pytest

from atcache.errors import CorruptCacheError
from atcache.fields import At, JsonFields, Omitted, Range


@dataclass(frozen=True, kw_only=True, slots=True)
class Grid(JsonFields):
    """One that knows all its members."""

    is_strict: ClassVar[bool] = True
    sides: tuple[Annotated[int, Range(at_least=1)], int]
    kind: Literal["patch", "pixel"] = "patch"
    note: Annotated[str | None, Omitted] = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Card(JsonFields):
    """One that later versions may add to."""

    name: Annotated[str, At("of.name")]
    grid: Annotated[Grid | None, At("of.grid")]
    share: Annotated[float, Range(above=0, below=1)] = 0.5
    chosen: tuple[int, ...] | str | None = None
    errors: Mapping[str, float]


OBJECT = {"of": {"name": "a", "grid": {"sides": [2, 3], "kind": "pixel"}}, "share": 0.25, "errors": {"x": 1}}


def test_an_object_is_read_and_written_without_loss():
    card = Card.from_json(OBJECT)
    assert card == Card(name="a", grid=Grid(sides=(2, 3), kind="pixel"), share=0.25, errors={"x": 1})
    assert card.to_json() == {**OBJECT, "chosen": None}
    assert list(card.to_json()) == ["of", "share", "chosen", "errors"]
    assert Card.from_json({**OBJECT, "mood": 1, "chosen": [1]}).chosen == (1,)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"share": 1}, r'^card\.json: "share" is 1, expected more than 0 and less than 1\. Make it again\.$'),
        ({"share": math.nan}, r'"share" is nan, expected a finite number'),
        ({"share": 10**400}, r'"share" is 10{9,}\.{3}0{9,}, expected more than 0 and less than 1\.'),
        ({"share": True}, r'"share" is True, expected a number'),
        ({"chosen": {}}, r'"chosen" is \{\}, expected a list or text'),
        ({"chosen": [1, "2"]}, r"\"chosen\[1\]\" is '2', expected a whole number"),
        ({"errors": {"x": None}}, r'"errors\.x" is None, expected a number'),
        ({"of": 1}, r'"of" is 1, expected an object'),
        ({"of": {"grid": None}}, r'has no "of\.name", expected text'),
        ({"of": {"name": "a", "grid": {"sides": [2]}}}, r'"of\.grid\.sides" is \[2\], expected a list of 2'),
        ({"of": {"name": "a", "grid": {"sides": [0, 1]}}}, r'"of\.grid\.sides\[0\]" is 0, expected at least 1'),
        # A default does not stand for what a strict class lacks, unless it was left out because of it.
        ({"of": {"name": "a", "grid": {"sides": [2, 3]}}}, r'has no "of\.grid\.kind", expected one of patch'),
        ({"of": {"name": "a", "grid": {**OBJECT["of"]["grid"], "x": 1}}}, r'"of\.grid\.x" is 1, expected only sides,'),
    ],
)
def test_what_does_not_fit_is_named_with_its_place_and_what_was_expected(change, message):
    with pytest.raises(CorruptCacheError, match=message):
        Card.from_json({**OBJECT, **change}, "card.json", error=CorruptCacheError, advice="Make it again.")
