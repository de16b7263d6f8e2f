"""Files of weights: read without running what is in them, whole or in shards, and named if they are something else."""

from __future__ import annotations

import argparse
import json
import pathlib
import pickle
import types
import zipfile
from collections import OrderedDict, defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn, cast

import numpy as np
import torch
from torch import Tensor
from torch.torch_version import TorchVersion

from atcache.errors import TeacherError
from atcache.files.location import expand_home
from atcache.store.metadata import RUN_FILE

GRID_KEY = "patch_grid"
"""Key of a safetensors file's metadata under which atcache writes the grid of patches, such as "14x14"."""
_WHOLE = ("model.safetensors", "pytorch_model.safetensors", "pytorch_model.bin", "model.pth", "model.pt")
_INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt")
# Their tensors are as large as the weights and are never weights.
_NOT_WEIGHTS = {"optimizer", "optimizers", "optimizer_states", "optim", "scaler", "lr_scheduler", "lr_schedulers"}
_DEEPEST = 16  # dicts within dicts
# What torch and pickle raise for files that are cut short or made to harm.
_DAMAGE = (RuntimeError, EOFError, zipfile.BadZipFile, ValueError, LookupError, TypeError, AttributeError, MemoryError)
_INDEX_NBYTES_LIMIT = 64 * 2**20


def _plain_dict(*_default: object) -> dict[object, object]:
    """Stands for `collections.defaultdict`, which torch's reader does not fill."""
    return {}


