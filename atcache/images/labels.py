"""A sample's label: the number in its `.cls` file, or a member of its `.json` file."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any, cast

from atcache.choices import LABELS, Labels
from atcache.errors import ConfigError

_MAX_NBYTES = 64
_MAX_JSON_NBYTES = 2**20
MAX_LABEL = 2**31 - 1
"""The largest label: what fits in an int32."""
_NUMBER = re.compile(r"\s*([0-9]{1,10})\s*")
_SEVERAL = re.compile(r"\s*-?[0-9]+(?:[\s,;]+-?[0-9]+)+[\s,;]*")
_EXPECTED = f"expected an integer from 0 to {MAX_LABEL}"


class BadLabelError(ValueError):
    """A label cannot be used. The message continues a sentence that begins with the sample's key."""


@dataclass(frozen=True, slots=True)
class _Unclear:
    """What stands in for a value that the text of a .json leaves open. Only where a label is, it matters."""

    why: str


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelRule:
    """Where labels are, and whether a sample needs one."""

    mode: Labels = "required"
    key: str | None = None
    """The label's place in the sample's `.json`, such as "class_id" or "meta.class_id"; None for the `.cls` file."""

    def __post_init__(self) -> None:
        if self.mode not in LABELS:
            raise ConfigError(f"labels={self.mode!r}: expected one of {', '.join(LABELS)}.")
        if self.key is None:
            return
        if self.mode == "none":
            raise ConfigError(f"label_key={self.key}: with labels none, no label is read. Leave one of the two out.")
        if not all(self.key.split(".")):
            raise ConfigError(f"label_key={self.key!r}: expected a key of the .json files, such as class_id or a.b.")

    @property
    def extension(self) -> str | None:
        """The extension of the file that holds the label; None if labels are not read."""
        if self.mode == "none":
            return None
        return "cls" if self.key is None else "json"

    @property
    def max_nbytes(self) -> int:
        """How large that file may be."""
        return _MAX_NBYTES if self.key is None else _MAX_JSON_NBYTES

    @property
    def place(self) -> str:
        """Where labels are, for messages."""
        return ".cls" if self.key is None else f".json, key {self.key}"

    @property
    def advice(self) -> str:
        """What to do about a sample without a label."""
        mend = (
            "Add it, or name its place by --label-key if it is in the .json"
            if self.key is None
            else "Add it, correct the key, or leave --label-key out if the tars have .cls files"
        )
        return (
            f"{mend}. `atcache build` and `plan` need no labels: give them --labels none, or --labels optional if only "
            "some samples lack one."
        )

    def parse(self, data: bytes) -> int | None:
        """The label in a file's bytes, at most `max_nbytes`; None if the file holds none.

        Raises:
            BadLabelError: what is there cannot be a label.
        """
        if self.key is None:
            return _parse_text(data.decode(errors="replace"))
        return _parse_value(_find(data, self.key), self.key)

    def refuse_large(self, head: bytes, nbytes: int) -> BadLabelError:
        """The error for a file of more than `max_nbytes` bytes, which begins with `head`."""
        if self.key is not None:
            return BadLabelError(f"has a .json of {nbytes} bytes; expected at most {_MAX_JSON_NBYTES}")
        return _not_a_number(head[:_MAX_NBYTES].decode(errors="replace"))


def _parse_text(text: str) -> int:
    match = _NUMBER.fullmatch(text)
    if match is not None and int(match[1]) <= MAX_LABEL:
        return int(match[1])
    raise _not_a_number(text)


def _not_a_number(text: str) -> BadLabelError:
    if _SEVERAL.fullmatch(text):
        return BadLabelError(
            f"has several labels ({text.strip()!r}), and a sample has one class here. Keep one, or build without: "
            "`atcache build --labels none`"
        )
    return BadLabelError(f"has the label {text!r}; {_EXPECTED}, as text")


def _find(data: bytes, key: str) -> Any:  # noqa: ANN401 - any JSON value
    """The member at a dotted key; None if there is none."""
    try:
        value: Any = json.loads(data.decode(), parse_constant=_constant, object_pairs_hook=_members)
    except (ValueError, RecursionError) as error:
        raise BadLabelError(f"has a .json that cannot be read ({type(error).__name__}: {error})") from error
    for part in key.split("."):
        value = cast("dict[str, Any]", value).get(part) if isinstance(value, dict) else None
        if isinstance(value, _Unclear):
            raise BadLabelError(f"has a .json that cannot be read ({value.why})")
    return value


def _constant(text: str) -> _Unclear:
    return _Unclear(f"{text} is not JSON")


def _members(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members: dict[str, Any] = {}
    for name, value in pairs:  # of a name that comes again, it is not certain which of the values is meant
        members[name] = _Unclear(f"{name!r} occurs twice") if name in members else value
    return members


def _parse_value(value: Any, key: str) -> int | None:  # noqa: ANN401 - any JSON value
    if value is None:
        return None
    if isinstance(value, str) and (match := _NUMBER.fullmatch(value)):
        value = int(match[1])
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= MAX_LABEL:
        shown = json.dumps(value, default=lambda unclear: unclear.why)
        shown = shown if len(shown) <= _MAX_NBYTES else shown[:_MAX_NBYTES] + "..."
        if isinstance(value, list):
            raise BadLabelError(
                f"has a list as {key} in its .json ({shown}), and a sample has one class here. Name another key, or "
                "build without: `atcache build --labels none`"
            )
        raise BadLabelError(f"has {shown} as {key} in its .json; {_EXPECTED}")
    return value
