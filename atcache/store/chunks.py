"""Chunks and shards as bytes: [bytes, compressor, crc32c] chunks under the `sharding_indexed` codec's index.

Pure functions on bytes; see "sharding-indexed" v1.0, "blosc", "zstd" and "crc32c" of the Zarr v3 specification.
Compression goes through numcodecs directly because zarr-python adds about half a millisecond to every chunk.
"""

from __future__ import annotations

import struct
import sys
import zlib
from typing import Any, cast

import google_crc32c
import numpy as np
from numcodecs import (
    blosc as _blosc,  # pyright: ignore
    zstd as _zstd,  # pyright: ignore
)

from atcache.errors import ConfigError
from atcache.store.layout import COMPRESSORS, ArraySpec

BLOSC_LEVEL = 5
"""On integer codes level 3 often gives up ("incompressible"), and 7 takes 3 to 9 times as long to save about 1 %."""
ZSTD_LEVEL = 1
"""On integer codes and photos levels 3 and 5 are slower and save nothing."""

GZIP_LEVEL = 6
"""Where matches are looked for at all, see `_deflate`."""
_GZIP = 31  # zlib's window bits for a gzip stream
_DEFLATE_MEMORY = 7
"""zlib's memory level, which also says how often it starts new Huffman tables: every 8192 bytes at 7."""
_MOSTLY_ZERO = 0.1
"""A chunk with fewer bytes that are not 0 than this share is searched for matches."""
_SMALL_NBYTES = 2**15

EMPTY = np.uint64(2**64 - 1)
"""Offset and length of a chunk that is not there."""

# Compiled modules, without types.
blosc = cast("Any", _blosc)
zstd = cast("Any", _zstd)
_google_crc32c = cast("Any", google_crc32c)

# The crc32c of any bytes followed by their own crc32c. Comparing with it checks a chunk without copying a part of it.
_CRC32C_RESIDUE = 0x48674BC7

_BLOSC_HEADER = struct.Struct("<BBBBIII")
_BLOSC_MEMCPYED = 0x02
_ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"


class DamagedChunkError(Exception):
    """Bytes are not a chunk or index of the expected size; the store turns this into an error that names the file."""


def check_byte_order() -> None:
    """Refuse a machine of the other byte order: caches hold little-endian numbers, which are taken as they are.

    Raises:
        ConfigError: it is big-endian.
    """
    if sys.byteorder != "little":
        raise ConfigError(
            "this machine is big-endian, and atcache reads and writes caches only on little-endian ones, such as "
            "x86-64 and ARM. Use one of these."
        )


def use_single_threaded_blosc() -> None:
    """Keep blosc to the calling thread: callers bring their own threads, and its pool does not survive a fork."""
    blosc.use_threads = False


def crc32c(data: bytes) -> bytes:
    """The checksum as Zarr's crc32c codec appends it: 4 bytes, little-endian."""
    return struct.pack("<I", _google_crc32c.value(data))


_SHUFFLES = {"shuffle": blosc.SHUFFLE, "bitshuffle": blosc.BITSHUFFLE}


def compress(array: np.ndarray, compressor: str) -> bytes:
    """A chunk's bytes as stored: the little-endian elements in the compressor's order, with their crc32c appended."""
    how = COMPRESSORS[compressor]
    array = array.swapaxes(-1, -2) if how.is_transposed else array
    array = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<"))
    if how.shuffle is not None:
        packed = bytes(blosc.compress(array, b"zstd", BLOSC_LEVEL, _SHUFFLES[how.shuffle], 0))
    else:
        packed = _deflate(array) if how.is_deflated else bytes(zstd.compress(array, ZSTD_LEVEL))
    return packed + crc32c(packed)


def _deflate(array: np.ndarray) -> bytes:
    """A gzip stream, with Huffman tables alone or with matches too, whichever is smaller.

    Packed codes are independent of each other: matches are found by chance, and cost more than they save (8 %). Only
    where most bytes are 0, or a chunk is small and so cheap to try, matches are looked for.
    """
    data = array.reshape(-1).view(np.uint8)
    strategies = [zlib.Z_HUFFMAN_ONLY]
    if data.size <= _SMALL_NBYTES or np.count_nonzero(data) < _MOSTLY_ZERO * data.size:
        strategies.append(zlib.Z_DEFAULT_STRATEGY)

    def packed(strategy: int) -> bytes:
        stream = zlib.compressobj(GZIP_LEVEL, zlib.DEFLATED, _GZIP, _DEFLATE_MEMORY, strategy)
        return stream.compress(data.data) + stream.flush()

    return min(map(packed, strategies), key=len)


def decompress_into(encoded: bytes, compressor: str, out_bytes: np.ndarray) -> None:
    """Undo `compress` into `out_bytes`, uint8 and contiguous, which the chunk must fill exactly.

    Elements keep the order in which they are stored: if the compressor transposes, the last two axes are swapped.

    Checksum and declared size are checked before decompressing, so that no chunk can make the reader allocate memory.

    Raises:
        DamagedChunkError: checksum, header or size do not fit.
    """
    if len(encoded) < 4 or _google_crc32c.value(encoded) != _CRC32C_RESIDUE:
        raise DamagedChunkError("its checksum does not match")
    packed = memoryview(encoded)[:-4]
    if COMPRESSORS[compressor].is_deflated:
        _inflate_into(packed, out_bytes)
        return
    is_blosc = COMPRESSORS[compressor].shuffle is not None
    nbytes = _blosc_nbytes(packed) if is_blosc else _zstd_nbytes(packed)
    if nbytes != out_bytes.nbytes:
        raise DamagedChunkError(f"it claims {nbytes} bytes of content, expected {out_bytes.nbytes}")
    try:
        (blosc if is_blosc else zstd).decompress(packed, out_bytes)
    except (RuntimeError, ValueError) as error:
        raise DamagedChunkError(f"it cannot be decompressed ({error})") from error


