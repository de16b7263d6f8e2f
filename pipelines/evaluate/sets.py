"""The sets of images that runs are scored on, from the options that name them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from atcache.errors import ConfigError
from atcache.files.location import Location, listed, parse_location

MAIN_SET = "val"
"""The name of the set that --cache and --data make."""
_NAMED = re.compile(r"([A-Za-z0-9][A-Za-z0-9_.-]*)=(.+)", re.DOTALL)


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalSet:
    """One set of images."""

    name: str
    caches: tuple[Location, ...] = ()
    """Validation caches, used as one."""
    data: tuple[str, ...] = ()
    """Tars of the images, or where the caches' tars are now."""
    classes: Path | None = None
    """A file of the classes that predictions are restricted to; None for all."""
    corrupt: str | None = None
    """The corruption that is made of the main set, such as "fog:3"; None for the images as they are."""


def eval_sets(
    cache: Location | tuple[Location, ...] | None,
    data: str | tuple[str, ...] | None,
    val_cache: tuple[str, ...],
    val_data: tuple[str, ...],
    classes_of: tuple[str, ...],
) -> tuple[EvalSet, ...]:
    """The sets in the order in which they were named, that of `cache` and `data` first.

    Args:
        cache: caches of the main set.
        data: tars of the main set.
        val_cache: NAME=CACHE of further sets; a name may come more than once.
        val_data: NAME=TARS of further sets, or of where the tars of their caches are now.
        classes_of: FILE for all sets, NAME=FILE for one.

    Raises:
        ConfigError: there is no set, a text has no name, or a name is not that of a set.
    """
    caches: dict[str, list[Location]] = {}
    tars: dict[str, list[str]] = {}
    for place in listed(cache):
        caches.setdefault(MAIN_SET, []).append(place)
    for place in (data,) if isinstance(data, str) else data or ():
        tars.setdefault(MAIN_SET, []).append(place)
    # A name stands where it came first, whether for a cache or for tars: caches first, as they are the usual way.
    for name, place in _named("val_cache", "CACHE", val_cache):
        caches.setdefault(name, []).append(parse_location(place))
    for name, place in _named("val_data", "TARS", val_data):
        tars.setdefault(name, []).append(place)
    names = list(dict.fromkeys([*caches, *tars]))
    if MAIN_SET in names:
        names.sort(key=lambda name: name != MAIN_SET)
    if not names:
        raise ConfigError("nothing to evaluate on: give --cache or --data.")
    classes = _classes_of(classes_of, names)
    return tuple(
        EvalSet(
            name=name,
            caches=tuple(caches.get(name, ())),
            data=tuple(tars.get(name, ())),
            classes=classes.get(name, classes.get("")),
        )
        for name in names
    )


def with_corrupted(sets: tuple[EvalSet, ...], texts: Sequence[str]) -> tuple[EvalSet, ...]:
    """The sets, and behind them the main one under each corruption that the texts name.

    Raises:
        ConfigError: there is no such corruption, or no main set.
    """
    if not texts:
        return sets
    from atcache.views.corrupt import parse_corruptions  # imported here, because help should not wait for numpy

    wanted = dict.fromkeys(each for text in texts for each in parse_corruptions(text))
    main = sets[0]
    if main.name != MAIN_SET:
        raise ConfigError(
            f"corrupt={texts[0]}: the images of --data or --cache are corrupted. Give one of them; {main.name} is a "
            "further set."
        )
    return (*sets, *(replace(main, name=str(each), corrupt=str(each)) for each in wanted))


def _named(option: str, kind: str, texts: Iterable[str]) -> Iterable[tuple[str, str]]:
    for text in texts:
        match = _NAMED.fullmatch(text)
        if match is None:
            example = "sketch.zarr" if kind == "CACHE" else "'sketch-{00..09}.tar'"
            main = f"--{option.removeprefix('val_')}"
            raise ConfigError(
                f"{option}={text!r}: expected NAME={kind}, such as sketch={example}. A name has letters, digits, "
                f"dots, - and _ only. For the main set, give {main} {text}."
            )
        yield match[1], match[2]


def _classes_of(texts: Iterable[str], names: list[str]) -> dict[str, Path]:
    """The file of each set that is named with one; under an empty name the file of all others."""
    found: dict[str, Path] = {}
    for text in texts:
        match = _NAMED.fullmatch(text)
        name, file = (match[1], match[2]) if match is not None else ("", text)
        if name and name not in names:
            raise ConfigError(
                f"classes_of={text!r}: no set is named {name!r}. The sets are {', '.join(names)}. If this is a "
                f"file, write ./{text}."
            )
        if name in found:
            raise ConfigError(
                f"classes_of={text!r}: a file is given {'for all sets' if not name else 'for ' + name} already."
            )
        path = parse_location(file)
        if not isinstance(path, Path):
            raise ConfigError(f"classes_of={text!r}: expected a file on this machine.")
        found[name] = path
    return found
