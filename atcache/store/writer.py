"""Writes a cache: creates it whole, writes one task's shards at a time, finishes it.

The cache, on the disk or on an object store, is valid at every moment: after a kill or a power cut at any point, it
holds all tasks that have a commit record, and nothing else is trusted. Equal input gives equal bytes, however often the
build was interrupted.
"""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from atcache.errors import CacheMismatchError, CacheMissError, ConfigError, CorruptCacheError
from atcache.files.durable import (
    disk_errors_explained,
    encode_json,
    fsync_path,
    fsync_tree,
    make_folder,
    partial_path,
    write_file,
)
from atcache.files.location import Location, Url, parse_location
from atcache.files.spool import Spool
from atcache.files.writers import only_writer
from atcache.store.bucket import Piece, put_new_cache, put_together, replace_object
from atcache.store.chunks import BLOSC_LEVEL, GZIP_LEVEL, ZSTD_LEVEL, ChunkEncoder, check_byte_order
from atcache.store.committed import check_commits
from atcache.store.growth import end_growth, enlarge_arrays, read_growth
from atcache.store.layout import COMPRESSORS, FORMAT, ArraySpec, Status, StoreLayout, Task
from atcache.store.manifest import (
    COMMITS,
    Commit,
    commit_path,
    encode_commit,
    find_commit,
    find_joined_commit,
    how_to_redo,
    read_commit,
    summarise_commits,
    write_commit,
)
from atcache.store.metadata import (
    ATTRIBUTES,
    SEAL,
    collect_metadata,
    is_old_table,
    load_root,
    read_metadata,
    seal,
    seal_holds,
    split_root,
)
from atcache.store.records import delete_own_record, join_records
from atcache.store.shard_file import ShardFile
from atcache.store.tables import write_group, write_samples, write_state

if TYPE_CHECKING:
    from atcache.images.source import SampleIndex

RESERVED_ATTRIBUTES = ("format", "layout", "complete", SEAL)
"""Members of `attributes["atcache"]` that the store writes."""


def create_cache(
    path: Location | str,
    layout: StoreLayout,
    attributes: Mapping[str, Any],
    index: SampleIndex,
    state: Mapping[str, np.ndarray],
    bias_LHQK: np.ndarray | None = None,
) -> None:
    """Create an empty cache: all metadata, the sample table and the codec's state, but no task yet.

    The cache is built in a temp folder beside `path` and renamed, so that `path` is a whole cache or does not exist. On
    an object store, its zarr.json is put last, and what a stopped creation left there is deleted before.

    Args:
        path: the folder to create, or the URL of one on an object store.
        layout: the cache's arrays.
        attributes: members of `attributes["atcache"]` in addition to format, layout and completeness; JSON values.
        index: the samples, `layout.num_samples` of them.
        state: the codec's arrays, float32.
        bias_LHQK: the teacher's bias for the stored layers and heads, float32, if it has one.

    Raises:
        CacheMismatchError: `path` exists.
        ConfigError: an argument cannot be stored, or a cache on the object store was not wholly deleted.
        DiskFullError: no space is left.
        NotWritableError: the object store refuses, or fails for minutes.
    """
    check_byte_order()
    path = parse_location(path)
    if len(index.keys_S) != layout.num_samples:
        raise ConfigError(f"the layout is for {layout.num_samples} samples, the source has {len(index.keys_S)}.")
    if reserved := sorted(set(attributes) & set(RESERVED_ATTRIBUTES)):
        raise ConfigError(f"attributes {', '.join(reserved)} are written by the store; give others.")
    if isinstance(path, Path):
        with new_cache_folder(path) as temp:
            write_empty_cache(temp, layout, attributes, index, state, bias_LHQK)
        return
    with Spool() as spool, disk_errors_explained(spool.path):
        write_empty_cache(spool.path, layout, attributes, index, state, bias_LHQK)
        if not put_new_cache(path, spool.path):
            raise _exists(path)


