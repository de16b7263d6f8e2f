"""What `paper.py` is asked for, and which images it takes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np

from atcache.choices import Mode, PolicyName, Precision
from atcache.errors import ConfigError
from atcache.feed.order import choose_subset
from atcache.files.durable import encode_json, make_folder, write_file
from atcache.images.source import index_source

_FILE = "study.json"

_MAY_CHANGE = ("out", "codecs", "view_counts", "corrupt", "seeds", "side_seeds", "workers", "keep_mib", "device")
"""Settings that change no run: a study may be continued with more rows, or on another machine."""

_BEFORE = {"policy": "crop-flip", "mixup": 0.0, "cutmix": 0.0}
"""What studies of earlier versions had, which did not record it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Study:
    """What to compare, and how much of it."""

    out: Path
    teacher: str
    weights: Path | None
    data: str
    """Tars of training images with labels; students get `labels` of these."""
    val_data: str
    labels: int
    """The number of labelled images that students get."""
    val_samples: int
    held_out: int
    """Training images that no student gets, on which `tune` compares."""
    views: int
    """Views of each image in the caches, where views are not what is compared."""
    policy: PolicyName
    """How views are drawn."""
    mixup: float
    cutmix: float
    codec: str
    """How maps are stored, where this is not what is compared."""
    codecs: tuple[str, ...]
    """To compare, with the first. It also stores q and k for students that copy these, so it must keep them."""
    view_counts: tuple[int, ...]
    shift: Mapping[str, str]
    """Other test images: the tars by name."""
    corrupt: tuple[str, ...]
    """Corruptions of the test images; a group counts as the mean of its corruptions."""
    epochs: float
    batch_size: int
    base_lrs: tuple[float, ...]
    """Of students that begin with random weights; several are tried by `tune`."""
    finetune_lrs: tuple[float, ...]
    init_values: tuple[float | None, ...]
    """What LayerScale begins with in students that begin with random weights; None is timm's value."""
    layer_decay: float
    """Of finetune only."""
    drop_path: float
    label_smoothing: float
    tune: tuple[Mode, ...]
    """Modes whose recipe is chosen on held-out images; the other modes that begin with random weights take copy's."""
    seeds: int
    """Students of each row of the modes, of ensembles and of other test images."""
    side_seeds: int
    """Students of each other row."""
    workers: int
    keep_mib: int
    device: str
    precision: Precision


def keep_study(study: Study) -> None:
    """Record the settings in the study's folder, or refuse to continue one with others that change its runs.

    Before its first cache is there, all settings may change: it may have none because one of them was wrong. Until
    then it chooses its images, too.

    Raises:
        ConfigError: names the first setting that differs; or there are too few images.
    """
    file = study.out / _FILE
    asked = json.loads(encode_json({**asdict(study), "out": None, "weights": study.weights and str(study.weights)}))
    has_begun = file.exists() and any(any(study.out.glob(made)) for made in ("caches/*/zarr.json", "runs/*/*"))
    there = {**_BEFORE, **json.loads(file.read_text())} if has_begun else asked
    shift = {**asked["shift"], **there["shift"]}  # others may be added
    asked["shift"] = {**there["shift"], **asked["shift"]}
    for name, value in asked.items():
        before = shift if name == "shift" else there.get(name)
        if name not in _MAY_CHANGE and before != value:
            raise ConfigError(
                f"{study.out} holds another study: {name} is {before!r} there and {value!r} here. Give another --out, "
                "or the same options."
            )
    make_folder(study.out)
    if not has_begun:
        _choose_images(study)
    write_file(file, encode_json(asked))


def read_study(out: Path) -> Study:
    """The settings that a folder's study was last continued with.

    Raises:
        ConfigError: the folder holds no study, or one of an earlier version that did not record all settings.
    """
    file = out / _FILE
    if not file.exists():
        raise ConfigError(f"--report: {out} is not the folder of an earlier study.")
    kept = json.loads(file.read_text())
    if missing := [one.name for one in fields(Study) if one.name not in kept]:
        raise ConfigError(f"--report: {file} does not say {missing[0]}. Continue the study once with its options.")
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in kept.items()}
    return Study(**{**values, "out": out, "weights": kept["weights"] and Path(kept["weights"])})


def _choose_images(study: Study) -> None:
    """Write which training images students get, and which are held out, as even over the classes as possible."""
    numbers = {"labels.txt": study.labels, "held-out.txt": study.held_out}
    index = index_source(study.data)
    good_S = np.flatnonzero(index.label_S >= 0)
    if len(good_S) < (needed := study.labels + study.held_out):
        raise ConfigError(
            f"data={study.data}: {len(good_S)} images have labels, but {study.labels} for students and "
            f"{study.held_out} held-out ones are {needed}. Lower --labels or --held-out."
        )
    rest_S = good_S
    for name, number in numbers.items():
        if number:
            chosen_S = choose_subset(index.label_S, rest_S, number, seed=0)
            rest_S = np.setdiff1d(rest_S, chosen_S)
            write_file(study.out / name, "".join(f"{key}\n" for key in index.sample_keys(chosen_S)).encode())
