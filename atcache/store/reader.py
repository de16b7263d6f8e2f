"""Reads a cache: codes and pixels of one sample in one `pread` each, every byte checked, nothing loaded unasked.

Chunks are decompressed here, not by zarr-python, which adds half a millisecond to each: reading must keep up with
training.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from atcache.errors import CacheMissError, ConfigError, CorruptCacheError
from atcache.store.chunks import EMPTY, DamagedChunkError, decode_index, decompress_into, use_single_threaded_blosc
from atcache.store.layout import ArraySpec, Status, StoreLayout, Task, describe_status
from atcache.store.manifest import commit_path, list_commits
from atcache.store.metadata import read_root
from atcache.store.tables import read_array, read_samples, read_state

if TYPE_CHECKING:
    from atcache.source import SampleIndex

# Bounds what a reader keeps: file descriptors, and indexes of some 100 KB each for a large teacher.
MAX_OPEN_SHARDS = 384
MAX_VIEW_BLOCKS = 128

# Chunks further apart than this are read one by one: another writer may have laid them out in another order.
_MAX_GAP_NBYTES = 2**16


class _OpenShard:
    """A shard's file descriptor and checked index. Closed with its last user: eviction cannot hurt a reading thread."""

    def __init__(self, file: Path, spec: ArraySpec) -> None:
        self.fd = -1
        self.fd = os.open(file, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        nbytes = os.fstat(self.fd).st_size
        if nbytes < spec.index_nbytes:
            raise DamagedChunkError(f"it has {nbytes} bytes, fewer than its index")
        index = read_exactly(self.fd, spec.index_nbytes, nbytes - spec.index_nbytes)
        self.index_N2 = decode_index(index, spec, nbytes)

    def __del__(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)


def read_exactly(fd: int, nbytes: int, offset: int) -> bytes:
    """`os.pread` that returns all or raises `DamagedChunkError`: it may stop early at 2 GiB, or at a signal."""
    data = os.pread(fd, nbytes, offset)
    while len(data) < nbytes:
        more = os.pread(fd, nbytes - len(data), offset + len(data))
        if not more:
            raise DamagedChunkError("it ends early")
        data += more
    return data


class CacheReader:
    """One cache, open for reading; complete or not.

    Threads may share it. Pickled or forked copies open their own files. A cache that is still being built may be read:
    a task is seen once its shards are in place, except that `status_VS` and `samples` keep what they first read.
    """

    def __init__(self, path: Path | str, *, max_open_shards: int = MAX_OPEN_SHARDS) -> None:
        """Open a cache. Reads one small file, whatever the cache's size.

        Args:
            path: its folder.
            max_open_shards: file descriptors and indexes kept; lower it where many processes share a limit.

        Raises:
            CacheMissError: there is none at `path`.
            CacheMismatchError: it has another format number.
            CorruptCacheError: its metadata is damaged.
        """
        use_single_threaded_blosc()
        self.path = Path(path)
        self.max_open_shards = max_open_shards
        self.attributes: dict[str, Any]
        self.layout: StoreLayout
        self.attributes, self.layout = read_root(self.path)
        self._codes = self.layout.codes
        self._rgb = self.layout.rgb
        self._reset()

    def _reset(self) -> None:
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._shards: OrderedDict[str, _OpenShard] = OrderedDict()
        self._view_blocks: OrderedDict[str, np.ndarray] = OrderedDict()

    def __reduce__(self) -> tuple[Any, ...]:
        return partial(CacheReader, max_open_shards=self.max_open_shards), (self.path,)

    @property
    def is_complete(self) -> bool:
        """Whether the build finished, and no commit record was deleted since to have its task redone."""
        layout = self.layout
        num_tasks = layout.num_views * layout.num_blocks
        return self.attributes.get("complete") is not None and len(list_commits(self.path)) == num_tasks

    def missing_tasks(self) -> list[Task]:
        """Tasks without commit record, from one folder listing."""
        committed = list_commits(self.path)
        return [task for task in self.layout.tasks() if task.name not in committed]

    def read_codes(
        self, view: int, sample: int, layers: slice | None = None, out: np.ndarray | None = None
    ) -> np.ndarray:
        """Codes of one view of one sample.

        Args:
            view: from 0.
            sample: its index in the source.
            layers: positions among the stored layers, without step; None for all.
            out: where to write, C-contiguous, codes dtype, shape (layer, token, component); None for a new array.

        Returns:
            codes_LTC: `out`, or a new array.

        Raises:
            CacheMissError: not stored; the message says why.
            CorruptCacheError: the stored bytes are damaged.
        """
        layout, spec = self.layout, self._codes
        first, stop, step = (layers or slice(None)).indices(layout.num_layers)
        if step != 1 or first >= stop:
            raise ConfigError(f"layers={layers}: expected a range without step within {layout.num_layers} layers.")
        shape = (stop - first, layout.num_tokens, layout.num_components)
        out_LTC = np.empty(shape, spec.dtype) if out is None else out
        if out_LTC.shape != shape or out_LTC.dtype != spec.dtype or not out_LTC.flags.c_contiguous:
            raise ConfigError(f"out is {out_LTC.dtype} {out_LTC.shape}; expected contiguous {spec.dtype} {shape}.")
        width = layout.layers_per_chunk
        first_chunk, stop_chunk = first // width, -(-stop // width)
        out_bytes = out_LTC.reshape(-1).view(np.uint8)
        layer_nbytes = spec.chunk_nbytes // width
        chunks = self._read_sample(spec, view, sample, first_chunk, stop_chunk)
        for number, encoded in enumerate(chunks, start=first_chunk):
            start = max(first, number * width)
            end = min(stop, (number + 1) * width)
            target = out_bytes[(start - first) * layer_nbytes : (end - first) * layer_nbytes]
            if end - start == width:
                self._decompress(encoded, spec, view, sample, target)
            else:
                whole = np.empty(spec.chunk_nbytes, np.uint8)
                self._decompress(encoded, spec, view, sample, whole)
                target[:] = whole[(start - number * width) * layer_nbytes : (end - number * width) * layer_nbytes]
        return out_LTC

    def read_pixels(self, view: int, sample: int) -> np.ndarray:
        """The stored image of one view of one sample: pixels_HWC uint8, RGB.

        Raises:
            CacheMissError: this cache stores no pixels, or not these.
            CorruptCacheError: the stored bytes are damaged.
        """
        spec = self._rgb
        if spec is None:
            raise CacheMissError(f"{self.path} stores no pixels; views are replayed from the tars.")
        pixels_HWC = np.empty(spec.chunk_shape[2:], spec.dtype)
        (encoded,) = self._read_sample(spec, view, sample, 0, 1)
        self._decompress(encoded, spec, view, sample, pixels_HWC.reshape(-1))
        return pixels_HWC

    def parameters(self, view: int, sample: int) -> np.ndarray:
        """The drawn parameters of one view of one sample: parameters_P float32."""
        return self._view_row(self.layout.parameters, view, sample).copy()

    def pixel_hash(self, view: int, sample: int) -> int:
        """The hash of the augmented image, 0 where there is none."""
        return int(self._view_row(self.layout.pixel_hash, view, sample))

    def status(self, view: int, sample: int) -> int:
        """The `Status` of one view of one sample; PENDING while its task is not done."""
        self._check_place(view, sample)
        block_S = self._view_block(self.layout.status, self.layout.task_of(view, sample))
        return Status.PENDING if block_S is None else int(block_S[sample % self.layout.samples_per_shard])

    @cached_property
    def status_VS(self) -> np.ndarray:
        """All statuses, uint8 of shape (view, sample), read-only. The first use reads one small file a task."""
        layout = self.layout
        status_VS = np.zeros((layout.num_views, layout.num_samples), np.uint8)
        for task in layout.tasks():
            block_S = self._view_block(layout.status, task, keep=False)
            if block_S is not None:
                status_VS[task.view, task.start : task.stop] = block_S[: task.num_samples]
        status_VS.flags.writeable = False
        return status_VS

    @cached_property
    def samples(self) -> SampleIndex:
        """The sample table, read at the first use. Its tars are where they were at build time."""
        return read_samples(self.path, self.layout.num_samples)

    @cached_property
    def labels_S(self) -> np.ndarray:
        """Labels, int64, -1 for none."""
        return self.samples.label_S

    @cached_property
    def state(self) -> dict[str, np.ndarray]:
        """The codec's fitted arrays by name, float32."""
        return read_state(self.path)

    @cached_property
    def bias_LHQK(self) -> np.ndarray | None:
        """The teacher's bias for the stored layers and heads, float32; None when it has none."""
        if not (self.path / "attention" / "bias" / "zarr.json").exists():
            return None
        return read_array(self.path, "attention/bias")

    def _check_place(self, view: int, sample: int) -> None:
        layout = self.layout
        if not 0 <= view < layout.num_views:
            raise CacheMissError(f"view {view} is not in {self.path}: it has views 0 to {layout.num_views - 1}.")
        if not 0 <= sample < layout.num_samples:
            raise CacheMissError(
                f"sample {sample} is not in {self.path}: it has samples 0 to {layout.num_samples - 1}."
            )

    def _shard(self, spec: ArraySpec, task: Task) -> _OpenShard | None:
        """The open shard, or None if there is no such file: its task is not done."""
        if self._pid != os.getpid():
            self._reset()
        name = spec.shard_file(task)
        with self._lock:
            shard = self._shards.get(name)
            if shard is not None:
                self._shards.move_to_end(name)
                return shard
        try:
            shard = _OpenShard(self.path / name, spec)
        except FileNotFoundError:
            return None
        except DamagedChunkError as error:
            self._raise_damaged(spec, task, error)
        with self._lock:
            self._shards[name] = shard
            if len(self._shards) > self.max_open_shards:
                self._shards.popitem(last=False)
        return shard

    def _read_sample(self, spec: ArraySpec, view: int, sample: int, first: int, stop: int) -> list[bytes]:
        """The encoded chunks [first, stop) of one sample."""
        self._check_place(view, sample)
        task = self.layout.task_of(view, sample)
        shard = self._shard(spec, task)
        if shard is None:
            self._raise_missing(spec, task, view, sample)
        base = (sample - task.start) * spec.num_chunks_per_sample
        ranges: list[list[int]] = shard.index_N2[base + first : base + stop].tolist()
        if any(offset == EMPTY for offset, _ in ranges):
            self._raise_missing(spec, task, view, sample)
        start = min(offset for offset, _ in ranges)
        nbytes = max(offset + nbytes for offset, nbytes in ranges) - start
        try:
            if nbytes > sum(nbytes for _, nbytes in ranges) + _MAX_GAP_NBYTES:
                return [read_exactly(shard.fd, nbytes, offset) for offset, nbytes in ranges]
            data = read_exactly(shard.fd, nbytes, start)
        except DamagedChunkError as error:
            self._raise_damaged(spec, task, error)
        return [data[offset - start : offset - start + nbytes] for offset, nbytes in ranges]

    def _decompress(self, encoded: bytes, spec: ArraySpec, view: int, sample: int, out_bytes: np.ndarray) -> None:
        try:
            decompress_into(encoded, spec.compressor, out_bytes)
        except DamagedChunkError as error:
            self._raise_damaged(spec, self.layout.task_of(view, sample), error, sample)

    def _view_row(self, spec: ArraySpec, view: int, sample: int) -> np.ndarray:
        self._check_place(view, sample)
        task = self.layout.task_of(view, sample)
        block = self._view_block(spec, task)
        if block is None:
            self._raise_missing(spec, task, view, sample)
        return block[sample - task.start]

    def _view_block(self, spec: ArraySpec, task: Task, *, keep: bool = True) -> np.ndarray | None:
        """One shard of a views array, which is one chunk; None if its task is not done."""
        if self._pid != os.getpid():
            self._reset()
        name = spec.shard_file(task)
        with self._lock:
            block = self._view_blocks.get(name)
            if block is not None:
                self._view_blocks.move_to_end(name)
                return block
        try:
            shard = _OpenShard(self.path / name, spec)
            block = np.empty(spec.chunk_shape[1:], spec.dtype)
            offset, nbytes = shard.index_N2[0].tolist()
            if offset == EMPTY:
                raise DamagedChunkError("its only chunk is missing")
            data = read_exactly(shard.fd, nbytes, offset)
            decompress_into(data, spec.compressor, block.reshape(-1).view(np.uint8))
        except FileNotFoundError:
            return None
        except DamagedChunkError as error:
            self._raise_damaged(spec, task, error)
        if keep:
            with self._lock:
                self._view_blocks[name] = block
                if len(self._view_blocks) > MAX_VIEW_BLOCKS:
                    self._view_blocks.popitem(last=False)
        return block

    def _raise_missing(self, spec: ArraySpec, task: Task, view: int, sample: int) -> NoReturn:
        """Say why a sample is not there; a shard that its commit record promises is not missing but lost."""
        status = self.status(view, sample)
        if status in (Status.PENDING, Status.STORED) and commit_path(self.path, task).exists():
            self._raise_damaged(spec, task, DamagedChunkError(f"it lacks sample {sample}, which was committed"), sample)
        advice = " Run the same `atcache build` command again to continue." if status == Status.PENDING else ""
        raise CacheMissError(
            f"view {view} of sample {sample} ({self.samples.sample_key(sample)!r}) is not stored in {self.path}: "
            f"{describe_status(status)}.{advice}"
        )

    def _raise_damaged(self, spec: ArraySpec, task: Task, error: Exception, sample: int | None = None) -> NoReturn:
        chunk = "" if sample is None else f", sample {sample}"
        raise CorruptCacheError(
            f"{self.path / spec.shard_file(task)}{chunk} is damaged: {error}. Delete "
            f"{commit_path(self.path, task)} and run the same `atcache build` command again: only this task is redone."
        ) from error
