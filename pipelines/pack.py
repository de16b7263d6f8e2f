"""Pack an image folder with one folder per class into WebDataset tars. The bytes of the images do not change."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from atcache.errors import ConfigError, DiskFullError, SourceError
from atcache.fields import JsonFields
from atcache.files.durable import (
    check_can_write,
    disk_errors_explained,
    encode_json,
    fsync_path,
    make_folder,
    only_writer,
    write_file,
)
from atcache.images.decode import IMAGE_EXTENSIONS
from atcache.images.tars import PACK_RECORD, pack_folder

from .options import config, option, seed_option
from .running.progress import Progress

CLASSES_FILE = "classes.txt"
# Keys are kept short enough for the plain tar header, which every reader knows.
_MAX_KEY_NBYTES = 90
# What a sample takes beyond its image, at most: a header and padding for the image, and the same for the label.
_SAMPLE_OVERHEAD_NBYTES = 2048
# What ends a tar, at most: two empty blocks, padded to a multiple of 10240 bytes.
_TAR_OVERHEAD_NBYTES = 20480


@config
class PackConfig:
    """The options of `atcache pack`."""

    data: Path = option("Image folder with one folder per class; classes are numbered in the order of their names.")
    out: Path = option("Folder for the tars and classes.txt; created if it is missing.", is_written=True)
    name: str | None = option(
        "Name of the tars: NAME-000000.tar and so on. It becomes part of each sample's key, so give training and "
        "validation tars different names.  [default: the image folder's name]",
        default=None,
    )
    samples_per_tar: int = option("Images in each tar; the last may hold fewer.", default=1000, at_least=1)
    shuffle_seed: int = seed_option("the order of the images in the tars")
    in_order: bool = option(
        "Keep the images in the order of their names instead of shuffling; tars sorted by class make poor batches.",
        default=False,
    )

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9_-]+", self.tar_name):
            raise ConfigError(f"the tars cannot be called {self.tar_name!r}: give a name of letters, digits, - and _.")

    @property
    def tar_name(self) -> str:
        """`name`, or the name of the image folder if it is None."""
        return self.data.resolve().name if self.name is None else self.name


@dataclass(frozen=True, kw_only=True, slots=True)
class PackedSample:
    """One image on its way into a tar."""

    path: Path
    key: str
    extension: str
    """As in the file's name, lower-cased, without the dot."""
    label: int
    nbytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class PackPlan:
    """What a pack will write."""

    classes: tuple[str, ...]
    """Names of the class folders; the position is the label. Empty ones count, so labels agree with other programs."""
    tars: tuple[tuple[PackedSample, ...], ...]
    ignored: dict[str, int]
    """How many files are left out, by reason."""

    @property
    def num_samples(self) -> int:
        """Images in all tars."""
        return sum(map(len, self.tars))

    @property
    def nbytes(self) -> int:
        """Bytes of all tars, at most."""
        image_nbytes = sum(sample.nbytes for tar in self.tars for sample in tar)
        return image_nbytes + self.num_samples * _SAMPLE_OVERHEAD_NBYTES + len(self.tars) * _TAR_OVERHEAD_NBYTES


@dataclass(frozen=True, kw_only=True, slots=True)
class PackSummary(JsonFields):
    """What a pack has written."""

    tars: tuple[str, ...]
    num_samples: int
    num_classes: int
    nbytes: int
    ignored: dict[str, int]


