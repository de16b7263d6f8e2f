"""Push: send a cache to a dataset repository of a Hugging Face hub.

Data go first. The last commit has every zarr.json, and so what makes the folder a cache: nobody can open half of one.
Where a cache is published already, it also has all files that replace others. huggingface_hub sends the files; those
that are there already are not sent again, so the same call continues. Each commit names the one it was made for: if
others have committed meanwhile, the place is looked at again, so that two caches are never mixed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from atcache.cache.cache import Cache
from atcache.errors import CacheMismatchError, CorruptCacheError, RemoteError
from atcache.fields import JsonFields
from atcache.files.location import Url
from atcache.files.ranges import read_file
from atcache.files.remote.hub import ask_hub, pinned
from atcache.store.committed import check_record
from atcache.store.growth import read_growth
from atcache.store.metadata import refuse_damaged_root
from atcache.store.reader import CacheReader
from atcache.store.records import COMMITS, read_records

from ..running.progress import Progress
from .card import CardState, renew_card
from .config import PushConfig
from .files import cache_files, check_folder_sizes
from .repository import Stored, check_is_free, find_head, find_stored, list_stored

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    _Operations = Sequence[CommitOperationAdd | CommitOperationDelete]

_FILES_A_COMMIT = 250
_NBYTES_A_COMMIT = 16 * 2**30
_NUM_TRIES = 10
"""How often a commit is made anew because others commit at the same time."""
_NOT_THE_HEAD = (409, 412)
"""Statuses by which a hub says that a commit's parent is not the newest any more."""
_FILES_AT_ONCE = 10
"""Files between two moves of the progress bar."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PushSummary(JsonFields):
    """What a push has sent."""

    cache: str
    to: str
    """The place, with the commit that has all of it."""
    num_files: int
    """Files of the cache."""
    num_sent: int
    """Files that were not there yet."""
    sent_nbytes: int
    card: str
    """What became of the repository's README.md: "written", "renewed", "unchanged", or "left alone": it is someone
    else's."""
    seconds: float


def push(config: PushConfig) -> PushSummary:
    """Send a complete cache to a hub. The same call continues a push that was stopped, or sends what has changed.

    Returns:
        What was sent.

    Raises:
        CacheMismatchError: the cache is not complete, has files behind symbolic links, or is changed meanwhile; or
            another one is there, also one that is pushed at the same time.
        CorruptCacheError: the cache is damaged: its zarr.json, a commit record, or the size or index of a shard.
        CacheMissError: there is no cache, or no such repository.
        RemoteError: the hub cannot be reached, or refuses.
    """
    start_s = time.monotonic()
    cache = Cache(config.cache)
    states = _check(cache)
    files = list(states)
    head = find_head(config.place, config.create)
    stored = list_stored(head)
    check_is_free(head, config.cache, files, stored)
    there = find_stored(config.cache, files, stored)
    wanted = sorted(set(files) - there, key=_in_order)
    # Where readers may be, files are replaced together with the metadata: each commit is a whole cache.
    replaced = {name for name in wanted if name in stored} if "zarr.json" in stored else set[str]()
    last = [name for name in wanted if _is_metadata(name) or name in replaced]
    first = [name for name in wanted if not (_is_metadata(name) or name in replaced)]
    with _quiet_bars(), Progress("push", total=len(files), unit="files", done=len(files) - len(wanted)) as progress:
        sender = _Sender(cache, _Place(config.place, head, stored, there), states, progress)
        try:
            for batch in _batches(states, first):
                sender.send(batch)
            to, state = sender.finish(last)
        except (OSError, ValueError):  # what huggingface_hub raises if a file is gone
            _check_unchanged(cache, states)
            raise
    return PushSummary(
        cache=str(config.cache),
        to=str(to),
        num_files=len(files),
        num_sent=len(wanted),
        sent_nbytes=sum(states[name].nbytes for name in wanted),
        card=state,
        seconds=time.monotonic() - start_s,
    )


class _State(NamedTuple):
    """What tells that a file is still the one that it was."""

    nbytes: int
    mtime_ns: int
    inode: int

    @classmethod
    def of(cls, file: Path) -> _State:
        about = file.stat()
        return cls(about.st_size, about.st_mtime_ns, about.st_ino)


