"""The images of Hugging Face datasets: parquet files, and the arrow files that `datasets` writes.

An image is a struct of its bytes and its path. The names of the classes are in the schema's metadata.
"""

# pyarrow is untyped, and need not be installed.
# pyright: reportMissingImports=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path, PurePath, PurePosixPath
from typing import Any

from atcache.errors import ConfigError, SourceError
from atcache.images.decode import IMAGE_EXTENSIONS
from atcache.images.labels import MAX_LABEL
from atcache.machine import memory_nbytes

from ..running.progress import Progress
from .classes import Classes, in_order, read_classes
from .config import PackConfig
from .plan import PackedSample, PackPlan, plan_tars, unique_key
from .splits import ARROW

PARQUET = ".parquet"
_ROWS_AT_A_TIME = 16
# What begins the files of each kind; the name in a dataset may have no extension, or a wrong one.
_MAGIC = (
    (b"\xff\xd8\xff", "jpg"),
    (b"\x89PNG\r\n\x1a\n", "png"),
    (b"BM", "bmp"),
    (b"P5", "pgm"),
    (b"P6", "ppm"),
)


def find_tables(root: Path) -> list[Path]:
    """The parquet or arrow files of a dataset; none if the folder begins with images, or only its folders hold any.

    Only as much is listed as is needed to tell the two apart.

    Raises:
        SourceError: a file beside images cannot be read.
        ConfigError: there are images and such files, and pyarrow is not installed.
    """
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        suffixes = {Path(name).suffix.lower() for name in files}
        if suffixes.intersection(IMAGE_EXTENSIONS):
            return []
        if suffix := next((suffix for suffix in (PARQUET, ARROW) if suffix in suffixes), None):
            found = chain(Path(folder).glob(f"*{suffix}"), root.rglob(f"*{suffix}"))
            tables = sorted({path for path in found if _is_data(path.relative_to(root))})
            # Tables beside class folders may be about the images instead of holding them, as metadata.parquet.
            return tables if not _holds_images(root) or any(map(_images_in, tables)) else []
    return []


def _holds_images(root: Path) -> bool:
    return any(Path(name).suffix.lower() in IMAGE_EXTENSIONS for *_, files in os.walk(root) for name in files)


def _images_in(file: Path) -> list[str]:
    """The columns of images that a file has."""
    schema = _schema(file)
    features = _features(schema)
    return [field.name for field in schema if _is_image(field, features)]


def _is_data(path: PurePath) -> bool:
    # `datasets` keeps results of its own beside the data, in cache-0123abcd.arrow.
    return not any(part.startswith(".") for part in path.parts) and not path.name.startswith(("cache-", "tmp"))


