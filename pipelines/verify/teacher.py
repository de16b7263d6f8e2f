"""Compare a cache with its teacher: recompute some views, and measure how far decoded maps are from live ones."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from atcache.cache.cache import Cache
from atcache.cache.coders import stored_coder
from atcache.cache.differences import name_differences
from atcache.errors import AtcacheError, CacheMismatchError
from atcache.files.location import Location
from atcache.students.teacher_side import CachedFactors
from atcache.teachers.foreign.names import OWN, is_foreign
from atcache.teachers.foreign.own import OwnTeacher
from atcache.teachers.names import parse_model_name
from atcache.teachers.run import TeacherRun
from atcache.views.rendering import STORED

from ..fidelity import (
    INJECTED_ERROR_FLOOR,
    ROW_KL_FLOOR_NATS,
    injected_error,
    layer_row_kl,
    layer_v_error,
    layer_x_error,
    target_row_kl,
)
from ..running.progress import Progress
from ..running.run_teacher import load_named_teacher, recorded_name
from .files import Report
from .views import Place

_VIEWS_A_FORWARD = 8

_TIMES_A_VIEW = 10.0  # one view's KL may be this many times the limit of the mean, because images differ


@dataclass(frozen=True, kw_only=True, slots=True)
class Fidelity:
    """How far decoded maps are from the live teacher's."""

    teacher: str
    num_views: int
    """Views that were recomputed."""
    row_kl_nats: float
    """Mean KL(live || decoded) over rows, heads, layers and views."""
    layer_row_kl_nats: dict[int, float]
    """The same mean for each stored layer, by block index."""
    injected_error: float
    """Relative error of the teacher's final features when it attends with decoded maps."""
    worst_row_kl_nats: float
    """The largest mean row KL of a single view."""
    worst_sample_key: str
    worst_view: int
    worst_shard: str
    """The shard that holds that view's codes."""
    row_kl_limit_nats: float
    """The largest allowed `row_kl_nats`; a single view may have ten times as much."""
    injected_error_limit: float
    """The largest allowed `injected_error`."""
    v_error: float | None
    """Relative error of decoded v, the mean over layers and views; None if v is not stored."""
    v_error_limit: float | None
    """The largest allowed `v_error`; a single view may have ten times as much."""
    worst_v_error: float | None
    """The largest `v_error` of a single view."""
    x_error: float | None
    """The same three for what attention and MLP get."""
    x_error_limit: float | None
    worst_x_error: float | None


def open_teacher(cache: Cache, name: str | OwnTeacher, weights: Path | None, device: torch.device) -> TeacherRun:
    """The cache's own teacher, which computes as it did at build time.

    Args:
        cache: the cache, which records its teacher.
        name: as for a build. The tag of its weights is not compared, the weights themselves are.
        weights: a file; None takes timm's.
        device: where it runs.

    Raises:
        CacheMismatchError: it is another model, or has other weights or another input.
        TeacherError: it cannot be loaded.
    """
    record = cache.record.teacher_record
    _refuse_another(cache, _describe(record.name), _describe(recorded_name(name)))
    teacher = load_named_teacher(name, weights, device)
    _refuse_another(cache, cache.record.identity.input.to_json(), teacher.input.to_json())
    return record.run(teacher, device)


def _refuse_another(cache: Cache, recorded: dict[str, Any], given: dict[str, Any]) -> None:
    if differences := name_differences(recorded, given):
        raise CacheMismatchError(
            f"{cache.path} was built with another teacher: {'; '.join(differences)}. {_what_to_give(cache)}."
        )


def _what_to_give(cache: Cache) -> str:
    name = cache.record.identity.teacher
    if name.startswith(OWN):
        return f"Hand over the module that it was built with, {name}"
    return f"Give the --teacher it was built with: {name}"


def _describe(text: str) -> dict[str, Any]:
    if is_foreign(text):
        # Folders move and revisions get names: what was loaded is told by its weights. Only code is told by the name.
        return {"name": text if text.startswith(OWN) else text.partition(":")[0]}
    name = parse_model_name(text)
    return {"name": name.architecture, **name.arguments}