# What training scripts keep beside weights. Making or filling one of these runs no code that the file chooses. A pair
# says what stands for a name.
_HARMLESS: list[Any] = [
    argparse.Namespace,  # arguments of the script
    types.SimpleNamespace,
    # Paths in them, which as pure paths only name files. Python 3.13 has them in another module.
    *((pathlib.PurePosixPath, f"pathlib{inner}.{kind}PosixPath") for inner in ("", "._local") for kind in ("", "Pure")),
    *(
        (pathlib.PureWindowsPath, f"pathlib{inner}.{kind}WindowsPath")
        for inner in ("", "._local")
        for kind in ("", "Pure")
    ),
    # Plain containers; torch knows dict, list and tuple by themselves, and these for a default or a cast.
    (_plain_dict, "collections.defaultdict"),
    *((kind, f"builtins.{kind.__name__}") for kind in (int, float, str, bool, list, dict, tuple, frozenset, slice)),
    TorchVersion,  # a string
    # Scores, losses and states of random generators: numbers in numpy's types. Both names of numpy's core module.
    np.ndarray,
    np.dtype,
    *((np.float64(0).__reduce__()[0], f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
    *((np.zeros(0).__reduce__()[0], f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")),
    *(type(np.dtype(code)) for code in "?bBhHiIlLqQefdgFDU"),
    # hyper_parameters of Lightning: a dict, in its packages of several years.
    *(
        (OrderedDict, f"{module}.AttributeDict")
        for module in (
            "lightning.fabric.utilities.data",
            "lightning_fabric.utilities.data",
            "pytorch_lightning.utilities.parsing",
            "lightning.pytorch.utilities.parsing",
        )
    ),
]


class Weights(dict[str, Tensor]):
    """Tensors by name, and the grid of patches of the model they are of, if that is known."""

    def __init__(self, tensors: Mapping[str, Tensor], *, grid: tuple[int, int] | None = None) -> None:
        super().__init__(tensors)
        self.grid = grid
        """Patches down and across."""


def read_weights(path: str | Path) -> Weights:
    """The tensors of a safetensors or torch file by name, on the CPU. Tensors of dicts within dicts have dotted names.

    Torch files are read with `weights_only=True`, so nothing in them can run. Which of a file's tensors are the
    weights of a model, and under which prefix, `load_weights` finds out.

    Args:
        path: a file; an index of shards (`model.safetensors.index.json`); or a folder that holds one of these.

    Raises:
        TeacherError: the file is missing, is something else than weights, holds pickled objects, or no tensors.
        ConfigError: the path begins with the home folder of nobody.
    """
    path = expand_home(Path(path))
    if path.is_dir():
        path = _file_in(path)
    if not path.is_file():
        raise TeacherError(f"weights {path}: no such file.")
    if path.name.endswith(".index.json"):
        return Weights(_read_shards(path))
    checkpoint, grid = _read_file(path)
    tensors: dict[str, Tensor] = {}
    for name, tensor in _tensors_within(checkpoint):
        if name in tensors:
            raise TeacherError(f"weights {path}: two tensors are called {name}. Save the state dict alone.")
        tensors[name] = tensor
    if not tensors:
        raise TeacherError(f"weights {path}: no tensors found. The file holds {_outline(checkpoint)}.")
    return Weights(tensors, grid=grid)


def _file_in(folder: Path) -> Path:
    """The file of weights in a folder: one of the usual names, or the only file that can be one."""
    for name in (_WHOLE[0], _INDEXES[0], *_WHOLE[1:], _INDEXES[1]):
        if (folder / name).is_file():
            return folder / name
    if (folder / RUN_FILE).is_file():  # its checkpoint would do, but is of weights that change with every step
        raise TeacherError(
            f"weights {folder}: this run is not finished: {_WHOLE[0]} is missing. Run its `atcache train` command "
            "again."
        )
    for suffix in _SUFFIXES:
        files = sorted(file.name for file in folder.glob(f"*{suffix}"))
        if len(files) == 1:
            return folder / files[0]
        if files:
            raise TeacherError(f"weights {folder}: a folder of several files ({', '.join(files[:5])}). Name one.")
    raise TeacherError(f"weights {folder}: a folder without a file of weights ({', '.join(_SUFFIXES)}).")


def check_weights(folder: Path) -> None:
    """Refuse files of weights that are missing, cut short or something else, for another library that will read them.

    Only the beginnings of files are read. A folder without a file of a usual name is left to that library.

    Raises:
        TeacherError: names the file, and what it is instead.
    """
    path = next(
        (folder / name for name in (_WHOLE[0], _INDEXES[0], *_WHOLE[1:], _INDEXES[1]) if (folder / name).is_file()),
        None,
    )
    if path is None:
        return
    files = [path] if path not in [folder / name for name in _INDEXES] else [folder / name for name in _shards(path)]
    for file in files:
        if _begins_as_safetensors(file):
            _safetensors_metadata(file)


def _read_shards(index: Path) -> dict[str, Tensor]:
    """The tensors of all files that an index names; all must lie beside it."""
    tensors: dict[str, Tensor] = {}
    for file, names in sorted(_shards(index).items()):
        held = dict(_tensors_within(_read_file(index.parent / file)[0]))
        if lacking := [name for name in names if name not in held]:
            raise TeacherError(f"weights {index.parent / file}: lacks {lacking[0]}, which {index.name} says it holds.")
        tensors |= {name: held[name] for name in names}
    if not tensors:
        raise TeacherError(f"weights {index}: the index names no tensors.")
    return tensors


def _shards(index: Path) -> dict[str, list[str]]:
    """The files that an index names, which are there, and the names of their tensors."""
    if index.stat().st_size > _INDEX_NBYTES_LIMIT:
        raise TeacherError(f"weights {index}: an index of {index.stat().st_size} bytes, expected a few thousand.")
    try:
        weight_map: Any = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names_of_file: dict[str, list[str]] = defaultdict(list)
        for name, file in cast("dict[str, str]", dict(weight_map)).items():
            names_of_file[str(file)].append(name)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        _refuse_if_no_weights(index, index.read_bytes()[:512])
        raise TeacherError(
            f'weights {index}: not an index of shards. Expected JSON with a "weight_map" from names to files.'
        ) from error
    if outside := [file for file in names_of_file if Path(file).name != file or "\\" in file or file in ("", "..")]:
        raise TeacherError(
            f"weights {index}: names a file outside its folder, {outside[0]!r}. Expected names of files beside it."
        )
    if missing := [file for file in names_of_file if not (index.parent / file).is_file()]:
        raise TeacherError(
            f"weights {index}: {len(missing)} of its {len(names_of_file)} files are missing, the first {missing[0]}. "
            "Download them into the same folder."
        )
    return names_of_file


def _read_file(path: Path) -> tuple[object, tuple[int, int] | None]:
    """What a file holds, and the grid of patches if it says so."""
    return _read_safetensors(path) if _begins_as_safetensors(path) else (_read_torch(path), None)


def _begins_as_safetensors(path: Path) -> bool:
    """Whether a file begins as safetensors do. What can be neither that nor a torch file is refused."""
    with path.open("rb") as file:
        head = file.read(512)
    # A safetensors file begins with the length of its header in 8 bytes, the high ones 0; the header is JSON.
    if head[5:9] == b"\0\0\0{":
        return True
    _refuse_if_no_weights(path, head)
    return False


def _refuse_if_no_weights(path: Path, head: bytes) -> None:
    if not head:
        raise TeacherError(f"weights {path}: an empty file. Download it again.")
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if text.startswith(b"version https://git-lfs"):
        raise TeacherError(
            f"weights {path}: a Git LFS pointer of {path.stat().st_size} bytes, not the file it stands for. Run "
            "`git lfs pull` in its repository, or download the file itself."
        )
    if text.startswith(b"<"):
        shown = " ".join(text[:60].decode(errors="replace").split())
        raise TeacherError(
            f"weights {path}: a web page (it begins with {shown!r}), not weights. The download got an error or a "
            "login page; download the file again."
        )
    if text.startswith((b"{", b"[")) and b"\0" not in text:
        shown = " ".join(text[:60].decode(errors="replace").split())
        raise TeacherError(
            f"weights {path}: JSON text (it begins with {shown!r}), not weights. If it is an error message, download "
            "the file again; an index of shards must be called *.index.json."
        )


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], tuple[int, int] | None]:
    from safetensors import torch as safetensors_torch

    metadata = _safetensors_metadata(path)
    return safetensors_torch.load_file(path), _grid(metadata.get(GRID_KEY, ""))


def _safetensors_metadata(path: Path) -> dict[str, str]:
    """The metadata in a file's header, which also says how long the file must be."""
    from safetensors import SafetensorError, safe_open

    try:
        with cast("Any", safe_open)(path, framework="pt") as file:
            return file.metadata() or {}
    except SafetensorError as error:
        raise TeacherError(f"weights {path}: damaged safetensors file ({error}). Download it again.") from error


def _grid(text: str) -> tuple[int, int] | None:
    sides = text.split("x")
    if len(sides) != 2 or not all(side.isascii() and side.isdigit() and len(side) < 6 for side in sides):
        return None
    return int(sides[0]), int(sides[1])


def _read_torch(path: Path) -> object:
    try:
        # Opened here, since torch would read a file by the ending of its name: this one may end in .safetensors.
        with path.open("rb") as file, torch.serialization.safe_globals(_HARMLESS):
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        _refuse_pickle(path, error)
    except _DAMAGE as error:
        raise TeacherError(f"weights {path}: neither a safetensors nor a torch file, or damaged.") from error


def _refuse_pickle(path: Path, error: pickle.UnpicklingError) -> NoReturn:
    detail = str(error)
    if "GLOBAL" not in detail and not zipfile.is_zipfile(path):
        raise TeacherError(f"weights {path}: neither a safetensors nor a torch file.") from error
    found = detail.partition("GLOBAL ")[2].split(" ")[0]
    raise TeacherError(
        f"weights {path}: the file holds pickled Python objects beside tensors{f' ({found})' if found else ''}, which "
        "could run code when read; it was not read. If you trust it, save its state dict alone (as safetensors, or "
        "with torch.save(model.state_dict(), ...))."
    ) from error


def _tensors_within(checkpoint: object) -> Iterator[tuple[str, Tensor]]:
    """All tensors of dicts within dicts, by dotted names."""
    seen: set[int] = set()  # a file made to harm may hold a dict that contains itself, several times

    def walk(entries: object, parents: tuple[str, ...]) -> Iterator[tuple[str, Tensor]]:
        if not isinstance(entries, Mapping) or len(parents) > _DEEPEST:
            return
        held = cast("Mapping[object, object]", entries)
        if id(held) in seen:
            return
        seen.add(id(held))
        for key, value in held.items():
            path = (*parents, str(key))
            if isinstance(value, Tensor):
                yield ".".join(path), value.detach()
            elif parents or key not in _NOT_WEIGHTS:
                yield from walk(value, path)

    return walk(checkpoint, ())


def _outline(checkpoint: object, limit: int = 8) -> str:
    """The top level of what a file holds, for messages."""
    if not isinstance(checkpoint, Mapping):
        return f"one {type(checkpoint).__name__}, expected a dict of tensors"
    entries = cast("Mapping[object, object]", checkpoint)
    shown = [f"{key} ({type(value).__name__})" for key, value in list(entries.items())[:limit]]
    more = f" and {len(entries) - limit} more" if len(entries) > limit else ""
    return f"{', '.join(shown)}{more}" if shown else "an empty dict"
