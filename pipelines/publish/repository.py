"""A dataset repository of a hub: whether a cache may be put there, and which files it has already."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from atcache.errors import CacheMismatchError, CacheMissError, RemoteError
from atcache.files.location import Url
from atcache.files.remote.hub import ask_hub, pinned
from atcache.store.reader import CacheReader

from .compare import why_not_earlier
from .config import Visibility

_SMALL_NBYTES = 2**20
_NUM_HASHED_AT_ONCE = 4


@dataclass(frozen=True, slots=True)
class Stored:
    """A file that a repository has."""

    nbytes: int
    oid: str
    """Its SHA-256 if it is stored by LFS, else git's SHA-1 of it."""


def find_head(place: Url, create: Visibility | None) -> Url:
    """`place` at its newest commit; the repository is made if it is missing and `create` says so.

    Raises:
        RemoteError: the user is not logged in, or the hub cannot be reached, or refuses.
        CacheMissError: there is no such repository or branch.
    """
    from huggingface_hub import HfApi, get_token

    if get_token() is None:
        raise RemoteError(
            f"{place}: the hub must know who writes. Log in with `hf auth login`, or set HF_TOKEN to a token with "
            "write access."
        )
    with suppress(FileNotFoundError):
        return pinned(place)
    api = HfApi()
    try:
        ask_hub(place, lambda: api.dataset_info(place.repository, expand=["sha"]))
    except FileNotFoundError as error:
        if create is None:
            raise CacheMissError(
                f"{place}: the hub has no dataset {place.repository} that you may see. Check the name, or add "
                "--create private (or public) to make it."
            ) from error
        ask_hub(
            place,
            lambda: api.create_repo(place.repository, repo_type="dataset", private=create == "private", exist_ok=True),
        )
    try:
        return pinned(place)
    except FileNotFoundError as error:
        raise CacheMissError(
            f"{place}: the dataset {place.repository} has no branch {place.revision}. Make it on the dataset's page, "
            "or leave out the @ and the branch."
        ) from error


def list_stored(folder: Url) -> dict[str, Stored]:
    """The files of a repository's folder and below it, by their paths in the folder."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import EntryNotFoundError
    from huggingface_hub.hf_api import RepoFile

    def question() -> dict[str, Stored]:
        try:
            entries = HfApi().list_repo_tree(
                folder.repository,
                folder.key or None,
                recursive=True,
                revision=folder.revision,
                repo_type="dataset",
            )
            return {
                entry.path.removeprefix(f"{folder.key}/" if folder.parts else ""): Stored(
                    entry.size, entry.blob_id if entry.lfs is None else entry.lfs.sha256
                )
                for entry in entries
                if isinstance(entry, RepoFile)
            }
        except EntryNotFoundError:
            return {}

    return ask_hub(folder, question)


def find_stored(path: Path, files: list[str], stored: Mapping[str, Stored]) -> set[str]:
    """Those of a cache's files that the repository has already, byte for byte. Files of equal size are read."""
    alike = [name for name in files if name in stored and (path / name).stat().st_size == stored[name].nbytes]
    with ThreadPoolExecutor(_NUM_HASHED_AT_ONCE) as pool:
        are_same = pool.map(_is_same, [path / name for name in alike], [stored[name] for name in alike])
        return {name for name, is_same in zip(alike, are_same, strict=True) if is_same}


def _is_same(file: Path, stored: Stored) -> bool:
    is_lfs = len(stored.oid) == 64
    with file.open("rb") as opened:
        if is_lfs:
            return hashlib.file_digest(opened, "sha256").hexdigest() == stored.oid
        data = opened.read()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest() == stored.oid


def check_is_free(folder: Url, path: Path, files: list[str], stored: Mapping[str, Stored]) -> None:
    """Refuse to put a cache where another is, or where a push of another was begun.

    Args:
        folder: the place, at its newest commit.
        path: the cache.
        files: the cache's files.
        stored: what is at the place.

    Raises:
        CacheMismatchError: there is another cache; the message names the differences.
    """
    if "zarr.json" in stored:
        differences = why_not_earlier(CacheReader(folder), CacheReader(path))
    else:
        # Small files tell: the sample table, and the commit records with their checksums of the shards.
        small = [name for name in files if name in stored and stored[name].nbytes <= _SMALL_NBYTES]
        different = sorted(set(small) - find_stored(path, small, stored))
        differences = [f"{name}, left by a push that did not end, is another" for name in different[:1]]
    if differences:
        raise CacheMismatchError(
            f"{folder} has another cache than {path}: {'; '.join(differences)}. Name another folder, as in "
            f"hf://datasets/{folder.repository}/NAME.zarr, or another repository."
        )
