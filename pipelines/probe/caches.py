"""The caches of a probe: those that exist, or small ones of a part of the images."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from atcache.cache.record import CacheRecord
from atcache.errors import ConfigError
from atcache.feed.caches import are_mixed, open_caches, usable_samples
from atcache.feed.order import choose_subset, epoch_permutation
from atcache.files.durable import write_file
from atcache.files.location import listed
from atcache.images.source import SampleIndex, index_source
from atcache.images.tar_samples import Problem
from atcache.teachers.names import parse_model_name
from atcache.teachers.verdict import TeacherVerdict, judge

from ..build.config import BuildConfig
from ..build.run import build
from .config import BUILT_SAMPLES, BUILT_VAL_SAMPLES, BUILT_VIEWS, ProbeConfig

_TRAIN, _VAL = 0, 1
"""Seeds of the samples that are drawn: always the same, so that a probe can be repeated."""
_FEWEST_OF_A_CLASS = 5
"""With fewer training samples a class, there are fewer classes: from one image each, no student learns in minutes."""


_CACHES = "train.zarr", "val.zarr"
_KEYS = "train-keys.txt", "val-keys.txt"


class ProbeCaches(NamedTuple):
    """What the students are trained and validated on."""

    train: Any
    """The place of the training cache, or of several."""
    val: Any
    subset: int | None
    """How many samples each seed draws from the training cache; None if all are taken."""
    num_samples: int
    """Samples that a student is trained on."""
    num_classes: int
    """Classes that the usable samples have."""
    verdict: TeacherVerdict
    """What is known of the teacher."""


def open_probe_caches(config: ProbeConfig) -> ProbeCaches:
    """The caches that the options name, or small ones, which are built or were built before.

    Raises:
        ConfigError: there are too few images.
        AtcacheError: what `atcache build` raises, or what opening a cache raises.
    """
    is_given = config.cache is not None
    train, val = (config.cache, config.val_cache) if is_given else _build_both(config)
    readers = open_caches(listed(train))
    labels = [reader.samples.label_S[usable_samples(reader, "required")] for reader in readers]
    num_usable = sum(map(len, labels))
    if not num_usable:
        raise ConfigError(f"{listed(train)[0]} has no samples with a label, which the students learn from.")
    if is_given and (config.samples or 0) > num_usable:
        raise ConfigError(f"samples={config.samples}: the cache has {num_usable} with a label. Give at most that.")
    mixed = next(filter(are_mixed, readers), None) if is_given else None
    if mixed is not None and config.samples not in (None, num_usable):
        raise ConfigError(
            f"samples={config.samples}: the views of {mixed.path} are mixed with those of other samples, so all "
            f"{num_usable} are needed. Leave --samples out."
        )
    takes_some = is_given and mixed is None
    wanted = min(config.samples or BUILT_SAMPLES, num_usable) if takes_some else num_usable
    record = CacheRecord.of(readers[0])
    student = None if config.student is None else parse_model_name(config.student)
    return ProbeCaches(
        train=train,
        val=val,
        subset=wanted if wanted < num_usable else None,
        num_samples=wanted,
        num_classes=len(np.unique(np.concatenate(labels))),
        verdict=judge(record.teacher_record.name, student, record.trained),
    )


def remove_built_caches(out: Path) -> None:
    """Remove the small caches of a probe that is begun again with other ones, and the lists of their samples."""
    for name in (*_CACHES, *_KEYS):
        if (out / name).is_dir():
            shutil.rmtree(out / name)
        else:
            (out / name).unlink(missing_ok=True)


def _build_both(config: ProbeConfig) -> tuple[Path, Path]:
    train, val = (config.out / name for name in _CACHES)
    keys = [config.out / name for name in _KEYS]
    if not all(file.exists() for file in keys):
        for file, text in zip(keys, _draw_samples(config), strict=True):
            write_file(file, text.encode())
    assert config.teacher is not None, "checked by ProbeConfig"
    common: dict[str, Any] = {
        **{"teacher": config.teacher, "weights": config.weights, "label_key": config.label_key},
        **{"device": config.device, "precision": config.precision, "on_bad_image": "skip"},
    }
    policy = config.policy or "crop-flip"
    views = config.views or (1 if policy == "eval" else BUILT_VIEWS)
    build(BuildConfig(**common, data=config.data, keys=keys[0], out=train, policy=policy, views=views))
    # The same codec for both: it is fitted once, and to more samples.
    build(
        BuildConfig(
            **common, data=config.val_data or config.data, keys=keys[1], out=val, policy="eval", codec_from=train
        )
    )
    return train, val


def _draw_samples(config: ProbeConfig) -> tuple[str, str]:
    """The keys of the samples to train on and to validate on, as text, one a line."""
    index, good_S = _read_index(config.data, config)
    if config.val_data is not None:
        val_index, val_good_S = _read_index(config.val_data, config)
        num_train = min(config.samples or BUILT_SAMPLES, len(good_S))
        num_val = min(config.val_samples or BUILT_VAL_SAMPLES, len(val_good_S))
        _refuse_too_many(config, config.samples or 0, len(good_S), str(config.data))
        _refuse_too_many(config, config.val_samples or 0, len(val_good_S), config.val_data)
        train_S = choose_subset(index.label_S, _of_some_classes(index, good_S, num_train, num_train), num_train, _TRAIN)
        val_good_S = val_good_S[np.isin(val_index.label_S[val_good_S], index.label_S[train_S])]
        if not len(val_good_S):
            raise ConfigError(f"{config.val_data} has no image of a class that {config.data} has.")
        val_S = choose_subset(val_index.label_S, val_good_S, min(num_val, len(val_good_S)), _VAL)
        return _as_lines(index, train_S), _as_lines(val_index, val_S)
    if len(good_S) < 2:
        raise ConfigError(f"{config.data} has {len(good_S)} usable samples; there must be some to train on and others.")
    num_val = config.val_samples or min(BUILT_VAL_SAMPLES, len(good_S) // 2)
    num_train = config.samples or min(BUILT_SAMPLES, max(1, len(good_S) - num_val))
    _refuse_too_many(config, num_train + num_val, len(good_S), str(config.data))
    good_S = _of_some_classes(index, good_S, num_train, num_train + num_val)
    # Validation samples first: they stay the same if another probe trains on more, of the same classes.
    spare_S = _spared_for_validation(index.label_S, good_S, num_val / (num_train + num_val))
    val_S = choose_subset(index.label_S, spare_S, min(num_val, len(spare_S)), _VAL)
    train_S = choose_subset(index.label_S, np.setdiff1d(good_S, val_S), num_train, _TRAIN)
    val_S = val_S[np.isin(index.label_S[val_S], index.label_S[train_S])]
    if not len(val_S):
        raise ConfigError(f"{config.data} has no two images of a class. Give --val-data.")
    return _as_lines(index, train_S), _as_lines(index, val_S)


def _spared_for_validation(label_S: np.ndarray, good_S: np.ndarray, share: float) -> np.ndarray:
    """At most a share of each class, so that small classes are not all validated and never trained on."""
    shuffled_S = good_S[epoch_permutation(len(good_S), _VAL, -1)]
    spared: list[np.ndarray] = []
    for label in np.unique(label_S[good_S]).tolist():
        of_class_S = shuffled_S[label_S[shuffled_S] == label]
        spared.append(of_class_S[: min(len(of_class_S) - 1, math.ceil(share * len(of_class_S)))])
    return np.sort(np.concatenate(spared))


def _of_some_classes(index: SampleIndex, good_S: np.ndarray, num_samples: int, num_needed: int) -> np.ndarray:
    """Usable samples, of some classes only if all would have too few samples each.

    Args:
        index: the images.
        good_S: rows of usable samples.
        num_samples: how many are trained on.
        num_needed: how many samples the classes must have together, at least.
    """
    classes_C, counts_C = np.unique(index.label_S[good_S], return_counts=True)
    order_C = epoch_permutation(len(classes_C), _TRAIN, -1)
    num_with_enough = 1 + int(np.searchsorted(np.cumsum(counts_C[order_C]), num_needed))
    num_classes = max(2, num_with_enough, num_samples // _FEWEST_OF_A_CLASS)
    return good_S[np.isin(index.label_S[good_S], classes_C[order_C[:num_classes]])]


def _read_index(data: str | None, config: ProbeConfig) -> tuple[SampleIndex, np.ndarray]:
    """The samples of tars, and the rows of those with an image, a label, and a key that a line of a file can hold."""
    assert data is not None, "checked by ProbeConfig"
    index = index_source(data, label_key=config.label_key, on_bad="skip")
    is_line_S = np.char.find(index.keys_S, b"\n") < 0
    return index, np.flatnonzero((index.problem_S == Problem.NONE) & (index.label_S >= 0) & is_line_S)


def _refuse_too_many(config: ProbeConfig, wanted: int, available: int, data: str) -> None:
    if wanted > available:
        asked = f"samples={config.samples}, val_samples={config.val_samples}"
        raise ConfigError(
            f"{data} has {available} usable samples, too few for {asked}. Give fewer, or validation images of their "
            "own with --val-data."
        )


def _as_lines(index: SampleIndex, rows: np.ndarray) -> str:
    return "".join(f"{index.sample_key(row)}\n" for row in rows.tolist())
