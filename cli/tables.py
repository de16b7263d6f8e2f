"""Tables of layers x heads on stderr, for `atcache stats` and `atcache compare`."""

from __future__ import annotations

import os
from collections.abc import Sequence

import click

from ..pipelines.stats.tables import NamedTable

_WIDTH = 8  # of a column


def print_tables(tables: Sequence[NamedTable], layers: Sequence[int], heads: Sequence[int]) -> None:
    """Print tables with a row a layer and a column a head."""
    for table in tables:
        for line in table_lines(table.title, layers, heads, table.mean):
            click.echo(line, err=True)
        if table.standard_error is not None:
            largest = max(number for row in table.standard_error for number in row)
            click.echo(f"standard errors are at most {largest:.2g}", err=True)


def table_lines(title: str, layers: Sequence[int], heads: Sequence[int], table: Sequence[Sequence[float]]) -> list[str]:
    """A table as text; on a terminal, in blocks of heads that fit its width."""
    form = _form(table)
    at_once = max(1, (_terminal_width() - 5) // _WIDTH)
    lines = ["", title]
    for start in range(0, len(heads), at_once):
        block = slice(start, start + at_once)
        lines.append("layer" + "".join(f"{f'head {head}':>{_WIDTH}}" for head in heads[block]))
        lines += [
            f"{layer:>5}" + "".join(f"{number:>{_WIDTH}{form}}" for number in numbers[block])
            for layer, numbers in zip(layers, table, strict=True)
        ]
    return lines


def _form(table: Sequence[Sequence[float]]) -> str:
    """The format of a table's numbers: the same for all of them, with digits enough for the largest."""
    numbers = [abs(number) for row in table for number in row]
    if all(isinstance(number, int) for number in numbers):
        return "d"
    for digits in (3, 4, 5):
        if max(numbers) >= 10.0 ** (2 - digits):
            return f".{digits}f"
    return ".1e" if any(numbers) else ".3f"


def _terminal_width() -> int:
    """Columns of the terminal that stderr is, or more than any table has: logs and files have no width."""
    try:
        return os.get_terminal_size(2).columns or 2**20
    except OSError:
        return 2**20
