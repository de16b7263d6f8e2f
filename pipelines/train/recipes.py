"""Recipes: settings of `train` and `build` in a TOML file that users can read, copy and change.

The papers' recipes come with the package. A file has the form of atcache.toml: one table per command, one key per
option.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import atcache
from atcache.errors import ConfigError
from atcache.files.location import expand_home

FOLDER = Path(atcache.__file__).parent / "data" / "recipes"
TABLES = ("train", "build")
VIEW_FIELDS = ("policy", "mixup", "cutmix", "mix_prob")
"""Settings of [build] that also apply to a run without a cache, because it draws its own views."""


def recipe_names() -> tuple[str, ...]:
    """The recipes that come with the package."""
    return tuple(sorted(path.stem for path in FOLDER.glob("*.toml")))


def recipe_path(name: str) -> Path:
    """The file of a recipe: one of the package's by name, or the user's own by path.

    Raises:
        ConfigError: there is no such recipe or file.
    """
    if name in recipe_names():
        return FOLDER / f"{name}.toml"
    path = expand_home(Path(name))
    if path.is_file():
        return path
    raise ConfigError(
        f"recipe {name!r}: there is no such file, and no recipe of that name. The recipes are "
        f"{', '.join(recipe_names())}, in {FOLDER}."
    )


def read_recipe(name: str) -> dict[str, dict[str, Any]]:
    """The settings of a recipe by command: "train" holds fields of `TrainConfig`, "build" fields of `BuildConfig`.

    Raises:
        ConfigError: there is no such recipe, it is not TOML, or it holds other tables.
    """
    path = recipe_path(name)
    try:
        tables: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}.") from error
    for table, settings in tables.items():
        if table not in TABLES or not isinstance(settings, dict):
            raise ConfigError(f"{path}: {table!r} is not a table of a recipe. Expected only [train] and [build].")
    return {table: {key.replace("-", "_"): value for key, value in tables.get(table, {}).items()} for table in TABLES}


def views_to_draw(name: str) -> dict[str, Any]:
    """How a recipe's run without a cache draws its views: as [build] says, unless [train] says otherwise.

    Raises:
        ConfigError: as `read_recipe`.
    """
    recipe = read_recipe(name)
    wanted = {**recipe["build"], **recipe["train"]}
    return {field: wanted[field] for field in VIEW_FIELDS if field in wanted}


def view_differences(wanted: Mapping[str, Any], policy: Mapping[str, Any]) -> list[str]:
    """How stored views differ from those that a recipe asks for: one text per setting.

    Args:
        wanted: a recipe's "build" settings.
        policy: the view policy that a cache records.

    >>> view_differences({"policy": "randaug", "mixup": 0.8}, {"name": "crop-flip"})
    ["policy is 'crop-flip', not 'randaug'", 'mixup is 0.0, not 0.8']
    """
    mixing: Mapping[str, Any] = policy.get("mixing") or {}
    stored: dict[str, Any] = {
        "policy": policy["name"],
        "mixup": mixing.get("mixup_alpha", 0.0),
        "cutmix": mixing.get("cutmix_alpha", 0.0),
        "mix_prob": mixing.get("prob", 1.0),
    }
    return [
        f"{name} is {stored[name]!r}, not {wanted[name]!r}"
        for name in VIEW_FIELDS
        if name in wanted and wanted[name] != stored[name]
    ]
