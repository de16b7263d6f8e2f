"""Reads a cache: codes and pixels of one sample in one `pread` each, every byte checked, nothing loaded in advance.

Chunks are decompressed here, not by zarr-python, which adds half a millisecond to each: reading must keep up with
training.
"""

from __future__ import annotations

from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, cast
from uuid import uuid4

import numpy as np

from atcache.errors import CacheMismatchError, CacheMissError, ConfigError, CorruptCacheError
from atcache.files.location import Location, Url, parse_location
from atcache.files.ranges import RangeFile, expect_together, promise
from atcache.store.chunks import EMPTY, DamagedChunkError, check_byte_order, use_single_threaded_blosc
from atcache.store.layout import COMPRESSORS, ArraySpec, Status, StoreLayout, Task, describe_status
from atcache.store.manifest import how_to_redo, list_commits
from atcache.store.metadata import ATTRIBUTES, SEAL, has_array, load_root, split_root
from atcache.store.open_shards import OpenShard, OpenShards
from atcache.store.tables import describe_array, read_array, read_samples, read_state

if TYPE_CHECKING:
    from atcache.images.source import SampleIndex

_NO_CHUNK = int(EMPTY)  # comparing with a numpy integer takes ten times as long


class _SampleArray:
    """What reading needs of an array's spec, worked out once: for each view it would double the cost of reading."""

    def __init__(self, spec: ArraySpec) -> None:
        self.spec = spec
        self.num_chunks_per_sample = spec.num_chunks_per_sample
        *_, first, second = spec.chunk_shape
        self.is_transposed = COMPRESSORS[spec.compressor].is_transposed
        self.stored_sides = (second, first) if self.is_transposed else (first, second)


