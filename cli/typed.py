"""Refuses typed words from which click would drop a value, or whose mistake it would explain wrongly."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import cast

import click

_OTHER_NAMES = {"--teacher": "--model", "--model": "--teacher"}
"""Options that a user may expect of one command because another has them."""
_CAN_JOIN = re.compile(r"[\w./*?{}+-]+")


def refuse_misread(command: click.Command, ctx: click.Context, words: list[str]) -> None:
    """Refuse words that a shell or click would take otherwise than they were meant.

    Args:
        command: the command that gets the words.
        ctx: the command's context, for messages. Values from a file of defaults are not looked at.
        words: what was typed behind the command's name.

    Raises:
        click.UsageError: an option that takes one value is given several, a pattern of tars stands without quotes, or
            there is no such option.
    """
    try:
        values, extra, _ = _collecting(command).make_parser(ctx).parse_args(list(words))
    except click.NoSuchOption as error:
        other = _OTHER_NAMES.get(error.option_name)
        if other is None or all(other not in each.opts for each in command.params):
            raise
        message = f"No such option '{error.option_name}'. Did you mean '{other}'?"
        raise click.NoSuchOption(error.option_name, message, ctx=ctx) from error
    _refuse_unquoted(command, ctx, values, extra)
    for option in filter(_takes_one, command.params):
        typed = [str(value) for value in cast("Sequence[object]", values.get(str(option.name), ()))]
        if len(dict.fromkeys(typed)) > 1:
            ctx.fail(
                f"{option.opts[0]} takes one value, but is given {len(typed)}: {', '.join(typed)}. "
                f"{_joined(typed) if _names_tars(option) else 'Give it once.'}"
            )


def _takes_one(parameter: click.Parameter) -> bool:
    return isinstance(parameter, click.Option) and not (
        parameter.multiple or parameter.is_flag or parameter.count or parameter.nargs != 1
    )


def _collecting(command: click.Command) -> click.Command:
    """A command like this one, whose options keep all values that are typed instead of the last."""
    collecting = copy.copy(command)
    collecting.params = [copy.copy(parameter) for parameter in command.params]
    for parameter in filter(_takes_one, collecting.params):
        cast(click.Option, parameter).multiple = True
    return collecting


def _names_tars(option: click.Parameter) -> bool:
    return isinstance(option, click.Option) and (option.metavar or "").endswith("TARS")


def _joined(values: list[str]) -> str:
    """How to name several places of tars in one value."""
    if all(_CAN_JOIN.fullmatch(value) for value in values):
        return f"Write one pattern for all: '{{{','.join(dict.fromkeys(values))}}}'."
    return "Write one pattern for all, such as '{a,b}/*.tar'."


def _refuse_unquoted(
    command: click.Command, ctx: click.Context, values: Mapping[str, object], extra: Sequence[str]
) -> None:
    """Refuse tars that stand where no option takes them: a shell has made them of a pattern without quotes."""
    option = next((each for each in command.params if _names_tars(each) and values.get(str(each.name))), None)
    if option is None:
        return
    loose = list(extra)
    for argument in command.params:
        if isinstance(argument, click.Argument):
            value = values.get(str(argument.name))
            several = cast("tuple[object, ...]", value) if isinstance(value, tuple) else (value,)
            loose += [each for each in several if isinstance(each, str)]
    for word in loose:
        # A run's folder may have any name.
        if word.lower().endswith(".tar") and not Path(word).is_dir():
            ctx.fail(
                f"{word} stands alone, and {option.opts[0]} takes one pattern. Put the pattern in quotes: "
                f"{option.opts[0]} 'train-{{0000..0099}}.tar'."
            )
