"""The images of an image folder."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from atcache.errors import SourceError
from atcache.images.decode import IMAGE_EXTENSIONS

from .classes import in_order, read_classes
from .config import PackConfig
from .csv_labels import read_labels
from .plan import PackedSample, PackPlan, plan_tars, unique_key

_MANY = 3  # names in a message


def plan_folder(config: PackConfig) -> PackPlan:
    """Plan which image goes into which tar, under which key. Depends only on the files in the folder and the config.

    Hidden files, files that are not images, empty files, files outside the class folders and links that lead out of
    `data` are left out and counted; linked folders are not entered.

    Raises:
        SourceError: there is no folder, no class folder or no image, or labels and images do not agree.
    """
    root = config.data.resolve()
    if (root / "zarr.json").exists():
        raise SourceError(f"{config.data} is a cache, which cannot be packed. Give a folder of images.")
    if not root.is_dir():
        what = ", but a tar, which need not be packed" if root.suffix.lower() == ".tar" and root.is_file() else ""
        raise SourceError(
            f"{config.data} is not a folder{what}. Give an image folder with one folder per class, or a folder of "
            "parquet or arrow files."
        )
    classes = None if config.classes is None else read_classes(config.classes)
    ignored: Counter[str] = Counter()
    if config.labels_file is not None:
        labels, classes = read_labels(config.labels_file, root, classes)
        found = [(path, labels.pop(path.relative_to(root), None)) for path in _images(root, ignored)]
        if labels:
            few = ", ".join(map(str, sorted(labels)[:_MANY]))
            raise SourceError(
                f"{config.labels_file} lists {len(labels)} images that are not in {root}, or cannot be packed: {few}. "
                "Paths are relative to --data."
            )
        ignored["images that are not listed"] = sum(label is None for _, label in found)
        found = [(path, label) for path, label in found if label is not None]
    elif not config.has_labels:
        found = [(path, None) for path in _images(root, ignored)]
    else:
        names = _class_folders(root, ignored)
        classes = classes or in_order(names)
        label_of = {name: classes.label_of(name, f"the folder {root / name}") for name in names}
        found = [(path, label_of[name]) for name in names for path in _images(root / name, ignored, inside=root)]
    left_out = {reason: count for reason, count in ignored.items() if count}
    if not found:
        raise SourceError(
            f"{'the class folders of ' if config.has_labels else ''}{root} hold no images "
            f"({', '.join(IMAGE_EXTENSIONS)}); left out: "
            f"{', '.join(f'{count} {reason}' for reason, count in sorted(left_out.items())) or 'nothing'}."
        )
    keys: set[str] = set()
    samples = [
        PackedSample(
            path=path,
            key=unique_key(path.relative_to(root), keys),
            extension=path.suffix[1:].lower(),
            label=label,
            nbytes=path.stat().st_size,
        )
        for path, label in found
    ]
    return plan_tars(config, samples, classes, left_out)


def _class_folders(root: Path, ignored: Counter[str]) -> list[str]:
    """The names of the class folders, in the order of their labels if no list says otherwise."""
    names: list[str] = []
    num_images = num_links = 0
    for entry in root.iterdir():
        if entry.is_dir() and not entry.is_symlink() and not entry.name.startswith("."):
            names.append(entry.name)
        else:
            ignored["linked or hidden folders" if entry.is_dir() else "files outside the class folders"] += 1
            num_links += entry.is_dir() and not entry.name.startswith(".")
            num_images += entry.suffix.lower() in IMAGE_EXTENSIONS
    if not names and num_links:
        left_out = ", ".join(f"{count} {reason}" for reason, count in sorted(ignored.items()))
        raise SourceError(
            f"{root} holds no class folders that can be packed; left out: {left_out}. Links to folders are not "
            "followed. Give real folders, one per class; or as --data the folder that the links lead into, with "
            "--labels FILE.csv."
        )
    if not names:
        advice = " For images without labels, give --labels none; for labels in a file, --labels FILE.csv."
        raise SourceError(
            f"{root} holds no folders. Expected one folder per class: {root}/CLASS/IMAGE.jpg."
            f"{advice if num_images else ''}"
        )
    return list(in_order(names).names)


def _images(folder: Path, ignored: Counter[str], *, inside: Path | None = None) -> Iterator[Path]:
    """The images under a folder, sorted; counts in `ignored` what is left out.

    Args:
        folder: where to look.
        ignored: how many files are left out, by reason.
        inside: the folder that links may not lead out of, if it is another.
    """
    images: list[Path] = []
    for parent, folders, files in os.walk(folder):
        linked = [name for name in folders if name.startswith(".") or (Path(parent) / name).is_symlink()]
        ignored["linked or hidden folders"] += len(linked)
        folders[:] = [name for name in folders if name not in linked]
        for name in files:
            path = Path(parent) / name
            if name.startswith("."):
                ignored["hidden files"] += 1
            elif path.suffix.lower() not in IMAGE_EXTENSIONS:
                ignored["files that are no images"] += 1
            elif path.is_symlink() and not path.resolve().is_relative_to(inside or folder):
                ignored["links that lead out of the folder"] += 1
            elif not path.is_file():
                ignored["broken links and special files"] += 1
            elif path.stat().st_size == 0:
                ignored["empty files"] += 1
            else:
                images.append(path)
    yield from sorted(images)