def plan_pack(config: PackConfig) -> PackPlan:
    """Plan which image goes into which tar, under which key. Depends only on the files in the folder and the config.

    Hidden files, files that are not images, empty files, files outside the class folders and links that lead out of
    `data` are left out and counted; linked folders are not entered.

    Raises:
        SourceError: there is no folder, no class folder or no image.
    """
    root = config.data.resolve()
    if not root.is_dir():
        raise SourceError(f"{config.data} is not a folder. Give an image folder with one folder per class.")
    ignored: Counter[str] = Counter()
    classes: list[str] = []
    for entry in sorted(root.iterdir()):
        if entry.is_dir() and not entry.is_symlink() and not entry.name.startswith("."):
            classes.append(entry.name)
        else:
            ignored["linked or hidden folders" if entry.is_dir() else "files outside the class folders"] += 1
    if not classes:
        raise SourceError(f"{root} holds no folders. Expected one folder per class: {root}/CLASS/IMAGE.jpg.")
    samples: list[PackedSample] = []
    keys: set[str] = set()
    for label, name in enumerate(classes):
        for path in _images(root, name, ignored):
            relative = path.relative_to(root)
            samples.append(
                PackedSample(
                    path=path,
                    key=_unique_key(relative, keys),
                    extension=path.suffix[1:].lower(),
                    label=label,
                    nbytes=path.stat().st_size,
                )
            )
    if not samples:
        raise SourceError(
            f"the class folders of {root} hold no images ({', '.join(IMAGE_EXTENSIONS)}); left out: "
            f"{', '.join(f'{count} {reason}' for reason, count in sorted(ignored.items())) or 'nothing'}."
        )
    if not config.in_order:
        # Sorting by a hash gives the same order on every machine and in every version of Python.
        samples.sort(key=lambda sample: hashlib.blake2b(f"{config.shuffle_seed}/{sample.key}".encode()).digest())
    step = config.samples_per_tar
    tars = tuple(tuple(samples[start : start + step]) for start in range(0, len(samples), step))
    return PackPlan(classes=tuple(classes), tars=tars, ignored=dict(ignored))


def _images(root: Path, class_name: str, ignored: Counter[str]) -> list[Path]:
    """The images under a class folder, sorted; counts in `ignored` what is left out."""
    images: list[Path] = []
    for folder, folders, files in os.walk(root / class_name):
        linked = [name for name in folders if name.startswith(".") or (Path(folder) / name).is_symlink()]
        ignored["linked or hidden folders"] += len(linked)
        folders[:] = [name for name in folders if name not in linked]
        for name in files:
            path = Path(folder) / name
            if name.startswith("."):
                ignored["hidden files"] += 1
            elif path.suffix.lower() not in IMAGE_EXTENSIONS:
                ignored["files that are no images"] += 1
            elif path.is_symlink() and not path.resolve().is_relative_to(root):
                ignored["links that lead out of the folder"] += 1
            elif not path.is_file():
                ignored["broken links and special files"] += 1
            elif path.stat().st_size == 0:
                ignored["empty files"] += 1
            else:
                images.append(path)
    for reason in [reason for reason, count in ignored.items() if not count]:
        del ignored[reason]
    return sorted(images)


def _unique_key(relative: Path, keys: set[str]) -> str:
    """A unique key that begins with the class folder and suits every WebDataset reader: without dots, not too long."""
    parts = [re.sub(r"[^\w-]", "_", part) for part in relative.with_suffix("").parts]
    key = "/".join(parts)
    if len(key.encode()) > _MAX_KEY_NBYTES:
        name_hash = hashlib.blake2b(os.fsencode(relative), digest_size=12).hexdigest()
        key = f"{parts[0].encode()[:40].decode(errors='ignore')}/{name_hash}"
    unique, number = key, 1
    while unique in keys:
        number += 1
        unique = f"{key}-{number}"
    keys.add(unique)
    return unique


def pack(config: PackConfig) -> PackSummary:
    """Write the tars and `classes.txt` into `config.out`; equal folders and configs give equal bytes.

    The tars are written to a hidden folder in `out` and moved out of it when all are complete, so a pack that fails
    leaves none. What a killed pack leaves is removed by the next pack; until then all commands refuse its tars.

    Raises:
        SourceError: there is nothing to pack, an image cannot be read, or tars of that name exist.
        DiskFullError: the tars do not fit on the disk.
        ConfigError: another process is packing tars of that name there.
    """
    plan = plan_pack(config)
    names = tuple(f"{config.tar_name}-{position:06d}.tar" for position in range(len(plan.tars)))
    out = config.out
    _make_out(out, config.data.resolve())
    partial = pack_folder(out, config.tar_name)
    with disk_errors_explained(out):
        partial.mkdir(exist_ok=True)
    with disk_errors_explained(out), only_writer(partial, where_possible=True):
        partial.mkdir(exist_ok=True)  # another pack may have ended, and removed it, while this one waited
        _undo(partial, out)
        try:
            _check_out(out, config.tar_name, plan)
            with Progress("pack", total=plan.num_samples, unit="images") as progress:
                for name, samples in zip(names, plan.tars, strict=True):
                    _write_tar(partial / name, samples)
                    progress.advance(len(samples))
            (partial / CLASSES_FILE).write_bytes(_classes_text(plan))
            nbytes = sum((partial / name).stat().st_size for name in names)
            _put_in_place(partial, out, names)
        finally:
            _undo(partial, out)
            partial.rmdir()
    return PackSummary(
        tars=tuple(str(out / name) for name in names),
        num_samples=plan.num_samples,
        num_classes=len(plan.classes),
        nbytes=nbytes,
        ignored=plan.ignored,
    )


