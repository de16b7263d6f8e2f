"""The shape of a cache: which arrays it has, how they are cut into shards and chunks, which task writes what.

Pure functions of numbers: nothing here reads or writes files."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import Annotated, ClassVar, Literal

import numpy as np

from atcache.errors import ConfigError
from atcache.fields import JsonFields, Omitted

FORMAT = 1
"""The format number this version writes and reads; `docs/format.md` says what it means."""

CODES_DTYPES = ("int8", "uint8", "int16", "int32")
"""Integer types that every Zarr v3 library reads."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Compressor:
    """How the integers of a chunk become bytes: standard Zarr codecs, so that any Zarr library reads them."""

    shuffle: Literal["shuffle", "bitshuffle"] | None
    """How blosc groups bytes or bits before zstd; None for zstd or deflate without blosc."""
    is_transposed: bool
    """Whether the last two axes are swapped first: all tokens of one component lie together."""
    is_deflated: bool = False
    """Whether the bytes are deflated (gzip): for bytes of which each is independent of those before."""


ZSTD = "zstd"
BLOSC = "blosc-zstd-bitshuffle"
GZIP = "gzip"
COMPRESSORS: Mapping[str, Compressor] = {
    ZSTD: Compressor(shuffle=None, is_transposed=False),
    BLOSC: Compressor(shuffle="bitshuffle", is_transposed=False),
    "transpose-blosc-zstd-shuffle": Compressor(shuffle="shuffle", is_transposed=True),
    "transpose-blosc-zstd-bitshuffle": Compressor(shuffle="bitshuffle", is_transposed=True),
    GZIP: Compressor(shuffle=None, is_transposed=False, is_deflated=True),
}
"""By the names that caches record, fastest to read first. A build measures which is smallest for its codes."""

# Limits that no real cache comes near. They keep a damaged or hostile layout from asking for absurd memory.
MAX_CHUNK_NBYTES = 2**30
MAX_CHUNKS_PER_SHARD = 2**24
MAX_NUM_TASKS = 10**7
MAX_NUM_SAMPLES = 2**31 - 1
MAX_NUM_VIEWS = 10_000
MAX_VIEW_NBYTES = 2**32
"""Limit for the codes of one view of one sample, decompressed, which a reader holds in memory as a whole."""
MAX_NUM_ROWS = 2**33
"""Limit for views times samples: a reader may hold a status for each."""

MAX_FOLDER_ENTRIES = 10_000
"""The most that a folder should hold: Hugging Face's hub takes no more. All shards of a view are in one folder."""
MAX_SINGLE_RECORDS = 9_000
"""A cache with more tasks than this has its commit records joined; the rest of the 10,000 is room for other files."""
RECORDS_PER_FILE = 1000
MAX_RECORDS_PER_FILE = 10_000


class Status(IntEnum):
    """What became of one sample of one view (`views/status`).

    Numbers from 2 are those of `atcache.images.tar_samples.Problem`.
    """

    PENDING = 0
    STORED = 1
    NO_IMAGE = 2
    NO_LABEL = 3
    DUPLICATE_KEY = 4
    TRUNCATED = 5
    UNDECODABLE = 6
    NO_SAMPLE = 255
    """No sample has this row: see `StoreLayout.part_stops`."""


def describe_status(status: int) -> str:
    """A status as words, for messages.

    >>> describe_status(6)
    'undecodable'
    """
    known = {int(member): member.name.lower().replace("_", " ") for member in Status}
    return known.get(status, f"status {status}")


def max_encoded_nbytes(nbytes: int) -> int:
    """An upper bound for an encoded chunk of `nbytes`: zstd and blosc add less than this to incompressible data."""
    return nbytes + nbytes // 64 + 1024


def task_name(view: int, block: int) -> str:
    """The name of the task that writes a block of a view; see `Task`."""
    return f"v{view:04d}-b{block:06d}"


@dataclass(frozen=True, slots=True, order=True)
class Task(JsonFields):
    """The work that writes one shard of every array: one view of the samples [start, stop)."""

    view: int
    block: int
    start: int
    stop: int

    @property
    def name(self) -> str:
        """The name of the task's commit record.

        >>> Task(view=0, block=3, start=300, stop=400).name
        'v0000-b000003'
        """
        return task_name(self.view, self.block)

    @property
    def num_samples(self) -> int:
        """Samples in the block; the last block of a part may have fewer."""
        return self.stop - self.start


