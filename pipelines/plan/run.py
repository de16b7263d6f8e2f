"""Plan: say, before anything is written, what a cache would take and whether it would pay.

index -> measure with the teacher -> measure the disk -> arithmetic. What is assumed is not measured. If all that the
teacher is needed for is assumed, it is not loaded.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from atcache.fields import JsonFields
from atcache.files.durable import disk_errors_explained, existing_folder
from atcache.files.sizes import size_text
from atcache.images.source import SampleIndex
from atcache.machine import memory_nbytes
from atcache.teachers.verdict import TeacherVerdict

from ..build.samples import index_samples
from .config import PlanConfig
from .disk import DiskProbe
from .images import ImageCost, say_image_cost
from .measure import Measures, Say, measure, what_is_assumed
from .verdict import DISK, Assessment, Decision, Machine, Workload, assess, decide

_MUCH_STATE = 0.02  # a note tells of fitted state that takes more than this share of the cache


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan(JsonFields):
    """What was measured, and the answer."""

    teacher: str | None
    out: str
    device: str | None
    """Where speeds were measured; None if no model was run."""
    mode: str
    workload: Workload
    machine: Machine
    scratch_img_per_s: float | None
    """The student's speed without a teacher; None if it was not measured."""
    images: ImageCost | None
    """What a view costs one core; None if it was not measured."""
    assessments: tuple[Assessment, ...]
    """One for each codec setting."""
    decision: Decision
    verdict: TeacherVerdict | None
    """What is known of the teacher and what the student lacks; None if no model was run."""
    assumed: tuple[str, ...]
    """The assumptions, as they were typed."""
    notes: tuple[str, ...]
    """What the user should know about how the numbers came about."""
    seconds: float
    """Time the plan took."""


def plan(config: PlanConfig, say: Say = lambda _: None) -> Plan:
    """Measure what is not assumed, and decide.

    Args:
        config: what to plan for.
        say: called with a line on what is being done.

    Returns:
        The plan. Nothing was written, except a temp file without a name on the target's disk, which is gone.

    Raises:
        AtcacheError: a child of it names what does not fit.
    """
    start_s = time.monotonic()
    assumed = config.assumed
    index = None
    if config.data is not None and (assumed.num_samples is None or assumed.missing_of_teacher):
        index = index_samples(config.data, config, on_bad="skip")
    workload = Workload(
        num_samples=assumed.num_samples or _count_good(index),
        num_views=config.views,
        epochs=config.epochs,
        runs=config.runs,
        replays_images=config.pixels == "replay",
    )
    found = what_is_assumed(config)
    if assumed.missing_of_teacher:
        assert index is not None, "checked by PlanConfig"
        found = measure(config, index, workload.num_samples, found, say)
    found, disk_notes = _with_disk(config, found, say)
    assessments = tuple(assess(workload, found.machine, cost) for cost in found.costs)
    return Plan(
        teacher=None if config.teacher is None else str(config.teacher),
        out=str(config.out),
        device=found.device,
        mode=config.mode,
        workload=workload,
        machine=found.machine,
        scratch_img_per_s=found.scratch_img_per_s,
        images=found.images,
        assessments=assessments,
        decision=decide(workload, found.machine, assessments),
        verdict=found.verdict,
        assumed=config.assume,
        notes=tuple(_notes(config, index, found, disk_notes, assessments)),
        seconds=time.monotonic() - start_s,
    )


def _count_good(index: SampleIndex | None) -> int:
    assert index is not None, "checked by PlanConfig"
    return max(1, int(np.count_nonzero(index.problem_S == 0)))


def _with_disk(config: PlanConfig, found: Measures, say: Say) -> tuple[Measures, list[str]]:
    """`found` with the disk's speeds, which are measured if they are not assumed; and notes about them."""
    assumed = config.assumed
    if assumed.read_nbytes_per_s is not None and assumed.write_nbytes_per_s is not None:
        return found, []
    assert isinstance(config.out, Path), "checked by PlanConfig"
    folder = existing_folder(config.out)
    say(f"measuring the disk of {folder}")
    with disk_errors_explained(folder), DiskProbe(folder) as probe:
        if assumed.write_nbytes_per_s is None:
            found = found._replace(machine=replace(found.machine, write_nbytes_per_s=probe.write_nbytes_per_s))
        if assumed.read_nbytes_per_s is not None:
            return found, []
        speeds = [probe.read_nbytes_per_s(cost.nbytes_per_view, config.num_workers) for cost in found.costs]
        costs = (replace(cost, read_nbytes_per_s=speed) for cost, speed in zip(found.costs, speeds, strict=True))
        found = found._replace(costs=tuple(costs))
    notes = {
        "dropped": [],
        "kept": [
            f"The page cache cannot be dropped for {folder}, so the read speed is that of memory. To plan with the "
            "disk's own speed, --assume disk-read-gb-per-s."
        ],
        "unknown": [
            f"The file system of {folder} does not tell whether the page cache was dropped, so the read speed may be "
            "that of memory. To be sure, --assume disk-read-gb-per-s."
        ],
    }
    return found, notes[probe.page_cache]


def _notes(
    config: PlanConfig,
    index: SampleIndex | None,
    found: Measures,
    disk_notes: Sequence[str],
    assessments: Sequence[Assessment],
) -> Iterator[str]:
    assumed = config.assumed
    if index is not None and (num_bad := int(np.count_nonzero(index.problem_S))):
        yield f"Samples without image or label: {num_bad}. To leave them out, build with --on-bad-image skip."
    if assumed.teacher_img_per_s is not None and assumed.student_img_per_s is None:
        yield "The teacher's speed is assumed and the student's was measured here: is that the same machine?"
    if assumed.teacher_img_per_s is None and assumed.student_img_per_s is not None:
        yield "The student's speed is assumed and the teacher's was measured here: is that the same machine?"
    if assumed.nbytes_per_view is not None and found.device is not None:
        yield "The size is assumed, but row KL and features off were measured with the codec at its own size."
    if found.machine.load_img_per_s is None:
        yield "Loading images is not counted as a limit, with or without a cache. To count it, --assume load-img-per-s."
    if found.images is not None:
        limits = frozenset(one.build_limit for one in assessments)
        yield say_image_cost(found.images, found.machine, limits, stores_pixels=config.pixels == "store")
    if found.machine.shares_processors:
        yield "The models run on the processors that also load and compress, so these times are added up."
    yield from disk_notes
    for one in assessments:
        # The disk is the limit only at first. A speed that is assumed may be that of another machine.
        if assumed.read_nbytes_per_s is None and one.epoch_limit == DISK and one.total_nbytes < memory_nbytes() / 2:
            yield (
                f"A cache of {size_text(one.total_nbytes)} fits in the {size_text(memory_nbytes())} of memory here: "
                "only the first epoch would wait for the disk."
            )
    for one in assessments:
        if one.cost.state_nbytes > _MUCH_STATE * one.total_nbytes:
            yield (
                f"Codec {one.cost.codec} stores {size_text(one.cost.state_nbytes)} of fitted state beside the views, "
                "once for all of them."
            )