def _check(cache: Cache) -> dict[str, _State]:
    """The files of a cache that may be published, and their states."""
    reader, path = cache.reader, _folder(cache)
    advice = "Type its `atcache build` command again to continue, then push."
    if not reader.is_complete:
        raise CacheMismatchError(
            f"{path} is not complete: {len(reader.missing_tasks())} of {reader.layout.num_tasks} tasks are missing. "
            f"{advice}"
        )
    files = cache_files(path, reader.layout)
    states = {name: _State.of(path / name) for name in files}
    if read_growth(path) is not None:  # looked for after the states: a growth that begins later changes them
        raise CacheMismatchError(f"{path} is growing, and not all of it is there yet. {advice}")
    check_folder_sizes(path, files)
    refuse_damaged_root(path, reader.attributes, "Restore it from a copy, then push.")
    for record in read_records(path):
        if problems := check_record(path, record, reader.layout).problems:
            raise CorruptCacheError(
                f"{problems[0]} Repair it with `atcache verify --repair` and its `atcache build` command, then push."
            )
    return states


def _folder(cache: Cache) -> Path:
    assert isinstance(cache.path, Path), "a push has a local cache"
    return cache.path


def _check_unchanged(cache: Cache, states: Mapping[str, _State]) -> None:
    """Refuse to end the push of a cache that was grown or repaired meanwhile: its files would not fit each other."""
    path, changed = _folder(cache), None
    for name, state in states.items():
        try:
            changed = None if _State.of(path / name) == state else name
        except FileNotFoundError:
            changed = name
        if changed:
            break
    if changed is None and CacheReader(path).layout != cache.reader.layout:
        changed = "zarr.json"  # between opening the cache and looking at the states
    if changed:
        raise CacheMismatchError(
            f"{path} was changed during the push ({changed}), so it was not published. When nothing writes to it any "
            "more, type the same command again: what was sent stays."
        )


def _is_metadata(name: str) -> bool:
    return name.rpartition("/")[2] == "zarr.json"


def _is_record(name: str) -> bool:
    return name.startswith(f"{COMMITS}/") and not _is_metadata(name)


def _in_order(name: str) -> tuple[bool, bool, str]:
    """Shards and tables, then commit records, then metadata."""
    return _is_metadata(name), _is_record(name), name


def _batches(states: Mapping[str, _State], files: Sequence[str]) -> Iterator[list[str]]:
    """The files of each commit."""
    batch, nbytes = list[str](), 0
    for name in files:
        batch.append(name)
        nbytes += states[name].nbytes
        if len(batch) == _FILES_A_COMMIT or nbytes >= _NBYTES_A_COMMIT:
            yield batch
            batch, nbytes = [], 0
    if batch:
        yield batch


def _read_readme(head: Url) -> str | None:
    try:
        return read_file(Url(head.root, ("README.md",))).decode(errors="replace")
    except FileNotFoundError:
        return None


@contextmanager
def _quiet_bars() -> Generator[None]:
    """Without huggingface_hub's own progress bars, one for each file."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    if are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


@dataclass(slots=True)
class _Place:
    """What a push knows of the place that it writes to."""

    url: Url
    head: Url
    """The same at the newest commit that is known."""
    stored: dict[str, Stored]
    """The files that are there at that commit."""
    ours: set[str]
    """Those of them that are the cache's, byte for byte."""


