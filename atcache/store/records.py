"""Where commit records lie: a file for each task or, in large caches, a file for many consecutive blocks of a view.

Joining, splitting and deleting are safe to kill at any moment: a new file is on the disk before the files that it
replaces are removed. So a record may be in several files for a while, and all of them must go when it is deleted. Where
they differ, which only a mistake could cause, the smallest file holds.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

from atcache.files.durable import encode_json, fsync_path, write_file
from atcache.files.location import Location, Url
from atcache.files.ranges import is_damage, list_files, read_file, unreadable
from atcache.files.remote.putting import delete_file, patiently, put_file
from atcache.files.spool import Spool
from atcache.store.layout import MAX_RECORDS_PER_FILE, StoreLayout, Task, task_name
from atcache.store.metadata import parse_json

Result = TypeVar("Result")

COMMITS = "commits"
_SINGLE = re.compile(r"v(\d{4,})-b(\d{6,})\.json")
_JOINED = re.compile(r"v(\d{4,})-b(\d{6,})-b(\d{6,})\.jsonl")
_LINE = json.JSONEncoder(sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=False)
_NUM_REQUESTS = 16
_NUM_LOOKS = 5
"""How often a folder is listed again because files were joined between listing and reading."""


@dataclass(frozen=True, slots=True, order=True)
class RecordFile:
    """A file with the records of the tasks of blocks `first` to `last` of a view."""

    view: int
    first: int
    last: int

    @classmethod
    def parse(cls, name: str) -> RecordFile | None:
        """The file of this name; None for files that hold no records.

        >>> RecordFile.parse("v0000-b003000-b003999.jsonl")
        RecordFile(view=0, first=3000, last=3999)
        """
        if match := _SINGLE.fullmatch(name):
            file = cls(int(match[1]), int(match[2]), int(match[2]))
        elif match := _JOINED.fullmatch(name):
            file = cls(int(match[1]), int(match[2]), int(match[3]))
        else:
            return None
        # A name must not stand for millions of tasks, nor a file have two names.
        return file if 0 < file.num_tasks <= MAX_RECORDS_PER_FILE and file.name == name else None

    @property
    def num_tasks(self) -> int:
        """Records in the file."""
        return self.last - self.first + 1

    @property
    def name(self) -> str:
        """Its name in the folder of records."""
        first = task_name(self.view, self.first)
        return f"{first}.json" if self.first == self.last else f"{first}-b{self.last:06d}.jsonl"

    def tasks(self) -> list[str]:
        """Names of the tasks whose records it holds, in order."""
        return [task_name(self.view, block) for block in range(self.first, self.last + 1)]


@dataclass(frozen=True, slots=True)
class Record:
    """What a task's record says, unchecked."""

    task: str
    """The name of the task."""
    file: Location
    """Where it was read."""
    value: dict[str, Any] | None
    """None if it cannot be read."""
    problem: str = ""
    """Why it cannot."""


def list_record_files(path: Location) -> list[RecordFile]:
    """The files of records of a cache, in order; from the folder's listing alone."""
    return sorted(file for name in list_files(path / COMMITS) if (file := RecordFile.parse(name)) is not None)


def list_tasks(path: Location) -> set[str]:
    """Names of the tasks that have a record; from the folder's listing alone."""
    return {task for file in list_record_files(path) for task in file.tasks()}


def files_of(layout: StoreLayout) -> list[RecordFile]:
    """The files of records that a finished cache has."""
    return [
        file_of(layout, view, first)
        for view in range(layout.num_views)
        for first in range(0, layout.num_blocks, layout.records_per_file)
    ]


def file_of(layout: StoreLayout, view: int, block: int) -> RecordFile:
    """The file of a finished cache that holds the record of this block of a view."""
    first = block - block % layout.records_per_file
    return RecordFile(view, first, min(first + layout.records_per_file, layout.num_blocks) - 1)


def read_records(path: Location, layout: StoreLayout | None = None) -> Iterator[Record]:
    """Each task's record, file by file; on a server several files at once.

    Files may be joined meanwhile by the process that leads a build: what is gone is looked for again.

    Args:
        path: the cache.
        layout: of a cache that is finished, and on a server that cannot list files; None to list them.

    Raises:
        AtcacheError: a file or the folder cannot be read now, which says nothing about the records.
    """
    files = list_record_files(path) if layout is None else files_of(layout)
    wanted = {task for file in files for task in file.tasks()}
    for _ in range(_NUM_LOOKS):
        for record in _read_files(path, files, wanted):
            wanted.discard(record.task)
            yield record
        if not wanted or layout is not None:
            break
        files = list_record_files(path)
        wanted &= {task for file in files for task in file.tasks()}  # others were deleted meanwhile
    yield from (_missing(path, task) for task in sorted(wanted))


