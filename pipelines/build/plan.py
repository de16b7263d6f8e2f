"""What a build will make and cost, and whether it may continue an existing cache. Writes nothing."""

from __future__ import annotations

import platform
from dataclasses import dataclass, replace

import numpy as np
import torch

from atcache import __version__
from atcache.cache.differences import find_differences, name_differences
from atcache.cache.identity import CacheIdentity, Selection
from atcache.cache.record import CacheRecord, CalibrationRecord, CreatedBy, SampleChoice
from atcache.errors import CacheMismatchError
from atcache.fields import JsonFields
from atcache.files.durable import free_nbytes
from atcache.files.location import Location
from atcache.store.chunks import ChunkEncoder
from atcache.store.committed import check_commits
from atcache.store.layout import MAX_FOLDER_ENTRIES, StoreLayout
from atcache.store.reader import CacheReader
from atcache.store.shard_size import plan_samples_per_shard, settle_samples_per_shard
from atcache.store.writer import encode_pixels
from atcache.teachers.foreign.names import hash_note
from atcache.teachers.load import Teacher
from atcache.teachers.run import TeacherRun
from atcache.views.apply import library_versions

from .calibrate import Calibration, CalibrationViews, layer_cards
from .sizes import plan_codes

_HASH_NBYTES = 8  # hashes do not compress; statuses, which are all alike, take almost nothing


@dataclass(frozen=True, kw_only=True, slots=True)
class BuildPlan(JsonFields):
    """What a build will do and cost."""

    teacher: str
    licence: str | None
    """The licence of the teacher's weights; None if it is not known."""
    num_samples: int
    num_views: int
    num_tasks: int
    num_done_tasks: int
    """Tasks an earlier run has committed."""
    num_layers: int
    num_heads: int
    num_tokens: int
    num_queries: int
    """Tokens whose rows of the maps are kept."""
    nbytes_per_view: int
    """Measured on the calibration views, pixels included when they are stored."""
    map_nbytes_per_view: int
    """Bytes that the same maps, or rows of them, take as float16."""
    state_nbytes: int
    """Bytes of the codec's fitted arrays, stored once."""
    remaining_nbytes: int
    """Bytes of the views that are still to be written."""
    free_nbytes: int | None
    """Bytes free on the disk of the cache; None if it is on an object store."""
    row_kl_nats: float
    """Mean row KL of decoded maps on the calibration views."""
    injected_error: float
    """Relative error of the teacher's features when it attends with decoded maps."""
    v_error: float | None
    """Relative error of decoded v on the calibration views; None if v is not stored."""
    x_error: float | None
    """The same for what attention and MLP get."""
    teacher_views_per_s: float
    """Speed of the teacher and the codec alone, without loading images or writing."""
    decode_operations: float | None
    """Multiply-adds that decoding a view takes, as a share of the teacher's forward pass; None if next to none."""
    decode_seconds: float
    """Time that decoding a view takes, as a share of the teacher's forward pass on this device."""

    @property
    def note(self) -> str | None:
        """A sentence if a view has more shards than hubs take in one folder; None if all is well."""
        num_blocks = self.num_tasks // self.num_views
        if num_blocks <= MAX_FOLDER_ENTRIES:
            return None
        return (
            f"a view has {num_blocks} shards in one folder. Hugging Face's hub takes {MAX_FOLDER_ENTRIES} entries at "
            "most, so this cache could not be published there; larger --samples-per-shard make fewer."
        )


def describe_cache(
    identity: CacheIdentity, run: TeacherRun, calibration: Calibration, choice: SampleChoice | None
) -> CacheRecord:
    """The record of a new cache: its identity, and what it was made with."""
    import timm

    teacher = run.teacher
    return CacheRecord(
        identity=identity,
        weights_from=teacher.source,
        licence=teacher.licence,
        depth=teacher.depth,
        trained=teacher.trained,
        geometry=calibration.geometry,
        choice=choice,
        calibration=CalibrationRecord(
            num_held_back=calibration.num_held_back,
            row_kl_nats=calibration.row_kl_nats,
            injected_error=calibration.injected_error,
            v_error=calibration.v_error,
            x_error=calibration.x_error,
            decode_operations=calibration.decode_cost.operations,
            layers=tuple(layer_cards(run, calibration)),
        ),
        created_by=CreatedBy(
            atcache=__version__,
            python=platform.python_version(),
            torch=torch.__version__,
            timm=timm.__version__,
            device=run.device.type,
            views=library_versions(),
        ),
    )


def check_same_cache(
    existing: CacheReader, identity: CacheIdentity, samples_per_shard: int | None, *, grows: bool
) -> None:
    """Refuse to continue a cache that was begun with other parameters.

    Args:
        existing: the cache.
        identity: what is wanted.
        samples_per_shard: what the user wants; None if he does not care.
        grows: whether it may have fewer views and samples than are wanted.

    Raises:
        CacheMismatchError: names each difference, with both values.
    """
    record, layout = CacheRecord.of(existing), existing.layout
    there = replace(record.identity, selection=_indices_of(record))
    added = {"views.num_views", "source.fingerprint", "source.num_samples"}
    if grows:
        there = replace(
            there,
            num_views=identity.num_views,
            fingerprint=identity.fingerprint,
            num_samples=identity.num_samples,
        )
    asked, stored = identity.to_json(), there.to_json()
    # Earlier versions made no shard larger than the cache.
    first_stop = layout.parts()[0][1]
    if samples_per_shard is not None and layout.samples_per_shard not in (
        settle_samples_per_shard(samples_per_shard, first_stop),
        min(samples_per_shard, first_stop),
    ):
        asked["samples_per_shard"], stored["samples_per_shard"] = samples_per_shard, layout.samples_per_shard
    differences = name_differences(stored, asked)
    if differences:
        could_grow = find_differences(stored, asked).keys() <= added and identity.num_views >= there.num_views
        chosen = "The samples are those of --data, --keys, --max-samples and --labels. "
        raise CacheMismatchError(
            f"{existing.path} exists and is another cache: {'; '.join(differences)}. "
            f"{chosen if identity.fingerprint != there.fingerprint else ''}"
            "Give another --out, or the options it was begun with"
            f"{', or --grow to add the views or tars that it lacks' if could_grow else ''}."
            f"{hash_note(identity.teacher) if identity.weights_sha256 != there.weights_sha256 else ''}"
        )


