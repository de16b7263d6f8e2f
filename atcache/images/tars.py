"""The tars that a `--data` option names by brace patterns, folders and lists. Each mistake gets a clear error."""

from __future__ import annotations

import glob
import math
import re
from collections.abc import Sequence
from fnmatch import fnmatchcase
from itertools import islice
from pathlib import Path

from atcache.errors import ConfigError, SourceError
from atcache.files.location import Location, Url, expand_home, looks_like_url, parse_location
from atcache.files.ranges import list_files
from atcache.images.decode import IMAGE_EXTENSIONS

PACK_RECORD = "moving.json"
"""A file in the folder of an unfinished pack. It names the files that are being moved to their place."""
_MAX_TARS = 1_000_000
_MAX_FOLDERS = 32
_FEW = 3  # names in a message
_RANGE = re.compile(r"\{(-?[0-9]{1,18})\.\.(-?[0-9]{1,18})")
_TABLES = (".parquet", ".arrow")
_COMPRESSED = (".gz", ".tgz", ".bz2", ".tbz2", ".xz", ".txz", ".zst", ".lz4")


def pack_folder(out: Path, name: str) -> Path:
    """The folder in which `atcache pack` makes `out`/NAME-000000.tar. It exists during a run, or after a killed one."""
    return out / f".{name}.atcache-pack"


def expand_tars(data: str | Path | Sequence[str | Path]) -> tuple[Location, ...]:
    """The tars that `data` names. No two have the same basename. Local tars exist; remote ones are not checked.

    Args:
        data: a brace pattern (`train-{000000..001281}.tar`) or shell pattern (`train-*.tar`), one tar, a folder of tars
            (taken in the order of their names), or a list of any of these. Braces are expanded first, so that
            `{train,extra}-*.tar` and `part-{0..3}/` work too. `~` is the home folder. Each may be a URL. A URL may be a
            shell pattern or a folder only if the server can list folders.

    Raises:
        SourceError: nothing matches; a tar is missing, compressed or not a tar; it belongs to an unfinished
            `atcache pack`; or two tars have the same basename.
    """
    specs = [data] if isinstance(data, (str, Path)) else list(data)
    tars = tuple(path for spec in specs for path in _expand(str(spec)))
    if not tars:
        raise SourceError("no tars were given. Name at least one WebDataset tar, or a folder of tars.")
    seen: dict[str, Location] = {}
    for path in tars:
        if path.name in seen:
            raise SourceError(
                f"two tars are called {path.name} ({seen[path.name]} and {path}), but a sample is identified by its "
                "tar's name and its key. Rename one."
            )
        seen[path.name] = path
    return tars


def _expand(spec: str) -> Sequence[Location]:
    if spec.startswith("hf:") and not spec.startswith("hf://"):
        raise SourceError(
            f"{spec} names a dataset on the hub. Run `atcache pack --data {spec} --out TARS` and give the folder it "
            "makes."
        )
    if looks_like_url(spec):
        return _expand_url(spec)
    path = expand_home(Path(spec))
    names = [path] if path.exists() else [Path(name) for name in expand_braces(str(path))]
    paths = [path for name in names for path in _find(name)]
    missing = [path for path in paths if not path.is_file()]
    if len(missing) == len(paths):
        raise SourceError(
            f"{spec!r} matches no file (looked in {path.parent.absolute()}). Give a folder of tars, one tar, or a "
            "pattern such as 'train-{0000..0099}.tar'."
        )
    if missing:
        raise SourceError(
            f"{len(missing)} of the {len(paths)} tars of {spec!r} are missing, the first is {missing[0]}. Copy them "
            "or narrow the pattern."
        )
    for path in paths:
        _check_suffix(path)
        _check_can_be_recorded(path)
    for out, name in dict.fromkeys((path.parent, path.stem.rpartition("-")[0]) for path in paths):
        if (pack_folder(out, name) / PACK_RECORD).exists():
            raise SourceError(
                f"the tars {name}-*.tar in {out} are not complete: `atcache pack` was stopped while it moved them to "
                "this folder. Run the same `atcache pack` command again."
            )
    return paths


def as_typed_in(folder: Path, spec: str) -> str:
    """Tars that were named in a working folder, in a form that means the same in every one.

    >>> as_typed_in(Path("/work"), "tars/{0..3}.tar"), as_typed_in(Path("/work"), "{/a,/b}/0.tar")
    ('/work/tars/{0..3}.tar', '{/a,/b}/0.tar')
    """
    if looks_like_url(spec):
        return spec
    names = expand_braces(spec) if spec.startswith("{") else [spec]
    full = [str(folder / expand_home(Path(name))) for name in names]
    if full == names:
        return spec
    if any(Path(name).is_absolute() for name in names):
        return f"{{{','.join(full)}}}"
    return str(folder / expand_home(Path(spec)))


def _check_can_be_recorded(path: Path) -> None:
    """Refuse a path that no JSON file can hold, before anything long is done with it."""
    try:
        str(path.absolute()).encode()
    except UnicodeEncodeError as error:
        raise SourceError(
            f"{str(path)!r}: the name is no UTF-8 text, so a cache cannot record it. Rename it, or give a link to it."
        ) from error


