"""Push: send a cache to a dataset repository of a Hugging Face hub.

Data go first. The last commit has every zarr.json, and so what makes the folder a cache: nobody can open half of one.
huggingface_hub sends the files; those that are there already are not sent again, so the same call continues. The last
commit names the one it was made for, so that it takes nothing back that others have committed meanwhile.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Mapping, Sequence
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
from atcache.store.growth import read_growth
from atcache.store.manifest import COMMITS, check_commit, read_commits
from atcache.store.reader import CacheReader

from ..running.progress import Progress
from .card import CardState, renew_card
from .config import PushConfig
from .files import cache_files, check_folder_sizes
from .repository import check_is_free, find_head, find_stored, list_stored

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

_FILES_A_COMMIT = 250
_NBYTES_A_COMMIT = 16 * 2**30
_NUM_TRIES = 10
"""How often the last commit is made anew because others commit at the same time."""
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
        CacheMismatchError: the cache is not complete, or another one is there.
        CorruptCacheError: a shard of the cache is damaged.
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
    wanted = sorted(set(files) - find_stored(config.cache, files, stored), key=_in_order)
    last = [name for name in wanted if _is_metadata(name)]
    with _quiet_bars(), Progress("push", total=len(files), unit="files", done=len(files) - len(wanted)) as progress:
        sender = _Sender(cache, config.place, states, progress)
        try:
            for batch in _batches(states, wanted[: len(wanted) - len(last)]):
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
    for commit in read_commits(path).values():
        if problems := check_commit(path, commit, reader.layout):
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


def _in_order(name: str) -> tuple[bool, bool, str]:
    """Shards and tables, then commit records, then metadata."""
    return _is_metadata(name), name.startswith(f"{COMMITS}/"), name


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


class _Sender:
    """Makes the commits of one push."""

    def __init__(self, cache: Cache, place: Url, states: Mapping[str, _State], progress: Progress) -> None:
        from huggingface_hub import HfApi

        self._cache, self._path, self._states = cache, _folder(cache), states
        self._place, self._progress, self._api = place, progress, HfApi()

    def send(self, files: Sequence[str]) -> None:
        """Add files in one commit, a few at a time."""
        operations = [self._add(name) for name in files]
        for start in range(0, len(operations), _FILES_AT_ONCE):
            few = operations[start : start + _FILES_AT_ONCE]
            ask_hub(
                self._place,
                lambda few=few: self._api.preupload_lfs_files(
                    self._place.repository,
                    few,
                    repo_type="dataset",
                    revision=self._place.revision,
                    free_memory=False,
                ),
            )
            self._progress.advance(len(few))
        self._commit(operations, f"Data of {self._name}")

    def finish(self, files: Sequence[str]) -> tuple[Url, CardState]:
        """Make the folder a cache: its metadata, and the repository's card, in one commit.

        Returns:
            The place at that commit, and what became of the card.
        """
        from huggingface_hub import CommitOperationAdd

        metadata = {name: (self._path / name).read_bytes() for name in files}  # read before the last look at the cache
        _check_unchanged(self._cache, self._states)
        for _ in range(_NUM_TRIES):
            head = pinned(self._place)
            readme, state = renew_card(_read_readme(head), self._cache, self._place)
            operations: list[CommitOperationAdd | CommitOperationDelete] = [
                CommitOperationAdd(self._place_of(name), data) for name, data in metadata.items()
            ]
            operations += self._deletions(head)
            if readme is not None:
                operations.append(CommitOperationAdd("README.md", readme.encode()))
            commit = (
                self._commit(operations, f"{self._name} is complete", head.revision) if operations else head.revision
            )
            if commit is not None:
                self._progress.advance(len(files))
                return self._place.at_revision(commit), state
        raise RemoteError(
            f"{self._place}: others commit to {self._place.repository} all the time. Type the same command again "
            "later: what was sent stays."
        )

    def _deletions(self, head: Url) -> list[CommitOperationDelete]:
        """Of the commit records that the cache no longer has."""
        from huggingface_hub import CommitOperationDelete

        names = (f"{COMMITS}/{name}" for name in list_stored(head / COMMITS))
        return [CommitOperationDelete(self._place_of(name)) for name in sorted(names) if name not in self._states]

    @property
    def _name(self) -> str:
        return self._place.name or self._place.repository

    def _place_of(self, name: str) -> str:
        return "/".join([*self._place.parts, name])

    def _add(self, name: str) -> CommitOperationAdd:
        from huggingface_hub import CommitOperationAdd

        return CommitOperationAdd(self._place_of(name), str(self._path / name))

    def _commit(
        self,
        operations: Sequence[CommitOperationAdd | CommitOperationDelete],
        message: str,
        parent: str | None = None,
    ) -> str | None:
        """The new commit; None if another was made after `parent`."""
        from huggingface_hub.errors import HfHubHTTPError

        def question() -> str | None:
            try:
                return self._api.create_commit(
                    self._place.repository,
                    operations,
                    commit_message=message,
                    repo_type="dataset",
                    revision=self._place.revision,
                    parent_commit=parent,
                ).oid
            except HfHubHTTPError as error:
                if parent is not None and error.response.status_code in _NOT_THE_HEAD:
                    return None
                raise

        return ask_hub(self._place, question)