class _Sender:
    """Makes the commits of one push."""

    def __init__(self, cache: Cache, place: _Place, states: Mapping[str, _State], progress: Progress) -> None:
        from huggingface_hub import HfApi

        self._cache, self._path, self._states = cache, _folder(cache), states
        self._place, self._url, self._progress, self._api = place, place.url, progress, HfApi()

    def send(self, files: Sequence[str]) -> None:
        """Add files in one commit, a few at a time."""
        operations = self._upload({name: self._path / name for name in files})
        self._commit(lambda: self._missing(operations), f"Data of {self._name}")
        self._note_sent(operations)

    def finish(self, files: Sequence[str]) -> tuple[Url, CardState]:
        """Make the folder a cache: its metadata, what these replace, and the repository's card, in one commit.

        Args:
            files: metadata, and what else must not be there before them.

        Returns:
            The place at that commit, and what became of the card.
        """
        from huggingface_hub import CommitOperationAdd

        # All is read before the last look at the cache: of shards and tables, only the checksums are kept.
        metadata = {name: (self._path / name).read_bytes() for name in self._states if _is_metadata(name)}
        data = {name: self._path / name for name in files if name not in metadata}
        replacing = self._upload({name: file.read_bytes() if _is_record(name) else file for name, file in data.items()})
        _check_unchanged(self._cache, self._states)
        state: CardState = "unchanged"

        def operations() -> _Operations:
            nonlocal state
            readme, state = renew_card(_read_readme(self._place.head), self._cache, self._url)
            there = find_stored(self._path, list(metadata), self._place.stored)
            return [
                *(CommitOperationAdd(self._place_of(name), metadata[name]) for name in metadata if name not in there),
                *self._missing(replacing),
                *self._deletions(),
                *([] if readme is None else [CommitOperationAdd("README.md", readme.encode())]),
            ]

        self._commit(operations, f"{self._name} is complete")
        self._progress.advance(len(files) - len(replacing))
        return self._place.head, state

    def _upload(self, files: Mapping[str, Path | bytes]) -> dict[str, CommitOperationAdd]:
        """Send files, a few at a time, without a commit. Returns how to add them."""
        from huggingface_hub import CommitOperationAdd

        operations: dict[str, CommitOperationAdd] = {}
        names = list(files)
        for start in range(0, len(names), _FILES_AT_ONCE):
            few = {name: files[name] for name in names[start : start + _FILES_AT_ONCE]}
            added = {
                name: CommitOperationAdd(self._place_of(name), str(file) if isinstance(file, Path) else file)
                for name, file in few.items()
            }
            ask_hub(
                self._url,
                lambda added=added: self._api.preupload_lfs_files(
                    self._url.repository,
                    added.values(),
                    repo_type="dataset",
                    revision=self._url.revision,
                    free_memory=False,
                ),
            )
            operations |= added
            self._progress.advance(len(added))
        return operations

    def _missing(self, operations: Mapping[str, CommitOperationAdd]) -> _Operations:
        return [operation for name, operation in operations.items() if name not in self._place.ours]

    def _deletions(self) -> Iterator[CommitOperationDelete]:
        """Of the commit records that the cache no longer has."""
        from huggingface_hub import CommitOperationDelete

        for name in sorted(self._place.stored):
            if _is_record(name) and name not in self._states:
                yield CommitOperationDelete(self._place_of(name))

    def _note_sent(self, operations: Mapping[str, CommitOperationAdd]) -> None:
        """Note what was committed. Of files that the hub keeps in git, `_look_again` compares the bytes."""
        self._place.ours |= operations.keys()
        for name, operation in operations.items():
            about = operation.upload_info
            self._place.stored[name] = Stored(about.size, about.sha256.hex())

    def _look_again(self) -> None:
        """Look at the place again after a commit of others.

        Raises:
            CacheMismatchError: another cache is there now, or files are that this push did not find or send.
        """
        place, head = self._place, pinned(self._url)
        stored = list_stored(head)
        check_is_free(head, self._path, list(self._states), stored)
        data = [name for name in self._states if not _is_metadata(name)]
        changed = [name for name in data if stored.get(name) != place.stored.get(name)]
        same = find_stored(self._path, changed, stored)
        if others := sorted(set(changed) - same):
            raise CacheMismatchError(
                f"{self._url}: someone else has put or removed {others[0]} there during this push, so {self._path} was "
                "not published. Push another cache to another folder. If this cache is to be here, wait until nobody "
                "else pushes to this place, then type the same command again."
            )
        self._place = _Place(self._url, head, stored, place.ours | same)

    def _commit(self, operations: Callable[[], _Operations], message: str) -> None:
        """Make a commit on the newest one, after a look at what others have committed.

        Args:
            operations: what to commit on `self._place`; nothing if all of it is there.
            message: the commit's.
        """
        for _ in range(_NUM_TRIES):
            asked = operations()
            commit = self._try_to_commit(asked, message, self._place.head.revision) if asked else None
            if commit is not None:
                self._place.head = self._url.at_revision(commit)
            if commit is not None or not asked:
                return
            self._look_again()
        raise RemoteError(
            f"{self._url}: others commit to {self._url.repository} all the time. Type the same command again later: "
            "what was sent stays."
        )

    @property
    def _name(self) -> str:
        return self._url.name or self._url.repository

    def _place_of(self, name: str) -> str:
        return "/".join([*self._url.parts, name])

    def _try_to_commit(self, operations: _Operations, message: str, parent: str) -> str | None:
        """The new commit; None if another was made after `parent`."""
        from huggingface_hub.errors import HfHubHTTPError

        def question() -> str | None:
            try:
                return self._api.create_commit(
                    self._url.repository,
                    operations,
                    commit_message=message,
                    repo_type="dataset",
                    revision=self._url.revision,
                    parent_commit=parent,
                ).oid
            except HfHubHTTPError as error:
                if error.response.status_code in _NOT_THE_HEAD:
                    return None
                raise

        return ask_hub(self._url, question)