def _find(path: Path) -> list[Path]:
    """The tars of a folder, or what a shell pattern matches; `path` itself if it is neither or matches nothing."""
    if path.is_dir():
        return _tars_in(path)
    if path.exists() or not glob.has_magic(str(path)):
        return [path]
    return [Path(name) for name in sorted(glob.glob(str(path)))] or [path]  # noqa: PTH207 - Path.glob takes no absolute pattern


def _expand_url(spec: str) -> list[Url]:
    """The tars that a URL names. Whether they exist is not checked here; opening a missing one fails."""
    tars: list[Url] = []
    for name in expand_braces(spec):
        try:
            url = parse_location(name)
        except ConfigError as error:
            raise SourceError(str(error)) from None
        assert isinstance(url, Url), "it looks like a URL"
        tars += _list_tars(url) if glob.has_magic(url.name) or _is_folder(url) else [url]
    for tar in tars:
        _check_suffix(tar)
    return tars


def _is_folder(url: Url) -> bool:
    """Whether a URL names a folder: on a server that lists, all that is not called as a file, as imagenet-1.0."""
    if not url.can_list:
        return not url.suffix
    return not url.name.lower().endswith((".tar", *_COMPRESSED, *IMAGE_EXTENSIONS, *_TABLES))


def _list_tars(url: Url) -> list[Url]:
    """The tars in a folder on a server, or those that match a shell pattern, in the order of their names."""
    if not url.can_list:
        raise SourceError(
            f"{url} is not a .tar, and a web server cannot list a folder. Name the tars, such as "
            "URL/train-{0000..0146}.tar."
        )
    folder, pattern = (url.parent, url.name) if glob.has_magic(url.name) else (url, "*.tar")
    names = [name for name in list_files(folder) if "/" not in name and fnmatchcase(name, pattern)]
    if not pattern.startswith("."):  # `*` matches no hidden file, as in a shell: macOS makes ._train-000000.tar
        names = [name for name in names if not name.startswith(".")]
    if not names:
        raise SourceError(f"{str(url)!r} matches no file on the server. Check the folder and the pattern.")
    return [folder / name for name in names]


def expand_braces(pattern: str) -> list[str]:
    """The names that a brace pattern stands for, in order.

    Raises:
        SourceError: its braces do not match, or it stands for too many names.
    """
    from braceexpand import braceexpand

    if "{" not in pattern and "}" not in pattern:
        return [pattern]  # braceexpand would drop backslashes
    # Count the names before expanding them: braceexpand makes whole ranges at once, which could fill the memory.
    num_tars = math.prod(abs(int(last) - int(first)) + 1 for first, last in _RANGE.findall(pattern))
    if num_tars > _MAX_TARS:
        raise SourceError(f"{pattern!r} stands for {num_tars} tars, expected at most {_MAX_TARS}. Check its numbers.")
    try:
        names = list(islice(braceexpand(pattern), _MAX_TARS + 1))
    except ValueError:  # its UnbalancedBracesError
        raise SourceError(
            f"{pattern!r} has unbalanced braces; expected a pattern such as train-{{000000..001281}}.tar."
        ) from None
    if len(names) > _MAX_TARS:
        raise SourceError(f"{pattern!r} stands for more than {_MAX_TARS} tars, the most allowed. Check its numbers.")
    return names


def _check_suffix(path: Location) -> None:
    if path.name.lower().endswith(_COMPRESSED):
        raise SourceError(f"{path} is compressed. Decompress it first: samples are read in place.")
    if path.suffix.lower() in IMAGE_EXTENSIONS:
        raise SourceError(
            f"{path} is an image. To make tars, run `atcache pack` on a folder that has one folder for each class."
        )
    if path.suffix.lower() != ".tar":
        raise SourceError(f"{path} is not a .tar file. Name WebDataset tars, or a folder of tars.")


def _folders_of_tars(entries: Sequence[Path]) -> list[Path]:
    """The folders among `entries` that hold tars."""
    folders = [path for path in entries if path.is_dir()]
    # More are the classes of an image folder, whose million files would take long to list.
    if len(folders) > _MAX_FOLDERS:
        return []
    return [path for path in folders if next((tar for tar in path.glob("*.tar") if tar.is_file()), None) is not None]


def _tars_in(folder: Path) -> list[Path]:
    entries = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    tars = [path for path in entries if path.suffix.lower() == ".tar" and path.is_file()]
    if tars:
        return tars
    for path in entries:
        if path.name.lower().endswith(_COMPRESSED):
            _check_suffix(path)
    if (folder / "zarr.json").exists():
        raise SourceError(
            f"{folder} is a cache, and tars are expected here. Name the tars that it was made from; commands that read "
            "a cache take it with --cache, and build with --views-from."
        )
    if below := _folders_of_tars(entries):
        few = " or ".join(map(str, below[:_FEW])) + (" or another one" if len(below) > _FEW else "")
        raise SourceError(f"{folder} holds no tars itself, but folders in it do. Give {few}.")
    if any(path.is_dir() or path.suffix.lower() in (*IMAGE_EXTENSIONS, *_TABLES) for path in entries):
        kind = (
            "a Hugging Face dataset" if any(path.suffix.lower() in _TABLES for path in entries) else "an image folder"
        )
        raise SourceError(
            f"{folder} holds no tars; it looks like {kind}. Run `atcache pack --data {folder} --out TARS` and "
            "give the folder it makes."
        )
    raise SourceError(f"{folder} holds no tars. Name WebDataset tars, or a folder of tars.")