@dataclass(frozen=True, kw_only=True, slots=True)
class Tables:
    """Files with the same columns, and what their columns are."""

    files: tuple[Path, ...]
    image: str
    label: str | None
    """The column of labels; None if samples get none."""
    names: tuple[str, ...] | None
    """What the numbers in the column of labels stand for, if it says so."""

    @classmethod
    def open(cls, files: Sequence[Path], config: PackConfig) -> Tables:
        """Find the columns of images and labels, which are the same in all files.

        Raises:
            SourceError: a file cannot be read, its columns are not those of images, or they mean other classes than
                those of the first file.
            ConfigError: pyarrow is not installed.
        """
        schema = _schema(files[0])
        features = _features(schema)
        image = _only(_images_in(files[0]), config.image_column, "image", files[0])
        if not config.has_labels:
            _check_alike(files, image, None)
            return cls(files=tuple(files), image=image, label=None, names=None)
        classed = [name for name in schema.names if features.get(name, {}).get("_type") == "ClassLabel"]
        plain = [field.name for field in schema if field.name in ("label", "labels") and _is_label(field)]
        asked = config.label_column
        if asked is not None:
            plain, classed = [field.name for field in schema if _is_label(field)], []
        label = _only(classed or plain, asked, "label", files[0])
        _check_alike(files, image, label)
        return cls(files=tuple(files), image=image, label=label, names=_class_names(features, label))

    def plan(self, config: PackConfig, spool: Path) -> PackPlan:
        """Copy the images to one file, from which they can be read in any order, and plan their tars.

        Only a few rows are in memory at a time.

        Args:
            config: the labels, keys and order that are wanted.
            spool: the file to write. It lives as long as the plan.

        Raises:
            SourceError: a row has no image or no label.
        """
        keys: set[str] = set()
        seen: set[str] = set()
        samples: list[PackedSample] = []
        labels: list[int | str | None] = []
        with spool.open("xb") as file, Progress("read", total=len(self.files), unit="files") as progress:
            for row, (data, path, label) in enumerate(self._rows(progress)):
                where = f"row {row} of {self.files[0].parent}"
                if not data:
                    raise SourceError(
                        f"{where}: the image has no bytes{f', only the path {path!r}' if path else ''}. Save the "
                        "dataset again with the images in it: `datasets` does so with save_to_disk or push_to_hub."
                    )
                name = PurePosixPath(path or "").name
                stem = re.sub(r"[^\w-]", "_", PurePath(name).stem) or f"{row:08d}"
                offset = file.tell()
                file.write(data)
                samples.append(
                    PackedSample(
                        path=spool,
                        offset=offset,
                        nbytes=len(data),
                        # In some datasets all images have the same name.
                        key=unique_key(PurePath(f"{stem}-{row:08d}" if stem in seen else stem), keys),
                        extension=_extension(data, name, where),
                        label=None,
                    )
                )
                seen.add(stem)
                labels.append(label)
        if not samples:
            raise SourceError(f"{self.files[0].parent} has no rows.")
        if self.label is None:
            return plan_tars(config, samples, None, {})
        numbers, classes = self._numbered(labels, None if config.classes is None else read_classes(config.classes))
        labelled = [replace(sample, label=number) for sample, number in zip(samples, numbers, strict=True)]
        return plan_tars(config, labelled, classes, {})

    def _numbered(
        self, labels: Sequence[int | str | None], wanted: Classes | None
    ) -> tuple[Sequence[int], Classes | None]:
        """The label of each row by the wanted list of classes, or by the dataset's own."""
        bad = [row for row, label in enumerate(labels) if label is None or (isinstance(label, int) and label < 0)]
        if bad:
            raise SourceError(
                f"{len(bad)} of {len(labels)} rows have no label in the column {self.label!r}, the first is row "
                f"{bad[0]} ({labels[bad[0]]}). Hidden labels are often -1: pack such a split with --labels none."
            )
        texts = [label for label in labels if isinstance(label, str)]
        if texts:
            classes = wanted or (in_order(texts) if self.names is None else Classes(self.names))
            return [classes.label_of(text, f"row {row}") for row, text in enumerate(texts)], classes
        numbers = [label for label in labels if isinstance(label, int)]
        if self.names is not None:
            return self._numbered_by_name(numbers, self.names, wanted)
        highest = max(numbers)
        if highest > MAX_LABEL:
            raise SourceError(
                f"the column {self.label!r} has the label {highest}, expected whole numbers from 0 to {MAX_LABEL}. "
                "Name another column, or pack with --labels none."
            )
        if wanted is not None and highest >= len(wanted.names):
            raise SourceError(
                f"the column {self.label!r} has the label {highest}, and {wanted.file} names {len(wanted.names)} "
                "classes. Give the list that belongs to the data."
            )
        return numbers, wanted

    def _numbered_by_name(
        self, numbers: list[int], names: tuple[str, ...], wanted: Classes | None
    ) -> tuple[list[int], Classes]:
        """The label of each row, whose number stands for a name: the number itself, if the wanted list agrees."""
        highest = max(numbers)
        if highest >= len(names):
            raise SourceError(f"the column {self.label!r} has the label {highest}, but names {len(names)} classes.")
        # Not by way of the names, of which two classes may have the same.
        if wanted is None:
            return numbers, Classes(names)
        if wanted.names[: len(names)] == tuple(name.strip() for name in names):  # a list that is read has no spaces
            return numbers, wanted
        times = Counter(names)
        doubled = next((names[number] for number in sorted(set(numbers)) if times[names[number]] > 1), None)
        if doubled is not None:
            raise SourceError(
                f"the column {self.label!r} has {times[doubled]} classes called {doubled!r}, and by the names in "
                f"{wanted.file} they cannot be told apart. Leave --classes out, so that the numbers stay, or give a "
                "list that begins with the data's own names."
            )
        return [wanted.label_of(names[number], f"row {row}") for row, number in enumerate(numbers)], wanted

    def _rows(self, progress: Progress) -> Iterator[tuple[bytes | None, str | None, int | str | None]]:
        """Bytes, path and label of each row."""
        columns = [self.image, *([self.label] if self.label is not None else [])]
        for file in self.files:
            with _explained(file):
                for batch in _batches(file, columns):
                    labels = batch.column(self.label).to_pylist() if self.label is not None else [None] * len(batch)
                    for image, label in zip(batch.column(self.image).to_pylist(), labels, strict=True):
                        if isinstance(image, dict):
                            yield image.get("bytes"), image.get("path"), label
                        else:
                            yield image, None, label
            progress.advance(1)


