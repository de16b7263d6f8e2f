"""Lists the regular files of a tar by reading its headers only: names, offsets and sizes. It extracts nothing.

Why not `tarfile`: it takes 27 us for each member, this module 9 us (ImageNet has 2.6 million members). It also stops
silently at a damaged or missing header, and reads extension headers of any size. Tests compare the two on every format
that `tarfile` writes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from atcache.errors import SourceError
from atcache.files.location import Location
from atcache.files.ranges import RangeFile

_BLOCK_NBYTES = 512
_ZERO_BLOCK = bytes(_BLOCK_NBYTES)
_MAX_EXTENSION_NBYTES = 1 << 20
# Writers pad a tar with zeros to a full record: 10 KiB by default, and hardly ever more than this.
_MAX_PADDING_NBYTES = 1 << 20
# Type flags of headers: regular files (the last is a contiguous file); links, devices, folders and pipes.
_REGULAR = (b"0", b"\0", b"7")
_WITHOUT_DATA = (b"1", b"2", b"3", b"4", b"5", b"6")
_COMPRESSED_MAGIC = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd", b"\x04\x22\x4d\x18")


class TarMember(NamedTuple):
    """One regular file of a tar."""

    name: bytes
    """As stored; usually UTF-8."""
    offset: int
    """Where the file's bytes begin in the tar."""
    nbytes: int
    """The file's size; all its bytes are within the tar."""
    head: bytes
    """The file's first bytes, at most 512: enough for a label."""


class DamagedTarError(SourceError):
    """A tar ends too early or holds a header that cannot be read. The members before it are fine."""

    def __init__(self, message: str, name: bytes | None = None) -> None:
        super().__init__(message)
        self.name = name
        """The name of the member that is cut off, if its header is still there."""


class _Extension(NamedTuple):
    """What pax and GNU extension headers say about the member after them."""

    name: bytes | None = None
    nbytes: int | None = None
    is_sparse: bool = False