def check_fidelity(
    cache: Cache, run: TeacherRun, places: Iterable[Place], threshold: float, report: Report
) -> Fidelity | None:
    """Recompute views and compare their maps with the decoded ones.

    The limit of the row KL is `threshold` times the codec's `target_kl`, if it has one. Otherwise it is `threshold`
    times what the build recorded: the mean of the calibration or of all tasks, whichever is larger. The limit of the
    injected error is `threshold` times that of the calibration. Neither limit is below a floor for the type the teacher
    computes in: noise of another device, batch size or version of torch is not a failure. A view whose own KL is over
    ten times the limit fails too, because the mean would hide one damaged view.

    Args:
        cache: the cache.
        run: its teacher.
        places: the views; those that are not stored are skipped.
        threshold: at least 1.
        report: receives what is over a limit.

    Returns:
        The comparison; None if no view could be recomputed, which is reported.
    """
    limits = _limits(cache, run.dtype, threshold)
    compare = _Comparison(cache, run)
    measured: list[Place] = []
    row_kl_VL: list[tuple[float, ...]] = []
    v_error_VL: list[tuple[float, ...]] = []
    x_error_VL: list[tuple[float, ...]] = []
    squared_error = 0.0
    chosen = list(places)
    with Progress("teacher", total=len(chosen), unit="views") as progress:
        for start in range(0, len(chosen), _VIEWS_A_FORWARD):
            batch = chosen[start : start + _VIEWS_A_FORWARD]
            views = [view for place in batch if (view := _read_view(cache, place, report)) is not None]
            if views:
                row_kl_BL, v_error_BL, x_error_BL, error = compare(views)
                row_kl_VL += row_kl_BL
                v_error_VL += v_error_BL
                x_error_VL += x_error_BL
                squared_error += len(views) * error**2
                measured += [view.place for view in views]
            progress.advance(len(batch))
    if not measured:
        report.add(f"{cache.path}: no view could be recomputed with the teacher.")
        return None
    row_kl_L, row_kl_V = np.mean(row_kl_VL, axis=0), np.mean(row_kl_VL, axis=1)
    worst = measured[int(row_kl_V.argmax())]
    fidelity = Fidelity(
        teacher=str(run.teacher.name),
        num_views=len(measured),
        row_kl_nats=float(row_kl_L.mean()),
        layer_row_kl_nats=dict(zip(cache.geometry.layers, map(float, row_kl_L), strict=True)),
        injected_error=(squared_error / len(measured)) ** 0.5,
        worst_row_kl_nats=float(row_kl_V.max()),
        worst_sample_key=cache.reader.samples.sample_key(worst.sample),
        worst_view=worst.view,
        worst_shard=str(cache.path / cache.reader.layout.codes.shard_file(worst.task)),
        row_kl_limit_nats=limits.row_kl_nats,
        injected_error_limit=limits.injected_error,
        v_error=float(np.mean(v_error_VL)) if v_error_VL else None,
        v_error_limit=limits.v_error,
        worst_v_error=float(np.mean(v_error_VL, axis=1).max()) if v_error_VL else None,
        x_error=float(np.mean(x_error_VL)) if x_error_VL else None,
        x_error_limit=limits.x_error,
        worst_x_error=float(np.mean(x_error_VL, axis=1).max()) if x_error_VL else None,
    )
    _judge(cache.path, fidelity, report)
    return fidelity


class _Limits(NamedTuple):
    row_kl_nats: float
    injected_error: float
    v_error: float | None
    x_error: float | None


def _limits(cache: Cache, dtype: torch.dtype, threshold: float) -> _Limits:
    """See `check_fidelity`."""
    calibration, complete = cache.record.calibration, cache.record.complete
    recorded_kl, recorded_error = calibration.row_kl_nats, calibration.injected_error
    floor = INJECTED_ERROR_FLOOR[dtype]
    recorded_v_error = calibration.v_error if cache.geometry.v_head_dim else None
    recorded_x_error = calibration.x_error if cache.geometry.input_width else None
    if complete is not None and (measured := complete.quality.get("row_kl_nats")) is not None:
        recorded_kl = max(recorded_kl, measured.mean)
    target_kl = target_row_kl(cache.codec)
    return _Limits(
        row_kl_nats=max(threshold * (recorded_kl if target_kl is None else target_kl), ROW_KL_FLOOR_NATS[dtype]),
        injected_error=max(threshold * recorded_error, floor),
        v_error=None if recorded_v_error is None else max(threshold * recorded_v_error, floor),
        x_error=None if recorded_x_error is None else max(threshold * recorded_x_error, floor),
    )


