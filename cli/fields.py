"""Click options made from the fields of a command's config."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, TypeVar

import click

from ..pipelines.options import Option, OptionType, options_of
from .paths import LOCATION, OUT, PATH

_Command = TypeVar("_Command", bound=Callable[..., Any] | click.Command)


def options_from(
    config_class: type[Any], *, without: Collection[str] = (), optional: Collection[str] = ()
) -> Callable[[_Command], _Command]:
    """A decorator that gives a command one option for each field of its config, required ones first.

    Args:
        config_class: made with `pipelines.options.config`.
        without: fields without an option, as the command fills them in another way.
        optional: required fields that may also come from elsewhere than the command line.
    """
    fields = {name: field for name, field in options_of(config_class).items() if name not in without}
    settings = [
        _parameter(name, field, about, kind, required=_is_required(field) and name not in optional)
        for name, (field, about, kind) in sorted(fields.items(), key=lambda item: not _is_required(item[1][0]))
    ]

    def decorate(command: _Command) -> _Command:
        for parameter in reversed(settings):
            command = parameter(command)
        return command

    return decorate


def _is_required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING


def _parameter(
    name: str, field: dataclasses.Field[Any], about: Option, kind: OptionType, *, required: bool
) -> Callable[[Any], Any]:
    default: Any = None if _is_required(field) else field.default
    if about.is_argument:
        nargs = -1 if kind.takes_several else 1
        return click.argument(name, type=_click_type(about, kind), metavar=about.metavar, nargs=nargs)
    long = "--" + name.replace("_", "-")
    if kind.base is bool:
        can_be_off = default or kind.takes_none
        names = (f"{long}/--no-{long.removeprefix('--')}",) if can_be_off else (long,)
        return click.option(*names, name, is_flag=True, default=default, show_default=bool(default), help=about.help)
    settings: dict[str, Any] = {"type": _click_type(about, kind), "help": about.help, "required": required}
    if about.metavar is not None:
        settings["metavar"] = about.metavar
    if kind.takes_several:
        return click.option(long, name, multiple=True, callback=_one_or_several if kind.takes_one else None, **settings)
    return click.option(long, name, default=default, show_default=default is not None, **settings)


def _one_or_several(_ctx: click.Context, _param: click.Parameter, values: tuple[Any, ...]) -> Any:  # noqa: ANN401 - any type
    """What a config holds for an option that may come more than once: None, the one value, or a tuple."""
    return values if len(values) > 1 else next(iter(values), None)


def _click_type(about: Option, kind: OptionType) -> click.ParamType[Any]:
    """The type that converts an option's text, and whose choices and range the help shows."""
    if kind.choices:
        return click.Choice(kind.choices)
    if kind.base is Path:
        return LOCATION if kind.takes_urls else OUT if about.is_written else PATH
    if kind.base in (int, float) and about.limits:
        low = about.at_least if about.above is None else about.above
        high = about.at_most if about.below is None else about.below
        opens = {"min_open": about.above is not None, "max_open": about.below is not None}
        if kind.base is float:
            return click.FloatRange(low, high, **opens)
        # No user meets a limit as large as this, so the help does not show it; the config checks it all the same.
        return click.IntRange(
            None if low is None else int(low), None if high is None or high >= 2**53 else int(high), **opens
        )
    return {int: click.INT, float: click.FLOAT, str: click.STRING}[kind.base]
