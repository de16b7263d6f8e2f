"""Open the caches that a student learns from, check that they fit together, and join their views."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Any

import numpy as np

from atcache.cache.differences import name_differences
from atcache.cache.record import CacheRecord
from atcache.choices import Labels
from atcache.errors import CacheMismatchError, ConfigError, SourceError
from atcache.feed.order import choose_subset
from atcache.feed.sample_views import CachedViews, JoinedViews, Views
from atcache.files.location import Location
from atcache.images.class_names import same_classes
from atcache.images.source import SampleIndex, Source, relocate
from atcache.store.reader import CacheReader
from atcache.views.rendering import STORED


def open_caches(paths: Sequence[Location]) -> tuple[CacheReader, ...]:
    """Open caches to use together: they must have the same teacher and size of views, and no sample in common.

    Codecs, their fitted state, view policies and numbers of views may differ.

    Raises:
        CacheMismatchError: two of them do not fit together, or name a class differently; the message names both, and
            what differs.
        CacheMissError: there is no cache at one of the paths.
        CorruptCacheError: a cache is damaged.
    """
    readers = tuple(CacheReader(path) for path in paths)
    for reader in readers:
        CacheRecord.of(reader).make_codec(reader.path)  # refuses a cache that cannot be used, before anything slow
    for other in readers[1:]:
        _check_alike(readers[0], other)
    for first, second in combinations(readers, 2):
        _check_other_samples(first, second)
    if len(readers) > 1:
        same_classes([reader.samples.classes for reader in readers])
    return readers


def _check_alike(first: CacheReader, other: CacheReader) -> None:
    """Refuse two caches that cannot teach one student."""
    places = f"in {first.path}", f"in {other.path}"
    differences = name_differences(_what_is_shared(first), _what_is_shared(other), places)
    if not differences and not _equal_bias(first.bias_LHQK, other.bias_LHQK):
        differences = [f"the teacher's bias {places[0]} is not the one {places[1]}"]
    if differences:
        raise CacheMismatchError(
            f"these caches cannot be used together: {'; '.join(differences)}. Build both with the same teacher, "
            "weights, layers, heads and image size."
        )


def _what_is_shared(reader: CacheReader) -> dict[str, Any]:
    """What must be equal in all caches of one training."""
    record = CacheRecord.of(reader)
    teacher, policy, images = record.teacher_record.to_json(), record.policy, record.identity.input
    del teacher["precision"]  # the maps are the same, only rounded to float32 or bfloat16
    teacher["geometry"].pop("v_head_dim", None)  # checked for each cache, if a student is given v
    teacher["geometry"].pop("input_width", None)  # no student is given them
    return {
        **teacher,
        "views": {"image_height": policy.image_height, "image_width": policy.image_width},
        "input": {"mean": list(images.mean), "std": list(images.std)},
    }


def _equal_bias(first: np.ndarray | None, second: np.ndarray | None) -> bool:
    if first is None or second is None:
        return first is second
    return np.array_equal(first, second)


def _check_other_samples(first: CacheReader, second: CacheReader) -> None:
    """Refuse two caches that share a sample: an epoch would show it twice, and an accuracy would count it twice."""
    if tar := _shared_tar(first.samples, second.samples):
        raise CacheMismatchError(
            f"{first.path} and {second.path} both hold samples of {tar}, which would count twice. Give "
            "only one of them; for more views of the same samples, build one cache with more --views."
        )


def _shared_tar(first: SampleIndex, second: SampleIndex) -> str | None:
    """The first tar of which two sources share samples: of the same name and size, in whatever folder.

    Sources may hold different parts of a tar. It is the same tar if their common keys lie at the same places.
    """
    numbers = {tar.name: number for number, tar in enumerate(second.tars)}
    for number, tar in enumerate(first.tars):
        other = numbers.get(tar.name)
        if other is None or first.tar_nbytes[number] != second.tar_nbytes[other]:
            continue
        ours, theirs = _places_of(first, number), _places_of(second, other)
        common = ours.keys() & theirs.keys()
        if common and all(ours[key] == theirs[key] for key in common):
            return tar.name
    return None


def _places_of(index: SampleIndex, tar: int) -> dict[bytes, tuple[int, int]]:
    """Where each key's image lies in a tar: offset and number of bytes."""
    rows = np.flatnonzero(index.tar_S == tar)
    places = zip(index.offset_S[rows].tolist(), index.nbytes_S[rows].tolist(), strict=True)
    return dict(zip(index.keys_S[rows].tolist(), places, strict=True))