class CacheReader:
    """One cache, open for reading; complete or not.

    Threads may share it. Pickled or forked copies open their own files. A cache that is still being built may be read:
    a task is seen once its shards are in place, except that `status_VS` and `samples` keep what they first read. A
    cache that grows stays what it was when it was opened, also in copies.
    """

    def __init__(self, path: Location | str, attributes: dict[str, Any] | None = None) -> None:
        """Open a cache. Reads one small file, whatever the cache's size.

        Args:
            path: its folder, or the URL of one. On a hub, `path` then names the commit that was there at this time.
            attributes: what another reader of it has, or `read_growth` gives; None to read them.

        Raises:
            CacheMissError: there is no cache at `path`.
            CacheMismatchError: it has another format number, or is on a web server and not complete.
            CorruptCacheError: its metadata is damaged.
            ConfigError: this machine is big-endian.
        """
        check_byte_order()
        use_single_threaded_blosc()
        self.path = _pinned(parse_location(path))
        self.attributes: dict[str, Any]
        self.layout: StoreLayout
        root = load_root(self.path) if attributes is None else {"attributes": {ATTRIBUTES: attributes}}
        self.attributes, self.layout = split_root(self.path, root)
        if not self._can_list and self.attributes.get("complete") is None:
            raise CacheMismatchError(
                f"{self.path} is not complete, and a web server cannot list what is there. Finish its build before "
                "it is served, or read it from a folder or an object store."
            )
        self._codes = _SampleArray(self.layout.codes)
        self._rgb = None if self.layout.rgb is None else _SampleArray(self.layout.rgb)
        self._shards = OpenShards(self.path)
        self._planned_S: np.ndarray | None = None
        self._told: set[tuple[str, Task]] = set()  # shards that know how much of them will be read

    def __reduce__(self) -> tuple[Any, ...]:
        return CacheReader, (self.path, self.attributes)

    @property
    def is_remote(self) -> bool:
        """Whether the cache is read from a server."""
        return isinstance(self.path, Url)

    @property
    def is_complete(self) -> bool:
        """Whether the build finished and no commit record was deleted since, as is done to build a task again."""
        return self.attributes.get("complete") is not None and not self.missing_tasks()

    @cached_property
    def name_of_values(self) -> str:
        """Equal for readers that give the same values: of a complete cache, what its metadata says of it.

        The tasks that an incomplete cache lacks may come at any time, so each of its readers has a name of its own.
        """
        return str(self.attributes.get(SEAL)) if self.is_complete else uuid4().hex

    @property
    def _can_list(self) -> bool:
        return not isinstance(self.path, Url) or self.path.can_list

    def committed_tasks(self) -> set[str]:
        """Names of the tasks with a commit record, in a growing cache also of tasks to come.

        On a web server these are all tasks: the cache must be complete.
        """
        return list_commits(self.path) if self._can_list else {task.name for task in self.layout.tasks()}

    def missing_tasks(self) -> list[Task]:
        """Tasks without a commit record, from one folder listing."""
        committed = self.committed_tasks()
        return [task for task in self.layout.tasks() if task.name not in committed]

    def read_codes(self, view: int, sample: int, layers: slice | None = None) -> np.ndarray:
        """Codes of one view of one sample.

        Args:
            view: from 0.
            sample: its index in the source.
            layers: a range of rows along L, without a step; None for all.

        Returns:
            codes_LTC: a new array. If chunks are stored transposed, so is its memory: each component's tokens are
            together.

        Raises:
            CacheMissError: the codes are not stored; the message says why.
            CorruptCacheError: the stored bytes are damaged.
        """
        layout, array = self.layout, self._codes
        first, stop, step = (layers or slice(None)).indices(layout.num_layers)
        if step != 1 or first >= stop:
            raise ConfigError(f"layers={layers}: expected a range without step within {layout.num_layers} layers.")
        width = layout.layers_per_chunk
        first_chunk, stop_chunk = first // width, -(-stop // width)
        stored_first, num_stored = first_chunk * width, (stop_chunk - first_chunk) * width
        stored = np.empty((num_stored, *array.stored_sides), array.spec.dtype)
        self._read_into(stored, array, view, sample, first_chunk, stop_chunk)
        wanted = stored[first - stored_first : stop - stored_first]
        return wanted.swapaxes(1, 2) if array.is_transposed else wanted

    def read_pixels(self, view: int, sample: int) -> np.ndarray:
        """The stored image of one view of one sample: pixels_HWC uint8, RGB; a new array.

        Raises:
            CacheMissError: this cache stores no pixels, or not these.
            CorruptCacheError: the stored bytes are damaged.
        """
        array = self._rgb
        if array is None:
            raise CacheMissError(f"{self.path} stores no pixels; views are replayed from the tars.")
        pixels_HWC = np.empty(array.spec.chunk_shape[2:], np.uint8)
        self._read_into(pixels_HWC, array, view, sample, 0, 1)
        return pixels_HWC

    def plan(self, sample_S: np.ndarray) -> None:
        """Say which samples an epoch will read, all in one view each; further calls add to them.

        On a server, shards that will be read nearly whole are then fetched in few large requests.
        """
        if self.is_remote:
            planned_S = np.zeros(self.layout.num_samples, bool) if self._planned_S is None else self._planned_S.copy()
            planned_S[sample_S] = True
            self._planned_S = planned_S
            self._told.clear()

    def expect(self, view: int, sample_S: np.ndarray, *, codes: bool = True, pixels: bool = True) -> None:
        """Start reading these samples from the disk or a server ahead of their use; do not wait for them.

        Runs of neighbours become one long read each. Samples that are not there are skipped.

        Args:
            view: the view of all samples.
            sample_S: the samples, ascending.
            codes: whether their codes are wanted.
            pixels: whether their pixels are wanted, or what it takes to replay them.
        """
        cuts = np.flatnonzero((np.diff(sample_S) > 1) | (np.diff(sample_S // self.layout.samples_per_shard) > 0)) + 1
        arrays = (self._codes if codes else None, self._rgb if pixels else None)
        wanted = [array for array in arrays if array is not None]
        runs = np.split(sample_S, cuts)
        if self.is_remote:
            tasks = {self.layout.task_of(view, int(run[0])) for run in runs}
            small = [self.layout.parameters, self.layout.pixel_hash] if pixels and self._rgb is None else []
            self._shards.open_together([array.spec for array in wanted], small, tasks)
        places = [self._place_of(array, view, run) for array in wanted for run in runs]
        expect_together([place for place in places if place is not None])

    def _place_of(self, array: _SampleArray, view: int, run: np.ndarray) -> tuple[RangeFile, int, int] | None:
        task = self.layout.task_of(view, int(run[0]))
        shard = self._shard(array.spec, task)
        if shard is None:
            return None
        if self._planned_S is not None and (array.spec.name, task) not in self._told:
            self._told.add((array.spec.name, task))
            num_planned = int(np.count_nonzero(self._planned_S[task.start : task.stop]))
            shard.file.will_read(shard.file.nbytes * num_planned // task.num_samples)
            # All shards of an array have about as many bytes for each sample.
            sample_nbytes = shard.file.nbytes / task.num_samples
            promise(self, array.spec.name, int(sample_nbytes * np.count_nonzero(self._planned_S)))
        first, stop = (int(row - task.start) * array.num_chunks_per_sample for row in (run[0], run[-1] + 1))
        return shard.place_of(first, stop)

    def parameters(self, view: int, sample: int) -> np.ndarray:
        """The drawn parameters of one view of one sample: parameters_P float32."""
        return self._view_row(self.layout.parameters, view, sample).copy()

    def pixel_hash(self, view: int, sample: int) -> int:
        """The hash of the augmented image, 0 if there is none."""
        return int(self._view_row(self.layout.pixel_hash, view, sample))

    def status(self, view: int, sample: int) -> int:
        """The `Status` of one view of one sample; PENDING while its task is not done."""
        self._check_place(view, sample)
        task = self.layout.task_of(view, sample)
        if sample >= task.stop:
            return Status.NO_SAMPLE
        block_S = self._view_block(self.layout.status, task)
        return Status.PENDING if block_S is None else int(block_S[sample % self.layout.samples_per_shard])

    def statuses(self, view: int, sample_S: np.ndarray) -> np.ndarray:
        """`status` of some samples of a view, uint8. Reads one small file for each of their tasks."""
        return self._gather(self.layout.status, view, sample_S, Status.PENDING, Status.NO_SAMPLE)

    def parameters_of(self, view: int, sample_S: np.ndarray) -> np.ndarray:
        """`parameters` of some samples of a view: parameters_SP, NaN where a task is not done or no sample has the row.

        Reads one small file for each of their tasks.
        """
        return self._gather(self.layout.parameters, view, sample_S, np.nan, np.nan)

    def _gather(
        self, spec: ArraySpec, view: int, sample_S: np.ndarray, not_done: float, no_sample: float
    ) -> np.ndarray:
        values = np.full((len(sample_S), *spec.shape[2:]), not_done, spec.dtype)
        if not len(sample_S):
            return values
        block_S = sample_S // self.layout.samples_per_shard
        tasks = [self.layout.task(view, int(block)) for block in np.unique(block_S)]
        blocks = self._shards.map(lambda task: self._view_block(spec, task), tasks)
        order = np.argsort(block_S, kind="stable")
        for task, block, where in zip(tasks, blocks, np.split(order, _first_of_each(block_S[order])), strict=True):
            if block is not None:
                values[where] = block[sample_S[where] - task.start]
            values[where[sample_S[where] >= task.stop]] = no_sample
        return values

    @cached_property
    def status_VS(self) -> np.ndarray:
        """All statuses, uint8 of shape (view, sample), read-only.

        The first use reads one small file for each task, unless the cache is complete and has codes of all samples.
        """
        layout = self.layout
        is_stored = self._has_all_codes and self.is_complete
        status_VS = np.full((layout.num_views, layout.num_samples), Status.STORED if is_stored else 0, np.uint8)
        tasks = [] if is_stored else layout.tasks()
        blocks = self._shards.map(lambda task: self._view_block(layout.status, task, keep=False), tasks)
        for task, block_S in zip(tasks, blocks, strict=True):
            if block_S is not None:
                status_VS[task.view, task.start : task.stop] = block_S[: task.num_samples]
        for (_, stop), (start, _) in pairwise(layout.parts()):
            status_VS[:, stop:start] = Status.NO_SAMPLE
        status_VS.flags.writeable = False
        return status_VS

    @property
    def _has_all_codes(self) -> bool:
        """Whether the totals of a finished cache say that no sample is without codes."""
        complete: Any = self.attributes.get("complete")
        num_views = self.layout.num_views * self.layout.num_real_samples
        return isinstance(complete, dict) and cast("dict[str, Any]", complete).get("num_stored") == num_views

    @cached_property
    def samples(self) -> SampleIndex:
        """The sample table, read at the first use. Its tars are where they were at build time."""
        return read_samples(self.path, self.layout.num_samples, self.layout.samples_group)

    @cached_property
    def labels_S(self) -> np.ndarray:
        """Labels, int64, -1 for none."""
        return self.samples.label_S

    @cached_property
    def state(self) -> dict[str, np.ndarray]:
        """The codec's fitted arrays by name."""
        return read_state(self.path)

    @cached_property
    def bias_LHQK(self) -> np.ndarray | None:
        """The teacher's bias for the stored layers and heads, float32; None if it has none."""
        return None if self.bias_kind is None else read_array(self.path, "attention/bias")

    @cached_property
    def bias_kind(self) -> tuple[tuple[int, ...], str] | None:
        """Shape and type that the bias has, by its zarr.json; None if there is no bias."""
        return describe_array(self.path, "attention/bias") if has_array(self.path, "attention/bias") else None

    def _check_place(self, view: int, sample: int) -> None:
        layout = self.layout
        if not 0 <= view < layout.num_views:
            raise CacheMissError(f"view {view} is not in {self.path}: it has views 0 to {layout.num_views - 1}.")
        if not 0 <= sample < layout.num_samples:
            raise CacheMissError(
                f"sample {sample} is not in {self.path}: it has samples 0 to {layout.num_samples - 1}."
            )

    def _shard(self, spec: ArraySpec, task: Task) -> OpenShard | None:
        try:
            return self._shards.get(spec, task)
        except DamagedChunkError as error:
            self._raise_damaged(spec, task, error)

    def _read_into(
        self, stored: np.ndarray, array: _SampleArray, view: int, sample: int, first: int, stop: int
    ) -> None:
        """The chunks [first, stop) of one sample, decompressed into contiguous memory."""
        self._check_place(view, sample)
        spec, task = array.spec, self.layout.task_of(view, sample)
        shard = self._shard(spec, task)
        if shard is None:
            self._raise_missing(spec, task, view, sample)
        base = (sample - task.start) * array.num_chunks_per_sample
        ranges: list[list[int]] = shard.index_N2[base + first : base + stop].tolist()
        if any(offset == _NO_CHUNK for offset, _ in ranges):
            self._raise_missing(spec, task, view, sample)
        try:
            shard.read_into(ranges, spec, stored.reshape(-1).view(np.uint8))
        except DamagedChunkError as error:
            self._raise_damaged(spec, task, error, sample)

    def _view_row(self, spec: ArraySpec, view: int, sample: int) -> np.ndarray:
        self._check_place(view, sample)
        task = self.layout.task_of(view, sample)
        block = self._view_block(spec, task)
        if block is None:
            self._raise_missing(spec, task, view, sample)
        return block[sample - task.start]

    def _view_block(self, spec: ArraySpec, task: Task, *, keep: bool = True) -> np.ndarray | None:
        try:
            return self._shards.view_block(spec, task, keep=keep)
        except DamagedChunkError as error:
            self._raise_damaged(spec, task, error)

    def _raise_missing(self, spec: ArraySpec, task: Task, view: int, sample: int) -> NoReturn:
        """Raise an error that says why a sample is not there. If its task has a commit record, its shard is damaged."""
        status = self.status(view, sample)
        if status in (Status.PENDING, Status.STORED) and task.name in self.committed_tasks():
            self._raise_damaged(spec, task, DamagedChunkError(f"it lacks sample {sample}, which was committed"), sample)
        again = " Run the same `atcache build` or `atcache pull` command again to continue."
        advice = again if status == Status.PENDING else ""
        raise CacheMissError(
            f"view {view} of sample {sample} ({self.samples.sample_key(sample)!r}) is not stored in {self.path}: "
            f"{describe_status(status)}.{advice}"
        )

    def _raise_damaged(self, spec: ArraySpec, task: Task, error: Exception, sample: int | None = None) -> NoReturn:
        chunk = "" if sample is None else f", sample {sample}"
        advice = (
            how_to_redo(self.path, task.name, is_joined=self.layout.records_per_file > 1)
            if isinstance(self.path, Path)
            else "The file on the server is damaged: copy it there again."
        )
        raise CorruptCacheError(f"{self.path / spec.shard_file(task)}{chunk} is damaged: {error}. {advice}") from error


def _first_of_each(sorted_N: np.ndarray) -> np.ndarray:
    """Where a run of equal numbers ends and the next begins."""
    return np.flatnonzero(np.diff(sorted_N)) + 1


def _pinned(path: Location) -> Location:
    if not isinstance(path, Url) or not path.is_on_hub:
        return path
    from atcache.files.remote.hub import pinned

    try:
        return pinned(path)
    except FileNotFoundError as error:
        raise CacheMissError(
            f"{path} is not a cache: the hub has no dataset {path.repository} with the revision {path.revision}, or it "
            "is private. Check the name; for a private one log in with `hf auth login` or set HF_TOKEN."
        ) from error
