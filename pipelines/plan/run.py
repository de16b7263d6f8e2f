"""Plan: say, before anything is written, what a cache would take and whether it would pay.

index -> measure with the teacher -> measure the disk -> arithmetic. What is assumed is not measured. If all that the
teacher is needed for is assumed, it is not loaded.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from atcache.fields import JsonFields
from atcache.images.source import SampleIndex, index_source

from .config import PlanConfig
from .disk import DiskProbe, existing_folder
from .measure import Measures, Say, measure
from .verdict import DISK, UNLIMITED, Assessment, CodecCost, Decision, Machine, Workload, assess, decide, size

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
    assessments: tuple[Assessment, ...]
    """One for each codec setting."""
    decision: Decision
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
        index = index_source(config.data, on_bad="skip")
    workload = Workload(
        num_samples=assumed.num_samples or _count_good(index),
        num_views=config.views,
        epochs=config.epochs,
        runs=config.runs,
        replays_images=config.pixels == "replay",
    )
    measures = None
    if assumed.missing_of_teacher:
        assert index is not None, "checked by PlanConfig"
        measures = measure(config, index, workload.num_samples, say)
    machine = _machine(config, measures)
    costs = _costs(config, measures)
    machine, costs, disk_notes = _with_disk(config, machine, costs, say)
    assessments = tuple(assess(workload, machine, cost) for cost in costs)
    return Plan(
        teacher=config.teacher,
        out=str(config.out),
        device=None if measures is None else measures.device,
        mode=config.mode,
        workload=workload,
        machine=machine,
        scratch_img_per_s=None if measures is None else measures.scratch_img_per_s,
        assessments=assessments,
        decision=decide(workload, machine, assessments),
        assumed=config.assume,
        notes=(
            *_notes(config, index, machine, measures),
            *disk_notes,
            *_memory_notes(config, assessments),
            *_state_notes(assessments),
        ),
        seconds=time.monotonic() - start_s,
    )


def _count_good(index: SampleIndex | None) -> int:
    assert index is not None, "checked by PlanConfig"
    return max(1, int(np.count_nonzero(index.problem_S == 0)))


def _machine(config: PlanConfig, measures: Measures | None) -> Machine:
    """The speeds, assumed or measured. `_with_disk` adds those of the disk if they are not assumed."""
    assumed = config.assumed
    teacher, student = assumed.teacher_img_per_s, assumed.student_img_per_s
    if measures is not None:
        teacher, student = teacher or measures.teacher_img_per_s, student or measures.student_img_per_s
    assert teacher is not None, "measured if it is not assumed"
    assert student is not None, "measured if it is not assumed"
    return Machine(
        teacher_img_per_s=teacher,
        student_img_per_s=student,
        load_img_per_s=assumed.load_img_per_s or (measures and measures.load_img_per_s),
        write_nbytes_per_s=assumed.write_nbytes_per_s or UNLIMITED,
        free_nbytes=assumed.free_nbytes or shutil.disk_usage(existing_folder(config.out)).free,
        shares_processors=measures is not None and measures.shares_processors,
    )


def _costs(config: PlanConfig, measures: Measures | None) -> list[CodecCost]:
    assumed = config.assumed
    if measures is not None:
        return list(measures.costs)
    assert assumed.nbytes_per_view is not None, "or it would have been measured"
    assert assumed.student_img_per_s is not None, "or it would have been measured"
    return [
        CodecCost(
            codec=config.codec[0] if config.codec else None,
            nbytes_per_view=assumed.nbytes_per_view,
            read_nbytes_per_s=assumed.read_nbytes_per_s or UNLIMITED,
            student_img_per_s=assumed.student_img_per_s,
            encode_img_per_s=assumed.encode_img_per_s,
        )
    ]


def _with_disk(
    config: PlanConfig, machine: Machine, costs: Sequence[CodecCost], say: Say
) -> tuple[Machine, list[CodecCost], list[str]]:
    """Machine and costs with the disk's speeds, which are measured if they are not assumed; and notes about them."""
    assumed = config.assumed
    if assumed.read_nbytes_per_s is not None and assumed.write_nbytes_per_s is not None:
        return machine, list(costs), []
    folder = existing_folder(config.out)
    say(f"measuring the disk of {folder}")
    with DiskProbe(folder) as probe:
        if assumed.write_nbytes_per_s is None:
            machine = replace(machine, write_nbytes_per_s=probe.write_nbytes_per_s)
        if assumed.read_nbytes_per_s is not None:
            return machine, list(costs), []
        measured = [
            replace(cost, read_nbytes_per_s=probe.read_nbytes_per_s(cost.nbytes_per_view, config.num_workers))
            for cost in costs
        ]
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
    return machine, measured, notes[probe.page_cache]


def _memory_notes(config: PlanConfig, assessments: Sequence[Assessment]) -> list[str]:
    """A note for each cache that fits in memory, so that the disk is its limit only at first."""
    if config.assumed.read_nbytes_per_s is not None:
        return []
    memory_nbytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return [
        f"A cache of {size(one.total_nbytes)} fits in this machine's {size(memory_nbytes)} of memory: only the first "
        "epoch would wait for the disk."
        for one in assessments
        if one.epoch_limit == DISK and one.total_nbytes < memory_nbytes / 2
    ]


def _state_notes(assessments: Sequence[Assessment]) -> list[str]:
    """A note for each codec whose fitted state is a large part of the cache."""
    return [
        f"Codec {one.cost.codec} stores {size(one.cost.state_nbytes)} of fitted state beside the views, once for all "
        "of them."
        for one in assessments
        if one.cost.state_nbytes > _MUCH_STATE * one.total_nbytes
    ]


def _notes(config: PlanConfig, index: SampleIndex | None, machine: Machine, measures: Measures | None) -> list[str]:
    assumed, notes = config.assumed, list[str]()
    if index is not None and (num_bad := int(np.count_nonzero(index.problem_S))):
        notes.append(f"Samples without image or label: {num_bad}. To leave them out, build with --on-bad-image skip.")
    if assumed.teacher_img_per_s is not None and assumed.student_img_per_s is None:
        notes.append("The teacher's speed is assumed and the student's was measured here: is that the same machine?")
    if assumed.teacher_img_per_s is None and assumed.student_img_per_s is not None:
        notes.append("The student's speed is assumed and the teacher's was measured here: is that the same machine?")
    if assumed.nbytes_per_view is not None and measures is not None:
        notes.append("The size is assumed, but row KL and features off were measured with the codec at its own size.")
    if machine.load_img_per_s is None:
        notes.append(
            "Loading images is not counted as a limit, with or without a cache. To count it, --assume load-img-per-s."
        )
    if machine.shares_processors:
        notes.append("The models run on the processors that also load and compress, so these times are added up.")
    return notes
