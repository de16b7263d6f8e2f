"""Pack images into WebDataset tars. The bytes of the images do not change."""

from __future__ import annotations

import json
import os
import re
import shutil
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
    write_file,
)
from atcache.files.writers import only_writer
from atcache.images.class_names import CLASSES_FILE, read_class_names
from atcache.images.tars import PACK_RECORD, pack_folder

from ..running.progress import Progress
from .classes import Classes, read_classes
from .config import PackConfig
from .folders import plan_folder
from .hub import fetch_dataset
from .plan import PackedSample, PackPlan
from .splits import choose_files
from .tables import Tables, find_tables

_IMAGES_FILE = "images"  # in the hidden folder: the images of tables, which the tars take in another order
_OF_TABLES = ("subset", "split", "image_column", "label_column")


@dataclass(frozen=True, slots=True)
class _Found:
    tables: Tables
    source: str


@dataclass(frozen=True, kw_only=True, slots=True)
class PackSummary(JsonFields):
    """What a pack has written."""

    tars: tuple[str, ...]
    num_samples: int
    num_classes: int
    nbytes: int
    ignored: dict[str, int]
    source: str
    """Where the images are from; of a dataset on the hub, with its commit: hf:ORG/NAME@COMMIT."""


def pack(config: PackConfig) -> PackSummary:
    """Write the tars and `classes.txt` into `config.out`; equal folders and configs give equal bytes.

    The tars are written to a hidden folder in `out` and moved out of it when all are complete, so a pack that fails
    leaves none. What a killed pack leaves is removed by the next pack; until then all commands refuse its tars.

    Raises:
        SourceError: there is nothing to pack, an image cannot be read, or tars of that name exist.
        DiskFullError: the tars do not fit on the disk.
        ConfigError: another process is packing tars of that name there.
    """
    found = _find(config)
    source = str(config.data.resolve()) if isinstance(found, PackPlan) else found.source
    out = config.out
    _make_out(out, config.data.resolve())
    partial = pack_folder(out, config.tar_name)
    with disk_errors_explained(out), only_writer(out, where_possible=True, name=f"{partial.name}.lock"):
        partial.mkdir(exist_ok=True)
        _undo(partial, out)
        try:
            _check_names(out, config.tar_name)
            plan = found if isinstance(found, PackPlan) else found.tables.plan(config, partial / _IMAGES_FILE)
            names = tuple(f"{config.tar_name}-{position:06d}.tar" for position in range(len(plan.tars)))
            _check_out(out, plan)
            with Progress("pack", total=plan.num_samples, unit="images") as progress:
                for name, samples in zip(names, plan.tars, strict=True):
                    _write_tar(partial / name, samples)
                    progress.advance(len(samples))
            nbytes = sum((partial / name).stat().st_size for name in names)
            if plan.classes is not None and not (out / CLASSES_FILE).exists():
                (partial / CLASSES_FILE).write_bytes(Classes(plan.classes).text())
                names = (*names, CLASSES_FILE)
            if config.hub_name is not None:  # the name alone does not say which version of the dataset these are
                about = f"{config.tar_name}-source.json"
                chosen = {"subset": config.subset, "split": config.split}
                write_file(partial / about, encode_json({"source": source, **chosen}))
                names = (*names, about)
            _put_in_place(partial, out, names)
        finally:
            _undo(partial, out)
            partial.rmdir()
    return PackSummary(
        tars=tuple(str(out / name) for name in names if name.endswith(".tar")),
        num_samples=plan.num_samples,
        num_classes=plan.num_classes,
        nbytes=nbytes,
        ignored=plan.ignored,
        source=source,
    )


def _find(config: PackConfig) -> PackPlan | _Found:
    """What is to be packed: the plan of an image folder, or the tables of a dataset."""
    is_folder = config.hub_name is None
    files = find_tables(config.data.resolve()) if is_folder and config.data.is_dir() else []
    if config.labels_file is not None and (files or not is_folder):
        raise ConfigError(
            f"labels={config.labels} is for image folders; {config.data} is a dataset with labels of its own."
        )
    if config.hub_name is not None:
        fetched = fetch_dataset(config.hub_name, config)
        return _Found(Tables.open(fetched.files, config), fetched.source)
    if not files:
        if (asked := next((name for name in _OF_TABLES if getattr(config, name) is not None), None)) is not None:
            raise SourceError(
                f"{config.data} holds no parquet or arrow files, so --{asked.replace('_', '-')} means nothing. Leave "
                "it out, or give another --data."
            )
        return plan_folder(config)
    root = config.data.resolve()
    names = [file.relative_to(root) for file in files]
    chosen = choose_files(names, config.subset, config.split, str(config.data))
    return _Found(Tables.open([root / file for file in chosen], config), str(root))


def _put_in_place(partial: Path, out: Path, names: tuple[str, ...]) -> None:
    """Move the files to `out`. Until all are there, a record lists the files that this pack moves."""
    record = partial / PACK_RECORD
    write_file(record, encode_json({name: _identity(partial / name) for name in names}))
    for name in names:
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


def _check_names(out: Path, tar_name: str) -> None:
    """Refuse a folder that has tars of this name."""
    number = re.compile(rf"{re.escape(tar_name)}-[0-9]{{6,}}\.tar")
    existing = sorted(path for path in out.iterdir() if number.fullmatch(path.name))
    if existing:
        raise SourceError(
            f"{out} already holds {len(existing)} tars called {tar_name}-NUMBER.tar, such as {existing[0].name}. "
            "Remove them, or give another --out or --name."
        )


def _check_out(out: Path, plan: PackPlan) -> None:
    """Refuse a folder whose tars have other classes, or whose disk is too small, before any tar is written."""
    classes_path = out / CLASSES_FILE
    if classes_path.exists() and plan.num_classes and not _agrees(classes_path, plan):
        raise SourceError(
            f"{classes_path} names other classes than these images have, so labels would not agree. Number them "
            f"alike with --classes {out}, or give another --out."
        )
    free_nbytes = shutil.disk_usage(out).free
    if plan.nbytes > free_nbytes:
        raise DiskFullError(f"{out} has {free_nbytes} bytes free, but the tars need {plan.nbytes}. Free some space.")


def _agrees(classes_path: Path, plan: PackPlan) -> bool:
    """Whether the labels of a plan mean the classes that a file names; the file may be written by hand."""
    if plan.classes is None:
        return plan.num_classes <= len(read_class_names(classes_path))
    # The bytes are looked at first: `pack` may itself have written names that `read_classes` refuses or trims.
    is_own = classes_path.read_bytes() == Classes(plan.classes).text()
    return is_own or read_classes(classes_path).names == plan.classes


def _write_tar(path: Path, samples: tuple[PackedSample, ...]) -> None:
    """Write one tar; it is safely on disk when this returns."""
    from webdataset.writer import TarWriter

    with path.open("wb") as file:
        # A fixed time and owner: equal images give equal bytes.
        with TarWriter(file, encoder=False, mtime=0, user="", group="", mode=0o644) as writer:
            for sample in samples:
                label = {} if sample.label is None else {"cls": str(sample.label).encode()}
                writer.write({"__key__": sample.key, sample.extension: sample.read(), **label})
        file.flush()
        os.fsync(file.fileno())