def read_record(path: Location, task: str, layout: StoreLayout | None = None) -> Record:
    """The record of one task; see `read_records`."""
    single = RecordFile.parse(f"{task}.json")
    if single is None or layout is None:
        return find_record(path, task) or _missing(path, task)
    file = file_of(layout, single.view, single.first)
    files = [file] if single.view < layout.num_views and _holds(file, single) else []
    return next(_read_files(path, files, {task}), _missing(path, task))


def find_record(path: Location, task: str) -> Record | None:
    """The record of one task, which is looked for in a file of its own first; None if there is none."""
    single = RecordFile.parse(f"{task}.json")
    files = [] if single is None else [single]
    for _ in range(_NUM_LOOKS):
        for record in _read_files(path, files, {task}):
            return record
        files = [file for file in list_record_files(path) if single is not None and _holds(file, single)]
        if not files:
            break
    return None


def find_joined_record(path: Path, layout: StoreLayout, task: Task) -> Record | None:
    """The record of a task in the file of its whole stretch; None if it is not joined with others there.

    Nothing is listed. Files of shorter runs hold only tasks that the build which made them does not do.
    """
    file = file_of(layout, task.view, task.block)
    if file.num_tasks == 1:
        return None
    return next(iter(_read_file(path, file, [task.name])), None)


def _missing(path: Location, task: str) -> Record:
    return Record(task, path / f"{COMMITS}/{task}.json", None, "FileNotFoundError: there is no such record")


def _holds(file: RecordFile, other: RecordFile) -> bool:
    return file.view == other.view and file.first <= other.first and other.last <= file.last


def _read_files(path: Location, files: Iterable[RecordFile], wanted: set[str]) -> Iterator[Record]:
    """The records of wanted tasks, each from the smallest file that has it; files that are gone are passed over."""
    smallest = _smallest(files)
    of_file: dict[RecordFile, list[str]] = {}
    for task, file in smallest.items():
        if task in wanted:
            of_file.setdefault(file, []).append(task)
    places = sorted(of_file)

    def read(file: RecordFile) -> list[Record]:
        return _read_file(path, file, of_file[file])

    if isinstance(path, Url):
        pool = ThreadPoolExecutor(_NUM_REQUESTS)
        try:
            for records in pool.map(read, places):
                yield from records
        finally:
            pool.shutdown(cancel_futures=True)
    else:
        for file in places:
            yield from read(file)


def _smallest(files: Iterable[RecordFile]) -> dict[str, RecordFile]:
    """The file that holds for each task."""
    smallest: dict[str, RecordFile] = {}
    for file in sorted(files, key=lambda file: -file.num_tasks):
        smallest.update(dict.fromkeys(file.tasks(), file))
    return smallest


def _read_file(path: Location, file: RecordFile, tasks: list[str]) -> list[Record]:
    """The records of these tasks, which the file should hold; none if the file is gone."""
    place = path / f"{COMMITS}/{file.name}"
    try:
        data = read_file(place)
    except FileNotFoundError:
        return []
    except OSError as error:
        if not is_damage(error):
            raise unreadable(place, error) from error
        return [Record(task, place, None, f"{type(error).__name__}: {error}") for task in tasks]
    if file.num_tasks == 1:
        return [Record(task, place, *_parse(data)) for task in tasks]
    # Lines are known by what they say, so that damage costs no more records than it hits.
    values = {_task_of(value): value for line in data.split(b"\n") if (value := _parse(line)[0]) is not None}
    lost = "ValueError: its line is damaged or missing"
    return [Record(task, place, values.get(task), "" if task in values else lost) for task in tasks]


def _parse(data: bytes) -> tuple[dict[str, Any] | None, str]:
    try:
        value: Any = parse_json(data)
    except ValueError as error:
        return None, f"{type(error).__name__}: {error}"
    if not isinstance(value, dict):
        return None, f"TypeError: it is {type(value).__name__}, expected an object"
    return cast("dict[str, Any]", value), ""


def _task_of(value: Mapping[str, Any]) -> str:
    """The name of the task that a record says it is of; empty if it says none."""
    try:
        return task_name(value["task"]["view"], value["task"]["block"])
    except (KeyError, TypeError, ValueError):
        return ""


