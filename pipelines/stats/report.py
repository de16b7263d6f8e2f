"""Tables of layers x heads as files, and a table with a row for each view, layer and head."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from atcache.files.durable import replaced_whole

from .outputs import PICTURES
from .picture import draw_tables
from .tables import Report


def write_report(path: Path, report: Report, record: Mapping[str, Any]) -> None:
    """Write the tables to a file, in the form that its ending names.

    Args:
        path: the file; it is replaced whole.
        report: the tables.
        record: what JSON holds.
    """
    with replaced_whole(path) as partial:
        if path.suffix.lower() in PICTURES:
            draw_tables(partial, report, path.suffix.lower().removeprefix("."))
        elif path.suffix.lower() == ".json":
            partial.write_text(json.dumps(record, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        else:
            _write_csv(partial, report)


def _write_csv(path: Path, report: Report) -> None:
    columns: dict[str, tuple[tuple[float, ...], ...]] = dict(report.places)
    for table in report.tables:
        columns[table.name] = table.mean
        if table.standard_error is not None:
            columns[f"{table.name}_standard_error"] = table.standard_error
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["layer", "head", *columns])
        for row, layer in enumerate(report.layers):
            for column, head in enumerate(report.heads):
                writer.writerow([layer, head, *(table[row][column] for table in columns.values())])


WriteView = Callable[[str, int, np.ndarray], None]
"""Writes the numbers of one view: its sample_key, its number, and values_KLH."""


@contextmanager
def view_table(
    path: Path | None, layers: Sequence[int], heads: Sequence[int], names: Sequence[str]
) -> Generator[WriteView]:
    """What writes the numbers of views to a CSV file as they come; at the end it replaces `path` whole.

    Args:
        path: the file; None writes nothing.
        layers: along L.
        heads: along H.
        names: of the columns, along K.
    """
    if path is None:
        yield lambda key, view, values_KLH: None
        return
    with replaced_whole(path) as partial, partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["sample_key", "view", "layer", "head", *names])

        def write(key: str, view: int, values_KLH: np.ndarray) -> None:
            for row, layer in enumerate(layers):
                for column, head in enumerate(heads):
                    # Seven digits are all that float32 has.
                    numbers = (f"{number:.7g}" for number in values_KLH[:, row, column])
                    writer.writerow([key, view, layer, head, *numbers])

        yield write