@contextmanager
def new_cache_folder(path: Path) -> Generator[Path]:
    """A temp folder beside `path` that becomes `path` at the end, durably, or is removed after an error.

    Raises:
        CacheMismatchError: `path` exists.
        DiskFullError: no space is left.
    """
    if path.exists():
        raise _exists(path)
    make_folder(path.absolute().parent)
    temp = partial_path(path)
    with disk_errors_explained(path):
        temp.mkdir()
        try:
            with only_writer(temp, where_possible=True):  # lest another process sweeps it
                yield temp
                fsync_tree(temp)
                temp.rename(path)
            fsync_path(path.absolute().parent)
        except BaseException as error:
            shutil.rmtree(temp, ignore_errors=True)
            if isinstance(error, OSError) and error.errno in (errno.ENOTEMPTY, errno.EEXIST) and path.exists():
                raise _exists(path) from error
            raise


def write_empty_cache(
    path: Path,
    layout: StoreLayout,
    attributes: Mapping[str, Any],
    index: SampleIndex,
    state: Mapping[str, np.ndarray],
    bias_LHQK: np.ndarray | None,
) -> None:
    """What `create_cache` writes, into a folder that is not there yet. See there for the arguments."""
    ours = {**attributes, "format": FORMAT, "layout": layout.to_json(), "complete": None}
    write_group(path, {ATTRIBUTES: seal(ours)})
    for group in ("views", "attention", COMMITS, *(["pixels"] if layout.pixels else [])):
        write_group(path / group)
    for spec in layout.arrays():
        _create_sharded_array(path, spec)
    write_samples(path, index, layout.samples_group)
    write_state(path, state, bias_LHQK)


def _exists(path: Location) -> CacheMismatchError:
    return CacheMismatchError(
        f"{path} exists already: give another path, or run the same command again if another process is building it."
    )


def _create_sharded_array(root: Path, spec: ArraySpec) -> None:
    import zarr
    from zarr.codecs import BloscCodec, BytesCodec, Crc32cCodec, GzipCodec, TransposeCodec, ZstdCodec

    how, num_axes = COMPRESSORS[spec.compressor], len(spec.shape)
    typesize = np.dtype(spec.dtype).itemsize
    if how.shuffle is not None:
        # The shuffle as a string: zarr 3.3 deprecates the enum that 3.1 annotates.
        compressor = BloscCodec(cname="zstd", clevel=BLOSC_LEVEL, shuffle=how.shuffle, typesize=typesize, blocksize=0)  # pyright: ignore[reportArgumentType]
    else:
        compressor = GzipCodec(level=GZIP_LEVEL) if how.is_deflated else ZstdCodec(level=ZSTD_LEVEL, checksum=False)
    last_two_swapped = (*range(num_axes - 2), num_axes - 1, num_axes - 2)
    zarr.create_array(
        store=str(root),
        name=spec.name,
        shape=spec.shape,
        dtype=spec.dtype,
        chunks=spec.chunk_shape,
        shards=spec.shard_shape,
        serializer=BytesCodec(endian="little"),
        filters=[TransposeCodec(order=last_two_swapped)] if how.is_transposed else None,
        compressors=[compressor, Crc32cCodec()],
        fill_value=0,
        dimension_names=spec.dimension_names,
    )


def encode_view(layout: StoreLayout, codes_LTC: np.ndarray) -> list[bytes]:
    """The chunks of one view, in order. Many threads may call it; compression releases the interpreter's lock.

    Args:
        layout: the cache's layout.
        codes_LTC: shape (layer, token, component), the layout's codes dtype.
    """
    encoder = ChunkEncoder(layout.codes)
    step = layout.layers_per_chunk
    if codes_LTC.shape[0] != layout.num_layers:
        raise ValueError(f"codes have {codes_LTC.shape[0]} layers, the layout {layout.num_layers}.")
    return [encoder.encode(codes_LTC[start : start + step]) for start in range(0, layout.num_layers, step)]


def encode_pixels(layout: StoreLayout, pixels_HWC: np.ndarray) -> bytes:
    """The chunk of one stored image, uint8 (height, width, 3). Many threads may call it."""
    if layout.rgb is None:
        raise ValueError("this layout stores no pixels.")
    return ChunkEncoder(layout.rgb).encode(pixels_HWC)


