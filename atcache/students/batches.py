"""Batches that are ready for a training loop: images, labels, and the teacher's attention of the same views."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias, cast, final

import numpy as np
import torch
from torch import Tensor

from atcache.cache.cache import Cache
from atcache.cache.record import CacheRecord
from atcache.choices import LABELS, MAX_SEED, Labels, Shuffle
from atcache.errors import ConfigError, SourceError
from atcache.feed.batch import Batch
from atcache.feed.beside import BesideViews, Other, rows_beside
from atcache.feed.caches import are_mixed, choose_cached_samples, open_caches, open_joined_views
from atcache.feed.classes import count_classes
from atcache.feed.loader import BatchStream
from atcache.feed.order import SampleOrder
from atcache.feed.prefetch import Prefetcher
from atcache.files.location import Location, Url, parse_location
from atcache.machine import kept_nbytes
from atcache.store.reader import CacheReader
from atcache.students.pairing import TeacherFactors, plan_pairing
from atcache.students.teacher_side import CacheTeacher
from atcache.teachers.devices import resolve_device
from atcache.teachers.inputs import normalise_images

Caches: TypeAlias = str | Location | Cache | Sequence[str | Location | Cache]
"""A cache or several: their folders, their URLs, or what `atcache.open` returned."""
Indices: TypeAlias = str | Sequence[int]
"""Layers or heads: [0, 1, 2, 5], or "0-2,5"."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class TrainingBatch:
    """What one step of a training loop takes. Images, labels and attention are of the same views, row by row.

    Example:
        batch = next(iter(atcache.batches("in1k.zarr", batch_size=8)))
        cache.samples.sample_key.values[batch.sample]  # which samples these are
    """

    images: Tensor
    """The views, normalised: float32 (batch, channel, height, width), on the device."""
    labels: Tensor
    """Classes, int64 (batch,), on the device; -1 for samples without a label. If the cache's views are mixed: the share
    of each class in each image, float32 (batch, class). `torch.nn.functional.cross_entropy` takes both."""
    attention: TeacherFactors
    """The teacher's attention, for a student of `make_student`. `attention.layer(5).maps()` are the maps of layer 5,
    shape (batch, head, query, key). Each call of `layer` decodes that layer, on the device."""
    beside: Mapping[str, TeacherFactors]
    """The attention of other teachers, in the same form, by the names that `atcache.batches` was given."""
    sample: Tensor
    """Rows of the sample table, int64 (batch,), in host memory. With several caches, row numbers continue from one
    cache to the next."""


