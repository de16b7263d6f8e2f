"""Which image goes into which tar, under which key and with which label."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath

from atcache.errors import SourceError

from .classes import Classes
from .config import PackConfig

# Keys are kept short enough for the plain tar header, which every reader knows.
_MAX_KEY_NBYTES = 90
# What a sample takes beyond its image, at most: a header and padding for the image, and the same for the label.
_SAMPLE_OVERHEAD_NBYTES = 2048
# What ends a tar, at most: two empty blocks, padded to a multiple of 10240 bytes.
_TAR_OVERHEAD_NBYTES = 20480


@dataclass(frozen=True, kw_only=True, slots=True)
class PackedSample:
    """One image on its way into a tar."""

    path: Path
    """The file that holds its bytes."""
    offset: int = 0
    """Where they begin in it."""
    nbytes: int
    key: str
    extension: str
    """Lower-cased, without the dot."""
    label: int | None
    """None if samples have no labels."""

    def read(self) -> bytes:
        """Its bytes, as they were found.

        Raises:
            SourceError: they cannot be read, or are fewer than there were.
        """
        try:
            with self.path.open("rb") as file:
                file.seek(self.offset)
                data = file.read(self.nbytes)
        except OSError as error:
            raise SourceError(f"{self.path} cannot be read: {error.strerror}. Nothing was kept.") from error
        if len(data) != self.nbytes:
            raise SourceError(f"{self.path} became shorter while it was packed. Nothing was kept; pack again.")
        return data


@dataclass(frozen=True, kw_only=True, slots=True)
class PackPlan:
    """What a pack will write."""

    classes: tuple[str, ...] | None
    """Names of the classes; the position is the label. Empty ones count, so that labels agree with other programs.
    None if only numbers are known, or if there are no labels."""
    tars: tuple[tuple[PackedSample, ...], ...]
    ignored: dict[str, int]
    """How many files are left out, by reason."""

    @property
    def num_samples(self) -> int:
        """Images in all tars."""
        return sum(map(len, self.tars))

    @property
    def num_classes(self) -> int:
        """Classes, those without an image included; 0 if there are no labels."""
        if self.classes is not None:
            return len(self.classes)
        return 1 + max((sample.label for tar in self.tars for sample in tar if sample.label is not None), default=-1)

    @property
    def nbytes(self) -> int:
        """Bytes of all tars, at most."""
        image_nbytes = sum(sample.nbytes for tar in self.tars for sample in tar)
        return image_nbytes + self.num_samples * _SAMPLE_OVERHEAD_NBYTES + len(self.tars) * _TAR_OVERHEAD_NBYTES


def plan_tars(
    config: PackConfig, samples: Sequence[PackedSample], classes: Classes | None, ignored: dict[str, int]
) -> PackPlan:
    """The plan that cuts samples, which are in the order of their names, into tars."""
    if not config.in_order:
        # Sorting by a hash gives the same order on every machine and in every version of Python.
        samples = sorted(
            samples,
            key=lambda sample: hashlib.blake2b(f"{config.shuffle_seed}/{sample.key}".encode()).digest(),
        )
    step = config.samples_per_tar
    tars = tuple(tuple(samples[start : start + step]) for start in range(0, len(samples), step))
    return PackPlan(classes=None if classes is None else classes.names, tars=tars, ignored=ignored)


def unique_key(path: PurePath, keys: set[str]) -> str:
    """A unique key that begins as the path does and suits every WebDataset reader: without dots, not too long.

    Args:
        path: relative.
        keys: those that are taken; the new one is added.
    """
    parts = [re.sub(r"[^\w-]", "_", part) for part in path.with_suffix("").parts]
    key = "/".join(parts)
    if len(key.encode()) > _MAX_KEY_NBYTES:
        name_hash = hashlib.blake2b(os.fsencode(path), digest_size=12).hexdigest()
        key = f"{parts[0].encode()[:40].decode(errors='ignore')}/{name_hash}"
    unique, number = key, 1
    while unique in keys:
        number += 1
        unique = f"{key}-{number}"
    keys.add(unique)
    return unique