def open_joined_views(
    readers: Sequence[CacheReader],
    data: str | Sequence[str] | None,
    *,
    code_layers: Sequence[slice] | None,
    keep_nbytes: int,
    labels: Labels = "required",
) -> tuple[Views, np.ndarray, np.ndarray]:
    """The views of all samples of complete caches; row numbers continue from one cache to the next.

    Args:
        readers: the caches, one or more.
        data: where their tars are now; None if they were not moved.
        code_layers: for each cache, which rows of L of its codes to read; None if no codes are wanted.
        keep_nbytes: memory in which views that were read are kept, over all caches.
        labels: "required" leaves out samples without a label; "optional" and "none" take them too. With "none" no row
            has a class.

    Returns:
        The views, the class of every row (-1 for none), and the rows that can be used: those stored in every view that
        have a label, if it is required.

    Raises:
        CacheMismatchError: a cache is not complete.
        ConfigError: `data` is given, and every cache stores its images; or labels are required, and views are mixed
            with those of samples without a label.
        SourceError: the tars cannot be found, or a cache has no sample that can be used.
    """
    if data is not None and all(reader.layout.pixels is not None for reader in readers):
        paths = " and ".join(str(reader.path) for reader in readers)
        raise ConfigError(f"data={data}: no tar would be read, the images are stored in {paths}. Leave it out.")
    num_samples = sum(reader.layout.num_samples for reader in readers)
    parts: list[CachedViews] = []
    usable: list[np.ndarray] = []
    start = 0
    for number, reader in enumerate(readers):
        layout = reader.layout
        if not reader.is_complete:
            raise CacheMismatchError(
                f"{reader.path} is not complete: {len(reader.missing_tasks())} of {len(layout.tasks())} tasks are "
                "missing. Run its `atcache build` command again."
            )
        source = None
        if layout.pixels is None:
            source = Source(reader.samples if data is None else relocate(reader.samples, data))
        its_layers = None if code_layers is None else code_layers[number]
        its_nbytes = keep_nbytes * layout.num_samples // num_samples
        parts.append(CachedViews(reader, source, code_layers=its_layers, keep_nbytes=its_nbytes))
        usable_S = usable_samples(reader, labels)
        if not len(usable_S):
            num_stored = len(usable_samples(reader, "none"))
            if not num_stored:
                raise SourceError(f"{reader.path} has no sample with an image. Build it from images that can be read.")
            raise SourceError(
                f"{reader.path} has no labels: none of its {num_stored} stored samples has one. Build a cache from "
                "images with labels, or learn from maps alone: `train --mode distill --attention-only`, or "
                'atcache.batches(labels="none").'
            )
        if labels == "required" and are_mixed(reader):
            _check_partners_have_labels(reader, len(usable_S))
        usable.append(start + usable_S)
        start += layout.num_samples
    label_S = np.concatenate([reader.labels_S for reader in readers])
    if labels == "none":
        label_S = np.full_like(label_S, -1)
    return parts[0] if len(parts) == 1 else JoinedViews(parts), label_S, np.concatenate(usable)


def choose_cached_samples(
    readers: Sequence[CacheReader], label_S: np.ndarray, usable_S: np.ndarray, *, subset: int | None, seed: int
) -> np.ndarray:
    """The rows to train on, ascending int64: all that can be used, or a subset of them, see `choose_subset`.

    Args:
        readers: the caches.
        label_S: class of every row.
        usable_S: the rows that can be used.
        subset: how many are wanted; None for all.
        seed: decides which ones.

    Raises:
        ConfigError: fewer can be used, or views are mixed with samples that may be outside the subset.
    """
    if subset is None:
        return usable_S
    if mixed := next((reader for reader in readers if are_mixed(reader)), None):
        raise ConfigError(
            f"subset={subset}: the views of {mixed.path} are mixed with those of other samples, whose images and "
            "labels a subset must not see. Build a cache without --mixup and --cutmix, or only of the subset's tars."
        )
    return choose_subset(label_S, usable_S, subset, seed)


def usable_samples(reader: CacheReader, labels: Labels = "required") -> np.ndarray:
    """The rows of a cache that are stored in every view and, if it is required, have a label; ascending int64."""
    is_stored_S = (reader.status_VS == STORED).all(axis=0)
    return np.flatnonzero(is_stored_S & (reader.labels_S >= 0) if labels == "required" else is_stored_S)


def _check_partners_have_labels(reader: CacheReader, num_usable: int) -> None:
    """Refuse mixed views of which some would show a sample without a label: what to predict would be half unknown."""
    if without := len(usable_samples(reader, "none")) - num_usable:
        raise ConfigError(
            f"the views of {reader.path} are mixed with each other, and {without} of its samples have no label. Build "
            "a cache without --mixup and --cutmix, or of samples with labels only (--labels required), or learn from "
            "maps alone: `train --mode distill --attention-only`."
        )


def are_mixed(reader: CacheReader) -> bool:
    """Whether a cache's views show two samples each."""
    return CacheRecord.of(reader).policy.mixing is not None
