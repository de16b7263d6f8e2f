"""Which files of a dataset belong to which subset and split, as their names and folders say it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePath

from atcache.errors import SourceError

ARROW = ".arrow"
# The words and separators by which `datasets` knows a split.
_WORDS = ("train", "training", "validation", "valid", "val", "dev", "test", "testing", "eval", "evaluation")
_WORD = re.compile(rf"(?:^|(?<=[-._ 0-9]))({'|'.join(_WORDS)})(?=[-._ 0-9]|$)")
_PART = re.compile(r"(?P<stem>.+?)-\d{5}-of-\d{5}.*")


@dataclass(frozen=True, slots=True)
class _Place:
    """What the name of a file and its folders say."""

    subset: str
    """The folders above those of the split; "." if there are none."""
    split: str | None


def choose_files(files: Sequence[PurePath], subset: str | None, split: str | None, where: str) -> list[PurePath]:
    """The files of one subset and one split: default/train-00000-of-00002.parquet, train/0000.parquet, x_train.parquet.

    Args:
        files: relative to the dataset.
        subset: the folders of the subset, or the name of one of them; None if there is only one subset.
        split: None if there is only one.
        where: what the dataset is called, for messages.

    Raises:
        SourceError: there is no such subset or split; there are several and none is asked for; or the names of some
            files say a split and those of others none.
    """
    places = {file: _place(file) for file in files}
    subsets = sorted({place.subset for place in places.values()})
    wanted = [name for name in subsets if subset is None or subset == name or subset in PurePath(name).parts]
    if len(wanted) != 1:
        said = "there is more than one subset" if wanted else f"there is no subset {subset!r}"
        raise SourceError(f"{where}: {said}; it has {', '.join(subsets)}. Give one with --subset.")
    places = {file: place for file, place in places.items() if place.subset == wanted[0]}
    splits = sorted({place.split for place in places.values() if place.split is not None})
    without = [file for file, place in places.items() if place.split is None]
    if splits and without:
        raise SourceError(
            f"{where}: the names of some files say a split ({', '.join(splits)}), and {len(without)} say none, the "
            f"first is {without[0]}. Move the files of each split to a folder of its own, called train or test."
        )
    if split is None and len(splits) <= 1:
        return list(places)
    if split not in splits:
        have = f"it has {', '.join(splits)}" if splits else "its files name no splits"
        said = "there is more than one split" if split is None else f"there is no split {split!r}"
        raise SourceError(f"{where}: {said}; {have}. {'Give one with --split' if splits else 'Leave --split out'}.")
    return [file for file, place in places.items() if place.split == split]


def _place(file: PurePath) -> _Place:
    folders, stem = file.parent.parts, file.stem
    part = _PART.fullmatch(stem)
    if part:
        stem = part["stem"]
    # `datasets` calls files so if the folder is the split: train/data-00000-of-00001.arrow, default/train/0000.parquet.
    is_in_split = stem == "data" or stem.isdecimal() or (stem.startswith("part") and not _word(stem))
    if not is_in_split and (name := _split_in_name(file, stem, is_part=part is not None)):
        return _Place("/".join(folders) or ".", name)
    for depth in reversed(range(len(folders))):
        if word := _word(folders[depth]):
            is_own = is_in_split and depth == len(folders) - 1
            return _Place("/".join(folders[:depth]) or ".", folders[depth] if is_own else word)
    if is_in_split and folders:
        return _Place("/".join(folders[:-1]) or ".", folders[-1])
    return _Place("/".join(folders) or ".", stem if part and not is_in_split else None)


def _split_in_name(file: PurePath, stem: str, *, is_part: bool) -> str | None:
    """The split that the name of a file says."""
    _, dash, last = stem.rpartition("-")
    # `load_dataset` names files dataset-train.arrow, and a split may have any name.
    if last in _WORDS or (dash and file.suffix == ARROW):
        return last
    word = _word(stem)
    return stem if word and is_part else word


def _word(name: str) -> str | None:
    """The split that a name says: its one word for a split, or the whole name if it has several, as train-val."""
    words: set[str] = set(_WORD.findall(name.lower()))
    return None if not words else words.pop() if len(words) == 1 else name
