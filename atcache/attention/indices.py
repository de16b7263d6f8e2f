"""Parse and check the indices of layers and heads."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby, pairwise

from atcache.errors import ConfigError


def parse_indices(text: str, limit: int, what: str = "layer") -> tuple[int, ...]:
    """The indices in a text such as "0-5,11", ascending and without repeats; "all" means every index below `limit`.

    Args:
        text: indices and inclusive ranges, separated by commas.
        limit: the number of layers or heads; every index must be below it.
        what: the word for messages, "layer" or "head".

    Raises:
        ConfigError: the text cannot be read, or an index does not exist.

    >>> parse_indices("0-2,5", 6)
    (0, 1, 2, 5)
    """
    if text.strip() == "all":
        return tuple(range(limit))
    ranges = parse_ranges(text, what)
    outside = [max(one.start, limit) for one in ranges if one.stop > limit]
    if outside:  # before the ranges are written out: the last index of one may be any number
        raise _no_such_index(min(outside), limit, what)
    return checked_indices(write_out(ranges), limit, what)


def parse_ranges(text: str, what: str) -> list[range]:
    """The indices and ranges in a text such as "0-5,11", in its order; an index is a range of one.

    Args:
        text: see `parse_indices`, without "all".
        what: the word for messages.

    Raises:
        ConfigError: the text cannot be read.
    """
    ranges: list[range] = []
    for part in text.split(","):
        first, dash, last = part.partition("-")
        try:
            start = int(first)
            stop = int(last) if dash else start
        except ValueError:
            raise ConfigError(
                f"{what}s {text!r}: {part.strip()!r} is not an index. Write indices and ranges, such as 0-5,11, or all."
            ) from None
        if stop < start:
            raise ConfigError(f"{what}s {text!r}: the range {part.strip()} is backwards. Put the smaller index first.")
        ranges.append(range(start, stop + 1))
    return ranges


def write_out(ranges: Iterable[range]) -> tuple[int, ...]:
    """All indices of the ranges, ascending and without repeats."""
    return tuple(sorted({index for one in ranges for index in one}))


def checked_indices(indices: Sequence[int], limit: int, what: str) -> tuple[int, ...]:
    """The indices as a tuple, after checking that they are ascending, without repeats and below `limit`.

    Raises:
        ConfigError: a check failed, or there are no indices.
    """
    chosen = tuple(indices)
    outside = [index for index in chosen if not 0 <= index < limit]
    if outside:
        raise _no_such_index(outside[0], limit, what)
    if not chosen or any(a >= b for a, b in pairwise(chosen)):
        raise ConfigError(f"{what}s {chosen}: expected at least one, ascending, without repeats.")
    return chosen


def format_indices(indices: Sequence[int]) -> str:
    """Ascending indices as `parse_indices` reads them.

    >>> format_indices([0, 1, 2, 5])
    '0-2,5'
    """
    runs = [[number for _, number in run] for _, run in groupby(enumerate(indices), lambda pair: pair[1] - pair[0])]
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _no_such_index(index: int, limit: int, what: str) -> ConfigError:
    return ConfigError(f"{what} {index} does not exist: the model has {limit}, numbered 0 to {limit - 1}.")