class _View(NamedTuple):
    place: Place
    pixels_HWC: np.ndarray
    codes_LTC: np.ndarray


def _read_view(cache: Cache, place: Place, report: Report) -> _View | None:
    """One stored view; None if it is not stored, or if its image cannot be read, which is reported."""
    if cache.reader.status(place.view, place.sample) != STORED:
        return None
    try:
        pixels_HWC = cache.image(place.sample, place.view)
    except AtcacheError as error:
        report.add(str(error))
        return None
    return _View(place, pixels_HWC, cache.reader.read_codes(place.view, place.sample))


class _Compared(NamedTuple):
    row_kl_BL: list[tuple[float, ...]]
    """Each view's row KL by layer."""
    v_error_BL: list[tuple[float, ...]]
    """The same for the error of v; empty if v is not stored."""
    x_error_BL: list[tuple[float, ...]]
    """The same for what attention and MLP get."""
    injected_error: float
    """Of all these views."""


class _Comparison:
    """Runs the teacher on batches of views and compares their maps. What all batches need is made once."""

    def __init__(self, cache: Cache, run: TeacherRun) -> None:
        self._run = run
        self._coder = stored_coder(cache.reader, cache.codec, cache.geometry, str(run.device))
        self._capture = run.capture(cache.geometry)

    def __call__(self, views: Sequence[_View]) -> _Compared:
        """How far the views are from the teacher's."""
        run, coder = self._run, self._coder
        pixels_BHWC = torch.from_numpy(np.stack([view.pixels_HWC for view in views]))
        codes_BLTC = torch.from_numpy(np.stack([view.codes_LTC for view in views])).to(run.device)
        layers = run.factors(self._capture, pixels_BHWC)
        row_kl_BL: list[tuple[float, ...]] = []
        v_error_BL: list[tuple[float, ...]] = []
        x_error_BL: list[tuple[float, ...]] = []
        for one in (slice(row, row + 1) for row in range(len(views))):
            live = [layer.select(one) for layer in layers]
            row_kl_BL.append(layer_row_kl(coder, live, codes_BLTC[one]))
            if (v_error_L := layer_v_error(coder, live, codes_BLTC[one])) is not None:
                v_error_BL.append(v_error_L)
            if (x_error_L := layer_x_error(coder, live, codes_BLTC[one])) is not None:
                x_error_BL.append(x_error_L)
        error = injected_error(run, pixels_BHWC, coder.geometry, CachedFactors(coder, codes_BLTC))
        return _Compared(row_kl_BL, v_error_BL, x_error_BL, error)


def _judge(path: Location, fidelity: Fidelity, report: Report) -> None:
    kl, limit = fidelity.row_kl_nats, fidelity.row_kl_limit_nats
    # "not within" instead of "over": a KL that is NaN must fail.
    if not (kl <= limit and fidelity.worst_row_kl_nats <= _TIMES_A_VIEW * limit):
        worst_layer = max(fidelity.layer_row_kl_nats, key=fidelity.layer_row_kl_nats.__getitem__)
        report.add(
            f"{path}: decoded maps are {kl:.3g} nats (row KL) from the teacher's on average over {fidelity.num_views} "
            f"views, the limit is {limit:.3g}; layer {worst_layer} is worst with "
            f"{fidelity.layer_row_kl_nats[worst_layer]:.3g}, and view {fidelity.worst_view} of "
            f"{fidelity.worst_sample_key} in {fidelity.worst_shard} with {fidelity.worst_row_kl_nats:.3g}."
        )
    if not fidelity.injected_error <= fidelity.injected_error_limit:
        report.add(
            f"{path}: with decoded maps the teacher's features are off by {fidelity.injected_error:.3g} on average "
            f"over {fidelity.num_views} views, the limit is {fidelity.injected_error_limit:.3g}."
        )
    of_v = (fidelity.v_error, fidelity.v_error_limit, fidelity.worst_v_error)
    of_x = (fidelity.x_error, fidelity.x_error_limit, fidelity.worst_x_error)
    for name, (mean, most, worst) in (("v", of_v), ("x", of_x)):
        if mean is None or most is None or worst is None:
            continue
        if not (mean <= most and worst <= _TIMES_A_VIEW * most):
            report.add(
                f"{path}: decoded {name} is off by {mean:.3g} on average over {fidelity.num_views} views, the limit is "
                f"{most:.3g}; in the worst view by {worst:.3g}."
            )
