"""Writes to object stores, which have neither rename nor locks: objects are put whole, and the last vouches for all.

Both a new cache and a finished task are some objects and one more that makes them count: the root's zarr.json, and the
commit record. `put_together` puts that one last, and only once the store has said that all others are this writer's.
So a kill at any moment leaves what was there before, and objects that do not count and that the next build replaces.

Two writers of the same thing, such as two builds or a worker that was believed dead, need no lock where the store obeys
conditions (`If-None-Match`, `If-Match`), as S3, Google's and Azure's do:

1. If the last object is there, or its record has been joined with others, the thing is done, and what this writer made
   is dropped.
2. Every object is created, never replaced: where there is one already, its bytes are compared. Equal ones are as good
   as its own. Other ones are a rival's, from another GPU, or a dead writer's. A living rival puts its last object soon:
   then see 1. After a while the object is replaced, if it is still the version that was seen.
3. All objects are asked for their versions; if one is not this writer's, back to 2.
4. The last object is created. If there is one by now, then its writer asked (3) before this one replaced its objects;
   so it is replaced, if it is still the version that was seen.
5. All versions are asked for again. A slow rival may have replaced an object between 3 and 4. It is about to replace
   the last object, too (4), or was killed before it could; so back to 2, which waits for it.

Whoever is alive at the end has seen its own objects under its own last object, or the rival's last object.
"""

from __future__ import annotations

import logging
import re
import time
import zlib
from collections.abc import Callable, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

from atcache.errors import ConfigError, NotWritableError, RemoteError
from atcache.files.durable import is_partial, partial_path
from atcache.files.location import Url
from atcache.files.ranges import list_files
from atcache.files.remote.fetcher import Meta, get_range, head, list_below, read_whole
from atcache.files.remote.putting import Put, delete_file, patiently, put_file
from atcache.files.spool import Spool
from atcache.store.records import COMMITS, list_record_files

SECONDS_FOR_A_RIVAL = 60.0
"""How long another writer's object is left alone, in case its last object follows."""
_SECONDS_OF_A_DEAD_ONE = 1800.0
"""Age of an object whose writer is not waited for. Stores refuse requests of clocks that differ by 15 minutes."""
_SECONDS_TO_ANSWER = 15.0
"""How long a store that fails is asked, before any work, whether it works."""
_SECONDS_BETWEEN_LOOKS = 0.5
_MOST_ROUNDS = 8
_OURS = re.compile(r"(attention|commits|pixels|samples(-[0-9]+)?|views)/|zarr\.json$")
"""How the names of a cache's objects begin."""
_CREATED = re.compile(
    r"(attention|commits|pixels|views)(/[a-z_]+)?/zarr\.json"
    r"|(attention/(bias|state/\w+)|samples(-[0-9]+)?/[a-z]+)/(zarr\.json|c(/[0-9]+)*)"
    r"|samples(-[0-9]+)?/zarr\.json"
)
"""The objects that a creation puts before the root; nothing else is deleted for having such a name."""
_NUM_THREADS = 8
_COMPARED_NBYTES = 16 * 2**20


class Piece(NamedTuple):
    """A local file that is to be an object of a cache."""

    name: str
    """Path in the cache."""
    file: Path
    nbytes: int
    crc32: int

    @classmethod
    def of(cls, name: str, file: Path) -> Piece:
        """The piece that a file is."""
        data = file.read_bytes()
        return cls(name, file, len(data), zlib.crc32(data))


def put_together(
    root: Url, pieces: Sequence[Piece], last: Piece, find_last: Callable[[], bytes | None] | None = None
) -> bytes:
    """Put objects, and at the end the one that makes them count; see the module.

    Args:
        root: the cache.
        pieces: the objects that are put first. Their files may be deleted afterwards.
        last: the one that vouches for them.
        find_last: its bytes, if they may have been moved since they were put; None to look for the object alone.
            Asked only where other objects are met, so it may be slow.

    Returns:
        The bytes of the last object that is there at the end: this writer's, or another one's who was faster.

    Raises:
        NotWritableError: the store refuses, or fails for minutes.
        ConfigError: other writers interfere without end.
    """
    ours, find_last = last.file.read_bytes(), find_last or partial(_read, root / last.name)
    if (theirs := _read(root / last.name)) is not None:
        return theirs
    obeyed = obeyed_conditions(root)
    # The largest goes first, alone: rivals whose bytes differ meet there, and the second one waits.
    versions: dict[Piece, Meta] = {}
    first, *others = sorted(pieces, key=lambda piece: -piece.nbytes)
    with ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="put") as threads:

        def are_ours() -> bool:
            found = threads.map(_head, [root / piece.name for piece in versions])
            return all(_same(one, expected) for one, expected in zip(found, versions.values(), strict=True))

        for _ in range(_MOST_ROUNDS):
            rival = _Rival(find_last, ours)
            put = partial(_put_piece, root, rival, obeyed)
            versions = {first: put(first)}
            if rival.last is None:
                versions |= zip(others, threads.map(put, others), strict=True)
            if rival.last is not None:
                return rival.last
            if rival.is_met and find_last() == ours:
                return ours
            if are_ours() and _put_last(root / last.name, last, ours, are_ours, obeyed) and are_ours():
                return ours
    raise ConfigError(
        f"other processes write {root / last.name} and what belongs to it again and again. Stop them, and type the "
        "same command again."
    )