def _inflate_into(packed: memoryview, out_bytes: np.ndarray) -> None:
    """Undo `_deflate`. A stream of another size than `out_bytes` is given up once that is seen."""
    stream = zlib.decompressobj(_GZIP)
    try:
        content = stream.decompress(packed, out_bytes.nbytes + 1)
    except zlib.error as error:
        raise DamagedChunkError(f"it cannot be decompressed ({error})") from error
    if len(content) != out_bytes.nbytes or not stream.eof or stream.unused_data:
        raise DamagedChunkError(f"its content is not of {out_bytes.nbytes} bytes")
    out_bytes[:] = np.frombuffer(content, np.uint8)


def _blosc_nbytes(packed: memoryview) -> int:
    if len(packed) < _BLOSC_HEADER.size:
        raise DamagedChunkError(f"it has {len(packed)} bytes, too few for a blosc chunk")
    _, _, flags, _, nbytes, blocksize, cbytes = _BLOSC_HEADER.unpack_from(packed)
    if cbytes != len(packed) or (nbytes and not 0 < blocksize <= max(nbytes, 1)):
        raise DamagedChunkError(f"its blosc header says {cbytes} bytes in blocks of {blocksize}, it has {len(packed)}")
    if flags & _BLOSC_MEMCPYED and cbytes != nbytes + _BLOSC_HEADER.size:
        raise DamagedChunkError("its blosc header contradicts itself")
    return nbytes


def _zstd_nbytes(packed: memoryview) -> int:
    """Content size of a zstd frame (RFC 8878, section 3.1.1.1); frames that do not state it are refused."""
    if len(packed) < 6 or bytes(packed[:4]) != _ZSTD_MAGIC:
        raise DamagedChunkError("it is not a zstd frame")
    descriptor = packed[4]
    is_single_segment = bool(descriptor & 0x20)
    field_nbytes = {0: 1 if is_single_segment else 0, 1: 2, 2: 4, 3: 8}[descriptor >> 6]
    start = 5 + (not is_single_segment) + (0, 1, 2, 4)[descriptor & 3]
    field = packed[start : start + field_nbytes]
    if not field_nbytes or len(field) < field_nbytes:
        raise DamagedChunkError("its zstd frame does not state its size")
    # The two-byte form starts at 256, since smaller sizes fit the one-byte form.
    return int.from_bytes(field, "little") + (256 if field_nbytes == 2 else 0)


class ChunkEncoder:
    """Encodes chunks of one array. Holds no state: threads may share it, and forked processes too."""

    def __init__(self, spec: ArraySpec) -> None:
        use_single_threaded_blosc()
        self.spec = spec

    def encode(self, chunk: np.ndarray) -> bytes:
        """One chunk's bytes as stored in the shard.

        Args:
            chunk: the chunk's elements; leading axes of length 1 may be left out. Its dtype must be the array's.
        """
        num_missing = len(self.spec.chunk_shape) - chunk.ndim
        shape = self.spec.chunk_shape[num_missing:]
        if num_missing < 0 or any(side != 1 for side in self.spec.chunk_shape[:num_missing]) or chunk.shape != shape:
            raise ValueError(f"a chunk of {self.spec.name} has shape {self.spec.chunk_shape}, got {chunk.shape}.")
        if chunk.dtype != np.dtype(self.spec.dtype):
            raise ValueError(f"{self.spec.name} holds {self.spec.dtype}, got {chunk.dtype}.")
        return compress(chunk, self.spec.compressor)


def encode_index(index_N2: np.ndarray) -> bytes:
    """A shard's index as stored at its end: (offset, length) of each chunk, uint64 little-endian, then its crc32c."""
    data = np.ascontiguousarray(index_N2, dtype="<u8").tobytes()
    return data + crc32c(data)


def decode_index(data: bytes, spec: ArraySpec, shard_nbytes: int) -> np.ndarray:
    """Undo `encode_index`, uint64 of shape (chunks in a shard, 2), with every range checked to lie before the index.

    Raises:
        DamagedChunkError: wrong size or checksum, or a chunk outside of the shard or larger than a chunk can be.
    """
    if len(data) != spec.index_nbytes or crc32c(data[:-4]) != data[-4:]:
        raise DamagedChunkError("its index does not match the index's checksum")
    index_N2 = np.frombuffer(data, dtype="<u8", count=2 * spec.num_chunks_per_shard).reshape(-1, 2)
    offsets_N, nbytes_N = index_N2[:, 0], index_N2[:, 1]
    is_empty_N = (offsets_N == EMPTY) & (nbytes_N == EMPTY)
    content_nbytes = np.uint64(shard_nbytes - spec.index_nbytes)
    is_inside_N = (nbytes_N > 4) & (nbytes_N <= np.minimum(content_nbytes, np.uint64(spec.max_encoded_nbytes)))
    # Compared as a difference, since offset + length may overflow in a hostile index.
    is_inside_N &= offsets_N <= content_nbytes - np.minimum(nbytes_N, content_nbytes)
    if not np.all(is_empty_N | is_inside_N):
        raise DamagedChunkError("its index points outside of the shard")
    return index_N2
