"""What a build will make and cost, and whether a cache that exists is the one asked for. Writes nothing."""

from __future__ import annotations

import platform
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from atcache import __version__
from atcache.codecs import Codec
from atcache.errors import CacheMismatchError
from atcache.source import SampleIndex
from atcache.store.layout import BLOSC, ZSTD, StoreLayout, plan_layers_per_chunk, plan_samples_per_shard
from atcache.store.manifest import check_commit, read_commits
from atcache.store.reader import CacheReader
from atcache.store.writer import encode_pixels, encode_view
from atcache.teachers import Teacher
from atcache.views import PARAMETER_NAMES, ViewPolicy, library_versions

from .calibrate import Calibration, TeacherRun
from .differences import name_differences

# blosc must be smaller than this share of what zstd makes: it takes longer to read.
_BLOSC_PAYS_BELOW = 0.99

# What a view takes beside codes and pixels: parameters, hash, status, its part of the shards' indexes.
_VIEW_RECORD_NBYTES = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class BuildPlan:
    """What a build will do and cost, before it does it."""

    teacher: str
    licence: str | None
    """Of the teacher's weights; None where it is not known."""
    num_samples: int
    num_views: int
    num_tasks: int
    num_done_tasks: int
    """Tasks an earlier run has committed."""
    num_layers: int
    num_heads: int
    num_tokens: int
    nbytes_per_view: int
    """Measured on the calibration views, pixels included when they are stored."""
    map_nbytes_per_view: int
    """The same maps as float16."""
    remaining_nbytes: int
    """Still to be written."""
    free_nbytes: int
    """Free on the target's disk."""
    row_kl_nats: float
    """Mean row KL of decoded maps on the calibration views."""
    injected_error: float
    """Relative error of the teacher's features when it attends with decoded maps."""
    teacher_views_per_s: float
    """Speed of the teacher and the codec alone, without loading images or writing."""


def identify(
    run: TeacherRun,
    index: SampleIndex,
    policy: ViewPolicy,
    *,
    num_views: int,
    pixels: str,
    layers: tuple[int, ...],
    heads: tuple[int, ...] | None,
    codec: Codec,
) -> dict[str, Any]:
    """What two builds must agree in to be the same cache, as a JSON object."""
    teacher = run.teacher
    return {
        "teacher": {
            "name": str(teacher.name),
            "weights_sha256": teacher.weights_sha256,
            "input": teacher.input.to_json(),
            "precision": str(run.dtype).removeprefix("torch."),
        },
        "source": {"fingerprint": index.fingerprint, "num_samples": index.num_samples},
        "views": {"policy": policy.to_json(), "num_views": num_views, "pixels": pixels},
        "selection": {"layers": list(layers), "heads": None if heads is None else list(heads)},
        "codec": codec.to_json(),
    }


def describe_cache(identity: Mapping[str, Any], run: TeacherRun, calibration: Calibration) -> dict[str, Any]:
    """What a new cache says of itself: its identity, and what it was made with."""
    import timm

    teacher = run.teacher
    return {
        **identity,
        "teacher": {
            **identity["teacher"],
            "weights_from": teacher.source,
            "licence": teacher.licence,
            "depth": teacher.depth,
        },
        "geometry": calibration.geometry.to_json(),
        "calibration": {"row_kl_nats": calibration.row_kl_nats, "injected_error": calibration.injected_error},
        "created_by": {
            "atcache": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "timm": timm.__version__,
            "device": run.device.type,
            "views": library_versions(),
        },
    }


def check_same_cache(existing: CacheReader, identity: Mapping[str, Any], samples_per_shard: int | None) -> None:
    """Refuse to continue a cache that was begun with other parameters.

    Raises:
        CacheMismatchError: names each difference, with both values.
    """
    asked = dict(identity)
    stored = {name: existing.attributes.get(name, {}) for name in identity}
    # A cache also says of its teacher what is not asked for, such as the licence.
    stored["teacher"] = {name: stored["teacher"].get(name) for name in identity["teacher"]}
    layout = existing.layout
    if samples_per_shard is not None:
        asked["samples_per_shard"] = min(samples_per_shard, layout.num_samples)
        stored["samples_per_shard"] = layout.samples_per_shard
    differences = name_differences(stored, asked)
    if differences:
        raise CacheMismatchError(
            f"{existing.path} exists and is another cache: {'; '.join(differences)}. "
            "Give another --out, or the options it was begun with."
        )