def put_new_cache(root: Url, folder: Path) -> bool:
    """Put an empty cache that lies in a folder, its zarr.json last.

    Args:
        root: where the cache is to be.
        folder: its files. They may be deleted afterwards.

    Returns:
        Whether the cache that is there at the end has this zarr.json.

    Raises:
        ConfigError: an older cache was not wholly deleted, or other writers interfere without end.
        NotWritableError: the store refuses, or fails for minutes.
    """
    pieces = {name: Piece.of(name, folder / name) for name in list_files(folder)}
    last = pieces.pop("zarr.json")
    _refuse_records(root)
    _sweep_creation(root, pieces.keys())
    return put_together(root, list(pieces.values()), last) == last.file.read_bytes()


def _refuse_records(root: Url) -> None:
    """Refuse a place with commit records but no cache: they would vouch for the tasks of the new one."""
    # In this order: another build may create the cache at this moment, and its records come after the root.
    records = patiently(lambda: list_record_files(root))
    if records and _read(root / "zarr.json") is None:
        raise ConfigError(
            f"{root} was a cache, and is only partly deleted: its zarr.json is gone, but there is "
            f"{root / COMMITS / records[0].name}. Delete all that is below {root}, or give another --out."
        )


def _sweep_creation(root: Url, names: Set[str]) -> None:
    """Delete what a creation that was stopped has left and this one, which puts `names`, does not replace.

    Readers take all arrays that they find in `attention/state` for the codec's, so those of another codec must go.
    """
    left = [name for name in patiently(lambda: list_below(root)) if _CREATED.fullmatch(name) and name not in names]
    if not left:
        return
    with ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="sweep") as threads:
        found = threads.map(_head, [root / name for name in left])
        newest_s = max((one.modified_s for one in found if one is not None), default=0.0)
        # Another creation may be at work: its root is waited for as `_put_piece` does.
        rival = _Rival(partial(_read, root / "zarr.json"), b"")
        while not rival.is_done():
            if time.time() - newest_s > _SECONDS_OF_A_DEAD_ONE or rival.is_given_up():
                list(threads.map(delete_file, [root / name for name in left]))
                return


def _same(one: Meta | None, other: Meta) -> bool:
    return one is not None and (one.size, one.version) == (other.size, other.version)


class _Rival:
    """Another writer of the same thing, if there is one. Threads may share it."""

    def __init__(self, find_last: Callable[[], bytes | None], ours: bytes) -> None:
        self._find_last, self._ours = find_last, ours
        self._stop_s: float | None = None
        self.is_met = False
        """Whether there was an object that this writer has not put."""
        self.last: bytes | None = None
        """Its last object, once it was seen."""

    def is_done(self) -> bool:
        """Whether it has put its last object."""
        if self.last is None:
            found = self._find_last()
            self.last = None if found == self._ours else found
        return self.last is not None

    def is_given_up(self) -> bool:
        """Wait a little for its last object. Returns whether that was in vain for long enough."""
        now_s = time.monotonic()
        if self._stop_s is None:
            self._stop_s = now_s + SECONDS_FOR_A_RIVAL
        if now_s > self._stop_s:
            return True
        time.sleep(_SECONDS_BETWEEN_LOOKS)
        return False


def _put(url: Url, file: Path, obeyed: Conditions, seen: Meta | None = None) -> Put:
    """Create an object, or replace the one that was seen; without that condition if the store does not obey it."""
    put = put_file(url, file, create=seen is None and obeyed.creates, replace=seen if obeyed.replaces else None)
    if put.outcome == "unsupported":
        raise NotWritableError(
            f"{url} cannot be written: the store now refuses a condition of a request that it obeyed before. Check "
            "what is between here and the store, such as a proxy, and type the same command to continue."
        )
    return put


def _put_piece(root: Url, rival: _Rival, obeyed: Conditions, piece: Piece) -> Meta:
    """Make an object have a piece's bytes, unless a rival is done. Returns what the store says about it."""
    url = root / piece.name
    replace: Meta | None = None
    while True:
        put = _put(url, piece.file, obeyed, replace)
        if put.version:
            return Meta(piece.nbytes, put.version)
        found = _head(url)
        replace = None
        if found is None:  # deleted meanwhile
            continue
        rival.is_met = True
        if put.outcome == "stored" or _has_bytes_of(url, found, piece) or rival.is_done():
            return found
        if time.time() - found.modified_s > _SECONDS_OF_A_DEAD_ONE or rival.is_given_up():
            replace = found


