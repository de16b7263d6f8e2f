"""timm models as people publish them: a repository of the hub or a folder, with a config.json and weights.

The config is read once, and what it says becomes a plain name: timm's architecture with arguments. So a cache or a run
needs no config later, and a commit is recorded instead of a branch.
"""

from __future__ import annotations

import json
import math
import re
import sys
from dataclasses import dataclass, replace
from functools import lru_cache
from inspect import signature
from pathlib import Path
from typing import Any, cast

from atcache.errors import TeacherError
from atcache.files.location import expand_home
from atcache.teachers.hub import fetch_file

SOURCES = ("hf-hub", "local-dir")
"""What may stand before a colon in place of a timm name."""
INPUT_ARGUMENTS = ("mean", "std", "interpolation", "crop_pct")
"""Arguments of a model's name that describe its input, not the model."""
_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
_REVISION = re.compile(r"\w[\w./-]*")
_LARGEST = 65536  # no published size is near it, and one far over it would fill the memory
_CONFIG_NBYTES_LIMIT = 8 * 2**20  # some list the names of 21000 classes


@dataclass(frozen=True, kw_only=True, slots=True)
class Published:
    """What the config of a published model says."""

    architecture: str
    """timm's name of the architecture."""
    arguments: dict[str, Any]
    """Arguments of `create_model`, and the model's input."""
    weights_at: str
    """"hf-hub:REPOSITORY@COMMIT" or "local-dir:FOLDER", the folder from the root."""
    licence: str | None
    """Licence of the weights, if the config names one."""
    crop_mode: str = "center"
    """What its own transform does to images of another shape than its input, in timm's words; see `note_crop`."""


def read_published(source: str) -> Published:
    """What is published at `source`: "hf-hub:ORG/MODEL", with "@REVISION" or without, or "local-dir:FOLDER".

    Raises:
        TeacherError: it cannot be reached or has no config.json that timm can use.
    """
    found = _read_published(source)
    return replace(found, arguments=dict(found.arguments))


@lru_cache(maxsize=16)
def _read_published(source: str) -> Published:
    kind, _, place = source.partition(":")
    if kind == "local-dir":
        folder = expand_home(Path(place)).absolute()
        file = folder / "config.json"
        if not folder.is_dir():
            raise TeacherError(f"model {source}: there is no folder {folder}.")
        if not file.is_file():
            raise TeacherError(f"model {source}: {folder} has no config.json. Expected a folder as timm publishes it.")
        return _from_config(source, file, f"local-dir:{folder}")
    repository, revision = _split(source)
    file = fetch_file(
        repository,
        ["config.json"],
        who=f"model {source}",
        then="its weights too into one folder, and give local-dir:FOLDER as the model",
        revision=revision,
    )
    return _from_config(source, file, f"hf-hub:{repository}@{file.parent.name}")


def published_weights(weights_at: str) -> tuple[Path, str]:
    """The file or folder of a published model's weights on this machine, and the name of their source.

    Raises:
        TeacherError: they cannot be had.
    """
    kind, _, place = weights_at.partition(":")
    if kind == "local-dir":
        if not Path(place).is_dir():
            raise TeacherError(f"weights {weights_at}: no such folder. Give the weights with --weights FILE.")
        return Path(place), f"local-dir:{Path(place).name}"
    repository, revision = _split(weights_at)
    path = fetch_file(
        repository, _WEIGHTS, who=f"model {weights_at}", then="give it with --weights FILE", revision=revision
    )
    return path, f"hub:{repository}@{path.parent.name}/{path.name}"


def _split(source: str) -> tuple[str, str | None]:
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    repository, at, revision = source.partition(":")[2].partition("@")
    try:
        validate_repo_id(repository)
        if "/" not in repository or (at and not _REVISION.fullmatch(revision)):
            raise HFValidationError(source)
    except HFValidationError as error:
        raise TeacherError(f"model {source!r}: expected hf-hub:ORG/MODEL or hf-hub:ORG/MODEL@REVISION.") from error
    return repository, revision or None


