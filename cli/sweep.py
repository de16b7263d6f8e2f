"""The file of a sweep: which students are trained from one stream of batches.

    [[student]]
    mode = "copy"

    [[student]]
    name = "copy-low"      # its folder under --out; if left out, made of the options that differ
    mode = "copy"
    base-lr = 3e-4

A key is a long option of `atcache train`, and wins over the command line.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, cast

import click

from atcache.errors import ConfigError

from .defaults import check_options, read_toml

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._,=+-]*")  # no parent folder, and nothing that a shell would split


def read_sweep(path: Path, command: click.Command) -> dict[str, dict[str, Any]]:
    """The students of a sweep: name -> values that differ from the common ones, by parameter name.

    Raises:
        ConfigError: the file is not a list of students, or a student has a key or a value that does not exist.
    """
    tables = read_toml(path)
    students: object = tables.pop("student", None)
    if tables or not isinstance(students, list) or not students:
        raise ConfigError(f"{path}: a sweep is a list of students, each a table of options that begins [[student]].")
    sweep: dict[str, dict[str, Any]] = {}
    for number, student in enumerate(cast("list[object]", students)):
        where = f"{path}: student {number}:"
        if not isinstance(student, dict):
            raise ConfigError(f"{where} {student!r} is not a table of options.")
        table = cast("dict[str, Any]", student)
        name = table.pop("name", None)
        values = check_options(table, "train", command, where=where)
        for option in ("sweep", "recipe", "out", "order_seed"):
            long = option.replace("_", "-")
            if option in values:
                raise ConfigError(f"{where} {long} is for all students; give it with --{long}.")
        name = _default_name(values, number) if name is None else name
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise ConfigError(
                f"{where} name = {name!r} cannot be a folder's name; use letters, digits, '-', '_' and '.'."
            )
        if name in sweep:
            raise ConfigError(f"{where} there is already a student {name!r}. Give this one another name.")
        sweep[name] = _as_options(values, command)
    return sweep


def _as_options(values: dict[str, Any], command: click.Command) -> dict[str, Any]:
    """The values as the command line would give them: paths and tuples, not text and lists."""
    options = {option.name: option for option in command.params}
    return {name: options[name].type_cast_value(click.Context(command), value) for name, value in values.items()}


def _default_name(values: dict[str, Any], number: int) -> str:
    """What differs, as a folder's name: "copy,seed=1"."""
    parts = [str(values["mode"])] if "mode" in values else []
    parts += [f"{key.replace('_', '-')}={value}" for key, value in values.items() if key != "mode"]
    return re.sub(r"[^A-Za-z0-9._,=+-]", "-", ",".join(parts)) or f"student-{number}"
