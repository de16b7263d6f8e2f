"""The options of `atcache pack`."""

from __future__ import annotations

import re
from pathlib import Path

from atcache.errors import ConfigError
from atcache.files.location import expand_home

from ..options import config, option, seed_option

HUB = "hf:"
NO_LABELS = "none"
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_LABELS_OF_OTHERS = ("required", "optional")
"""What --labels takes in commands that read tars, beside none."""


@config
class PackConfig:
    """The options of `atcache pack`."""

    data: Path = option(
        "What to pack: an image folder with one folder per class, a folder of parquet or arrow files of Hugging Face "
        "datasets, or hf:ORG/NAME for a dataset on the hub."
    )
    out: Path = option("Folder for the tars and classes.txt; created if it is missing.", is_written=True)
    name: str | None = option(
        "Name of the tars: NAME-000000.tar and so on. It becomes part of each sample's identity, so give training and "
        "validation tars different names.  [default: the name of the data, the subset and the split]",
        default=None,
    )
    classes: Path | None = option(
        "The names of the classes, whose position is the label: a classes.txt with one name a line, the folder of the "
        "training tars that holds one, or ImageNet's list of synsets.  [default: the class folders, in the order of "
        "their numbers if all are numbers, else of their names]",
        default=None,
    )
    labels: str | None = option(
        "A CSV file with the columns path and label, for images whose label is not their folder; labels are all "
        "numbers, or all names of classes. none packs images without labels.",
        default=None,
        metavar="FILE.csv|none",
    )
    subset: str | None = option(
        "The subset of a Hugging Face dataset that has several, by the name of its folder.", default=None
    )
    split: str | None = option("The split of a Hugging Face dataset, such as train.", default=None)
    revision: str | None = option(
        "Branch, tag or commit of a dataset on the hub.  [default: main; the commit is recorded]", default=None
    )
    image_column: str | None = option("The column of images, if a dataset has several.", default=None)
    label_column: str | None = option("The column of labels, if a dataset has several.", default=None)
    samples_per_tar: int = option("Images in each tar; the last may hold fewer.", default=1000, at_least=1)
    shuffle_seed: int = seed_option("the order of the images in the tars")
    in_order: bool = option(
        "Keep the images in the order of their names instead of shuffling; tars sorted by class make poor batches.",
        default=False,
    )

    def __post_init__(self) -> None:
        if self.hub_name is not None and not _HUB_NAME.fullmatch(self.hub_name):
            raise ConfigError(f"data={self.data}: expected hf:ORG/NAME, such as hf:uoft-cs/cifar10.")
        if not re.fullmatch(r"[A-Za-z0-9_-]+", self.tar_name):
            raise ConfigError(
                f"the tars cannot be called {self.tar_name!r}: give a --name of letters, digits, - and _."
            )
        if self.labels in _LABELS_OF_OTHERS:
            raise ConfigError(
                f"labels={self.labels}: expected a CSV file, or none. Leave --labels out if the folders are the labels."
            )
        if self.in_order and self.shuffle_seed:
            raise ConfigError(
                f"in_order and shuffle_seed={self.shuffle_seed}: images in order are not shuffled. Leave one out."
            )
        if self.labels == NO_LABELS and self.classes is not None:
            raise ConfigError(f"classes={self.classes} names labels, and labels=none packs none. Leave one out.")
        if self.labels is not None and self.labels != NO_LABELS:
            object.__setattr__(self, "labels", str(expand_home(Path(self.labels))))
        if self.revision is not None and self.hub_name is None:
            raise ConfigError(f"revision={self.revision} is of a dataset on the hub, and data={self.data} is none.")

    @property
    def hub_name(self) -> str | None:
        """ORG/NAME of a dataset on the hub; None if `data` is a folder."""
        text = str(self.data)
        return text.removeprefix(HUB) if text.startswith(HUB) else None

    @property
    def labels_file(self) -> Path | None:
        """The CSV file of labels, if one is given."""
        return None if self.labels in (None, NO_LABELS) else Path(self.labels)

    @property
    def has_labels(self) -> bool:
        """Whether samples get labels."""
        return self.labels != NO_LABELS

    @property
    def tar_name(self) -> str:
        """`name`, or what it is if it is None."""
        if self.name is not None:
            return self.name
        own = self.data.name if self.hub_name is not None else self.data.resolve().name
        parts = [own, *(part for part in (self.subset, self.split) if part is not None)]
        # A folder or a dataset may be called "my photos" or "v1.0", a tar may not.
        return re.sub(r"[^A-Za-z0-9_-]+", "-", "-".join(parts)).strip("-")