def _from_config(source: str, file: Path, weights_at: str) -> Published:
    from timm.models import is_model

    config = _read_config(source, file)
    architecture: Any = config.get("architecture")
    if not isinstance(architecture, str) or not is_model(architecture):
        what = "does not name a timm architecture" if architecture is None else f"names {architecture!r}"
        raise TeacherError(
            f"model {source}: its config.json {what}, expected a model of timm. {_other_library(source, config)}"
        )
    # Older configs have the fields of the weights at the top.
    about = _object(source, "pretrained_cfg", config.get("pretrained_cfg", config))
    arguments = _model_arguments(source, architecture, _object(source, "model_args", config.get("model_args") or {}))
    num_classes = config.get("num_classes", about.get("num_classes"))
    if "num_classes" not in arguments and isinstance(num_classes, int):
        arguments["num_classes"] = num_classes
    input_size: Any = about.get("input_size")
    if "img_size" not in arguments and "img_size" in _known_arguments(architecture) and input_size is not None:
        if not isinstance(input_size, list) or len(cast("list[Any]", input_size)) != 3:
            raise TeacherError(
                f"model {source}: its config.json has input_size {input_size!r}, expected [3, 224, 224]."
            )
        arguments["img_size"] = tuple(cast("list[int]", input_size)[1:])
    licence = about.get("license")
    return Published(
        architecture=architecture,
        arguments=arguments | _input_arguments(source, about),
        weights_at=weights_at,
        licence=licence if isinstance(licence, str) else None,
        crop_mode=str(about.get("crop_mode") or "center"),
    )


def _read_config(source: str, file: Path) -> dict[str, Any]:
    if file.stat().st_size > _CONFIG_NBYTES_LIMIT:
        raise TeacherError(f"model {source}: its config.json has {file.stat().st_size} bytes, expected a few thousand.")
    try:
        config: object = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise TeacherError(f"model {source}: its config.json is not JSON ({error}). Download it again.") from error
    return _object(source, "the top level", config)


def _other_library(source: str, config: dict[str, Any]) -> str:
    if "model_type" in config:
        return f"If it is a model of transformers, give transformers:{source.partition(':')[2]}."
    return "It may be a model of another library; timm.list_models() lists timm's."


def _object(source: str, what: str, value: object) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise TeacherError(f"model {source}: {what} of its config.json is {type(value).__name__}, expected an object.")
    return cast("dict[str, Any]", value)


def _model_arguments(source: str, architecture: str, given: dict[str, Any]) -> dict[str, Any]:
    """The config's arguments of the model: those that its class has, with plain values."""
    known = _known_arguments(architecture)
    arguments: dict[str, Any] = {}
    for name, value in given.items():
        if name not in known:
            raise TeacherError(
                f"model {source}: its config.json gives {architecture} the argument {name!r}, which it does not have. "
                "If it is spelled right, a newer timm may know it."
            )
        if isinstance(value, list):
            value = tuple(cast("list[Any]", value))
        parts: tuple[Any, ...] = cast("tuple[Any, ...]", value) if isinstance(value, tuple) else (value,)
        if not all(part is None or isinstance(part, (bool, int, float, str)) for part in parts):
            raise TeacherError(f"model {source}: its config.json has {name}={value!r}, expected numbers or a word.")
        if any(isinstance(part, (int, float)) and not abs(part) <= _LARGEST for part in parts):
            raise TeacherError(f"model {source}: its config.json has {name}={value!r}, expected at most {_LARGEST}.")
        if value is not None:  # timm takes its default then
            arguments[name] = value
    return arguments


def _known_arguments(architecture: str) -> set[str]:
    """The arguments of the classes of models in the module in which timm has an architecture."""
    from timm.models import model_entrypoint

    module = sys.modules[model_entrypoint(architecture).__module__]
    classes = [
        value for value in vars(module).values() if isinstance(value, type) and hasattr(value, "forward_features")
    ]
    return {name for one in classes for name in signature(one).parameters}


def _input_arguments(source: str, about: dict[str, Any]) -> dict[str, Any]:
    arguments: dict[str, Any] = {}
    for name in ("mean", "std"):
        value = about.get(name)
        if value is None:
            continue
        numbers = cast("list[Any]", value if isinstance(value, list) else [])
        if len(numbers) != 3 or not all(isinstance(one, (int, float)) and math.isfinite(one) for one in numbers):
            raise TeacherError(f"model {source}: its config.json has {name} {value!r}, expected three numbers.")
        arguments[name] = tuple(float(one) for one in numbers)
    interpolation, crop_pct = about.get("interpolation"), about.get("crop_pct")
    if isinstance(interpolation, str):
        arguments["interpolation"] = interpolation
    if isinstance(crop_pct, (int, float)):
        arguments["crop_pct"] = float(crop_pct)
    return arguments