def plan_layout(
    calibration: Calibration,
    num_samples: int,
    num_views: int,
    pixel_shape: tuple[int, int] | None,
    samples_per_shard: int | None,
) -> tuple[StoreLayout, int]:
    """The layout of a new cache, and the bytes a view will take in it, measured on the calibration views.

    Args:
        calibration: its codes are compressed here with each compressor; the layout names the one that pays.
        num_samples: rows of the source.
        num_views: views a sample.
        pixel_shape: (height, width) of stored images; None for none.
        samples_per_shard: as asked for; None for shards of about 256 MiB.
    """
    geometry, coder = calibration.geometry, calibration.coder
    num_layers, num_tokens = len(geometry.layers), geometry.tokens.num_tokens
    layout = StoreLayout(
        num_views=num_views,
        num_samples=num_samples,
        num_layers=num_layers,
        num_tokens=num_tokens,
        num_components=coder.num_components,
        codes_dtype=str(coder.codes_dtype).removeprefix("torch."),
        samples_per_shard=1,
        layers_per_chunk=plan_layers_per_chunk(
            num_tokens * coder.num_components * coder.codes_dtype.itemsize, num_layers
        ),
        parameter_names=PARAMETER_NAMES,
        pixels=pixel_shape,
    )
    layout, codes_nbytes = _choose_compressor(layout, calibration.codes_BLTC.numpy())
    nbytes_per_view = _VIEW_RECORD_NBYTES + 16 * layout.codes.num_chunks_per_sample + codes_nbytes
    if pixel_shape is not None:
        nbytes_per_view += 16 + _mean([len(encode_pixels(layout, image)) for image in calibration.pixels_BHWC.numpy()])
    if samples_per_shard is None:
        samples_per_shard = plan_samples_per_shard(nbytes_per_view, num_samples)
    return replace(layout, samples_per_shard=min(samples_per_shard, num_samples)), nbytes_per_view


def _choose_compressor(layout: StoreLayout, codes_BLTC: np.ndarray) -> tuple[StoreLayout, int]:
    """The layout with the compressor that makes these codes smaller, and the bytes a view takes with it."""
    layouts = {compressor: replace(layout, compressor=compressor) for compressor in (ZSTD, BLOSC)}
    nbytes = {
        compressor: _mean([sum(map(len, encode_view(candidate, codes_LTC))) for codes_LTC in codes_BLTC])
        for compressor, candidate in layouts.items()
    }
    best = BLOSC if nbytes[BLOSC] < _BLOSC_PAYS_BELOW * nbytes[ZSTD] else ZSTD
    return layouts[best], nbytes[best]


def _mean(values: list[int]) -> int:
    return round(float(np.mean(values)))


def committed_tasks(path: Path, layout: StoreLayout) -> set[str]:
    """Names of the tasks whose commit records and shards agree; the others are to be done (again)."""
    return {name for name, commit in read_commits(path).items() if not check_commit(path, commit, layout)}


def plan_build(
    out: Path,
    teacher: Teacher,
    calibration: Calibration,
    layout: StoreLayout,
    nbytes_per_view: int,
    *,
    num_done_tasks: int,
) -> BuildPlan:
    """The plan of a build into `out`."""
    num_tasks = layout.num_views * layout.num_blocks
    remaining_share = (num_tasks - num_done_tasks) / num_tasks
    return BuildPlan(
        teacher=str(teacher.name),
        licence=teacher.licence,
        num_samples=layout.num_samples,
        num_views=layout.num_views,
        num_tasks=num_tasks,
        num_done_tasks=num_done_tasks,
        num_layers=layout.num_layers,
        num_heads=len(calibration.geometry.heads),
        num_tokens=layout.num_tokens,
        nbytes_per_view=nbytes_per_view,
        map_nbytes_per_view=calibration.geometry.map_nbytes,
        remaining_nbytes=round(nbytes_per_view * layout.num_samples * layout.num_views * remaining_share),
        free_nbytes=_free_nbytes(out),
        row_kl_nats=calibration.row_kl_nats,
        injected_error=calibration.injected_error,
        teacher_views_per_s=calibration.teacher_views_per_s,
    )


def _free_nbytes(path: Path) -> int:
    """Free space on the disk that `path` is, or will be, on."""
    existing = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    return shutil.disk_usage(existing).free