class TaskWriter:
    """Writes the shards of one task, then its commit record.

    Samples are added in order, each once; memory holds the index and the small views arrays, not the codes. Until
    `commit` the cache is unchanged; `abort` removes the temp files if the task is given up. One thread at a time.

    On an object store, the shards are written to a temp folder of this machine, and `commit` puts them.
    """

    def __init__(self, path: Location | str, layout: StoreLayout, task: Task) -> None:
        self.task = task
        self._root = root = parse_location(path)
        self._spool = None if isinstance(root, Path) else Spool()
        self._folder = root if isinstance(root, Path) else cast("Spool", self._spool).path
        self._layout = layout
        self._next_sample = task.start
        self._num_stored = 0
        # One chunk each, which `commit` writes: the other arrays are written sample by sample.
        self._view_specs = {spec.name: spec for spec in (layout.parameters, layout.pixel_hash, layout.status)}
        self._view_rows = {name: np.zeros(spec.chunk_shape[1:], spec.dtype) for name, spec in self._view_specs.items()}
        self._shards: dict[str, ShardFile] = {}
        with disk_errors_explained(self._folder):
            try:
                for spec in layout.arrays():
                    self._shards[spec.name] = ShardFile(
                        self._folder / spec.shard_file(task), spec, is_durable=self._spool is None
                    )
            except BaseException:
                self.abort()
                raise

    def add(
        self,
        sample: int,
        *,
        status: int,
        parameters_P: np.ndarray | None = None,
        pixel_hash: int = 0,
        chunks: Sequence[bytes] | None = None,
        pixels_chunk: bytes | None = None,
    ) -> None:
        """Write the next sample of the task.

        Args:
            sample: its index in the source; must be the one after the last added.
            status: a `Status`; not PENDING.
            parameters_P: the view's drawn parameters, float32; None if the sample could not be read, stored as zeros.
            pixel_hash: hash of the augmented image; 0 if there is none.
            chunks: from `encode_view`; given if and only if `status` is STORED.
            pixels_chunk: from `encode_pixels`; given if and only if `status` is STORED and the layout stores pixels.
        """
        layout, row = self._layout, sample - self.task.start
        is_stored = status == Status.STORED
        if sample != self._next_sample or sample >= self.task.stop:
            raise ValueError(f"sample {sample} added to task {self.task.name}, expected {self._next_sample}.")
        if status == Status.PENDING:
            raise ValueError(f"sample {sample} has status PENDING; expected another status.")
        num_chunks = layout.codes.num_chunks_per_sample
        if (chunks is not None) != is_stored or (chunks is not None and len(chunks) != num_chunks):
            given = "none" if chunks is None else len(chunks)
            raise ValueError(f"sample {sample} of status {int(status)} comes with {given} chunks of {num_chunks}.")
        if (pixels_chunk is not None) != (is_stored and layout.pixels is not None):
            raise ValueError(
                f"sample {sample} of status {int(status)}: expected pixels if it is STORED and the layout has them."
            )
        if parameters_P is not None:
            self._view_rows["views/parameters"][row] = parameters_P
        self._view_rows["views/pixel_hash"][row] = pixel_hash
        self._view_rows["views/status"][row] = status
        with disk_errors_explained(self._shards["attention/codes"].path):
            for position, chunk in enumerate(chunks or ()):
                self._shards["attention/codes"].append(row * num_chunks + position, chunk)
            if pixels_chunk is not None:
                self._shards["pixels/rgb"].append(row, pixels_chunk)
        self._num_stored += is_stored
        self._next_sample += 1

    def commit(self, quality: Mapping[str, Any] | None = None, num_checked: int | None = None) -> Commit:
        """Put the shards in place, durably, and record the task as finished.

        If another worker has done the same task, and its record is joined with others already, that one stays, and
        these shards are dropped: only the process that leads a build may change joined files.

        Args:
            quality: finite numbers measured on the task, by name.
            num_checked: how many views they were measured on.

        Returns:
            The commit as recorded.
        """
        if self._next_sample != self.task.stop:
            raise ValueError(f"task {self.task.name} ends at sample {self.task.stop}, added up to {self._next_sample}.")
        with disk_errors_explained(self._folder):
            try:
                for name, rows in self._view_rows.items():
                    self._shards[name].append(0, ChunkEncoder(self._view_specs[name]).encode(rows))
                # All shards are on the disk before any gets its name, and the record is written last: whatever a record
                # names is complete.
                records = {name: shard.seal() for name, shard in self._shards.items()}
                commit = Commit(
                    task=self.task,
                    files={
                        shard.path.relative_to(self._folder).as_posix(): records[name]
                        for name, shard in self._shards.items()
                    },
                    num_stored=self._num_stored,
                    num_bad=self.task.num_samples - self._num_stored,
                    quality=dict(quality or {}),
                    num_checked=num_checked,
                )
                if isinstance(self._root, Path):
                    if (there := find_joined_commit(self._root, self._layout, self.task)) is not None:
                        return there
                    # Another device may have given other bytes: an old record must not cover new shards.
                    delete_own_record(self._root, self.task)
                for shard in self._shards.values():
                    shard.place()
                if isinstance(self._root, Path):
                    write_commit(self._root, commit)
                elif self._spool is not None:
                    commit = _put_task(self._root, self._spool, commit, is_joined=self._layout.records_per_file > 1)
            finally:
                self.abort()
        return commit

    def abort(self) -> None:
        """Remove the temp files; after `commit` there are none, and this does nothing."""
        for shard in self._shards.values():
            shard.discard()
        if self._spool is not None:
            self._spool.close()