def _indices_of(record: CacheRecord) -> Selection:
    """What was selected, as indices: the first versions recorded the text that was typed, or nothing."""
    selection, geometry = record.identity.selection, record.geometry
    layers = selection.layers if isinstance(selection.layers, tuple) else geometry.layers
    heads = geometry.heads if isinstance(selection.heads, str) else selection.heads
    return replace(selection, layers=layers, heads=heads)


def plan_layout(
    calibration: Calibration,
    views: CalibrationViews,
    num_samples: int,
    num_views: int,
    samples_per_shard: int | None,
    *,
    stores_pixels: bool,
    compressor: str | None = None,
    part_stops: tuple[int, ...] = (),
) -> tuple[StoreLayout, int]:
    """The layout of a new cache, and the bytes a view will take in it, measured on the calibration views.

    Args:
        calibration: its codes are compressed with each compressor, to choose the one for the layout.
        views: the views it was made from; their parameters are compressed too.
        num_samples: rows of the source.
        num_views: views of each sample.
        samples_per_shard: what the user wants; None for shards of about 256 MiB.
        stores_pixels: whether the images are stored too.
        compressor: of the cache that the codec was taken from; None to choose the one that makes the fewest bytes.
        part_stops: as in `StoreLayout`. The parts must fit `samples_per_shard`, which is then given.
    """
    height, width = calibration.pixels_BHWC.shape[1:3]
    layout, codes_nbytes = plan_codes(
        calibration.codes_BLTC.numpy(),
        num_views=num_views,
        num_samples=num_samples,
        parameter_names=views.parameter_names,
        pixels=(height, width) if stores_pixels else None,
        compressor=compressor,
    )
    # The calibration views' parameters are compressed as one shard.
    shard = replace(layout, num_samples=len(views.parameters_NP), samples_per_shard=len(views.parameters_NP))
    parameters_nbytes = len(ChunkEncoder(shard.parameters).encode(views.parameters_NP)) / shard.num_samples
    # 16: each chunk has an offset and a size in the index of its shard.
    record_nbytes = _HASH_NBYTES + parameters_nbytes + 16 * layout.codes.num_chunks_per_sample
    nbytes_per_view = round(record_nbytes + codes_nbytes)
    if stores_pixels:
        image_nbytes = [len(encode_pixels(layout, image)) for image in calibration.pixels_BHWC.numpy()]
        nbytes_per_view += 16 + round(float(np.mean(image_nbytes)))
    if samples_per_shard is None:
        samples_per_shard = plan_samples_per_shard(nbytes_per_view, num_samples)
    else:
        samples_per_shard = settle_samples_per_shard(samples_per_shard, num_samples)
    layout = replace(layout, samples_per_shard=samples_per_shard, part_stops=part_stops)
    return layout.with_joined_records(), nbytes_per_view


def committed_tasks(path: Location, layout: StoreLayout) -> tuple[set[str], set[str]]:
    """Names of the tasks whose commit records and shards agree, and of those whose do not, which must be done again."""
    checked = check_commits(path, layout)
    damaged = {name for name, one in checked.items() if one.problems}
    return checked.keys() - damaged, damaged


def plan_build(
    out: Location,
    teacher: Teacher,
    calibration: Calibration,
    layout: StoreLayout,
    nbytes_per_view: int,
    *,
    done: set[str],
) -> BuildPlan:
    """The plan of a build into `out`, of which the tasks with these names are done."""
    num_missing_views = sum(task.num_samples for task in layout.tasks() if task.name not in done)
    return BuildPlan(
        teacher=str(teacher.name),
        licence=teacher.licence,
        num_samples=layout.num_real_samples,
        num_views=layout.num_views,
        num_tasks=layout.num_tasks,
        num_done_tasks=len(done),
        num_layers=len(calibration.geometry.layers),
        num_heads=len(calibration.geometry.heads),
        num_tokens=calibration.geometry.tokens.num_tokens,
        num_queries=calibration.geometry.num_queries,
        nbytes_per_view=nbytes_per_view,
        map_nbytes_per_view=calibration.geometry.map_nbytes,
        state_nbytes=calibration.state_nbytes,
        remaining_nbytes=nbytes_per_view * num_missing_views,
        free_nbytes=free_nbytes(out),
        row_kl_nats=calibration.row_kl_nats,
        injected_error=calibration.injected_error,
        v_error=calibration.v_error,
        x_error=calibration.x_error,
        teacher_views_per_s=calibration.teacher_views_per_s,
        decode_operations=calibration.decode_cost.operations,
        decode_seconds=calibration.decode_cost.seconds,
    )
