"""The commands that make a run again, and what it ran on."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from atcache import __version__
from atcache.attention.indices import format_indices
from atcache.cache.record import CacheRecord
from atcache.errors import AtcacheError
from atcache.files.location import Location
from atcache.store.reader import CacheReader
from atcache.teachers.names import ALIASES

from ..build.config import BuildConfig
from ..evaluate.config import EvaluateConfig
from ..running.commands import as_command
from .config import ReportConfig
from .finished import FinishedRun, ValidationPlaces

_PACKAGES = ("torch", "torchvision", "timm", "numpy", "zarr", "webdataset", "pillow")
_WITH_PACKAGE = "demo-mae"
"""The teacher whose weights come with atcache."""


def commands_to_repeat(run: FinishedRun, places: ValidationPlaces) -> list[str]:
    """Build, train, evaluate and report as commands, as far as they are known."""
    training = run.config()
    # Where each cache is, and how it is called in the other commands.
    caches: dict[Location, Location] = dict(zip(run.caches, run.caches, strict=True))
    if training is not None:
        caches = dict(zip(run.caches, training.caches, strict=False))
    # All commands are for the folder where the training was typed. Paths of this folder are whole, if it is another.
    typed_here = Path(str(run.places.get("folder", ""))) in (Path(), Path.cwd())
    folder = run.folder if typed_here else run.folder.absolute()
    val_caches = tuple(cache if typed_here else cache.absolute() for cache in places.caches)
    caches |= {cache: cache for cache in val_caches if cache.absolute() not in caches}
    commands = [command for cache, name in caches.items() if (command := _build(cache, name)) is not None]
    if training is not None:
        commands.append(as_command("train", training))
    # A copying run that was validated with its teacher alone is predicted by neither: no cache has its maps.
    if places and run.record.num_classes and (val_caches or run.record.mode != "copy"):
        cache = (val_caches if len(val_caches) != 1 else val_caches[0]) or None
        label_key = None if cache else places.label_key
        evaluation = EvaluateConfig(runs=(folder,), cache=cache, data=places.data, label_key=label_key)
        reporting = ReportConfig(run=folder, val_cache=cache, val_data=places.data, label_key=label_key)
        commands += [as_command("eval", evaluation), as_command("report", reporting)]
    return commands


def _build(path: Location, name: Location) -> str | None:
    """The command that builds a cache under a name, from what it records; None if it cannot be read or made."""
    try:
        reader = CacheReader(path)
        record = CacheRecord.of(reader)
        identity, policy, selection = record.identity, record.policy, record.identity.selection
        alias = next((alias for alias, name in ALIASES.items() if name == identity.teacher), None)
        from_a_file = not record.weights_from.startswith("hub:") and alias != _WITH_PACKAGE
        codec = dict(identity.codec)
        kind, target_kl = str(codec.pop("name")), codec.get("target_kl")
        fields: dict[str, Any] = {
            "teacher": alias or identity.teacher,
            "weights": record.weights_from if from_a_file else None,
            "data": _data(reader.samples.tars),
            "out": name,
            "policy": policy.name,
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
        if kind == "transform":
            fields |= {"codec": kind, "target_kl": target_kl}
        else:
            given = ",".join(f"{key}={value}" for key, value in codec.items() if value is not None)
            fields["codec"] = f"{kind}:{given}" if given else kind
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


def _data(tars: Sequence[Location]) -> str:
    """One text for all tars: the only one, or their folder."""
    if len(tars) == 1:
        return str(tars[0])
    folders = {str(tar.parent) for tar in tars}
    return folders.pop() if len(folders) == 1 else os.path.commonpath([*folders])


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
