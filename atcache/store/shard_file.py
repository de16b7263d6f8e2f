"""Writes one shard: chunks go to a temp file, then the index, then a rename gives the file its name."""

from __future__ import annotations

import os
import zlib
from contextlib import suppress
from pathlib import Path

import numpy as np

from atcache.files.durable import fsync_path, make_folder, partial_path
from atcache.store.chunks import EMPTY, encode_index
from atcache.store.layout import ArraySpec
from atcache.store.manifest import FileRecord


class ShardFile:
    """One shard being written to its temp file: chunks as they come, the index at the end."""

    def __init__(self, path: Path, spec: ArraySpec, *, is_durable: bool = True) -> None:
        """Begin a shard.

        Args:
            path: where it will be.
            spec: its array.
            is_durable: whether it must survive a power cut; not if it is only on its way to a server.
        """
        self.path = path
        self._is_durable = is_durable
        self._partial = partial_path(path)
        self._index_N2 = np.full((spec.num_chunks_per_shard, 2), EMPTY, dtype="<u8")
        self._nbytes = 0
        self._crc32 = 0
        if is_durable:
            make_folder(path.parent)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self._partial.open("xb", buffering=2**20)

    def append(self, number: int, chunk: bytes) -> None:
        """Write the chunk that has this place in the index."""
        self._index_N2[number] = self._nbytes, len(chunk)
        self._write(chunk)

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._crc32 = zlib.crc32(data, self._crc32)
        self._nbytes += len(data)

    def seal(self) -> FileRecord:
        """Write the index and wait until all is on the disk."""
        self._write(encode_index(self._index_N2))
        self._file.flush()
        if self._is_durable:
            os.fsync(self._file.fileno())
        self._file.close()
        return FileRecord(nbytes=self._nbytes, crc32=self._crc32)

    def place(self) -> None:
        """Give the sealed shard its name."""
        self._partial.replace(self.path)
        if self._is_durable:  # a rename survives a power cut only once its folder is on the disk
            fsync_path(self.path.parent)

    def discard(self) -> None:
        """Remove the temp file, if it is still there."""
        # Closing writes what is still buffered, which fails again if the disk is full.
        with suppress(OSError):
            self._file.close()
        with suppress(FileNotFoundError):
            self._partial.unlink()