@dataclass(frozen=True, kw_only=True, slots=True)
class ArraySpec:
    """One array that tasks write: its first axes are (view, sample), one shard is one task."""

    name: str
    """Path in the cache, such as "attention/codes"."""
    dtype: str
    shape: tuple[int, ...]
    shard_shape: tuple[int, ...]
    chunk_shape: tuple[int, ...]
    dimension_names: tuple[str, ...]
    compressor: str
    """One of `COMPRESSORS`."""

    @property
    def chunk_nbytes(self) -> int:
        """Bytes of any decompressed chunk: chunks that reach beyond the array are padded to the full size."""
        return math.prod(self.chunk_shape) * np.dtype(self.dtype).itemsize

    @property
    def chunks_per_shard(self) -> tuple[int, ...]:
        """Chunks along each axis of a shard."""
        return tuple(shard // chunk for shard, chunk in zip(self.shard_shape, self.chunk_shape, strict=True))

    @property
    def num_chunks_per_shard(self) -> int:
        """Entries in a shard's index."""
        return math.prod(self.chunks_per_shard)

    @property
    def num_chunks_per_sample(self) -> int:
        """Consecutive index entries of one sample; 0 when one chunk holds all samples of the shard."""
        return self.num_chunks_per_shard // self.shard_shape[1] if self.chunk_shape[1] == 1 else 0

    @property
    def index_nbytes(self) -> int:
        """Bytes at the end of a shard: offset and length (uint64) of every chunk, and the index's crc32c."""
        return 16 * self.num_chunks_per_shard + 4

    @property
    def max_encoded_nbytes(self) -> int:
        """An upper bound for an encoded chunk."""
        return max_encoded_nbytes(self.chunk_nbytes)

    def shard_file(self, task: Task) -> str:
        """Path of a task's shard inside the cache.

        >>> layout.codes.shard_file(Task(0, 3, 300, 400))  # doctest: +SKIP
        'attention/codes/c/0/3/0/0/0'
        """
        return "/".join([self.name, "c", str(task.view), str(task.block), *["0"] * (len(self.shape) - 2)])


@dataclass(frozen=True, kw_only=True, slots=True)
class StoreLayout(JsonFields):
    """The numbers that determine every array of a cache. Stored in the cache's attributes."""

    is_strict: ClassVar[bool] = True
    num_views: int
    num_samples: int
    """Rows of the sample table, and so of the axis S. Of a cache in several parts, some belong to no sample."""
    num_layers: int
    """Rows of codes: one for each stored layer, or two, of bytes, if all layers are packed together."""
    num_tokens: int
    """Tokens that a row of codes has; 1 if they are packed together."""
    num_components: int
    """Codes of one token in one row."""
    codes_dtype: str
    """One of `CODES_DTYPES`."""
    samples_per_shard: int
    """Samples in a task, and so in a shard; see `shard_size.plan_samples_per_shard`."""
    layers_per_chunk: int
    """Divides `num_layers`; see `shard_size.plan_layers_per_chunk`."""
    parameter_names: tuple[str, ...]
    """What the components of `views/parameters` mean."""
    pixels: tuple[int, int] | None = None
    """(height, width) of the stored images; None when views are replayed from the tars."""
    compressor: str = BLOSC
    """How codes are compressed, one of `COMPRESSORS`."""
    part_stops: Annotated[tuple[int, ...], Omitted] = ()
    """The row after the last sample of each part, if the cache has grown or was merged; empty if it has one part.

    A part begins a shard of its own, since shards are never rewritten. So rows between the end of a part and the next
    multiple of `samples_per_shard` belong to no sample.
    """
    records_per_file: Annotated[int, Omitted] = 1
    """Blocks whose commit records are joined into one file once all of them are done; 1 if records are not joined.

    Versions that do not know of joined records do not know this member, and so refuse the cache.
    """

    def __post_init__(self) -> None:
        limits = {
            "num_views": MAX_NUM_VIEWS,
            "num_samples": MAX_NUM_SAMPLES,
            "num_layers": 4096,
            "num_tokens": 2**20,
            "num_components": 2**24,
            "samples_per_shard": MAX_CHUNKS_PER_SHARD,
            "layers_per_chunk": 4096,
            "records_per_file": MAX_RECORDS_PER_FILE,
        }
        for name, limit in limits.items():
            _check_count(name, getattr(self, name), limit)
        if self.pixels is not None:
            if len(self.pixels) != 2:
                raise ConfigError(f"pixels={self.pixels!r}: expected (height, width).")
            for side in self.pixels:
                _check_count("pixels", side, 2**16)
        if self.num_layers % self.layers_per_chunk:
            raise ConfigError(
                f"layers_per_chunk={self.layers_per_chunk} does not divide num_layers={self.num_layers}; "
                "choose a divisor, as plan_layers_per_chunk does."
            )
        if self.codes_dtype not in CODES_DTYPES:
            raise ConfigError(f"codes_dtype={self.codes_dtype!r}: expected one of {', '.join(CODES_DTYPES)}.")
        if self.compressor not in COMPRESSORS:
            raise ConfigError(f"compressor={self.compressor!r}: expected one of {', '.join(COMPRESSORS)}.")
        if not self.parameter_names or len(set(self.parameter_names)) != len(self.parameter_names):
            raise ConfigError(f"parameter_names={self.parameter_names}: expected one or more different names.")
        if self.num_views * self.num_blocks > MAX_NUM_TASKS:
            raise ConfigError(
                f"{self.num_views} views of {self.num_samples} samples in shards of {self.samples_per_shard} are "
                f"{self.num_views * self.num_blocks} tasks, over {MAX_NUM_TASKS}. Raise samples_per_shard."
            )
        if self.num_views * self.num_samples > MAX_NUM_ROWS:
            raise ConfigError(
                f"{self.num_views} views of {self.num_samples} samples are over the limit of {MAX_NUM_ROWS} in a "
                "cache. Split the samples among several caches, or make fewer views."
            )
        if self.part_stops:
            self._check_parts()
        for spec in self.arrays():
            if spec.chunk_nbytes > MAX_CHUNK_NBYTES or spec.num_chunks_per_shard > MAX_CHUNKS_PER_SHARD:
                raise ConfigError(
                    f"{spec.name} would have chunks of {spec.chunk_nbytes} bytes, {spec.num_chunks_per_shard} in a "
                    f"shard; the limits are {MAX_CHUNK_NBYTES} and {MAX_CHUNKS_PER_SHARD}. Lower samples_per_shard "
                    "or layers_per_chunk."
                )
        codes_nbytes = self.codes.chunk_nbytes * (self.num_layers // self.layers_per_chunk)
        if codes_nbytes > MAX_VIEW_NBYTES:
            raise ConfigError(
                f"the codes of one view would be {codes_nbytes} bytes ({self.num_layers} x {self.num_tokens} x "
                f"{self.num_components} of {self.codes_dtype}), over {MAX_VIEW_NBYTES}. Store fewer layers or heads."
            )

    def _check_parts(self) -> None:
        for stop in self.part_stops:
            _check_count("part_stops", stop, self.num_samples)
        starts = [start for start, _ in self.parts()]
        is_one = len(self.part_stops) < 2
        if (
            is_one
            or self.part_stops[-1] != self.num_samples
            or any(start >= stop for start, stop in zip(starts, self.part_stops, strict=True))
        ):
            raise ConfigError(
                f"part_stops={self.part_stops}: expected none or several ascending rows up to "
                f"num_samples={self.num_samples}, each "
                f"part beginning at a multiple of samples_per_shard={self.samples_per_shard}."
            )

    @property
    def num_blocks(self) -> int:
        """Blocks of samples, and so tasks, in a view."""
        return -(-self.num_samples // self.samples_per_shard)

    @property
    def num_tasks(self) -> int:
        """Tasks of all views."""
        return self.num_views * self.num_blocks

    def parts(self) -> list[tuple[int, int]]:
        """First row, and row after the last sample, of each part."""
        stops = self.part_stops or (self.num_samples,)
        return [(start, stop) for start, stop in zip((0, *map(self.next_block, stops)), stops, strict=False)]

    def with_part(self, stops: tuple[int, ...]) -> StoreLayout:
        """The layout with more samples behind these: one part or several, by the row after the last of each."""
        start = self.next_block(self.num_samples)
        part_stops = (*(self.part_stops or (self.num_samples,)), *(start + stop for stop in stops))
        return replace(self, num_samples=part_stops[-1], part_stops=part_stops)

    def with_joined_records(self) -> StoreLayout:
        """The layout with records joined if there are many tasks; small caches stay readable by older versions."""
        if self.num_tasks <= MAX_SINGLE_RECORDS or self.records_per_file > 1:
            return self
        return replace(self, records_per_file=RECORDS_PER_FILE)

    def next_block(self, row: int) -> int:
        """The first row of a block from `row` on."""
        return -(-row // self.samples_per_shard) * self.samples_per_shard

    @property
    def num_real_samples(self) -> int:
        """Samples, without the rows between parts."""
        return sum(stop - start for start, stop in self.parts())

    @property
    def samples_group(self) -> str:
        """The group with the sample table. A cache that gets another part also gets another table, with all rows."""
        return f"samples-{len(self.part_stops)}" if self.part_stops else "samples"

    def tasks(self) -> list[Task]:
        """All tasks: view by view, and block by block within a view."""
        return [self.task(view, block) for view in range(self.num_views) for block in range(self.num_blocks)]

    def task(self, view: int, block: int) -> Task:
        """The task of one view and block."""
        start = block * self.samples_per_shard
        stops = self.part_stops
        part_stop = stops[bisect_right(stops, start)] if stops else self.num_samples
        return Task(view, block, start, min(start + self.samples_per_shard, part_stop))

    def has_task(self, task: Task) -> bool:
        """Whether a task is one of this cache's."""
        is_inside = 0 <= task.view < self.num_views and 0 <= task.block < self.num_blocks
        return is_inside and task == self.task(task.view, task.block)

    def task_of(self, view: int, sample: int) -> Task:
        """The task that writes a sample of a view."""
        return self.task(view, sample // self.samples_per_shard)

    @property
    def codes(self) -> ArraySpec:
        """`attention/codes`: a chunk is a few layers of one sample."""
        tail = (self.num_tokens, self.num_components)
        return ArraySpec(
            name="attention/codes",
            dtype=self.codes_dtype,
            shape=(self.num_views, self.num_samples, self.num_layers, *tail),
            shard_shape=(1, self.samples_per_shard, self.num_layers, *tail),
            chunk_shape=(1, 1, self.layers_per_chunk, *tail),
            dimension_names=("view", "sample", "layer", "token", "component"),
            compressor=self.compressor,
        )

    @property
    def rgb(self) -> ArraySpec | None:
        """`pixels/rgb`: a chunk is one image; None when pixels are not stored."""
        if self.pixels is None:
            return None
        return ArraySpec(
            name="pixels/rgb",
            dtype="uint8",
            shape=(self.num_views, self.num_samples, *self.pixels, 3),
            shard_shape=(1, self.samples_per_shard, *self.pixels, 3),
            chunk_shape=(1, 1, *self.pixels, 3),
            dimension_names=("view", "sample", "height", "width", "channel"),
            compressor=ZSTD,
        )

    @property
    def parameters(self) -> ArraySpec:
        """`views/parameters`: what was drawn for each view."""
        return self._views_array("parameters", "float32", len(self.parameter_names))

    @property
    def pixel_hash(self) -> ArraySpec:
        """`views/pixel_hash`: hash of each augmented image; 0 if there is none."""
        return self._views_array("pixel_hash", "uint64")

    @property
    def status(self) -> ArraySpec:
        """`views/status`: a `Status` for each sample of each view."""
        return self._views_array("status", "uint8")

    def _views_array(self, name: str, dtype: str, num_parameters: int | None = None) -> ArraySpec:
        tail = () if num_parameters is None else (num_parameters,)
        return ArraySpec(
            name=f"views/{name}",
            dtype=dtype,
            shape=(self.num_views, self.num_samples, *tail),
            shard_shape=(1, self.samples_per_shard, *tail),
            chunk_shape=(1, self.samples_per_shard, *tail),
            dimension_names=("view", "sample", "parameter")[: 2 + len(tail)],
            compressor=ZSTD,
        )

    def arrays(self) -> list[ArraySpec]:
        """The arrays that tasks write, in the order their shards are put in place.

        Status is last: once its shard is there, the others are too.
        """
        pixels = [] if self.rgb is None else [self.rgb]
        return [self.codes, *pixels, self.parameters, self.pixel_hash, self.status]


def _check_count(name: str, value: object, limit: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= limit:
        raise ConfigError(f"{name}={value!r}: expected an integer from 1 to {limit}.")
