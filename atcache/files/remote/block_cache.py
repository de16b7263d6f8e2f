"""Blocks of remote files, kept in one local file of fixed size that all processes on this machine share.

The file has a header, a table of what is in which slot, and the slots. A block's key chooses a set of 16 slots, and
the block may be in any of them. If all 16 are taken, it replaces one at random: one that was read already, if there
is any, so that what was fetched ahead is still there when it is read. Reading and writing blocks takes no lock: each
row of the table has a checksum over the block's key and bytes. So a block that another process, a kill or the disk has
damaged counts as missing.

Why it does not replace the least recently used block: training reads everything once an epoch, in a new order. The
blocks used last are then needed last. Keeping them would give hardly any hits in a cache smaller than the data.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import secrets
import struct
import threading
import time
import weakref
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import google_crc32c

from atcache.errors import ConfigError
from atcache.files.location import expand_home

BLOCK_NBYTES = 2**16
"""What is kept or replaced as a whole. Measured on random reads of 26 and 151 KB (`benchmarks/remote.py`): of larger
blocks, much would be fetched that nobody reads. Requests are larger where all is read; see `RemoteFile`."""

DEFAULT_GIB = 16.0
FOLDER_VARIABLE = "ATCACHE_BLOCKS_DIR"
GIB_VARIABLE = "ATCACHE_BLOCKS_GIB"

_NUM_WAYS = 16
_ROW = struct.Struct("<16sIIII")  # key, bytes, crc32c of key and bytes, minute when it came, whether it was read
_WAS_READ_OFFSET = 28
_WAS_READ = (1).to_bytes(4, "little")
_UNREAD_MINUTES = 24 * 60  # a block that was fetched ahead is kept this long for its reader, who may have been killed
_SET_NBYTES = _NUM_WAYS * _ROW.size
_EMPTY_ROW = bytes(_ROW.size)
_HEADER = struct.Struct("<8sIIQ")  # magic, bytes of a block, slots of a set, sets
_HEADER_NBYTES = 4096  # a page, so that the table behind it is aligned
_MAGIC = b"atcblk2\n"

_crc32c = cast("Any", google_crc32c)


class BlockKeys:
    """The keys of the blocks of one version of a file, 16 bytes each, by block number."""

    def __init__(self, url: str, version: str, size: int) -> None:
        self._digest = hashlib.sha256(f"{url}\n{version}\n{size}\n".encode())

    def __getitem__(self, number: int) -> bytes:
        digest = self._digest.copy()
        digest.update(number.to_bytes(8, "little"))
        return digest.digest()[:16]


class BlockCache:
    """The blocks of one folder. Threads and forked processes may share it."""

    def __init__(self, folder: Path, max_nbytes: int) -> None:
        """Open the cache, or create it.

        Args:
            folder: the cache's folder. If it is missing, it is created with access for this user only.
            max_nbytes: the most bytes it may take, including the table. An existing cache of another size is replaced
                by an empty one.

        Raises:
            ConfigError: the folder cannot be written, or the size is too small for one set of blocks.
        """
        self.num_sets = (max_nbytes - _HEADER_NBYTES) // (_SET_NBYTES + _NUM_WAYS * BLOCK_NBYTES)
        if self.num_sets < 1:
            raise ConfigError(f"{GIB_VARIABLE}: {max_nbytes} bytes are too few for any block; expected at least 2 MiB.")
        self._data_offset = _HEADER_NBYTES + self.num_sets * _SET_NBYTES
        self._promised: dict[weakref.ref[object], dict[str, int]] = {}
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            # Never open this file a second time: closing that descriptor would drop all of this process's locks.
            self.lock_fd = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            fcntl.lockf(self.lock_fd, fcntl.LOCK_EX, 1, 0)
            try:
                self._fd = self._open(folder / "blocks")
            finally:
                fcntl.lockf(self.lock_fd, fcntl.LOCK_UN, 1, 0)
        except OSError as error:
            raise ConfigError(
                f"{folder} cannot store what is read from servers: {error.strerror}. Name another folder in the "
                f"environment variable {FOLDER_VARIABLE}."
            ) from error

    def _open(self, file: Path) -> int:
        header = _HEADER.pack(_MAGIC, BLOCK_NBYTES, _NUM_WAYS, self.num_sets)
        nbytes = self._data_offset + self.num_sets * _NUM_WAYS * BLOCK_NBYTES
        flags = os.O_RDWR | os.O_CLOEXEC
        try:
            found = os.open(file, flags)
        except FileNotFoundError:
            pass
        else:
            if os.pread(found, _HEADER.size, 0) == header and os.fstat(found).st_size == nbytes:
                return found
            os.close(found)
        # Processes that have the old file open continue to use it until they end.
        partial = file.with_name(f".blocks.{secrets.token_hex(8)}")
        made = os.open(partial, flags | os.O_CREAT | os.O_EXCL, 0o600)
        os.pwrite(made, header, 0)
        os.ftruncate(made, nbytes)  # a sparse file: it takes disk space only as slots are filled
        partial.replace(file)
        return made

    @property
    def num_slots(self) -> int:
        """The number of blocks it can hold."""
        return self.num_sets * _NUM_WAYS

    @property
    def nbytes(self) -> int:
        """The bytes of all blocks that it can hold."""
        return self.num_slots * BLOCK_NBYTES

    def promise(self, reader: object, name: str, nbytes: int) -> None:
        """Note how many bytes of the files under this name a reader will read in an epoch, for as long as it lives."""
        self._promised.setdefault(weakref.ref(reader, self._promised.pop), {})[name] = nbytes

    @property
    def has_room(self) -> bool:
        """Whether all that was promised can be here at once. Of a larger share, sets would overflow."""
        promised = list(self._promised.values())  # a copy, as other threads add to it
        return sum(sum(nbytes_of.values()) for nbytes_of in promised) <= self.nbytes * 3 // 4

    def __del__(self) -> None:
        for descriptor in (getattr(self, "_fd", -1), getattr(self, "lock_fd", -1)):
            if descriptor >= 0:
                os.close(descriptor)

    def get(self, key: bytes) -> bytes | None:
        """A block, exactly as it was stored; None if it is missing or damaged."""
        first, rows = self._rows_of(key)
        way = _find(rows, key)
        if way is None:
            return None
        _, nbytes, crc32c, _, was_read = _ROW.unpack_from(rows, way * _ROW.size)
        data = os.pread(self._fd, min(nbytes, BLOCK_NBYTES), self._data_offset + (first + way) * BLOCK_NBYTES)
        is_good = len(data) == nbytes and _checksum(key, data) == crc32c
        with suppress(OSError):  # a full disk that copies on write refuses even these few bytes
            if not is_good:
                self._write_row(first + way, _EMPTY_ROW)
            elif not was_read:
                os.pwrite(self._fd, _WAS_READ, _HEADER_NBYTES + (first + way) * _ROW.size + _WAS_READ_OFFSET)
        return data if is_good else None

    def has(self, key: bytes) -> bool:
        """Whether a block is in the table. Its bytes are not checked."""
        return _find(self._rows_of(key)[1], key) is not None

    def put(self, key: bytes, data: bytes | memoryview, *, was_read: bool = False) -> None:
        """Store a block; it may replace another one. On a full disk nothing is stored, and no error is raised.

        Args:
            key: the block's key.
            data: its bytes.
            was_read: whether its reader has it already. Else it is kept rather than blocks that were read.
        """
        first, rows = self._rows_of(key)
        way = _find(rows, key)
        if way is None:
            way = _find(rows, bytes(16))  # an empty row: its key is all zeros
        if way is None:
            way = _replaceable(rows)
        try:
            # The row is empty while the slot is written, so that the old row never points to new bytes.
            self._write_row(first + way, _EMPTY_ROW)
            written = os.pwrite(self._fd, data, self._data_offset + (first + way) * BLOCK_NBYTES)
            if written == len(data):
                self._write_row(first + way, _ROW.pack(key, len(data), _checksum(key, data), _minute(), was_read))
        except OSError:
            return

    def drop(self, key: bytes) -> None:
        """Remove a block."""
        first, rows = self._rows_of(key)
        way = _find(rows, key)
        if way is not None:
            with suppress(OSError):
                self._write_row(first + way, _EMPTY_ROW)

    def _rows_of(self, key: bytes) -> tuple[int, bytes]:
        """The first slot of a key's set, and the set's rows."""
        number = int.from_bytes(key[8:], "little") % self.num_sets
        rows = os.pread(self._fd, _SET_NBYTES, _HEADER_NBYTES + number * _SET_NBYTES)
        return number * _NUM_WAYS, rows.ljust(_SET_NBYTES, b"\0")

    def _write_row(self, slot: int, row: bytes) -> None:
        os.pwrite(self._fd, row, _HEADER_NBYTES + slot * _ROW.size)


def _find(rows: bytes, key: bytes) -> int | None:
    """The position of this key's row in a set; None if no row has it."""
    # A match may lie across two rows or inside one; only one at the start of a row counts.
    place = rows.find(key)
    while place >= 0 and place % _ROW.size:
        place = rows.find(key, place + 1)
    return None if place < 0 else place // _ROW.size


