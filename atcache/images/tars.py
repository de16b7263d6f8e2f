"""Which tars a `--data` option names: brace patterns, folders and lists, with one clear sentence for what cannot be."""

from __future__ import annotations

import glob
import math
import re
from collections.abc import Sequence
from fnmatch import fnmatchcase
from itertools import islice
from pathlib import Path

from atcache.errors import ConfigError, SourceError
from atcache.files.location import Location, Url, looks_like_url, parse_location
from atcache.files.ranges import list_files
from atcache.images.decode import IMAGE_EXTENSIONS

PACK_RECORD = "moving.json"
"""In the folder of an unfinished pack: which files it is just putting in place."""
_MAX_TARS = 1_000_000
_RANGE = re.compile(r"\{(-?[0-9]{1,18})\.\.(-?[0-9]{1,18})")
_COMPRESSED = (".gz", ".tgz", ".bz2", ".tbz2", ".xz", ".txz", ".zst", ".lz4")


def pack_folder(out: Path, name: str) -> Path:
    """Where `atcache pack` makes `out`/NAME-000000.tar; there only while it runs, or after it was killed."""
    return out / f".{name}.atcache-pack"


def expand_tars(data: str | Path | Sequence[str | Path]) -> tuple[Location, ...]:
    """The tars that `data` names, with basenames of their own; local ones exist.

    Args:
        data: a brace pattern (`train-{000000..001281}.tar`) or shell pattern (`train-*.tar`), one tar, a folder of tars
            (taken in the order of their names), or a list of any of these. Braces are expanded first, so that
            `{train,extra}-*.tar` and `part-{0..3}/` work too. `~` is the home folder. Each may be a URL; shell patterns
            and folders only where the server can list.

    Raises:
        SourceError: nothing matches, a tar is missing, is no plain tar, is of an unfinished `atcache pack`, or shares
            its basename with another.
    """
    specs = [data] if isinstance(data, (str, Path)) else list(data)
    tars = tuple(path for spec in specs for path in _expand(str(spec)))
    if not tars:
        raise SourceError("no tars were given. Name at least one WebDataset tar, or a folder of tars.")
    seen: dict[str, Location] = {}
    for path in tars:
        if path.name in seen:
            raise SourceError(
                f"two tars are called {path.name} ({seen[path.name]} and {path}), but samples are known by their tar's "
                "name and key. Rename one."
            )
        seen[path.name] = path
    return tars


def _expand(spec: str) -> Sequence[Location]:
    if looks_like_url(spec):
        return _expand_url(spec)
    path = Path(spec).expanduser()
    names = [path] if path.exists() else [Path(name) for name in _expand_braces(str(path))]
    paths = [path for name in names for path in _find(name)]
    missing = [path for path in paths if not path.is_file()]
    if len(missing) == len(paths):
        raise SourceError(f"{spec!r} matches no file. Check the folder ({path.parent}) and the pattern.")
    if missing:
        raise SourceError(
            f"{len(missing)} of the {len(paths)} tars of {spec!r} are missing, the first is {missing[0]}. Copy them "
            "or narrow the pattern."
        )
    for path in paths:
        _check_suffix(path)
    for out, name in dict.fromkeys((path.parent, path.stem.rpartition("-")[0]) for path in paths):
        if (pack_folder(out, name) / PACK_RECORD).exists():
            raise SourceError(
                f"the tars {name}-*.tar in {out} are not complete: an `atcache pack` was stopped while it put them in "
                "place. Run the same command again."
            )
    return paths


def _find(path: Path) -> list[Path]:
    """The tars of a folder, or what a shell pattern matches; `path` itself where it is neither or matches nothing."""
    if path.is_dir():
        return _tars_in(path)
    if path.exists() or not glob.has_magic(str(path)):
        return [path]
    return [Path(name) for name in sorted(glob.glob(str(path)))] or [path]  # noqa: PTH207 - Path.glob takes no absolute pattern


def _expand_url(spec: str) -> list[Url]:
    """The tars a URL names. They are not looked for: whoever opens them will tell."""
    tars: list[Url] = []
    for name in _expand_braces(spec):
        try:
            url = parse_location(name)
        except ConfigError as error:
            raise SourceError(str(error)) from None
        assert isinstance(url, Url), "it looks like a URL"
        tars += _list_tars(url) if glob.has_magic(url.name) or not url.suffix else [url]
    for tar in tars:
        _check_suffix(tar)
    return tars


def _list_tars(url: Url) -> list[Url]:
    """The tars in a folder of a server, or those a shell pattern names, in the order of their names."""
    if not url.can_list:
        raise SourceError(
            f"{url} is no .tar, and a web server cannot list a folder. Name the tars, as URL/train-{{0000..0146}}.tar."
        )
    folder, pattern = (url.parent, url.name) if glob.has_magic(url.name) else (url, "*.tar")
    names = [name for name in list_files(folder) if "/" not in name and fnmatchcase(name, pattern)]
    if not names:
        raise SourceError(f"{str(url)!r} matches no file on the server. Check the folder and the pattern.")
    return [folder / name for name in names]


def _expand_braces(pattern: str) -> list[str]:
    from braceexpand import braceexpand

    if "{" not in pattern and "}" not in pattern:
        return [pattern]  # braceexpand would drop backslashes
    # Counted before it is expanded: braceexpand makes whole ranges at once.
    num_tars = math.prod(abs(int(last) - int(first)) + 1 for first, last in _RANGE.findall(pattern))
    if num_tars > _MAX_TARS:
        raise SourceError(f"{pattern!r} stands for {num_tars} tars, expected at most {_MAX_TARS}. Check its numbers.")
    try:
        names = list(islice(braceexpand(pattern), _MAX_TARS + 1))
    except ValueError:  # its UnbalancedBracesError
        raise SourceError(f"{pattern!r} has unbalanced braces; expected like train-{{000000..001281}}.tar.") from None
    if len(names) > _MAX_TARS:
        raise SourceError(f"{pattern!r} stands for over {_MAX_TARS} tars. Check its numbers.")
    return names


def _check_suffix(path: Location) -> None:
    if path.name.lower().endswith(_COMPRESSED):
        raise SourceError(f"{path} is compressed. Decompress it first: samples are read in place.")
    if path.suffix.lower() in IMAGE_EXTENSIONS:
        raise SourceError(f"{path} is an image. Run `atcache pack` on a folder with one folder a class to make tars.")
    if path.suffix.lower() != ".tar":
        raise SourceError(f"{path} is no .tar file. Name WebDataset tars, or a folder of tars.")


def _tars_in(folder: Path) -> list[Path]:
    entries = sorted(folder.iterdir())
    tars = [path for path in entries if path.suffix.lower() == ".tar" and path.is_file()]
    if tars:
        return tars
    for path in entries:
        if path.name.lower().endswith(_COMPRESSED):
            _check_suffix(path)
    if any(path.is_dir() or path.suffix.lower() in IMAGE_EXTENSIONS for path in entries):
        raise SourceError(
            f"{folder} holds no tars; it looks like an image folder. Run `atcache pack --data {folder} --out TARS` and "
            "give the folder it makes."
        )
    raise SourceError(f"{folder} holds no tars. Name WebDataset tars, or a folder of tars.")