def read_members(path: Location, file: RangeFile) -> Iterator[TarMember]:
    """The regular files of an uncompressed tar, in order. Links, devices and absolute or `..` names are left out.

    Args:
        path: the tar's location, for messages.
        file: the same tar, opened.

    Raises:
        DamagedTarError: the tar is truncated or damaged; raised after the last complete member. A tar must end with a
            block of zeros, and only zeros may come after it.
    """
    offset, extension = 0, _Extension()
    while True:
        # One call reads a header and the block after it, so that labels need no further read.
        blocks = file.pread(2 * _BLOCK_NBYTES, offset)
        header = blocks[:_BLOCK_NBYTES]
        if header == _ZERO_BLOCK:
            if extension != _Extension():
                raise DamagedTarError(f"{path}: damaged at byte {offset}: a header is missing. Copy the tar again.")
            return _check_end(path, file, offset + _BLOCK_NBYTES)
        _check_header(path, header, offset)
        kind = header[156:157]
        name = extension.name or _name(header)
        nbytes = extension.nbytes
        if nbytes is None:
            nbytes = 0 if kind in _WITHOUT_DATA else _number(path, header[124:136], offset)
        start = offset + _BLOCK_NBYTES
        is_folder = kind in _WITHOUT_DATA or (kind == b"\0" and name.endswith(b"/"))
        stored_nbytes = 0 if is_folder else nbytes
        if start + stored_nbytes > file.nbytes:
            raise DamagedTarError(
                f"{path}: truncated: the member at byte {offset} ends at byte {start + stored_nbytes}, "
                f"but the file has {file.nbytes} bytes. Copy the tar again.",
                name if kind in _REGULAR else None,
            )
        offset = start + -(-stored_nbytes // _BLOCK_NBYTES) * _BLOCK_NBYTES
        if kind in (b"x", b"X", b"g", b"L", b"K"):
            extension = _extend(path, file, kind, start, nbytes, extension)
            continue
        if kind == b"S":
            raise DamagedTarError(
                f"{path}: the member at byte {start} is a sparse file, which cannot be read in place. Make the tar "
                "again without sparse files.",
                name,
            )
        if kind in _REGULAR and not is_folder and not extension.is_sparse and _is_safe(name):
            yield TarMember(name, start, nbytes, blocks[_BLOCK_NBYTES : _BLOCK_NBYTES + nbytes])
        extension = _Extension()


def _check_header(path: Location, header: bytes, offset: int) -> None:
    if offset == 0 and header.startswith(_COMPRESSED_MAGIC):
        raise DamagedTarError(f"{path} is compressed. Decompress it first: samples are read in place.")
    if len(header) < _BLOCK_NBYTES:
        raise DamagedTarError(
            f"{path}: truncated: the tar ends at byte {offset + len(header)} without an end block. Copy the tar again."
        )
    # The checksum counts its own eight bytes as blanks: 8 * 32.
    unsigned = sum(header) - sum(header[148:156]) + 256
    try:
        expected = _octal(header[148:156])
    except ValueError:
        expected = -1
    if expected == unsigned:
        return
    # Some old programs summed the bytes as signed numbers.
    high = sum(byte > 127 for byte in header) - sum(byte > 127 for byte in header[148:156])
    if expected != unsigned - 256 * high:
        what = "not a tar file" if offset == 0 else f"damaged at byte {offset}: the header's checksum is wrong"
        raise DamagedTarError(f"{path}: {what}. Copy the tar again.")


def _octal(field: bytes) -> int:
    """A number in a header, as octal text; blanks are 0. Raises ValueError if it is not one."""
    text = field.split(b"\0", 1)[0].strip()
    if text and not text.isdigit():
        raise ValueError(text)
    return int(text or b"0", 8)


def _number(path: Location, field: bytes, offset: int) -> int:
    """A size field: octal, or GNU's base 256 for sizes from 8 GiB."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    try:
        return _octal(field)
    except ValueError:
        raise DamagedTarError(
            f"{path}: damaged at byte {offset}: the size is not a number. Copy the tar again."
        ) from None


def _name(header: bytes) -> bytes:
    name = header[:100].split(b"\0", 1)[0]
    # Only POSIX headers hold the first part of a long name here; GNU's own format holds times.
    if header[257:263] == b"ustar\0" and header[345]:
        return header[345:500].split(b"\0", 1)[0] + b"/" + name
    return name


def _is_safe(name: bytes) -> bool:
    """Whether a name stays inside a folder. We never write a file of this name, but other programs may get the key."""
    return not name.startswith(b"/") and b"\0" not in name and (b".." not in name or b".." not in name.split(b"/"))


def _extend(path: Location, file: RangeFile, kind: bytes, start: int, nbytes: int, extension: _Extension) -> _Extension:
    """`extension`, updated with what the extension header at `start` says."""
    if nbytes > _MAX_EXTENSION_NBYTES:
        raise DamagedTarError(
            f"{path}: the extension header at byte {start} has {nbytes} bytes, expected at most "
            f"{_MAX_EXTENSION_NBYTES}. Make the tar again with shorter names."
        )
    body = file.pread(nbytes, start)
    if kind == b"K":  # a long link name, and links are left out
        return extension
    if kind == b"L":
        return extension._replace(name=body.split(b"\0", 1)[0])
    try:
        records = _pax_records(body)
        size = records.get(b"size")
        found = _Extension(
            records.get(b"path"),
            None if size is None else _octal_free(size),
            any(keyword.startswith(b"GNU.sparse.") for keyword in records),
        )
    except ValueError:
        raise DamagedTarError(
            f"{path}: damaged at byte {start}: the pax header cannot be read. Copy the tar again."
        ) from None
    if kind == b"g":
        # A global header (git archive writes one, with a comment) must not rename or resize every member.
        if found != _Extension():
            raise DamagedTarError(
                f"{path}: a global pax header at byte {start} sets names or sizes. Make the tar again without it."
            )
        return extension
    return _Extension(
        found.name or extension.name,
        extension.nbytes if found.nbytes is None else found.nbytes,
        found.is_sparse or extension.is_sparse,
    )


def _octal_free(text: bytes) -> int:
    """A number in a pax header, as decimal text. Raises ValueError if it is not one."""
    if not text.isdigit() or len(text) > 20:
        raise ValueError(text)
    return int(text)


def _pax_records(body: bytes) -> dict[bytes, bytes]:
    """The records "LENGTH KEYWORD=VALUE\\n" of a pax header. Raises ValueError if they are damaged."""
    records: dict[bytes, bytes] = {}
    position = 0
    while position < len(body) and body[position]:
        digits = body[position : position + 8].split(b" ", 1)[0]
        length = _octal_free(digits)
        record = body[position + len(digits) + 1 : position + length]
        if length <= len(digits) + 1 or not record.endswith(b"\n"):
            raise ValueError(record)
        keyword, _, value = record[:-1].partition(b"=")
        records[keyword] = value
        position += length
    return records


def _check_end(path: Location, file: RangeFile, offset: int) -> None:
    """Accept only a little zero padding after the end block: no joined tars, no download filled up with zeros."""
    num_after = file.nbytes - offset
    if num_after > _MAX_PADDING_NBYTES or any(file.pread(max(num_after, 0), offset)):
        raise DamagedTarError(
            f"{path}: damaged: {num_after} bytes follow the end block at byte {offset - _BLOCK_NBYTES}. Copy the tar "
            "again; if several tars were joined, split them, because readers stop at the first end block."
        )
