"""The commands that make a run again, and what it ran on."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from atcache import __version__
from atcache.attention.indices import format_indices
from atcache.cache.record import CacheRecord
from atcache.errors import AtcacheError, SourceError
from atcache.files.location import Location, Url
from atcache.images.tars import as_typed_in, expand_braces, expand_tars
from atcache.store.reader import CacheReader
from atcache.teachers.foreign.names import OWN
from atcache.teachers.names import ALIASES

from ..build.config import BuildConfig
from ..evaluate.config import EvaluateConfig
from ..running.commands import as_command
from .config import ReportConfig
from .finished import FinishedRun, ValidationPlaces

_PACKAGES = ("torch", "torchvision", "timm", "numpy", "zarr", "webdataset", "pillow")
_NUMBERED = re.compile(r"(.*?)(\d+)(\D*)", re.DOTALL)
"""The last number of a name, and what is before and behind it."""
_WITH_PACKAGE = "demo-mae"
"""The teacher whose weights come with atcache."""


def commands_to_repeat(run: FinishedRun, places: ValidationPlaces) -> list[str]:
    """Build, train, evaluate and report as commands, as far as they are known."""
    training = run.config()
    # Where each cache is, and how it is called in the other commands.
    caches: dict[Location, Location] = dict(zip(run.caches, run.caches, strict=True))
    if training is not None:
        caches = dict(zip(run.caches, training.caches, strict=False))
    folder, val_caches, val_data = run.folder, places.caches, places.data
    if Path(str(run.places.get("folder", ""))) not in (Path(), Path.cwd()):
        # All commands are for the folder where the training was typed, which is another one than this.
        folder, val_caches = folder.absolute(), tuple(cache.absolute() for cache in val_caches)
        given = (val_data,) if isinstance(val_data, str) else val_data or ()
        val_data = tuple(as_typed_in(Path.cwd(), tars) for tars in given) or None
    caches |= {cache: cache for cache in val_caches if cache.absolute() not in caches}
    commands = [command for cache, name in caches.items() if (command := build_command(cache, name)) is not None]
    if training is not None:
        commands.append(as_command("train", training))
    # A copying run that was validated with its teacher alone is predicted by neither: no cache has its maps.
    if places and run.record.num_classes and (val_caches or run.record.mode != "copy"):
        cache = (val_caches if len(val_caches) != 1 else val_caches[0]) or None
        label_key = None if cache else places.label_key
        evaluation = EvaluateConfig(runs=(folder,), cache=cache, data=val_data, label_key=label_key)
        reporting = ReportConfig(run=folder, val_cache=cache, val_data=val_data, label_key=label_key)
        commands += [as_command("eval", evaluation), as_command("report", reporting)]
    return commands


def build_command(path: Location, name: Location) -> str | None:
    """The command that builds a cache under a name, from what it records; None if it cannot be read or made."""
    try:
        reader = CacheReader(path)
        record = CacheRecord.of(reader)
        identity, policy, selection = record.identity, record.policy, record.identity.selection
        alias = next((alias for alias, name in ALIASES.items() if name == identity.teacher), None)
        if identity.teacher.startswith(OWN):
            return None  # a class in Python, which no command can name
        from_a_file = not record.weights_from.startswith("hub:") and alias != _WITH_PACKAGE
        fields: dict[str, Any] = {
            "teacher": alias or identity.teacher,
            "weights": record.weights_from if from_a_file else None,
            "data": data_of(reader.samples.tars),
            "out": name,
            "codec": _codec(identity.codec),
            "policy": policy.name,
            "decoding": policy.decoding,
            "corrupt": policy.corrupt,
            "seed": policy.seed,
            "views": identity.num_views,
            "pixels": identity.pixels,
            "queries": selection.queries,
            "store": selection.store,
            "layers": _chosen(selection.layers, record.depth),
            "heads": _chosen(selection.heads, record.geometry.num_model_heads),
            "precision": {"float32": "fp32", "bfloat16": "bf16"}[identity.precision],
        }
        if reader.samples.problem_S.any() or (record.complete is not None and record.complete.num_bad):
            fields["on_bad_image"] = "skip"
        if policy.mixing is not None:
            mixing = policy.mixing
            fields |= {"mixup": mixing.mixup_alpha, "cutmix": mixing.cutmix_alpha, "mix_prob": mixing.prob}
        if record.choice is not None:
            fields |= {
                "labels": record.choice.labels,
                "label_key": record.choice.label_key,
                "max_samples": record.choice.max_samples,
            }
        return as_command("build", BuildConfig(**fields))
    except (AtcacheError, OSError):
        return None


def _codec(recorded: Mapping[str, Any]) -> str:
    """A codec as it is typed, with the fields that it recorded."""
    fields = {name: value for name, value in recorded.items() if name != "name" and value is not None}
    if "target_nbytes" in fields:
        del fields["target_kl"]  # which is not met then
    given = ",".join(f"{name}={value}" for name, value in fields.items())
    return f"{recorded['name']}:{given}" if given else str(recorded["name"])


def data_of(tars: Sequence[Location]) -> str:
    """One text for these tars and no others: the only one, their folder, a range of numbers, or all of them in braces.

    Raises:
        SourceError: one has a name that braces cannot hold, or they are on several servers.
    """
    if len(tars) == 1:
        return str(tars[0])
    folder = tars[0].parent
    if isinstance(folder, Path) and folder.is_dir() and tuple(expand_tars(folder)) == tuple(tars):
        return str(folder)
    names = [*map(str, tars)]
    if unusual := [name for name in names if set("{},") & set(name)]:
        raise SourceError(f"{unusual[0]} has braces or a comma in its name.")
    first, last = _NUMBERED.fullmatch(names[0]), _NUMBERED.fullmatch(names[-1])
    if first and last and int(last[2]) - int(first[2]) + 1 == len(tars):
        as_range = f"{first[1]}{{{first[2]}..{last[2]}}}{first[3]}"
        if expand_braces(as_range) == names:
            return as_range
    # A URL is known by its beginning, so scheme and server stay before the braces.
    prefix = os.path.commonprefix(names)  # noqa: RUF071 - by characters, as commonpath would take a slash from s3://
    folder = prefix[: prefix.rfind("/") + 1]
    if isinstance(tars[0], Url) and folder.count("/") <= 2:
        raise SourceError(f"{names[0]} and {names[-1]} are on two servers.")
    return f"{folder}{{{','.join(name.removeprefix(folder) for name in names)}}}"


def _chosen(indices: tuple[int, ...] | str | None, num_all: int) -> str | None:
    """Layers or heads as they are typed; None for all."""
    if indices is None or isinstance(indices, str):
        return indices
    return None if len(indices) == num_all else format_indices(indices)


def environment(device: torch.device, run: FinishedRun) -> list[tuple[str, str]]:
    """What there is where the report is written: names and values."""
    found = [("atcache", __version__), ("Python", platform.python_version())]
    for name in _PACKAGES:
        try:
            found.append((name, version(name)))
        except PackageNotFoundError:
            continue
    processor = platform.processor() or platform.machine()
    where = f"{processor}, {os.cpu_count()} processors, {torch.get_num_threads()} threads of torch"
    if device.type == "cuda":
        where = f"{torch.cuda.get_device_name(device)}; {where}"
    found += [("system", platform.platform()), ("device", where)]
    return [*found, ("precision", str(run.settings.get("precision", "unknown")))]