def delete_records(path: Location, tasks: Iterable[str]) -> list[str]:
    """Delete the records of these tasks, durably. Nobody else may write records meanwhile.

    Where others are in the same file, they get files of their own first. Those that cannot be read are lost with it.

    Returns:
        Names of the tasks that have lost their record, in order.

    Raises:
        AtcacheError: a file cannot be read now. Nothing is lost.
    """
    unwanted, written = set(tasks), set[str]()
    files = list_record_files(path)
    affected = [file for file in files if not unwanted.isdisjoint(file.tasks())]
    others = set(files) - set(affected)
    smallest = _smallest(files)
    for file in affected:
        # Of a task that was done again, this file may have the old record, and what is written must not cover the new.
        holding = {smallest[task] for task in file.tasks()} if file.num_tasks > 1 else set[RecordFile]()
        kept = {
            record.task: record.value
            for record in _read_files(path, holding, set(file.tasks()) - unwanted)
            if record.value is not None and _can_be_written(record.value)
        }
        for piece in _pieces(file, kept):
            _write(path, piece, [kept[task] for task in piece.tasks()])
        written |= kept.keys()
    _remove(path, affected)
    left = {task for file in others for task in file.tasks()} | written
    return sorted({task for file in affected for task in file.tasks()} - left)


def _can_be_written(value: dict[str, Any]) -> bool:
    """Whether a record has only numbers and texts that JSON has: Python also reads others."""
    try:
        _LINE.encode(value).encode()
    except (ValueError, RecursionError):
        return False
    return True


def delete_own_record(path: Path, task: Task) -> None:
    """Delete the file that holds the record of this task alone, durably, if there is one. Nothing is listed."""
    file = path / f"{COMMITS}/{task.name}.json"
    if file.exists():
        file.unlink(missing_ok=True)
        fsync_path(file.parent)


def _pieces(file: RecordFile, kept: Mapping[str, Any]) -> Iterator[RecordFile]:
    """The longest runs of blocks of a file whose tasks are kept."""
    first = None
    for block in range(file.first, file.last + 2):
        if block <= file.last and task_name(file.view, block) in kept:
            first = block if first is None else first
        elif first is not None:
            yield RecordFile(file.view, first, block - 1)
            first = None


def join_records(path: Location, layout: StoreLayout) -> None:
    """Join the records of each complete stretch of `records_per_file` blocks into one file. Repeating it does nothing.

    Other processes may add records meanwhile, and replace those of single tasks, but not delete any. On an object
    store, a writer of a task looks for the record's own object: so it is called only when all tasks are done.

    Args:
        path: the cache.
        layout: of the cache, or of what it is growing to.
    """
    if layout.records_per_file == 1:
        return
    of_stretch: dict[tuple[int, int], list[RecordFile]] = {}
    for file in _asked(path, lambda: list_record_files(path)):
        of_stretch.setdefault((file.view, file.first // layout.records_per_file), []).append(file)
    for stretch in files_of(layout):
        files = of_stretch.get((stretch.view, stretch.first // layout.records_per_file), [])
        for _ in range(_NUM_LOOKS):
            if _join_stretch(path, stretch, files):
                break


def _join_stretch(path: Location, stretch: RecordFile, files: list[RecordFile]) -> bool:
    """Join the records of a stretch, which are in these files, if it is complete. False if one changed meanwhile."""
    wanted = set(stretch.tasks())
    if files == [stretch] or not wanted <= {task for file in files for task in file.tasks()}:
        return True

    def read() -> dict[str, dict[str, Any] | None]:
        return {record.task: record.value for record in _read_files(path, files, wanted)}

    values = _asked(path, read)
    # A stretch with a record that cannot be read is left as it is, for `atcache verify` to name the file.
    whole = [
        value
        for task in stretch.tasks()
        if (value := values.get(task)) is not None and _task_of(value) == task and _can_be_written(value)
    ]
    if len(whole) < stretch.num_tasks:
        return True
    _write(path, stretch, whole)
    # Another process that did the same task may have replaced its record since it was read.
    if _asked(path, read) != values:
        return False
    _remove(path, [file for file in files if file != stretch and _holds(stretch, file)])
    return True


def _asked(path: Location, request: Callable[[], Result]) -> Result:
    """What a request returns. A server that fails is asked again."""
    return request() if isinstance(path, Path) else patiently(request)


def _write(path: Location, file: RecordFile, values: list[dict[str, Any]]) -> None:
    """Write a file of records, durably."""
    if file.num_tasks == 1:
        data = encode_json(values[0])
    else:
        data = "".join(f"{_LINE.encode(value)}\n" for value in values).encode()
    place = path / f"{COMMITS}/{file.name}"
    if isinstance(place, Path):
        write_file(place, data)
        return
    with Spool() as spool:
        put_file(place, spool.write("records", data))


def _remove(path: Location, files: Sequence[RecordFile]) -> None:
    """Remove files of records, durably."""
    if isinstance(path, Path):
        for file in files:
            (path / f"{COMMITS}/{file.name}").unlink(missing_ok=True)
        if files:
            fsync_path(path / COMMITS)
        return
    with ThreadPoolExecutor(_NUM_REQUESTS) as pool:
        list(pool.map(delete_file, [path / f"{COMMITS}/{file.name}" for file in files]))
