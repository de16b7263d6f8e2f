"""A config as the command a person would type."""

from __future__ import annotations

import shlex
from typing import Any, cast

from ..options import options_of


def as_command(name: str, config: object) -> str:
    """The `atcache` command that runs `config`: an option for each field that is not at its default.

    Args:
        name: the sub-command.
        config: its config, made with `pipelines.options.config`.

    >>> from atcache.pipelines.pack.config import PackConfig
    >>> as_command("pack", PackConfig(data=Path("my images"), out=Path("tars"), name="pets"))
    "atcache pack --data 'my images' --out tars --name pets"
    """
    words = ["atcache", name]
    for field_name, (field, about, kind) in options_of(type(config)).items():
        value: Any = getattr(config, field_name)
        if value == field.default:
            continue
        values = cast("tuple[Any, ...]", value) if isinstance(value, tuple) else (value,)
        option = field_name.replace("_", "-")
        if about.is_argument:
            words += map(str, values)
        elif kind.base is bool:
            words.append(f"--{option}" if value else f"--no-{option}")
        else:
            words += [word for single in values for word in (f"--{option}", str(single))]
    return shlex.join(words)