def _extension(data: bytes, name: str, where: str) -> str:
    """The extension of a kind of image that atcache reads, by the first bytes."""
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    for magic, extension in _MAGIC:
        if data.startswith(magic):
            own = PurePath(name).suffix.lower()
            return "jpeg" if (extension, own) == ("jpg", ".jpeg") else extension
    raise SourceError(
        f"{where} ({name or 'without a name'}) is no image that atcache reads ({', '.join(IMAGE_EXTENSIONS)}): it "
        f"begins with {data[:8]!r}."
    )


# Reading with pyarrow


@contextmanager
def _explained(file: Path) -> Generator[None]:
    """Turn pyarrow's errors into one sentence that names the file."""
    arrow = _pyarrow()
    try:
        yield
    except (arrow.ArrowException, OSError) as error:
        reason = str(error).partition("\n")[0].rstrip(".")
        raise SourceError(f"{file} cannot be read as {file.suffix[1:]} ({reason}). Fetch it again.") from error


def _pyarrow() -> Any:  # noqa: ANN401 - untyped
    try:
        import pyarrow
        import pyarrow.parquet  # pyright: ignore[reportUnusedImport] - makes pyarrow.parquet
    except ImportError as error:
        raise ConfigError(
            "parquet and arrow files are read with pyarrow, which is not installed: pip install 'atcache[hf]'."
        ) from error
    return pyarrow


def _schema(file: Path) -> Any:  # noqa: ANN401 - a pyarrow.Schema
    arrow = _pyarrow()
    with _explained(file):
        if file.suffix.lower() == PARQUET:
            return arrow.parquet.read_schema(file)
        with arrow.memory_map(str(file)) as source:
            return _open_arrow(source).schema


def _open_arrow(source: Any) -> Any:  # noqa: ANN401 - a reader of pyarrow
    arrow = _pyarrow()
    try:
        return arrow.ipc.open_stream(source)  # what `datasets` writes
    except arrow.ArrowInvalid:
        source.seek(0)
        return arrow.ipc.open_file(source)


def _batches(file: Path, columns: Sequence[str]) -> Iterator[Any]:
    """The rows of a file, a few at a time."""
    arrow = _pyarrow()
    if file.suffix.lower() == PARQUET:
        with arrow.parquet.ParquetFile(file) as table:
            _check_row_groups(table, file, columns)
            # One group after the other: asked for all at once, pyarrow keeps those that it has read.
            for group in range(table.num_row_groups):
                yield from table.iter_batches(
                    batch_size=_ROWS_AT_A_TIME, row_groups=[group], columns=columns, use_threads=False
                )
        return
    with arrow.memory_map(str(file)) as source:
        reader = _open_arrow(source)
        batches = reader if hasattr(reader, "__iter__") else map(reader.get_batch, range(reader.num_record_batches))
        for batch in batches:
            chosen = batch.select(columns)
            for start in range(0, len(chosen), _ROWS_AT_A_TIME):
                yield chosen.slice(start, _ROWS_AT_A_TIME)


