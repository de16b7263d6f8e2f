"""A pipeline's config as the command a person would type."""

from __future__ import annotations

import dataclasses
import shlex
from typing import Any, cast


def as_command(name: str, config: Any, arguments: tuple[str, ...] = ()) -> str:  # noqa: ANN401 - any config dataclass
    """The `atcache` command that runs `config`: every field that is not at its default, as the option of its name.

    Args:
        name: the sub-command.
        config: its config; fields and options have the same names.
        arguments: fields that are given without an option's name.

    >>> from atcache.pipelines.pack import PackConfig
    >>> as_command("pack", PackConfig(data=Path("my images"), out=Path("tars")))
    "atcache pack --data 'my images' --out tars"
    """
    words = ["atcache", name]
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if value == field.default:
            continue
        values = cast("tuple[Any, ...]", value if isinstance(value, tuple) else (value,))
        for single in values:
            if field.name in arguments:
                words.append(str(single))
            elif isinstance(single, bool):
                words.append(_option(field.name if single else f"no_{field.name}"))
            else:
                words += [_option(field.name), str(single)]
    return shlex.join(words)


def _option(field_name: str) -> str:
    return "--" + field_name.replace("_", "-")