def _classes_text(plan: PackPlan) -> bytes:
    return b"".join(os.fsencode(name) + b"\n" for name in plan.classes)


def _put_in_place(partial: Path, out: Path, names: tuple[str, ...]) -> None:
    """Move the tars to `out`. Until all are there, a record lists the files that this pack moves."""
    moves = names if (out / CLASSES_FILE).exists() else (*names, CLASSES_FILE)
    record = partial / PACK_RECORD
    write_file(record, encode_json({name: _identity(partial / name) for name in moves}))
    for name in moves:
        (partial / name).replace(out / name)
    fsync_path(out)
    record.unlink()


def _undo(partial: Path, out: Path) -> None:
    """Remove what an unfinished pack has made, including the files that it has already moved to `out`."""
    record = partial / PACK_RECORD
    if record.exists():
        for name, identity in json.loads(record.read_text()).items():
            # Remove only what this pack has moved: the file left the hidden folder, and has not been replaced since.
            if not (partial / name).exists() and (out / name).exists() and _identity(out / name) == identity:
                (out / name).unlink()
        fsync_path(out)
    for path in partial.iterdir():
        path.unlink()


def _identity(path: Path) -> list[int]:
    """Size and time of a file. They stay the same when it is moved, and almost never when it is replaced."""
    return [path.stat().st_size, path.stat().st_mtime_ns]


def _make_out(out: Path, root: Path) -> None:
    """Make the folder for the tars."""
    if out.exists() and not out.is_dir():
        raise SourceError(f"{out} is a file, expected a folder for the tars. Give another --out.")
    if out.resolve().is_relative_to(root):
        raise SourceError(f"{out} lies inside the image folder, where it would become a class. Give another --out.")
    make_folder(out)
    check_can_write(out)


def _check_out(out: Path, tar_name: str, plan: PackPlan) -> None:
    """Refuse a folder that cannot take the tars, before anything is written."""
    existing = sorted(out.glob(f"{tar_name}-*.tar"))
    if existing:
        raise SourceError(
            f"{out} already holds {len(existing)} tars called {tar_name}-*.tar, such as {existing[0].name}. Remove "
            "them, or give another --out or --name."
        )
    classes_path = out / CLASSES_FILE
    if classes_path.exists() and classes_path.read_bytes() != _classes_text(plan):
        raise SourceError(
            f"{classes_path} names other classes than this folder has, so labels would not agree. Give another --out."
        )
    free_nbytes = shutil.disk_usage(out).free
    if plan.nbytes > free_nbytes:
        raise DiskFullError(f"{out} has {free_nbytes} bytes free, but the tars need {plan.nbytes}. Free some space.")


def _write_tar(path: Path, samples: tuple[PackedSample, ...]) -> None:
    """Write one tar; it is safely on disk when this returns."""
    from webdataset.writer import TarWriter

    with path.open("wb") as file:
        # A fixed time and owner: equal images give equal bytes.
        with TarWriter(file, encoder=False, mtime=0, user="", group="", mode=0o644) as writer:
            for sample in samples:
                label = str(sample.label).encode()
                writer.write({"__key__": sample.key, sample.extension: _read(sample), "cls": label})
        file.flush()
        os.fsync(file.fileno())


def _read(sample: PackedSample) -> bytes:
    try:
        return sample.path.read_bytes()
    except OSError as error:
        raise SourceError(f"{sample.path} cannot be read: {error.strerror}. Nothing was kept.") from error