def _check_row_groups(table: Any, file: Path, columns: Sequence[str]) -> None:  # noqa: ANN401 - a ParquetFile
    """Refuse a group of rows that says it would fill the memory."""
    for number in range(table.metadata.num_row_groups):
        group = table.metadata.row_group(number)
        parts = map(group.column, range(group.num_columns))
        nbytes = sum(part.total_uncompressed_size for part in parts if part.path_in_schema.split(".")[0] in columns)
        if nbytes > memory_nbytes() // 2:
            raise SourceError(f"{file}: row group {number} takes {nbytes} bytes of memory, more than there is.")


def _features(schema: Any) -> dict[str, dict[str, Any]]:  # noqa: ANN401 - a pyarrow.Schema
    """What `datasets` says about each column, if it says anything."""
    try:
        found: Any = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
    except (KeyError, TypeError, ValueError):
        return {}
    return {name: about for name, about in found.items() if isinstance(about, dict)} if isinstance(found, dict) else {}


def _class_names(features: dict[str, dict[str, Any]], label: str) -> tuple[str, ...] | None:
    """What the numbers in a column stand for, if it says so."""
    names = features.get(label, {}).get("names")
    is_names = isinstance(names, list) and all(isinstance(name, str) for name in names)
    return tuple(names) if is_names and names else None


def _check_alike(files: Sequence[Path], image: str, label: str | None) -> None:
    """Refuse files that lack a column of the first, or in which its labels mean something else."""
    first: Any = None
    for file in files:
        schema = _schema(file)
        features = _features(schema)
        if image not in schema.names or not _is_image(schema.field(image), features):
            raise SourceError(_not_alike(file, files[0], f"it has no images in the column {image!r}"))
        if label is None:
            continue
        if label not in schema.names or not _is_label(schema.field(label)):
            raise SourceError(_not_alike(file, files[0], f"it has no labels in the column {label!r}"))
        is_number = _pyarrow().types.is_integer(schema.field(label).type)
        meaning = is_number, _class_names(features, label)
        first = first or meaning
        if meaning != first:
            raise SourceError(_not_alike(file, files[0], f"its column {label!r} names other classes"))


def _not_alike(file: Path, first: Path, what: str) -> str:
    return (
        f"{file} cannot be packed together with {first}: {what}. Give --data a folder with only the files that belong "
        "together, or choose them with --subset and --split."
    )


def _is_image(field: Any, features: dict[str, dict[str, Any]]) -> bool:  # noqa: ANN401 - a pyarrow.Field
    types = _pyarrow().types
    kind = field.type
    if types.is_struct(kind):
        names = [kind.field(position).name for position in range(kind.num_fields)]
        return "bytes" in names and _is_bytes(kind.field(names.index("bytes")).type)
    return _is_bytes(kind) and (features.get(field.name, {}).get("_type") == "Image" or field.name in ("image", "img"))


def _is_bytes(kind: Any) -> bool:  # noqa: ANN401 - a pyarrow.DataType
    types = _pyarrow().types
    return types.is_binary(kind) or types.is_large_binary(kind)


def _is_label(field: Any) -> bool:  # noqa: ANN401 - a pyarrow.Field
    types = _pyarrow().types
    return types.is_integer(field.type) or types.is_string(field.type) or types.is_large_string(field.type)


def _only(columns: Sequence[str], asked: str | None, what: str, file: Path) -> str:
    """The column to take."""
    if asked is not None and asked in columns:
        return asked
    if asked is None and len(columns) == 1:
        return columns[0]
    have = ", ".join(columns) or "none"
    advice = " For images without labels, give --labels none." if what == "label" and not columns else ""
    raise SourceError(
        f"{file}: expected one column of {what}s{f' called {asked!r}' if asked else ''}, found {have}. Choose it with "
        f"--{what}-column.{advice}"
    )