def _replaceable(rows: bytes) -> int:
    """The position of a row in a full set whose block may go."""
    latest = _minute() - _UNREAD_MINUTES
    read = [way for way, (*_, minute, was_read) in enumerate(_ROW.iter_unpack(rows)) if was_read or minute < latest]
    return secrets.choice(read or range(_NUM_WAYS))


def _minute() -> int:
    return int(time.time() / 60)


def _checksum(key: bytes, data: bytes | memoryview) -> int:
    return _crc32c.extend(_crc32c.value(key), bytes(data))


_shared: BlockCache | None = None
_opening = threading.Lock()


def shared_blocks() -> BlockCache:
    """The block cache with the folder and size that the environment variables name; all processes share it.

    Raises:
        ConfigError: the folder cannot be written, or the size is not a number.
    """
    global _shared
    with _opening:
        if _shared is None:
            text = os.environ.get(GIB_VARIABLE, str(DEFAULT_GIB))
            try:
                max_nbytes = int(float(text) * 2**30)
            except (ValueError, OverflowError):
                raise ConfigError(f"{GIB_VARIABLE}={text!r}: expected a number of GiB, such as 16.") from None
            _shared = BlockCache(_folder(), max_nbytes)
        return _shared


def _folder() -> Path:
    named = os.environ.get(FOLDER_VARIABLE)
    if named:
        return expand_home(Path(named))
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "atcache" / "blocks"


def _renew_lock() -> None:
    global _opening
    _opening = threading.Lock()


os.register_at_fork(after_in_child=_renew_lock)