def _put_task(root: Url, spool: Spool, commit: Commit, *, is_joined: bool) -> Commit:
    """Put a task's shards and its record. Returns the record that is there: another worker may have been faster."""
    data = encode_commit(commit)
    name = commit_path(Path(), commit.task).as_posix()
    pieces = [Piece(name, spool.path / name, file.nbytes, file.crc32) for name, file in commit.files.items()]
    # Another build may have finished the cache, and joined the record of this task with others.
    find_last = partial(find_commit, root, commit.task.name) if is_joined else None
    there = put_together(root, pieces, Piece.of(name, spool.write(name, data)), find_last)
    return commit if there == data else read_commit(root, commit.task.name)


def finish_cache(path: Location | str, *, grows: bool = False) -> dict[str, Any]:
    """Declare a cache complete: write its totals and consolidated metadata, so that it opens with one read.

    Calling it again changes nothing.

    Args:
        path: the cache.
        grows: whether a growth is finished: the cache becomes what it has grown to when its root is replaced.

    Returns:
        The record in `attributes["atcache"]["complete"]`.

    Raises:
        CacheMissError: tasks are missing.
        CorruptCacheError: a committed shard has another size or index than committed, or zarr.json has changed.
    """
    path = parse_location(path)
    if isinstance(path, Url):
        data = replace_object(path / "zarr.json", lambda: encode_json(_finished_root(path, grows=False)))
        return json.loads(data)["attributes"][ATTRIBUTES]["complete"]
    root = _finished_root(path, grows=grows)
    write_file(path / "zarr.json", encode_json(root))
    if read_growth(path) is None:
        end_growth(path)
    return root["attributes"][ATTRIBUTES]["complete"]


def _finished_root(path: Location, *, grows: bool) -> dict[str, Any]:
    """The zarr.json of a cache that is complete, after a check that it is; see `finish_cache`."""
    root = load_root(path)
    ours, layout = split_root(path, root)
    if not seal_holds(ours):
        raise CorruptCacheError(f"{path}/zarr.json is damaged: its checksum does not match. Restore it from a copy.")
    if grows and isinstance(path, Path):
        ours, layout = read_growth(path) or (ours, layout)
    checked = check_commits(path, layout)
    names = [task.name for task in layout.tasks()]
    missing = [name for name in names if name not in checked]
    if missing:
        raise CacheMissError(
            f"{path} lacks {len(missing)} of {len(names)} tasks, the first is {missing[0]}. Run the same "
            "`atcache build` command again to continue."
        )
    commits = [checked[name].commit for name in names]
    for commit in commits:
        if problems := checked[commit.task.name].problems:
            redo = how_to_redo(path, commit.task.name, is_joined=layout.records_per_file > 1)
            raise CorruptCacheError(f"{problems[0]} {redo}")
    join_records(path, layout)
    complete = summarise_commits(commits)
    root["attributes"] = {**root["attributes"], ATTRIBUTES: seal({**ours, "complete": complete})}
    # As zarr.consolidate_metadata writes it, but without its warning that the key is not yet in the specification.
    if isinstance(path, Path):
        enlarge_arrays(path, layout)
    nodes = collect_metadata(path) if isinstance(path, Path) else read_metadata(path, layout)
    copies = {name: copy for name, copy in nodes.items() if not is_old_table(name, layout)}
    root["consolidated_metadata"] = {"kind": "inline", "must_understand": False, "metadata": copies}
    return root
