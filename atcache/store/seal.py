"""A checksum inside of a JSON object, over its other members: metadata has no second copy to be compared with."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from operator import ne
from typing import Any

from atcache.store.durable import encode_json

SEAL = "crc32"
"""The member that holds the checksum: zlib's crc32 of the other members as `encode_json` writes them."""


def seal(values: Mapping[str, Any]) -> dict[str, Any]:
    """`values` with their checksum; one they had before is replaced.

    >>> seal({"format": 1})
    {'format': 1, 'crc32': 1584290907}
    """
    others = {name: value for name, value in values.items() if name != SEAL}
    return {**others, SEAL: zlib.crc32(encode_json(others))}


def seal_holds(values: Mapping[str, Any]) -> bool:
    """Whether the members are those that were sealed; also True where there is no seal, as in older caches."""
    if SEAL not in values:
        # A name one letter off is that of a seal which was damaged itself.
        return not any(len(name) == len(SEAL) and sum(map(ne, name, SEAL)) == 1 for name in values)
    try:
        return seal(values)[SEAL] == values[SEAL]
    except ValueError:  # NaN, which JSON cannot say and Python reads all the same
        return False