@final
class Batches:
    """The batches of a training, in an order that only the seed decides. Made by `atcache.batches`.

    One `for` loop is one pass: `num_steps` batches. The next loop is the next pass: it continues with the following
    epochs, in a new order and with other views if the cache has several. After a `break`, the next loop continues with
    the batch that follows.

    Example:
        batches = atcache.batches("in1k.zarr", batch_size=16, epochs=2)
        for batch in batches:
            assert batch.images.shape[0] == len(batch.labels) == 16
            maps = batch.attention.layer(0).maps()  # (batch, head, query, key)
        torch.save(batches.state_dict(), "position.pt")
    """

    def __init__(
        self,
        make_stream: partial[BatchStream],
        teacher: CacheTeacher,
        *,
        beside: Mapping[str, CacheTeacher],
        num_steps: int,
        num_classes: int,
        mixed: bool,
        device: torch.device,
        mean: tuple[float, ...],
        std: tuple[float, ...],
    ) -> None:
        """Take what `atcache.batches` opened. Users call `atcache.batches` instead."""
        self._make_stream, self._teacher, self._mixed = make_stream, teacher, mixed
        self._beside = beside
        self._mean, self._std = mean, std
        self.num_steps = num_steps
        """Batches of one whole pass: the length of a learning rate schedule."""
        self.num_classes = num_classes
        """As many as the caches name, or as their labels need; 0 without labels."""
        self.device = device
        """Where images, labels and attention are."""
        self._prefetcher = Prefetcher(device)
        self._pass = 0
        self._is_over = False
        """Whether the last batch of this pass was handed out."""
        self._stream = self._stream_of_pass(0)

    def __len__(self) -> int:
        """Number of batches that the next `for` loop gives: what is left of this pass, or a whole pass."""
        return self.num_steps if self._is_over else len(self._stream)

    def __iter__(self) -> Iterator[TrainingBatch]:
        if self._is_over:  # a loop that counts took the last batch, and did not ask for one more
            self._begin_next_pass()
        for batch in self._stream:
            self._is_over = not len(self._stream)
            yield self._ready(self._prefetcher.send(self._looked_at(batch)), batch.sample_B)
        self._begin_next_pass()

    def _begin_next_pass(self) -> None:
        self._pass, self._is_over = self._pass + 1, False
        self._stream = self._stream_of_pass(self._pass, first_step=self._stream.step)

    def state_dict(self) -> dict[str, Any]:
        """The position, and what identifies these batches; JSON values. What workers have read ahead does not count."""
        return {"pass": self._pass, **self._stream.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue after the last batch that was handed out when `state` was taken, with exactly the same batches.

        The number of workers and the device may differ; the number of epochs too, if this pass has steps enough.

        Raises:
            ConfigError: `state` is that of other batches; the message names what differs.

        Example:
            batches = atcache.batches("in1k.zarr", batch_size=16, epochs=3)
            next(iter(batches))
            again = atcache.batches("in1k.zarr", batch_size=16, epochs=3)
            again.load_state_dict(batches.state_dict())
            assert len(again) == again.num_steps - 1
        """
        try:
            number = int(state["pass"])
            stream = self._stream_of_pass(number)
            stream.load_state_dict(state)
        except (KeyError, TypeError, AttributeError) as error:
            raise ConfigError(
                f"the state cannot be used ({error!r}). Give what `state_dict()` of such batches returned."
            ) from error
        self._pass, self._stream, self._is_over = number, stream, False

    def _stream_of_pass(self, number: int, *, first_step: int = 0) -> BatchStream:
        return self._make_stream(num_steps=(number + 1) * self.num_steps, first_step=first_step)

    def _looked_at(self, batch: Batch) -> Batch:
        """See `CacheTeacher.looked_at`."""
        beside = [
            teacher.looked_at(batch._replace(codes=(codes,))).codes[0]
            for teacher, codes in zip(self._beside.values(), batch.beside, strict=True)
        ]
        return self._teacher.looked_at(batch)._replace(beside=tuple(beside))

    def _ready(self, batch: Batch, sample_B: Tensor) -> TrainingBatch:
        labels = batch.class_probabilities(self.num_classes) if self._mixed else batch.label_B
        return TrainingBatch(
            images=normalise_images(batch.pixels_BHWC, self._mean, self._std, self.device),
            labels=labels,
            attention=self._teacher.factors(batch),
            beside={
                name: teacher.factors(batch._replace(codes=(codes,)))
                for (name, teacher), codes in zip(self._beside.items(), batch.beside, strict=True)
            },
            sample=sample_B,
        )


def batches(
    cache: Caches,
    *,
    beside: Mapping[str, str | Location | Cache] | None = None,
    data: str | Path | Sequence[str | Path] | None = None,
    batch_size: int = 256,
    epochs: float = 1.0,
    steps: int | None = None,
    seed: int = 0,
    shuffle: Shuffle = "global",
    subset: int | None = None,
    labels: Labels = "required",
    num_classes: int | None = None,
    layers: Indices | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    workers: int = 0,
    keep_mib: int = 256,
    device: str | torch.device = "auto",
    rank: int = 0,
    num_ranks: int = 1,
) -> Batches:
    """The batches of a training loop: images, labels and the teacher's attention, as `atcache train` reads them.

    Every sample comes once per epoch, and all batches are full: one may hold the end of an epoch and the beginning of
    the next. Epoch e shows view e modulo the cache's number of views. Samples that could not be stored are left out,
    and so are those without a label, unless `labels` says otherwise.

    Args:
        cache: a complete cache, or several to train on as one set of samples.
        beside: caches of other teachers for the same images, by names of your choice: each batch has their attention of
            the same views too. They must have been built with the same policy, seed and image size, which is checked.
            Samples that one of them lacks are left out.
        data: where the caches' tars are now, if they were moved since the build.
        batch_size: samples a step.
        epochs: passes over the samples that one `for` loop makes.
        steps: batches of one `for` loop, instead of `epochs`.
        seed: decides the order of the samples and the subset.
        shuffle: "global", or "block" for disks that are slow at random reads.
        subset: use only this many samples, spread over the classes as evenly as possible.
        labels: "required" takes only samples with a label. "optional" takes all; the label of a sample without one is
            -1, which `cross_entropy(..., ignore_index=-1)` skips. "none" takes all without their labels.
        num_classes: how many classes there are; None for as many as the caches name or their labels need. It matters
            only for mixed views, whose labels are the shares of the classes.
        layers: the teacher's layers that are read, such as "0-17" or [0, 1, 2]; None for all in the cache. Leave out
            layers that no student uses, and less is read.
        mean: subtracted from red, green and blue in 0..1; None for the teacher's. A student of another family may
            expect other values: `atcache train` takes the student's own.
        std: divided by, after that; None for the teacher's. Mean (0, 0, 0) and std (1, 1, 1) leave images in 0..1.
        workers: processes that read ahead; 0 reads between the steps.
        keep_mib: memory in which views that were read are kept, in MiB, over all workers: small datasets are read once.
        device: "auto" (a GPU if there is one), "cpu", "cuda" or "cuda:N".
        rank: which of `num_ranks` equal parts of every batch this process takes.
        num_ranks: processes that train together, each with its own rank; a divisor of `batch_size`.

    Raises:
        ConfigError: a value cannot be used.
        CacheMismatchError: a cache is not complete, or the caches do not fit together. A view of a cache `beside` that
            is another image is found when it is read.
        CacheMissError: there is no cache at one of the paths.
        SourceError: the tars cannot be found, or no sample can be used.

    Example:
        batches = atcache.batches("in1k.zarr", batch_size=8, seed=1)
        batch = next(iter(batches))
        batch.images.shape  # (batch, channel, height, width)
        batch.labels.shape  # (batch,)
        batch.attention.layer(0).maps().shape  # (batch, head, query, key)
    """
    for name, value, least in (
        ("batch_size", batch_size, 1),
        ("steps", steps, 1),
        ("subset", subset, 1),
        ("num_classes", num_classes, 1),
        ("seed", seed, 0),
        ("workers", workers, 0),
        ("keep_mib", keep_mib, 0),
        ("num_ranks", num_ranks, 1),
        ("rank", rank, 0),
    ):
        if value is not None and value < least:
            raise ConfigError(f"{name}={value}: expected at least {least}.")
    if seed > MAX_SEED:
        raise ConfigError(f"seed={seed}: expected at most {MAX_SEED}.")
    if not (epochs > 0 and math.isfinite(epochs)):
        raise ConfigError(f"epochs={epochs}: expected more than 0, and finite.")
    if rank >= num_ranks or batch_size % num_ranks:
        raise ConfigError(
            f"rank={rank}, num_ranks={num_ranks}, batch_size={batch_size}: expected a rank from 0 to num_ranks - 1, "
            "and a batch that can be cut into equal parts."
        )
    if labels not in LABELS:
        raise ConfigError(f"labels={labels!r}: expected one of {', '.join(LABELS)}.")
    on = resolve_device(str(device))
    readers = open_caches(locations_of(cache))
    geometry = CacheRecord.of(readers[0]).geometry
    teacher = CacheTeacher(readers, [plan_pairing(geometry, layers=index_text(layers))], on)
    views, label_S, usable_S = open_joined_views(
        readers,
        _as_text(data) if data is not None else _data_of(cache),
        code_layers=teacher.code_layers,
        keep_nbytes=kept_nbytes(keep_mib, workers),
        labels=labels,
    )
    if labels != "none":
        num_classes = count_classes([reader.samples for reader in readers], usable_S, num_classes)
    others = _open_others(beside or {}, readers, on)
    if others:
        views = BesideViews(views, readers, [other for other, _ in others.values()])
        usable_S = _in_all(usable_S, others)
    order = SampleOrder(
        sample_S=choose_cached_samples(readers, label_S, usable_S, subset=subset, seed=seed),
        seed=seed,
        batch_size=batch_size,
        shuffle=shuffle,
        rank=rank,
        num_ranks=num_ranks,
    )
    return Batches(
        partial(BatchStream, views, label_S, order, workers=workers),
        teacher,
        beside={name: its_teacher for name, (_, its_teacher) in others.items()},
        num_steps=order.num_steps(epochs) if steps is None else steps,
        num_classes=num_classes or 0,
        mixed=any(map(are_mixed, readers)),
        device=on,
        mean=_colours("mean", mean, readers[0]),
        std=_colours("std", std, readers[0]),
    )


def _open_others(
    caches: Mapping[str, str | Location | Cache], readers: Sequence[CacheReader], device: torch.device
) -> dict[str, tuple[Other, CacheTeacher]]:
    """The caches of other teachers by name, each with what decodes it."""
    others: dict[str, tuple[Other, CacheTeacher]] = {}
    for name, cache in caches.items():
        (reader,) = open_caches(locations_of(cache))
        teacher = CacheTeacher([reader], [plan_pairing(CacheRecord.of(reader).geometry, layers=None)], device)
        others[name] = Other(reader, teacher.code_layers[0], rows_beside(readers, reader)), teacher
    return others


def _in_all(usable_S: np.ndarray, others: Mapping[str, tuple[Other, CacheTeacher]]) -> np.ndarray:
    """Those of the samples that the caches of all other teachers have too."""
    for name, (other, _) in others.items():
        usable_S = usable_S[other.row_S[usable_S] >= 0]
        if not len(usable_S):
            raise SourceError(
                f"beside {name}: {other.reader.path} has none of the samples. Build it from the same tars, under the "
                "same names."
            )
    return usable_S


def locations_of(caches: Caches) -> tuple[Location, ...]:
    """The folders or URLs of one or several caches.

    Raises:
        ConfigError: no cache is named, or one has a URL of a kind that cannot be read.
    """
    if not (named := _listed(caches)):
        raise ConfigError("no cache is named: give at least one.")
    return tuple(cache.path if isinstance(cache, Cache) else parse_location(cache) for cache in named)


def index_text(indices: Indices | None) -> str | None:
    """Layers or heads as text, as the command line takes them."""
    return indices if indices is None or isinstance(indices, str) else ",".join(map(str, indices))


def _listed(caches: Caches) -> Sequence[str | Location | Cache]:
    return [caches] if isinstance(caches, (str, Path, Url, Cache)) else caches


def _data_of(caches: Caches) -> str | list[str] | None:
    """Where the tars are, of the caches that were opened with `data`; None if none was."""
    given = [cache.data for cache in _listed(caches) if isinstance(cache, Cache) and cache.reader.layout.pixels is None]
    places = [place for data in given if data is not None for place in _listed_data(data)]
    return places or None


def _as_text(data: str | Path | Sequence[str | Path]) -> str | list[str]:
    return str(data) if isinstance(data, (str, Path)) else _listed_data(data)


def _listed_data(data: str | Path | Sequence[str | Path]) -> list[str]:
    return [str(data)] if isinstance(data, (str, Path)) else list(map(str, data))


def _colours(name: str, given: Sequence[float] | None, reader: CacheReader) -> tuple[float, ...]:
    """The mean or std of red, green and blue: the given one, or the teacher's."""
    if given is None:
        given = cast("tuple[float, ...]", getattr(CacheRecord.of(reader).identity.input, name))
    values = tuple(map(float, given))
    if len(values) != 3 or not all(map(math.isfinite, values)) or (name == "std" and min(values) <= 0):
        positive = "three positive numbers" if name == "std" else "three numbers"
        raise ConfigError(f"{name}={values}: expected {positive}, for red, green and blue.")
    return values