def _put_last(url: Url, last: Piece, ours: bytes, are_ours: Callable[[], bool], obeyed: Conditions) -> bool:
    """Put the last object, in place of one whose writer's pieces were replaced since. False if that is not certain."""
    if _put(url, last.file, obeyed).outcome == "stored":
        return True
    found = _head(url)
    if found is None:
        return False
    if _read(url) == ours:  # stored by a request whose answer was lost, or by a rival with equal bytes
        return True
    # Asked after the rival's was seen: pieces that are ours now have replaced those that it vouches for.
    return are_ours() and (_put(url, last.file, obeyed, found).outcome == "stored" or _read(url) == ours)


def _has_bytes_of(url: Url, found: Meta, piece: Piece) -> bool:
    """Whether an object has a piece's bytes; it is read only if it has the same size."""
    if found.size != piece.nbytes:
        return False
    crc32 = 0
    for start in range(0, found.size, _COMPARED_NBYTES):
        data = patiently(partial(_read_part, url, found, start, min(found.size, start + _COMPARED_NBYTES)))
        if data is None:
            return False
        crc32 = zlib.crc32(data, crc32)
    return crc32 == piece.crc32


def _read_part(url: Url, found: Meta, start: int, stop: int) -> bytes | None:
    """A part of one version of an object; None if there is another one now."""
    try:
        return get_range(url, found, start, stop).result()[1]
    except RemoteError:
        if _same(_head(url), found):
            raise
        return None


def _head(url: Url) -> Meta | None:
    try:
        return patiently(lambda: head(url))
    except FileNotFoundError:
        return None


def _read(url: Url) -> bytes | None:
    try:
        return patiently(lambda: read_whole(url))
    except FileNotFoundError:
        return None


def replace_object(url: Url, make: Callable[[], bytes]) -> bytes:
    """Replace a small object by what `make` makes of it; nothing is put if that is the same.

    Another writer that changes it meanwhile is not overwritten: `make` is then called again, and reads what is there.

    Raises:
        FileNotFoundError: there is no such object.
        NotWritableError: the store refuses, or fails for minutes.
        ConfigError: other writers change it without end.
    """
    for _ in range(_MOST_ROUNDS):
        seen = patiently(lambda: head(url))  # before it is read, so that a change in between is noticed
        after = make()
        if after == _read(url):
            return after
        with Spool() as spool:
            if _put(url, spool.write("object", after), obeyed_conditions(url.parent), seen).outcome == "stored":
                return after
    raise ConfigError(f"other processes change {url} again and again. Stop them, and type the same command again.")


def check_can_begin(root: Url) -> None:
    """Refuse, before long work, a place on an object store where no cache can be made.

    Raises:
        NotWritableError: there is no such bucket, access is refused, or the server does not answer.
        ConfigError: what is there is not a cache, or was one that is not wholly deleted.
    """
    obeyed_conditions(root)
    names = patiently(lambda: list_below(root, num_pages=1))
    others = sorted(name for name in names if not _OURS.match(name))
    if others:
        raise ConfigError(
            f"{root} is not a cache and not empty: there is {root / others[0]}. Give another --out, or delete it."
        )
    _refuse_records(root)


class Conditions(NamedTuple):
    """Which conditions of requests a store obeys."""

    creates: bool
    """`If-None-Match`: it refuses to create an object that is there."""
    replaces: bool
    """`If-Match`: it replaces the version of an object that was seen, and refuses to replace another one."""


@lru_cache
def obeyed_conditions(root: Url) -> Conditions:
    """Which conditions the store of a cache obeys. Tried once by each process.

    Raises:
        NotWritableError: see `put_file`.
    """
    obeyed = _try_conditions(root)
    if not all(obeyed):  # another build may have taken the probe for a dead one's, and deleted it in between
        again = _try_conditions(root)
        obeyed = Conditions(obeyed.creates or again.creates, obeyed.replaces or again.replaces)
    if not all(obeyed):
        names = [name for name, is_obeyed in zip(("If-None-Match", "If-Match"), obeyed, strict=True) if not is_obeyed]
        logging.getLogger(__name__).warning(
            "NOTE: the store of %s ignores conditions of requests (%s), so it cannot keep two builds apart. Run only "
            "one build of this cache at a time. A build that is stopped loses nothing.",
            root,
            ", ".join(names),
        )
    return obeyed


def _try_conditions(root: Url) -> Conditions:
    probe = root / "commits" / partial_path(Path("probe")).name
    put = partial(put_file, probe, patience_s=_SECONDS_TO_ANSWER)
    with Spool() as spool:
        file = spool.write("probe", b"")
        other = spool.write("other", b"1")  # entity tags may be those of the bytes
        if put(file, create=True).outcome == "unsupported":
            put(file)  # is anything stored there at all?
        creates = put(file, create=True).outcome == "exists"
        seen = _head(probe)
        replaces = (
            seen is not None
            and put(other, replace=seen).outcome == "stored"
            and put(file, replace=seen).outcome == "changed"
        )
    delete_file(probe)
    return Conditions(creates, replaces)


def sweep_probes(root: Url) -> int:
    """Delete what builds left that were killed while they tried the store, and return how many there were."""
    left = [name for name in patiently(lambda: list_files(root / "commits")) if is_partial(name)]
    for name in left:
        delete_file(root / "commits" / name)
    return len(left)
