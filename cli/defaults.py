"""Defaults for the commands' options, from a TOML file: one table for each command, one key for each long option.

    [build]
    teacher = "mae-vit-l"
    views = 2

The command line wins over the file. Relative paths start in the working folder, as they do on the command line.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path
from typing import Any, cast

import click

from atcache.errors import ConfigError

DEFAULT_FILE = "atcache.toml"


def read_defaults(
    path: Path, command_name: str, command: click.Command, *, all_commands: tuple[str, ...]
) -> dict[str, Any]:
    """The file's values for one command, by parameter name, as click's `default_map` wants them.

    The names of all tables are checked, but only the keys of this command's: importing the other commands, to know
    their options, would take time.

    Raises:
        ConfigError: the file is not TOML, or names a table, an option or a value that does not exist. The message names
            the file, the key and what was expected.
    """
    tables = read_toml(path)
    for name, table in tables.items():
        if name not in all_commands:
            raise ConfigError(f"{path}: '{name}' is not a command of atcache; {_nearest(name, all_commands)}")
        if not isinstance(table, dict):
            raise ConfigError(f"{path}: '{name}' must be a table of options, written [{name}].")
    return check_options(tables.get(command_name, {}), command_name, command, where=f"{path}: [{command_name}]")


def check_options(table: dict[str, Any], command_name: str, command: click.Command, *, where: str) -> dict[str, Any]:
    """The values of a table of options, by parameter name.

    Args:
        table: TOML's values by the options' long names.
        command_name: the command's name.
        command: the command that has these options.
        where: which table of which file, for messages.

    Raises:
        ConfigError: an option or a value does not exist.
    """
    options = _file_options(command)
    values: dict[str, Any] = {}
    for key, value in table.items():
        option = options.get(key.replace("_", "-"))
        if option is None:
            raise ConfigError(f"{where} {key} is not an option of 'atcache {command_name}'; {_nearest(key, options)}")
        if option.name in values:
            raise ConfigError(f"{where} {key} is given twice, once spelled with '-' and once with '_'.")
        values[option.name] = _checked(value, option, command, f"{where} {key}")
    return values


def read_toml(path: Path) -> dict[str, Any]:
    """What a TOML file holds.

    Raises:
        ConfigError: it cannot be read, or is not TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}.") from error


def _file_options(command: click.Command) -> dict[str, click.Option]:
    """The command's options that a file may set, by long name without the dashes."""
    return {
        spelling.removeprefix("--").replace("_", "-"): parameter
        for parameter in command.params
        if isinstance(parameter, click.Option) and parameter.expose_value
        for spelling in parameter.opts
        if spelling.startswith("--")
    }


def _nearest(name: str, valid: Iterable[str]) -> str:
    valid = sorted(valid)
    close = get_close_matches(name.replace("_", "-"), valid, n=3)
    return f"did you mean {' or '.join(close)}?" if close else f"expected one of {', '.join(valid)}."


def _checked(value: object, option: click.Option, command: click.Command, where: str) -> object:
    """`value`, if the option takes it; else an error that says what it takes."""
    wanted, accepted = _toml_type(option)
    # As on the command line, an option that may come more than once also takes a single value.
    values: list[object] = cast("list[object]", value) if option.multiple and isinstance(value, list) else [value]
    for single in values:
        # To Python, True is also the number 1.
        if not isinstance(single, accepted) or (isinstance(single, bool) and accepted is not bool):
            raise ConfigError(f"{where} = {single!r}, but --{_long(option)} takes {wanted}.")
        if not isinstance(option.type, (click.Path, click.File)):  # a path must exist only when it is used
            try:
                option.type.convert(single, option, click.Context(command))
            except click.BadParameter as error:
                raise ConfigError(f"{where} = {single!r} cannot be used: {error.message.rstrip('.')}.") from error
    return values if option.multiple else values[0]


def _toml_type(option: click.Option) -> tuple[str, type | tuple[type, ...]]:
    """What TOML must hold for the option, in words and as Python types. Our own types read text, as from a shell."""
    if isinstance(option.type, click.types.BoolParamType):
        return "true or false", bool
    if isinstance(option.type, click.types.IntParamType):
        return "a whole number", int
    if isinstance(option.type, click.types.FloatParamType):
        return "a number", (int, float)
    return "text in quotes", str


def _long(option: click.Option) -> str:
    return next(spelling.removeprefix("--") for spelling in option.opts if spelling.startswith("--"))
