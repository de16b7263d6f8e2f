"""Make a student from a cache, for a training loop of your own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import torch

from atcache.cache.record import CacheRecord
from atcache.choices import WHATS, What
from atcache.errors import ConfigError
from atcache.feed.caches import open_caches, usable_samples
from atcache.feed.classes import count_classes
from atcache.store.reader import CacheReader
from atcache.students.batches import Caches, Indices, index_text, locations_of
from atcache.students.copy import CopyStudent
from atcache.students.distil import DistilledStudent
from atcache.students.pairing import plan_pairing
from atcache.students.student import check_views_fit, new_student
from atcache.students.teacher_side import CacheTeacher
from atcache.teachers.names import parse_model_name


def make_student(
    cache: Caches,
    mode: Literal["copy", "distill"],
    *,
    student: str | None = None,
    num_classes: int | None = None,
    layers: Indices | None = None,
    heads: Indices | None = None,
    layer_map: str | Mapping[int, int] | None = None,
    head_map: Indices | None = None,
    what: What = "map",
    drop_path: float = 0.0,
) -> CopyStudent | DistilledStudent:
    """A student of a cache's teacher, to be trained with `atcache.batches`: a module with fresh weights, on the CPU.

    Its `forward` takes images and the teacher's attention of the same views. Mode "copy" returns logits (batch, class).
    Mode "distill" returns logits and the attention loss: a scalar, the mean over layers, heads and queries of the
    cross-entropy between the teacher's maps and the student's, in nats; for another `what` than "map", the mean
    squared error. The timm model inside is `.model`; that of a distilled student is an ordinary one, which needs no
    teacher to predict.

    `torch.compile` makes one graph of either. Weights come from torch's global random generator: see
    `torch.manual_seed`.

    Args:
        cache: the cache, or the caches, that it is to be trained from.
        mode: "copy" or "distill".
        student: a timm name, with arguments after a colon such as "vit_large_patch16_224.mae:embed_dim=512"; None for
            the teacher's own architecture.
        num_classes: outputs of its head; None for as many as the caches name or their labels need. 0, or None if the
            caches have no labels, makes no head: instead of logits, the student returns features.
        layers: blocks whose attention is transferred, such as "0-17" or [0, 1, 2]; the others attend freely. None for
            all in the cache.
        heads: heads of these blocks, such as "0,3"; the others attend freely. None for all in the cache.
        layer_map: instead of `layers`, for a student of another depth: for blocks of the student, the teacher's block
            that each is given, such as {0: 0, 1: 11, 2: 23} or "0:0,1:11,2:23".
        head_map: instead of `heads`, for a student with other heads: for each head of the student, the teacher's head.
        what: what is transferred: "map", "qk", "q", "k", "v" or "qkv". All but "map" need a cache that keeps the
            teacher's own q and k; those with v also need one that stores v. Copying "qk" means copying the map.
        drop_path: the largest rate of stochastic depth.

    Raises:
        ConfigError: a value cannot be used, or the cache does not hold what is to be transferred.
        TeacherError: the student does not fit the teacher's attention; the message names both sides.

    Example:
        student = atcache.make_student("in1k.zarr", "copy")
        batch = next(iter(atcache.batches("in1k.zarr", batch_size=4, device="cpu")))
        logits = student(batch.images, batch.attention)  # (batch, class)
    """
    if mode not in ("copy", "distill"):
        raise ConfigError(
            f"mode={mode!r}: expected copy or distill. Other students are given no attention: timm.create_model makes "
            "them."
        )
    if what not in WHATS:
        raise ConfigError(f"what={what!r}: expected one of {', '.join(WHATS)}.")
    if not 0 <= drop_path < 1:
        raise ConfigError(f"drop_path={drop_path}: expected 0 or more, and less than 1.")
    for name, chosen, mapped in (("layers", layers, layer_map), ("heads", heads, head_map)):
        if chosen is not None and mapped is not None:
            raise ConfigError(f"{name} and {name[:-1]}_map both say which {name} are transferred; give one of them.")
    readers = open_caches(locations_of(cache))
    record = CacheRecord.of(readers[0])
    pairing = plan_pairing(
        record.geometry,
        layers=index_text(layers),
        heads=index_text(heads),
        layer_map=_pairs_text(layer_map),
        head_map=index_text(head_map),
        what=what,
        copies=mode == "copy",
    )
    if pairing.what != "map":
        CacheTeacher(readers, [pairing], torch.device("cpu"))  # refuses caches that do not hold it
    num_classes = _count_classes(readers, num_classes)
    architecture = parse_model_name(student or record.identity.teacher)
    made = new_student(mode, architecture, num_classes, geometry=record.geometry, pairing=pairing, drop_path=drop_path)
    check_views_fit(made, readers[0])
    module = made.module.train()  # new_student leaves it in evaluation mode
    assert isinstance(module, (CopyStudent, DistilledStudent)), "these are the modules of the two modes"
    return module


def _count_classes(readers: Sequence[CacheReader], wanted: int | None) -> int:
    """As many as the caches name or their labels need, or as are wanted; 0 for a student without a head."""
    if wanted == 0:
        return 0
    if wanted is not None and wanted < 0:
        raise ConfigError(f"num_classes={wanted}: expected at least 1, or 0 for a student without a head.")
    indexes = [reader.samples for reader in readers]
    starts = np.cumsum([0, *(index.num_samples for index in indexes)]).tolist()
    usable = [start + usable_samples(reader) for start, reader in zip(starts, readers, strict=False)]
    return count_classes(indexes, np.concatenate(usable), wanted)


def _pairs_text(pairs: str | Mapping[int, int] | None) -> str | None:
    """A layer map as the command line takes it."""
    if pairs is None or isinstance(pairs, str):
        return pairs
    return ",".join(f"{student}:{teacher}" for student, teacher in pairs.items())
